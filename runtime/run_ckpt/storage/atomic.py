"""Files and folders where a user wants them: what may be written to, and files that are whole or absent."""

import contextlib
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.storage.folders import open_folder
from run_ckpt.storage.partial import SUFFIX

_MAX_NAME_NBYTES = 255  # of Linux's file systems


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file that is whole or absent after a crash, in place of a file of that name.

    Raises as check_file.
    """
    check_file(path)
    with open_folder(path.parent) as folder:
        folder.write(path.name, data)


def check_file(path: Path) -> None:
    """Raise CheckpointError where something that is no file has the name (a folder, a device, a link), or no folder."""
    if not path.absolute().parent.is_dir():
        raise CheckpointError(f"{path}: its folder does not exist. Make it first.")
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise CheckpointError(f"{path}: is a device, a link or a folder. Give the name of a file.")


def target_faults(source: Path | None, target: Path) -> list[str]:
    """Return why ``target`` can't be the folder for what is made of ``source``, None for one not of this machine."""
    try:
        return list(_target_faults(source and source.resolve(), target, target.resolve()))
    except (OSError, RuntimeError, ValueError) as error:  # too long, a loop of links, a zero byte in the name
        return [f"{target}: can't be a folder ({error}). Choose another name."]


def _target_faults(source: Path | None, target: Path, resolved: Path) -> Iterator[str]:
    if not resolved.name:
        yield f"{target}: is the root of all files. Choose a folder in it."
    elif len(os.fsencode(resolved.name)) + len(SUFFIX) > _MAX_NAME_NBYTES:
        yield f"{target}: its name is too long. Choose one of at most {_MAX_NAME_NBYTES - len(SUFFIX)} bytes."
    elif source == resolved:
        yield f"{target}: is the source. Choose another folder."
    elif source in resolved.parents:
        yield f"{target}: lies in the source. Choose a folder outside of it."
    elif source and resolved in source.parents:
        yield f"{target}: holds the source. Choose another folder."
    elif resolved.exists() and not resolved.is_dir():
        yield f"{target}: is a file. Choose a folder."
    elif resolved.exists() and any(resolved.iterdir()):
        yield f"{target}: is not empty. Choose another folder, or remove this one."
    elif os.path.ismount(resolved):
        yield f"{target}: is where a disk is mounted, so that nothing can take its place. Choose a folder in it."
