"""Files that others may have prepared: regular ones only, so that no pipe is waited for, and small ones only whole."""

import errno
import os
import re
import stat
from difflib import get_close_matches
from pathlib import Path

# Files that are read whole. 300,000 tensors make an index of 37 MB, and a manifest of up to 240 MB.
MAX_TEXT_NBYTES = 64 * 2**20
MAX_INDEX_NBYTES = 128 * 2**20
MAX_MANIFEST_NBYTES = 512 * 2**20
# The Hub's cache holds a commit's files as links to where their bytes are.
_HUB_CACHE = re.compile(r"(?P<repo>.*/models--[^/]+)/snapshots/[0-9a-f]{40}(/.*)?")
# Of difflib: a letter wrong or two swapped, but not another word.
_ALIKE = 0.75
_KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket", stat.S_IFLNK: "a link"}


def open_to_read(path: str | Path, *, follow: bool = True, dir_fd: int | None = None) -> int:
    """Return a descriptor that reads a regular file.

    follow: go where a link leads. dir_fd: the folder that a relative ``path`` is in.
    Raises OSError where it can't be opened or is something else: a folder, a pipe, a device.
    """
    _check_regular(os.stat(path, dir_fd=dir_fd, follow_symlinks=follow), path)  # opening a device may do something
    flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | (0 if follow else os.O_NOFOLLOW)
    fd = os.open(path, flags, dir_fd=dir_fd)
    try:
        _check_regular(os.fstat(fd), path)  # it may be another one by now
    except BaseException:
        os.close(fd)
        raise
    return fd


def read_small(
    path: str | Path, max_nbytes: int = MAX_TEXT_NBYTES, *, follow: bool = True, dir_fd: int | None = None
) -> bytes:
    """Return what a regular file holds. Raises OSError as open_to_read, and for one of more than ``max_nbytes``."""
    fd = open_to_read(path, follow=follow, dir_fd=dir_fd)
    with open(fd, "rb") as file:
        nbytes = os.fstat(fd).st_size
        if nbytes <= max_nbytes:
            return file.read(nbytes)  # what is added meanwhile is not read
    raise OSError(errno.EFBIG, f"holds {nbytes:,} bytes, more than the {max_nbytes:,} of any such file", str(path))


def read_text(path: str | Path, max_nbytes: int = MAX_TEXT_NBYTES) -> str:
    """Return the text of a small file. Raises OSError as read_small, and UnicodeDecodeError."""
    return read_small(path, max_nbytes).decode()


def similar_path(path: Path) -> str:
    """Return `` (did you mean X?)`` for a path that is not there, "" where nothing beside it is spelt alike."""
    missing = next((part for part in [*reversed(path.parents), path] if not part.exists()), path)
    try:
        names = [entry.name for entry in missing.parent.iterdir()]
    except OSError:
        return ""
    similar = get_close_matches(missing.name, names, n=1, cutoff=_ALIKE)
    return f" (did you mean {missing.with_name(similar[0]) / path.relative_to(missing)}?)" if similar else ""


def leads_outside(path: Path) -> bool:
    """True where ``path`` is a link out of its folder, other than into the blobs of the Hub's cache."""
    if not path.is_symlink():
        return False
    folder, target = (Path(os.path.realpath(each)) for each in (path.parent, path))  # links may lead in a circle
    cache = _HUB_CACHE.fullmatch(folder.as_posix())
    return folder not in target.parents and not (cache and target.parent == Path(cache["repo"]) / "blobs")


def _check_regular(status: os.stat_result, path: str | Path) -> None:
    if not stat.S_ISREG(status.st_mode):
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), "a device")
        raise OSError(errno.EINVAL, f"is {kind}, not a file", str(path))
