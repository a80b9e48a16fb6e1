"""OUTPUT in an object store: built here, each shard uploaded while later ones are made, the manifests last."""

import platform
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from convert_ckpt.run_summary import RunSummary
from convert_ckpt.source.url import open_filesystem
from run_ckpt.contract.errors import FaultsError, ManifestError, PublishError, UsageError, first_line
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.progress import Progress
from run_ckpt.storage.files import MAX_MANIFEST_NBYTES
from run_ckpt.storage.reference import UrlRef
from run_ckpt.storage.units import format_nbytes

# Of the folder here in which the result is built; it is removed when all of it is in the store.
SUFFIX = ".upload"


def convert_and_upload(convert: Callable[..., RunSummary], reference: UrlRef, progress: Progress) -> RunSummary:
    """Convert and upload. convert: convert_checkpoint() with all but ``output`` and ``listener`` bound.

    The result is built in the folder NAME.upload of the current one, which so holds all of it. A store in which
    something else lies is refused before anything is converted. What is stopped is continued by the same command.
    Where the store holds the result of the same command, nothing is done.
    """
    store = StoreFolder(reference)
    folder = Path(f"{store.name}{SUFFIX}")
    if not folder.exists() and any(name.endswith(MANIFEST_NAME) for name in store.names()):
        return _find_complete(convert, store)
    uploads = Uploads(store, progress)
    try:
        summary = convert(output=folder, listener=uploads)
    finally:
        uploads.stop()
    local = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    if not uploads.was_started:  # it was complete here
        uploads.check(local, local)
    for name in sorted(local, key=lambda name: (name.endswith(MANIFEST_NAME), name)):
        if name not in uploads.sent:
            store.put(local[name], name)
    shutil.rmtree(folder)
    return replace(summary, output=str(reference))


def _find_complete(convert: Callable[..., RunSummary], store: "StoreFolder") -> RunSummary:
    """Return the summary of the run whose result is in the store. Raises PublishError where that is another one.

    convert() says so by manifests, names and sizes: those are laid out here.
    """
    with TemporaryDirectory(prefix="convert-ckpt-") as scratch:
        folder = Path(scratch) / store.name
        store.lay_out(folder)
        try:
            summary = convert(output=folder)
        except (FaultsError, ManifestError) as error:
            said = str(error).replace(str(folder), str(store.reference))
            raise PublishError(f"{store.reference}: holds something already; {said}") from error
    return replace(summary, output=str(store.reference))


class StoreFolder:
    """The folder of a file system that a URL names. Raises UsageError for one that nothing opens."""

    def __init__(self, reference: UrlRef):
        self.reference = reference
        self._filesystem, self._path = open_filesystem(reference.url)
        self.name = self._path.rpartition("/")[2]
        if not self.name:
            raise UsageError(f"{reference}: names no folder. Give one in it.")

    def names(self) -> set[str]:
        """Return the names of all files in it."""
        found: list[str] = self._ask("can't be listed", lambda: self._filesystem.find(self._path))
        return {name.removeprefix(self._path).lstrip("/") for name in found}

    def lay_out(self, folder: Path) -> None:
        """Make a folder with its manifests, and in place of each other file a hole of its size."""
        found = self._ask("can't be listed", lambda: self._filesystem.find(self._path, detail=True))
        for key, info in found.items():
            path = folder / key.removeprefix(self._path).lstrip("/")
            if ".." in path.parts:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "wb") as file:
                if path.name == MANIFEST_NAME and info["size"] <= MAX_MANIFEST_NBYTES:
                    file.write(self._ask(f"{path.name} can't be read", partial(self._filesystem.cat_file, key)))
                file.truncate(info["size"])

    def holds(self, path: Path, name: str) -> bool:
        """True where a small file is there with the same bytes."""
        found = self._ask(f"{name} can't be read", lambda: self._filesystem.cat_file(f"{self._path}/{name}"))
        return bool(found == path.read_bytes())

    def put(self, path: Path, name: str) -> None:
        """Upload a file, a large one in parts, as the file system does it; see that all of it is there."""
        remote = f"{self._path}/{name}"

        def put() -> int:
            self._filesystem.put_file(str(path), remote)
            self._filesystem.invalidate_cache()
            return int(self._filesystem.info(remote)["size"])

        if self._ask(f"{name} can't be written", put) != path.stat().st_size:
            raise PublishError(f"{self.reference}: {name} is not there as it was sent. Run the same command again.")

    def _ask(self, what: str, function: Callable[[], Any]) -> Any:
        try:
            self._filesystem.invalidate_cache()
            return function()
        except FileNotFoundError as error:
            raise PublishError(f"{self.reference}: {what}: no such bucket or folder. Check the name.") from error
        except Exception as error:  # each file system has errors of its own
            if "Credential" in type(error).__name__:  # botocore's, google.auth's, azure's
                raise PublishError(
                    f"{self.reference}: {what}: {platform.node()} has no credentials for it ({first_line(error)})."
                ) from error
            raise PublishError(
                f"{self.reference}: {what} ({type(error).__name__}: {first_line(error)}). What is here stays: run the"
                " same command again."
            ) from error


class Uploads:
    """Shards uploaded by a thread of its own while later ones are made; a component.ShardListener."""

    def __init__(self, store: StoreFolder, progress: Progress):
        self._store = store
        self._progress = progress
        self._queue: SimpleQueue[tuple[str, Path, int] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="upload", daemon=True)
        self._stopped = False
        self.was_started = False
        self.sent: set[str] = set()

    def check(self, names: Iterable[str], local: Mapping[str, Path] = MappingProxyType({})) -> None:
        """Raise PublishError where the store holds something that is none of the files ``names``, or another result.

        local: the files here, where the result is complete; its manifests may be there already.
        """
        wanted = {name for name in names if not name.endswith(MANIFEST_NAME)}
        foreign = [
            name
            for name in sorted(self._store.names() - wanted)
            if name not in local or not self._store.holds(local[name], name)
        ]
        if foreign:
            raise PublishError(
                f"{self._store.reference}: holds something already ({', '.join(foreign[:3])}). Choose another folder."
            )

    def start(self, names: Iterable[str], manifests: Mapping[str, Manifest]) -> None:
        """Begin, with the names of all shards to come."""
        self.check(names)
        self.was_started = True
        self._thread.start()

    def add(self, name: str, path: Path, nbytes: int) -> None:
        """Note that a shard is finished."""
        self._queue.put((name, path, nbytes))

    def stop(self) -> None:
        """Return once the shard that is being sent is done. The others are sent at the end."""
        self._stopped = True
        self._queue.put(None)
        if self._thread.is_alive():
            self._thread.join()

    def _work(self) -> None:
        while (shard := self._queue.get()) is not None:
            if self._stopped:
                return
            name, path, nbytes = shard
            try:
                self._store.put(path, name)
            except PublishError as error:
                self._progress.log(f"not uploaded for now: {error}")
                continue
            self.sent.add(name)
            self._progress.log(f"uploaded {name} ({format_nbytes(nbytes)})")
