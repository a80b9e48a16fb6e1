"""Files that are whole or absent after a crash, and their hashes."""

import hashlib
import os
from pathlib import Path

_READ_NBYTES = 4 * 2**20


def write_durably(path: Path, text: str) -> None:
    """Write a small text file that is whole or absent after a crash."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def hash_file(fd: int) -> str:
    """Return the SHA-256 of an open file."""
    digest = hashlib.sha256()
    buffer = bytearray(_READ_NBYTES)
    offset = 0
    while n_read := os.preadv(fd, [buffer], offset):
        digest.update(memoryview(buffer)[:n_read])
        offset += n_read
    return digest.hexdigest()


def hash_path(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with open(path, "rb") as file:
        return hash_file(file.fileno())


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
