"""Files that lie elsewhere: what a store tells of them, and reading them with patience."""

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from run_ckpt.contract.errors import FetchError, TransientError

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
    None where the store tells none."""

    nbytes: int
    version: str
    checksum: tuple[str, str] | None = None


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

    def read(self, path: str, start: int, stop: int) -> Iterator[bytes]:
        """Yield bytes [start, stop) of a file. Raises TransientError or FetchError."""
        ...

    def check_unchanged(self, path: str) -> None:
        """Raise FetchError if the file is no longer the one in ``files``."""
        ...

    @property
    def cache_folder(self) -> Path:
        """Where the store's own cache lies."""
        ...

    def cached(self, path: str) -> Path | None:
        """Return where the store's own cache holds the file already."""
        ...

    def cache(self, path: str) -> Path:
        """Fetch the file into the store's own cache. Raises TransientError or FetchError."""
        ...


class Patience:
    """Decides whether to try again, and waits: longer each time, or as long as the store asks.

    ``stopped`` ends a wait; ``log`` is told of waits that a person would notice.
    """

    def __init__(
        self, log: Callable[[str], None], stopped: threading.Event | None = None, *, first_contact: bool = False
    ):
        self._log = log
        self._stopped = stopped or threading.Event()
        self._tries = _FIRST_CONTACT_TRIES if first_contact else _TRIES
        self._n_failed = 0

    def progressed(self) -> None:
        """Note that the store answered: the count starts anew. Raises FetchError if the run is stopped."""
        self._n_failed = 0
        if self._stopped.is_set():
            raise FetchError("the run was stopped")

    def wait(self, error: TransientError) -> None:
        """Wait before the next try. Raises ``error`` after the last, or if the run is stopped."""
        self._n_failed += 1
        seconds = error.wait_seconds
        if self._n_failed >= self._tries or (seconds or 0) > _LONGEST_WAIT_SECONDS:
            tries = f"{self._n_failed} tries" if self._n_failed > 1 else "one try"
            raise FetchError(f"{error} Gave up after {tries}; run the same command again later.") from error
        if seconds is None:
            seconds = _FIRST_WAIT_SECONDS * 2 ** (self._n_failed - 1)
        if seconds >= _NOTICED_SECONDS:
            self._log(f"{error} Trying again in {seconds:.0f} s.")
        if self._stopped.wait(seconds):
            raise error


def read_range(store: Store, path: str, start: int, stop: int, patience: Patience) -> bytearray:
    """Return bytes [start, stop) of a file; after a cut, what is missing is asked for, not all of it."""
    data = bytearray()
    while len(data) < stop - start:
        try:
            for part in store.read(path, start + len(data), stop):
                data += part
                patience.progressed()
            if len(data) < stop - start:
                raise TransientError(f"{path}: the answer ended at byte {start + len(data):,} of {stop:,}.")
        except TransientError as error:
            patience.wait(error)
    return data


def read_file(store: Store, path: str, patience: Patience) -> bytearray:
    """Return a small file, its checksum compared."""
    file = store.files[path]
    data = read_range(store, path, 0, file.nbytes, patience)
    digest = new_digest(file)
    digest.update(data)
    fault = checksum_fault(path, file, digest)
    if fault:
        raise FetchError(fault)
    return data


def new_digest(file: RemoteFile) -> Any:
    """Return the hash object whose digest the store tells, before the first byte."""
    if file.checksum and file.checksum[0] == GIT_BLOB:
        return hashlib.sha1(f"blob {file.nbytes}\0".encode(), usedforsecurity=False)
    return hashlib.sha256()


def checksum_fault(path: str, file: RemoteFile, digest: Any) -> str | None:
    """Return a sentence if all bytes have passed ``digest`` and it is not the store's."""
    if file.checksum is None or digest.hexdigest() == file.checksum[1]:
        return None
    kind, expected = file.checksum
    return (
        f"{path}: the {kind} of what came is {digest.hexdigest()[:12]}..., the store says {expected[:12]}...:"
        " damaged there or on the way. Run the same command again; if it stays, tell the owner."
    )


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
