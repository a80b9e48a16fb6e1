"""A folder held by its descriptor: what is made, replaced or removed in it lies in it, wherever links would lead."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from re import fullmatch

from run_ckpt.storage.files import open_to_read, read_small

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC


class Folder:
    """An open folder; ``path`` names it in messages and for those who only read. A context manager.

    A new file has a random name until it is complete, see is_temporary().
    """

    def __init__(self, path: Path, fd: int):
        """Take over an open descriptor."""
        self.path = path
        self._fd = fd

    def open_folder(self, name: str, *, make: bool = False) -> "Folder":
        """Return the folder ``name`` in this one, "" for this one itself. make: where it does not exist."""
        if make and name:
            try:
                os.mkdir(name, dir_fd=self._fd)
                self.sync()
            except FileExistsError:
                pass
        return Folder(self.path / name, os.open(name or ".", _FOLDER | os.O_NOFOLLOW, dir_fd=self._fd))

    def names(self) -> list[str]:
        """Return the names of what is in it, sorted."""
        return sorted(os.listdir(self._fd))  # noqa: PTH208

    def status(self, name: str | None = None) -> os.stat_result:
        """Return what is known of an entry, of a link itself; or of the folder."""
        return os.fstat(self._fd) if name is None else os.stat(name, dir_fd=self._fd, follow_symlinks=False)

    def read(self, name: str) -> bytes:
        """Return a small file. Raises OSError as files.read_small."""
        return read_small(name, follow=False, dir_fd=self._fd)

    def open_file(self, name: str) -> int:
        """Return a descriptor that reads a regular file."""
        return open_to_read(name, follow=False, dir_fd=self._fd)

    def lock(self, name: str, *, shared: bool = False) -> int | None:
        """Return a descriptor of the file ``name``, made if missing, that locks other processes out until it is closed.

        shared: wait, and lock out only those that want it for themselves. None where another process holds the lock,
        or removed the file meanwhile.
        """
        try:
            fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600, dir_fd=self._fd)
        except FileNotFoundError:  # the folder is gone
            return None
        if relock(fd, shared=shared, wait=shared) and self.holds(name, fd):
            return fd
        os.close(fd)
        return None

    def holds(self, name: str, fd: int) -> bool:
        """True where the open file is the one that ``name`` stands for."""
        try:
            return os.path.samestat(os.fstat(fd), self.status(name))
        except FileNotFoundError:
            return False

    def create(self) -> tuple[str, int]:
        """Make a file; return its random name and a descriptor that writes it."""
        name = f".{secrets.token_hex(8)}.part"
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return name, os.open(name, flags, 0o666, dir_fd=self._fd)

    def rename(self, name: str, new_name: str, target: "Folder | None" = None) -> None:
        """Give a file another name, in place of what has that, or a folder, in place of an empty one; durably.

        target: the folder for the new name, if not this one.
        """
        target = target or self
        os.rename(name, new_name, src_dir_fd=self._fd, dst_dir_fd=target._fd)
        target.sync()

    @contextmanager
    def replace(self, name: str) -> Iterator[int]:
        """Yield a descriptor that writes a new file, which is then given its name: whole, or not at all."""
        temporary, fd = self.create()
        try:
            try:
                yield fd
                os.fsync(fd)
            finally:
                os.close(fd)
            self.rename(temporary, name)
        except BaseException:
            self.remove(temporary)
            raise

    def write(self, name: str, data: bytes) -> None:
        """Write a small file, which is whole or absent after a crash."""
        self.write_parts(name, [data])

    def write_parts(self, name: str, parts: Iterable[bytes]) -> None:
        """Write a file of bytes that follow each other, which is whole or absent after a crash."""
        offset = 0
        with self.replace(name) as fd:
            for part in parts:
                write_all(fd, memoryview(part), offset)
                offset += len(part)

    def link(self, name: str, target: Path) -> None:
        """Make a symbolic link ``name`` to ``target``."""
        os.symlink(target, name, dir_fd=self._fd)

    def remove(self, name: str) -> None:
        """Remove a file, a link, or a folder with all that is in it. Nothing of that name is fine too."""
        try:
            os.unlink(name, dir_fd=self._fd)
        except FileNotFoundError:
            pass
        except OSError as error:
            if error.errno not in (errno.EISDIR, errno.EPERM):  # Linux, POSIX
                raise
            with self.open_folder(name) as inside:
                for entry in inside.names():
                    inside.remove(entry)
            os.rmdir(name, dir_fd=self._fd)

    def walk(self, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
        """Yield everything in it, at any depth: the path from here, and what is known of it. Links are not followed."""
        for name in self.names():
            status = self.status(name)
            yield prefix + name, status
            if stat.S_ISDIR(status.st_mode):
                with self.open_folder(name) as inside:
                    yield from inside.walk(f"{prefix}{name}/")

    def sync(self) -> None:
        """Make its names durable."""
        os.fsync(self._fd)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> "Folder":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_folder(path: Path, *, follow: bool = True) -> Folder:
    """Return an open folder. follow: go where a link leads. Raises OSError where it is none."""
    return Folder(path, os.open(path, _FOLDER if follow else _FOLDER | os.O_NOFOLLOW))


def relock(fd: int, *, shared: bool, wait: bool = False) -> bool:
    """Change the lock of an open file. False where another process holds one; what was held before is then lost."""
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def is_temporary(name: str) -> bool:
    """True for the name that a file of ours has until it is complete."""
    return fullmatch(r"\.[0-9a-f]{16}\.part", name) is not None


def write_all(fd: int, data: memoryview, offset: int) -> None:
    """Write all of ``data`` from byte ``offset`` on."""
    while data:
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written
