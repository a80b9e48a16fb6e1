"""Source shards for the engine: on this machine, or fetched one ahead of the conversion and removed after it."""

import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from convert_ckpt.source.download import download
from convert_ckpt.source.store import Checksum, Retry, Store
from run_ckpt.contract.errors import FetchError
from run_ckpt.progress import Progress
from run_ckpt.storage.shards import Shard
from run_ckpt.storage.units import format_nbytes

# The Hub's own download into its cache can't be interrupted; its thread ends with the process.
_LONGEST_STOP_SECONDS = 10


@dataclass(frozen=True)
class FetchStep:
    """A shard to fetch, once those in ``after`` are done with."""

    shard: str
    after: frozenset[str]


class ShardProvider(Protocol):
    """Hands the engine its source shards."""

    def start(self, steps: list[FetchStep]) -> None:
        """Begin to bring the shards, in this order."""

    def wait(self, name: str) -> Path:
        """Return a shard's path once it is here. Raises what kept it from coming."""

    def release(self, name: str) -> None:
        """Give up a shard."""

    def stop(self) -> None:
        """Bring no more, and let nobody wait any longer."""


class LocalShards:
    """Shards that are here already, and stay."""

    def __init__(self, shards: Iterable[Shard]):
        self._paths = {shard.name: shard.path for shard in shards}

    def start(self, steps: list[FetchStep]) -> None:
        pass

    def wait(self, name: str) -> Path:
        return self._paths[name]

    def release(self, name: str) -> None:
        pass

    def stop(self) -> None:
        pass


class FetchedShards:
    """Shards of one component fetched in the order of the work, into ``folder`` or the store's cache.

    ``remote`` maps a shard to its path in the store; ``keep``: fetch into the cache, where it stays.
    One shard is fetched while the one before it is converted. A shard in ``folder`` that is not whole is continued.
    What lies in the store's cache is used there and never removed.
    """

    def __init__(
        self,
        store: Store,
        remote: Mapping[str, str],
        shards: tuple[Shard, ...],
        folder: Path,
        progress: Progress,
        *,
        keep: bool = False,
    ):
        self._store = store
        self._remote = remote
        self._headers = {shard.name: shard.header for shard in shards}
        self._folder = folder
        self._progress = progress
        self._keep = keep
        self._retry = Retry(progress.log)
        self._changed = threading.Condition()
        self._here: dict[str, Path] = {}
        self._released: set[str] = set()
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    def start(self, steps: list[FetchStep]) -> None:
        """Begin to fetch; what is no longer needed of an earlier run is removed."""
        self._folder.mkdir(parents=True, exist_ok=True)
        needed = {step.shard for step in steps}
        for path in self._folder.iterdir():
            if path.name not in needed:
                path.unlink()
        self._progress.start_fetching(sum(self._headers[step.shard].file_nbytes for step in steps))
        self._thread = threading.Thread(target=self._run, args=(steps,), name="fetch", daemon=True)
        self._thread.start()

    def wait(self, name: str) -> Path:
        """Return a shard's path once it is here. Raises what kept it from coming."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._here or self._failure)
            if name not in self._here:
                assert self._failure
                raise self._failure
            return self._here[name]

    def release(self, name: str) -> None:
        """Note that a shard is done with, and remove it if it lies in our folder."""
        path = self._here[name]
        if path.parent == self._folder:
            path.unlink()
        with self._changed:
            self._released.add(name)
            self._changed.notify_all()

    def stop(self) -> None:
        """End the fetching; what has come stays for the next run."""
        self._retry.stopped.set()
        self._fail(FetchError("the run was stopped"))
        if self._thread:
            self._thread.join(_LONGEST_STOP_SECONDS)

    def _run(self, steps: list[FetchStep]) -> None:
        try:
            for step in steps:
                if not self._wait_for_room(step):
                    return
                path = self._fetch(step.shard)
                with self._changed:
                    self._here[step.shard] = path
                    self._changed.notify_all()
        except BaseException as error:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = self._failure or error
            self._changed.notify_all()

    def _wait_for_room(self, step: FetchStep) -> bool:
        """Wait until the shards before are done with; False if the run ended meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: step.after <= self._released or self._failure)
            return self._failure is None

    def _fetch(self, name: str) -> Path:
        """Return where the whole shard lies, its bytes compared with what the store and its header say."""
        started, remote, header = time.monotonic(), self._remote[name], self._headers[name]
        path = self._find_in_cache(remote)
        if path is None:
            path = self._folder / name
            download(self._store, remote, path, self._retry, self._progress.advance_fetching)
        seconds = time.monotonic() - started
        self._progress.log(f"fetched {remote} ({format_nbytes(header.file_nbytes)}, {seconds:.3g} s)")
        return path

    def _find_in_cache(self, remote: str) -> Path | None:
        """Return where the store's own cache has the file, fetched into it where the cache is to keep it."""
        cache = self._store.cache
        if cache is None:
            return None
        path = cache.find(remote)
        if path is None:
            if not self._keep:
                return None
            path = self._retry(lambda: cache.fetch(remote))
        file = self._store.files[remote]
        checksum = Checksum(remote, file)
        checksum.update_from(path)
        if fault := checksum.fault():
            raise FetchError(f"{fault} It lies in the Hub cache; remove it there.")
        self._progress.advance_fetching(file.nbytes)
        return path
