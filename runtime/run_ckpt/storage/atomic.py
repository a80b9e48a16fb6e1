"""Files and folders that are whole or absent after a crash, and folders that may be written."""

import fcntl
import os
from pathlib import Path

from run_ckpt.contract.errors import CheckpointError


def write_durably(path: Path, text: str) -> None:
    """Write a small text file that is whole or absent after a crash."""
    part = path.with_name(path.name + ".part")
    with open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in ``folder`` durable."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def partial_folder(target: Path) -> Path:
    """Return the folder in which ``target`` is built: on the same disk, so that the result can be renamed."""
    target = target.resolve()
    return target.with_name(target.name + ".partial")


def lock_file(path: Path) -> int:
    """Return a descriptor of ``path`` (made if missing) that locks other processes out until it is closed.

    Raises CheckpointError where another process holds the lock.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise CheckpointError(f"{path.parent}: another run is at work on it. Wait for it or stop it.") from error
    return fd


def publish_folder(result: Path, target: Path) -> None:
    """Rename the finished folder ``result`` to ``target``: durably, all of it at once."""
    sync_folder(result)
    result.rename(target)
    sync_folder(target.parent)


def target_faults(source: Path | None, target: Path) -> list[str]:
    """Return why ``target`` can't be the folder for what is made of ``source``, None for one not of this machine."""
    if source is not None:
        resolved_source, resolved = source.resolve(), target.resolve()
        if resolved == resolved_source:
            return [f"{target}: is the source. Choose another folder."]
        if resolved_source in resolved.parents:
            return [f"{target}: lies in the source. Choose a folder outside of it."]
        if resolved in resolved_source.parents:
            return [f"{target}: holds the source. Choose another folder."]
    if target.is_dir() and any(target.iterdir()):
        return [f"{target}: is not empty. Choose another folder, or remove this one."]
    if target.exists() and not target.is_dir():
        return [f"{target}: is a file. Choose a folder."]
    return []
