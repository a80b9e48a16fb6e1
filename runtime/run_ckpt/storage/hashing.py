"""BLAKE3 of files, as the manifest records it."""

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.folders import Folder

# Small enough for a core's own cache, large enough to hide the cost of a call.
_READ_NBYTES = 2**20


class Digest(Protocol):
    """What blake3() returns, and what hashlib's functions return."""

    def update(self, data: bytes | memoryview, /) -> object: ...
    def hexdigest(self) -> str: ...


def _ignore(nbytes: int) -> None:
    pass


def describe_bytes(data: bytes) -> dict[str, Any]:
    """Return what the manifest says of a file that holds ``data``."""
    return {"nbytes": len(data), "blake3": hash_bytes(data)}


def hash_bytes(data: bytes) -> str:
    """Return the BLAKE3 of ``data``, hexadecimal."""
    return blake3(data).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """Return what the manifest says of a file: its size in bytes and BLAKE3."""
    return _describe(open_to_read(path))


def describe_entry(folder: Folder, name: str) -> dict[str, Any] | None:
    """Return what the manifest says of a file in a folder, None where there is no such file."""
    try:
        return _describe(folder.open_file(name))
    except OSError:
        return None


def _describe(fd: int) -> dict[str, Any]:
    try:
        return {"nbytes": os.fstat(fd).st_size, "blake3": hash_file(fd)}
    finally:
        os.close(fd)


def write_parts(folder: Folder, name: str, parts: Iterable[bytes]) -> dict[str, Any]:
    """Write a file as Folder.write_parts; return what the manifest says of it."""
    digest, nbytes = blake3(), 0

    def hashed() -> Iterator[bytes]:
        nonlocal nbytes
        for part in parts:
            digest.update(part)
            nbytes += len(part)
            yield part

    folder.write_parts(name, hashed())
    return {"nbytes": nbytes, "blake3": digest.hexdigest()}


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


def hash_parts(parts: Iterable[bytes]) -> str:
    """Return the BLAKE3 of bytes that follow each other, hexadecimal."""
    digest = blake3()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def add_file(digest: Digest, path: Path, advance: Callable[[int], object] = _ignore) -> None:
    """Add all bytes of a file to any digest."""
    fd = open_to_read(path)
    try:
        _add(digest, fd, advance)
    finally:
        os.close(fd)


def _add(digest: Digest, fd: int, advance: Callable[[int], object]) -> None:
    buffer = memoryview(bytearray(_READ_NBYTES))
    offset = 0
    while n_read := os.preadv(fd, [buffer], offset):
        digest.update(buffer[:n_read])
        advance(n_read)
        offset += n_read
