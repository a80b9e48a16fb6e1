"""BLAKE3 of files, as the manifest records it."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

# Small enough for a core's own cache, large enough to hide the cost of a call.
_READ_NBYTES = 2**20


class Digest(Protocol):
    """What blake3() returns, and what hashlib's functions return."""

    def update(self, data: memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


def _ignore(nbytes: int) -> None:
    pass


def describe_file(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file: its size in bytes and BLAKE3."""
    return {"nbytes": path.stat().st_size, "blake3": hash_path(path)}


def hash_path(path: Path, advance: Callable[[int], object] = _ignore) -> str:
    """Return the BLAKE3 of a file, hexadecimal. ``advance`` is called with the size of each part."""
    digest = blake3()
    add_file(digest, path, advance)
    return digest.hexdigest()


def hash_file(fd: int) -> str:
    """Return the BLAKE3 of an open file, hexadecimal."""
    digest = blake3()
    _add(digest, fd, _ignore)
    return digest.hexdigest()


def add_file(digest: Digest, path: Path, advance: Callable[[int], object] = _ignore) -> None:
    """Add all bytes of a file to any digest."""
    with open(path, "rb") as file:
        _add(digest, file.fileno(), advance)


def _add(digest: Digest, fd: int, advance: Callable[[int], object]) -> None:
    buffer = memoryview(bytearray(_READ_NBYTES))
    offset = 0
    while n_read := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:n_read])
        advance(n_read)
        offset += n_read
