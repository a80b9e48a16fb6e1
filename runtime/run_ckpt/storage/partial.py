"""TARGET.partial: the private folder in which a command builds TARGET, which so appears complete or not at all."""

import contextlib
import errno
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.storage.folders import Folder, is_temporary, open_folder, relock, write_all

SUFFIX = ".partial"
_RESULT = "result"
# What rename says where something, or more than an empty folder, has the name.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR)
# Others may put something into a folder of this mode.
_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH


@contextlib.contextmanager
def build_folder(target: Path, tool: str, *, of_links: bool = False) -> Iterator[Folder]:
    """Yield a folder that becomes ``target`` at the end, and is removed where the work fails.

    It lies in ``target``.partial. What a killed run of ``tool`` left there is thrown away; anything else there (an
    unfinished run of another) is refused. of_links: see PartialFolder.
    """
    with PartialFolder(target, tool, of_links=of_links) as partial:
        try:
            partial.folder.remove(_RESULT)
            with partial.folder.open_folder(_RESULT, make=True) as result:
                yield result
            partial.publish(_RESULT)
        finally:
            partial.discard([_RESULT], parents=True)


def remove_what_is_left(target: Path, tool: str, *, of_links: bool = False) -> None:
    """Remove the empty folder of a run of ``tool`` that was killed after ``target`` had got its name."""
    partial = PartialFolder(target, tool, of_links=of_links)
    if partial.path.is_dir():
        with partial:
            if not partial.names():
                partial.discard([])


class PartialFolder:
    """The folder TARGET.partial of the command ``tool``; a context manager that holds its lock.

    shared: several processes work in it. The first ``is_alone`` until it calls share(), which the others wait for.
    of_links: ``tool`` makes links in it, which are no sign of anybody else.

    It is ours where the lock file says so, or where it is empty. Nothing of anybody else is taken over or removed: a
    folder without that file, one that others may write to, and one with a link or device in it are refused.
    """

    def __init__(self, target: Path, tool: str, *, shared: bool = False, of_links: bool = False):
        self.target = Path(os.path.realpath(target))
        self.path = Path(f"{self.target}{SUFFIX}")
        self._tool = tool
        self._shared = shared
        self._of_links = of_links
        self._lock_name = f"{tool}.lock"
        self._mark = f"{tool} builds its result in this folder, and removes the folder when it is done.\n".encode()

    def __enter__(self) -> "PartialFolder":
        self._is_gone = False
        self._made = [parent for parent in self.path.parents if not parent.exists()]
        while not self._open():
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self.folder.close()
        os.close(self._lock_fd)

    def names(self) -> set[str]:
        """Return the names in the folder, less the lock's."""
        return {*self.folder.names()} - {self._lock_name}

    def walk(self) -> Iterator[tuple[str, os.stat_result]]:
        """Yield everything in the folder but the lock, at any depth: path and status."""
        return (entry for entry in self.folder.walk() if entry[0] != self._lock_name)

    def publish(self, name: str) -> None:
        """Give the finished folder ``name`` in it the name TARGET: durably, all of it at once."""
        with self.folder.open_folder(name) as result, open_folder(self.target.parent) as parent:
            result.sync()
            try:
                self.folder.rename(name, self.target.name, parent)
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise
                raise CheckpointError(
                    f"{self.target}: was made by somebody else meanwhile. Move that away, then give the same command"
                    " again."
                ) from error

    def discard(self, names: Iterable[str], *, parents: bool = False) -> None:
        """Remove what is called so in the folder, and the folder unless something else is in it.

        parents: those folders above it too that were made for it.
        """
        if self._is_gone:
            return
        for name in [*names, self._lock_name]:
            self.folder.remove(name)
        self._is_gone = True
        with contextlib.suppress(OSError):  # somebody else uses a folder by now
            for folder in [self.path, *(self._made if parents else ())]:
                folder.rmdir()

    def share(self) -> None:
        """Let others in. Raises CheckpointError where a run that wants the folder for itself was quicker."""
        self.is_alone = False
        if not (relock(self._lock_fd, shared=True) and self.folder.holds(self._lock_name, self._lock_fd)):
            raise self._busy()

    def take_alone(self) -> bool:
        """Lock all others out again; False where some are still at work. Then nothing may be written any more."""
        self.is_alone = relock(self._lock_fd, shared=False) and self.folder.holds(self._lock_name, self._lock_fd)
        return self.is_alone

    def clean(self) -> None:
        """Remove files that a killed process did not complete. Raises CheckpointError for what no run makes."""
        _clean(self.folder, of_links=self._of_links)

    def _open(self) -> bool:
        """Make or open the folder and take its lock; False where it was removed meanwhile."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            is_new = self._make()
            self.folder = open_folder(self.path, follow=False)
        except OSError as error:
            if self._shared and isinstance(error, FileNotFoundError):
                return False
            in_the_way = next((parent for parent in self.path.parents if parent.is_file()), None)
            raise CheckpointError(
                f"{in_the_way}: is a file, in which no folder can be. Choose another place."
                if in_the_way
                else f"{self.path}: {error.strerror}. Choose a place where you may make a folder."
            ) from error
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.folder.close)
            if not (is_new or self._is_private()) or not self._is_ours() or os.path.ismount(self.path):
                raise CheckpointError(
                    f"{self.path}: is in the way and not ours: it holds no unfinished run of {self._tool}, or others"
                    " may write to it. Remove it, or choose another name for the result."
                )
            fd = self._take_lock()
            if fd is None:
                return False
            self._lock_fd = fd
            on_failure.callback(os.close, self._lock_fd)
            if self.is_alone:
                self.clean()
            on_failure.pop_all()
        return True

    def _make(self) -> bool:
        """Make the folder; return False where something of that name is there."""
        try:
            self.path.mkdir(0o700)
        except FileExistsError:
            return False
        return True

    def _is_private(self) -> bool:
        status = self.folder.status()
        return not status.st_mode & _WRITABLE_BY_OTHERS and self._is_owner(status.st_uid)

    def _is_owner(self, uid: int) -> bool:
        """True where files that we make get this owner, which some shared file systems choose."""
        if uid == os.geteuid():
            return True
        try:
            name, fd = self.folder.create()
        except OSError:
            return False
        os.close(fd)
        owner = self.folder.status(name).st_uid
        self.folder.remove(name)
        return owner == uid

    def _is_ours(self) -> bool:
        names = self.folder.names()
        if self._lock_name not in names:
            return not names
        try:
            mark = self.folder.read(self._lock_name)
        except OSError:
            return False
        # Killed at once, a run leaves the lock alone, without its text.
        return mark == self._mark or (names == [self._lock_name] and self._mark.startswith(mark))

    def _take_lock(self) -> int | None:
        """Return the lock's descriptor, None where it is shared and was removed while this one waited for it."""
        fd = self.folder.lock(self._lock_name)
        self.is_alone = fd is not None
        if fd is None:
            if self._shared:
                return self.folder.lock(self._lock_name, shared=True)
            raise self._busy()
        if os.fstat(fd).st_size != len(self._mark):
            write_all(fd, memoryview(self._mark), 0)
            os.fsync(fd)
            self.folder.sync()
        return fd

    def _busy(self) -> CheckpointError:
        return CheckpointError(f"{self.path}: another run is at work on it. Wait for it or stop it.")


def _clean(folder: Folder, *, of_links: bool) -> None:
    for name in folder.names():
        status = folder.status(name)
        if stat.S_ISDIR(status.st_mode):
            with folder.open_folder(name) as inside:
                _clean(inside, of_links=of_links)
        elif of_links and stat.S_ISLNK(status.st_mode):
            folder.remove(name)
        elif not stat.S_ISREG(status.st_mode) or status.st_nlink > 1:
            raise CheckpointError(
                f"{folder.path / name}: is a link, or no file, and so not ours. Remove it, after a look at the others."
            )
        elif is_temporary(name):
            folder.remove(name)
