"""OUTPUT.partial: where a run builds its result, so that OUTPUT appears complete or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import PartialRunError
from run_ckpt.storage.atomic import lock_file, partial_folder, publish_folder, write_durably

_FINGERPRINT = "fingerprint.json"
_LOCK = "lock"
_RESULT = "result"
_RECORDS = "records"
_FETCHED = "fetched"
_SKELETON = "skeleton"


class Staging:
    """The folder OUTPUT.partial: the result so far, a record per finished shard, a fingerprint, fetched shards.

    Use as a context manager; it holds a lock, so that two runs never share the folder.
    """

    def __init__(self, output: Path):
        self.output = output.resolve()
        self.folder = partial_folder(output)
        self._lock_fd: int | None = None

    @property
    def result(self) -> Path:
        return self.folder / _RESULT

    @property
    def fetched(self) -> Path:
        """Where shards of a remote source lie, a folder for each component."""
        return self.folder / _FETCHED

    @property
    def skeleton(self) -> Path:
        """Where a remote source is laid out for the plan, without its weights."""
        return self.folder / _SKELETON

    def pinned_revision(self, reference: str) -> str | None:
        """Return the commit that an unfinished run of the same remote source began with."""
        path = self.folder / _FINGERPRINT
        remote = json.loads(path.read_text()).get("remote") if path.exists() else None
        return remote["revision"] if remote and remote["reference"] == reference else None

    def __enter__(self) -> "Staging":
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock_fd = lock_file(self.folder / _LOCK)
        return self

    def __exit__(self, *_: object) -> None:
        if self.folder.exists() and {path.name for path in self.folder.iterdir()} <= {_LOCK, _SKELETON}:
            self._discard()
        if self._lock_fd is not None:
            os.close(self._lock_fd)

    def _discard(self) -> None:
        """Leave no trace of a run that was refused before it began."""
        shutil.rmtree(self.folder)
        with contextlib.suppress(OSError):  # somebody else uses the folder by now
            for folder in self._made:
                if folder != self.folder:
                    folder.rmdir()

    def adopt(self, fingerprint: dict[str, Any], *, restart: bool) -> None:
        """Start here or go on: raise PartialRunError if what is here belongs to another run.

        restart: throw away what is here instead.
        """
        path = self.folder / _FINGERPRINT
        if restart:
            for name in (_FINGERPRINT, _RECORDS, _RESULT, _FETCHED):
                _remove(self.folder / name)
        if path.exists():
            differences = _differences(json.loads(path.read_text()), fingerprint)
            if differences:
                raise PartialRunError(
                    f"{self.folder} holds an unfinished run with another source or other options:"
                    f" {'; '.join(differences)}. Repeat that command to finish it, or add --restart to throw it away."
                )
        else:
            self.result.mkdir()
            write_durably(path, json.dumps(fingerprint, indent=1, sort_keys=True))

    def read_records(self, component: str) -> dict[str, dict[str, Any]]:
        """Return file name -> record of the finished files of a component."""
        folder = self.folder / _RECORDS / component
        return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}

    def write_record(self, component: str, file_name: str, record: Mapping[str, Any]) -> None:
        """Note that a file is complete and durable."""
        folder = self.folder / _RECORDS / component
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(folder / f"{file_name}.json", json.dumps(record, sort_keys=True))

    def is_published(self) -> bool:
        """True where a run got as far as renaming the result and was stopped before cleaning up."""
        return (self.folder / _FINGERPRINT).exists() and not self.result.exists() and self.output.exists()

    def publish(self) -> None:
        """Rename the result to OUTPUT and remove the rest."""
        if not self.is_published():
            publish_folder(self.result, self.output)
        shutil.rmtree(self.folder)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _differences(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in _differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    return [] if old == new else [f"{where} was {old!r}, now {new!r}"]
