"""What a run leaves in OUTPUT.partial, so that the same command goes on from there."""

import json
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from run_ckpt.contract.differences import differences, first_of
from run_ckpt.contract.errors import PartialRunError
from run_ckpt.contract.file_names import join_names
from run_ckpt.storage.files import read_small
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.hashing import hash_bytes
from run_ckpt.storage.partial import PartialFolder

_FINGERPRINT = "fingerprint.json"
_RESULT = "result"
_RECORDS = "records"
_FETCHED = "fetched"
_SKELETON = "skeleton"
# The record of what formats were predicted to cost, beside those of files.
PREDICTION = "prediction"
# In the order in which they are removed: as long as the fingerprint is there, it says what else may be.
_NAMES = (_FETCHED, _RECORDS, _RESULT, _FINGERPRINT)
_NOT_REMOTE = {"reference": "", "revision": ""}

# Only a hash of all of it could tell the two, and of a shard that was not yet converted there is none.
_TOUCHED = (
    "A shard of another ctime may hold other bytes, even at the same size and mtime; chmod and links change it too. "
)
_ASK_AGAIN_SECONDS = 0.1


class Staging:
    """The folder OUTPUT.partial: the result so far, a record per finished shard, a fingerprint, fetched shards.

    Use as a context manager; it holds a lock, so that two runs never share the folder: only those that each make a
    part of the result do (``shared``), once the first of them has called share().
    """

    def __init__(self, output: Path, *, shared: bool = False):
        self._partial = PartialFolder(output, "convert-ckpt", shared=shared)
        self._shared = shared
        self._scratch = self._partial.path
        self._temporary: TemporaryDirectory[str] | None = None
        self.output = self._partial.target
        self.folder = self._partial.path
        self.is_adopted = False

    @property
    def result(self) -> Path:
        return self.folder / _RESULT

    @property
    def fetched(self) -> Path:
        """Where shards of a remote source lie, a folder for each component; on this machine if the folder is shared."""
        return self._scratch / _FETCHED

    @property
    def skeleton(self) -> Path:
        """Where a remote source is laid out for the plan, without its weights."""
        return self._scratch / _SKELETON

    def pinned_revision(self, reference: str) -> str | None:
        """Return the commit that an unfinished run of the same remote source began with."""
        remote = (self._read_fingerprint() or {}).get("remote")
        return remote["revision"] if remote and remote["reference"] == reference else None

    def __enter__(self) -> "Staging":
        self._partial.__enter__()
        while not (self._partial.is_alone or self._read_fingerprint()):  # the run that was let in first gave up
            self._partial.__exit__()
            time.sleep(_ASK_AGAIN_SECONDS)
            self._partial.__enter__()
        if self._shared:
            self._temporary = TemporaryDirectory(prefix="convert-ckpt-")
            self._scratch = Path(self._temporary.name)
        return self

    def __exit__(self, *error: object) -> None:
        if self._temporary:
            self._temporary.cleanup()
        if self._partial.is_alone and self._partial.names() <= {_SKELETON}:
            self._partial.discard([_SKELETON], parents=True)  # a run that was refused before it began leaves no trace
        self._partial.__exit__(*error)

    def adopt(self, fingerprint: dict[str, Any], *, restart: bool) -> None:
        """Start here or go on: raise PartialRunError if what is here belongs to another run, or to none.

        restart: throw away what is here instead, if a run of ours left it.
        """
        old = self._read_fingerprint()
        if self._partial.is_alone:  # else others are writing
            self._refuse_foreign(old)
        for name in _NAMES if restart else ():
            self._partial.folder.remove(name)
        if restart or old is None:
            text = json.dumps(fingerprint, indent=1, sort_keys=True)
            self._partial.folder.write(_FINGERPRINT, text.encode())
        elif found := differences(old, fingerprint):
            touched = _TOUCHED if any(".ctime_ns was" in line for line in found) else ""
            raise PartialRunError(
                f"{self.folder} holds an unfinished run with another source or other options:"
                f" {first_of(found)}. {touched}Repeat that command to finish it, or add --restart to throw it away."
            )
        self.is_adopted = True

    def share(self) -> None:
        """Let the others in, where runs share the folder."""
        if self._shared and self._partial.is_alone:
            self._partial.share()

    def take_alone(self) -> bool:
        """Lock out all others of a shared folder, in order to publish; False where some are still at work."""
        return self._partial.is_alone or self._partial.take_alone()

    def open_result(self, component: str) -> Folder:
        """Return the folder of the result in which a component is built."""
        with self._partial.folder.open_folder(_RESULT, make=True) as result:
            return result.open_folder(component, make=True)

    def read_records(self, component: str) -> dict[str, dict[str, Any]]:
        """Return file name -> record of the finished files of a component; damaged records are passed over."""
        records = {}
        for path in sorted((self.folder / _RECORDS / component).glob("*.json")):
            try:
                entry = json.loads(read_small(path, follow=False))
                if entry["blake3"] == self._seal(component, path.stem, entry["record"]):
                    records[path.stem] = entry["record"]
            except (OSError, ValueError, KeyError, TypeError, RecursionError):
                continue
        return records

    def write_record(self, component: str, file_name: str, record: Mapping[str, Any]) -> None:
        """Note that a file is complete and durable."""
        text = json.dumps({"record": record, "blake3": self._seal(component, file_name, record)}, sort_keys=True)
        with (
            self._partial.folder.open_folder(_RECORDS, make=True) as records,
            records.open_folder(component, make=True) as folder,
        ):
            folder.write(f"{file_name}.json", text.encode())

    def may_be_published(self) -> bool:
        """True where a run may have been stopped after renaming the result and before it had cleaned up.

        Or where other runs that share the folder have made all parts.
        """
        with suppress(OSError):
            return (self._shared or self.folder.is_dir()) and not self.result.exists() and self.output.exists()
        return False

    def publish(self) -> None:
        """Rename the result to OUTPUT and remove the rest."""
        self._partial.clean()  # of other processes that were lost
        self._refuse_foreign(self._read_fingerprint())
        self._partial.publish(_RESULT)
        self.remove()

    def remove(self) -> None:
        """Remove OUTPUT.partial."""
        self._partial.discard([_SKELETON, *_NAMES])

    def give_up(self) -> None:
        """Remove OUTPUT.partial and the folders made for it, unless other runs are at work in it."""
        if self.take_alone():
            self._partial.discard([_SKELETON, *_NAMES], parents=True)

    def _read_fingerprint(self) -> dict[str, Any] | None:
        """Return what the unfinished run wrote of itself, None where there is none. Raises PartialRunError."""
        try:
            fingerprint = json.loads(read_small(self.folder / _FINGERPRINT, follow=False))
            if not _is_usable(fingerprint):
                raise ValueError("not what a run writes")
            return dict(fingerprint)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, RecursionError) as error:
            raise PartialRunError(
                f"{self.folder / _FINGERPRINT}: is damaged ({error}), so that nothing here can be taken over."
                f" Remove {self.folder}, then start again."
            ) from error

    def _seal(self, component: str, file_name: str, record: Mapping[str, Any]) -> str:
        """Return a hash that ties a record to its file and to the run that wrote it."""
        run = read_small(self.folder / _FINGERPRINT, follow=False).decode()
        return hash_bytes(json.dumps([run, component, file_name, record], sort_keys=True).encode())

    def _refuse_foreign(self, fingerprint: Mapping[str, Any] | None) -> None:
        foreign = list(self._foreign(fingerprint))
        if foreign:
            some = ", ".join(foreign[:3]) + (f" and {len(foreign) - 3} more" if len(foreign) > 3 else "")
            raise PartialRunError(f"{self.folder}: holds what no run put there: {some}. Move that to another place.")

    def _foreign(self, fingerprint: Mapping[str, Any] | None) -> Iterator[str]:
        """Yield what is here and was not made by the run of ``fingerprint``."""
        files: set[str] = set()
        if fingerprint:
            files = {_FINGERPRINT, f"{_RECORDS}/{PREDICTION}/{PREDICTION}.json"}
            for component, names in fingerprint["files"].items():
                folder, shards = component or "root", fingerprint["source"][component]["shards"]
                files |= {join_names(_RESULT, component, name) for name in names}
                files |= {f"{_RECORDS}/{folder}/{name}.json" for name in names}
                files |= {f"{_FETCHED}/{folder}/{name}" for name in shards}
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents}
        for path, status in self._partial.walk():
            expected = folders if stat.S_ISDIR(status.st_mode) else files
            if path not in expected and path.partition("/")[0] != _SKELETON:
                yield path


def _is_usable(fingerprint: Any) -> bool:
    """True where what is read of a fingerprint has the types that it is written with."""
    try:
        files, source, remote = fingerprint["files"], fingerprint["source"], fingerprint.get("remote", _NOT_REMOTE)
        shards = [source[component]["shards"] for component in files]
        names = [*files, *(name for names in files.values() for name in names)]
        return all(isinstance(entry, dict) for entry in shards) and all(
            isinstance(text, str) for text in (*names, remote["reference"], remote["revision"] or "")
        )
    except (LookupError, TypeError, AttributeError):
        return False
