"""Files that lie elsewhere: what a store says of them, and reading them in spite of passing faults."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from run_ckpt.contract.errors import FetchError, TransientError
from run_ckpt.storage.files import MAX_INDEX_NBYTES
from run_ckpt.storage.hashing import add_file
from run_ckpt.storage.hub_client import new_git_blob_hash

T = TypeVar("T")

SHA256 = "sha256"
GIT_BLOB = "git-sha1"

# Waits double from the first: 0.5 + 1 + ... + 64 s, two minutes, before a run gives up on a store that had
# answered; a store that never did is given up after the third try.
_FIRST_WAIT_SECONDS = 0.5
_TRIES = 9
_FIRST_CONTACT_TRIES = 3
# The Hub counts requests in windows of five minutes (https://huggingface.co/docs/hub/rate-limits).
_LONGEST_WAIT_SECONDS = 600
# Shorter waits are not worth a line.
_NOTICED_SECONDS = 5


@dataclass(frozen=True)
class RemoteFile:
    """A file of a store. ``version`` changes with the content; ``checksum`` is (SHA256 or GIT_BLOB, hex digest),
    None where the store states none."""

    nbytes: int
    version: str
    checksum: tuple[str, str] | None = None


class StoreCache(Protocol):
    """A cache on this machine that belongs to the store's own tools."""

    @property
    def folder(self) -> Path: ...

    def find(self, path: str) -> Path | None:
        """Return where the cache holds a file, None where it does not."""

    def fetch(self, path: str) -> Path:
        """Fetch a file into the cache. Raises TransientError or FetchError."""


class Store(Protocol):
    """Files elsewhere, in one state that does not change while they are used.

    ``files`` maps a path to the file; ``root`` is what the reference names of it: a folder, "" for all, or one
    of the files. ``name`` and ``revision`` go into the manifest.
    """

    @property
    def name(self) -> str: ...
    @property
    def revision(self) -> str | None: ...
    @property
    def files(self) -> Mapping[str, RemoteFile]: ...
    @property
    def root(self) -> str: ...
    @property
    def cache(self) -> StoreCache | None: ...

    def read(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file. Raises TransientError or FetchError."""

    def check_unchanged(self, path: str) -> None:
        """Raise FetchError if the file is no longer the one in ``files``."""


@dataclass(frozen=True)
class Retry:
    """Calls again what raises TransientError: after longer and longer waits, or as long as the store asks.

    ``log`` gets a line for each wait that a person would notice; ``stopped`` ends a wait. ``first_contact``: give up
    soon, since nobody may be there.
    """

    log: Callable[[str], None]
    stopped: threading.Event = field(default_factory=threading.Event)
    first_contact: bool = False

    def __call__(self, function: Callable[[], T]) -> T:
        """Return what ``function`` returns. Raises FetchError after the last try, or where the run is stopped."""
        n_tries = 0
        while True:
            try:
                return function()
            except TransientError as error:
                n_tries += 1
                self._wait(error, n_tries)

    def _wait(self, error: TransientError, n_tries: int) -> None:
        doubled = _FIRST_WAIT_SECONDS * 2 ** (n_tries - 1)
        seconds = doubled if error.wait_seconds is None else error.wait_seconds
        if n_tries >= (_FIRST_CONTACT_TRIES if self.first_contact else _TRIES) or seconds > _LONGEST_WAIT_SECONDS:
            tries = f"{n_tries} tries" if n_tries > 1 else "one try"
            raise FetchError(f"{error} Gave up after {tries}; run the same command again later.") from error
        if seconds >= _NOTICED_SECONDS:
            self.log(f"{error} Trying again in {seconds:.0f} s.")
        self.stopped.wait(seconds)
        self.check()

    def check(self) -> None:
        """Raise FetchError where the run is stopped."""
        if self.stopped.is_set():
            raise FetchError("the run was stopped")


def read_range(store: Store, path: str, start: int, stop: int, retry: Retry) -> bytearray:
    """Return bytes [start, stop) of a file; after a cut, only what is missing is asked for again."""
    data = bytearray()

    def read_on() -> bool:
        """Return False where the answer was cut after some bytes: that counts as no failed try."""
        n_before = len(data)
        try:
            for part in store.read(path, start + n_before, stop):
                data.extend(part)
                retry.check()
            if len(data) < stop - start:
                raise TransientError(f"{path}: the answer ended at byte {start + len(data):,} of {stop:,}.")
        except TransientError:
            if len(data) == n_before:
                raise
        return len(data) == stop - start

    while not retry(read_on):
        retry.stopped.wait(_FIRST_WAIT_SECONDS)
    return data


def read_file(store: Store, path: str, retry: Retry) -> bytearray:
    """Return a small file, its checksum compared. Raises FetchError, also for one that no such file is as large as."""
    file = store.files[path]
    if file.nbytes > MAX_INDEX_NBYTES:
        raise FetchError(f"{path}: listed with {file.nbytes:,} bytes, more than any such file has. Tell the owner.")
    data = read_range(store, path, 0, file.nbytes, retry)
    checksum = Checksum(path, file)
    checksum.update(data)
    if fault := checksum.fault():
        raise FetchError(fault)
    return data


class Checksum:
    """Compares the bytes of a file with what the store states of it, if it does."""

    def __init__(self, path: str, file: RemoteFile):
        self._path = path
        self._kind, self._expected = file.checksum or ("", "")
        self._digest: Any = None
        if self._kind:
            self._digest = hashlib.sha256() if self._kind == SHA256 else new_git_blob_hash(file.nbytes)

    def update(self, data: bytes | bytearray) -> None:
        """Add the next bytes."""
        if self._digest:
            self._digest.update(data)

    def update_from(self, path: Path) -> None:
        """Add the bytes of a file on this machine."""
        if self._digest and path.exists():
            add_file(self._digest, path)

    def fault(self) -> str | None:
        """Return a sentence where all bytes have passed and are not those that the store states."""
        if self._digest is None or self._digest.hexdigest() == self._expected:
            return None
        return (
            f"{self._path}: the {self._kind} of what came is {self._digest.hexdigest()[:12]}..., the store says"
            f" {self._expected[:12]}...: damaged there or on the way. Run the same command again; if it stays,"
            " tell the owner."
        )
