"""Shards brought here one ahead of the conversion, checked, and removed once they are done with."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from convert_ckpt.source.store import Patience, RemoteFile, Store, checksum_fault, new_digest, read_range
from run_ckpt.contract.errors import FetchError, TransientError
from run_ckpt.progress import Progress
from run_ckpt.storage.hashing import add_file
from run_ckpt.storage.shards import Shard
from run_ckpt.storage.units import format_nbytes

# One connection rarely fills a line. Four parts are in memory at once, 128 MiB; at up to 335 MB/s they stay under the
# 3,000 requests in five minutes that the Hub answers to the anonymous (https://huggingface.co/docs/hub/rate-limits).
_REQUESTS_AT_ONCE = 4
_PART_NBYTES = 32 * 2**20
# The Hub's own download into its cache can't be interrupted; its thread ends with the process.
_LONGEST_STOP_SECONDS = 10


@dataclass(frozen=True)
class FetchStep:
    """A shard to fetch, once those in ``after`` are done with."""

    shard: str
    after: frozenset[str]


class ShardProvider(Protocol):
    """Hands the engine its source shards: ``wait`` returns once a shard is here, ``release`` gives it up."""

    def start(self, steps: list[FetchStep]) -> None: ...
    def wait(self, name: str) -> Path: ...
    def release(self, name: str) -> None: ...
    def stop(self) -> None: ...


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
    """Fetches the shards of one component, in the order of the work, into ``folder`` or the store's cache.

    ``store_folder`` is where the store has them.

    One shard is fetched while the one before it is converted. A shard in ``folder`` that is not whole is
    gone on with. What lies in the store's cache is used there and never removed.
    """

    def __init__(
        self,
        store: Store,
        store_folder: str,
        shards: tuple[Shard, ...],
        folder: Path,
        progress: Progress,
        *,
        keep: bool = False,
    ):
        self._store = store
        self._store_folder = store_folder
        self._headers = {shard.name: shard.header.data for shard in shards}
        self._folder = folder
        self._progress = progress
        self._keep = keep
        self._stopped = threading.Event()
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
        self._progress.start_fetching(sum(self._file(step.shard).nbytes for step in steps))
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
        self._stopped.set()
        with self._changed:
            self._failure = self._failure or FetchError("the run was stopped")
            self._changed.notify_all()
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
        started = time.monotonic()
        remote = self._remote_name(name)
        path = self._store.cached(remote)
        if path is None and self._keep:
            path = self._cache(remote)
        if path is None:
            path = self._folder / name
            self._download(remote, path)
        else:
            fault = checksum_fault(remote, self._file(name), _digest_of(path, self._file(name)))
            if fault:
                raise FetchError(f"{fault} It lies in the Hub cache; remove it there.")
            self._progress.advance_fetching(self._file(name).nbytes)
        self._check_header(name, path)
        seconds = time.monotonic() - started
        self._progress.log(f"fetched {remote} ({format_nbytes(self._file(name).nbytes)}, {seconds:.3g} s)")
        return path

    def _cache(self, remote: str) -> Path:
        patience = self._patience()
        while True:
            try:
                return self._store.cache(remote)
            except TransientError as error:
                patience.wait(error)

    def _download(self, remote: str, path: Path) -> None:
        """Go on with the file where it ends. What does not add up in the end is fetched once more, from the start."""
        file = self._store.files[remote]
        resumed = path.exists() and 0 < path.stat().st_size <= file.nbytes
        while True:
            fault = checksum_fault(remote, file, self._append(remote, path))
            if fault is None:
                break
            path.unlink()
            self._progress.advance_fetching(-file.nbytes)
            if not resumed:
                raise FetchError(fault)
            resumed = False
        self._store.check_unchanged(remote)

    def _append(self, remote: str, path: Path) -> Any:
        """Fetch what the file lacks; return the digest of the whole."""
        file = self._store.files[remote]
        if path.exists() and path.stat().st_size > file.nbytes:
            path.unlink()
        digest = _digest_of(path, file) if path.exists() else new_digest(file)
        with open(path, "ab") as out:
            begin = out.tell()
            self._progress.advance_fetching(begin)
            for part in self._parts(remote, begin, file.nbytes):
                out.write(part)
                out.flush()
                digest.update(part)
                self._progress.advance_fetching(len(part))
        return digest

    def _parts(self, remote: str, begin: int, end: int) -> Iterator[bytearray]:
        """Yield the bytes in order, several ranges of them on their way at a time."""

        def fetch_part(start: int) -> bytearray:
            return read_range(self._store, remote, start, min(start + _PART_NBYTES, end), self._patience())

        pending: deque[Future[bytearray]] = deque()
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE, thread_name_prefix="range") as pool:
            try:
                for start in range(begin, end, _PART_NBYTES):
                    pending.append(pool.submit(fetch_part, start))
                    if len(pending) == _REQUESTS_AT_ONCE:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                pool.shutdown(wait=False, cancel_futures=True)

    def _check_header(self, name: str, path: Path) -> None:
        header = self._headers[name]
        with open(path, "rb") as file:
            if file.read(len(header)) != header or path.stat().st_size != self._file(name).nbytes:
                raise FetchError(f"{self._remote_name(name)}: is not the file whose header was read. Run this again.")

    def _patience(self) -> Patience:
        return Patience(self._progress.log, self._stopped)

    def _file(self, name: str) -> RemoteFile:
        return self._store.files[self._remote_name(name)]

    def _remote_name(self, name: str) -> str:
        return f"{self._store_folder}/{name}" if self._store_folder else name


def _digest_of(path: Path, file: RemoteFile) -> Any:
    digest = new_digest(file)
    add_file(digest, path)
    return digest
