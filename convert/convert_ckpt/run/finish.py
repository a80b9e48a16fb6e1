"""The SHA-256 of output shards that are all written, as many side by side as the processor gains by."""

import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager

import numpy as np

from convert_ckpt.run.buffers import Scratch
from convert_ckpt.run.digest import Hasher

_PIECE_NBYTES = 2 * 2**20


class FileHashing(AbstractContextManager["FileHashing"]):
    """Threads that hash files piece by piece; a file may join at any time. Leaving waits for them.

    A thread hashes as many files in one step as the processor gains by, so there are no more threads than that needs.
    """

    def __init__(self, hasher: Hasher):
        self._hasher = hasher
        self._pool = ThreadPoolExecutor(hasher.n_chains, thread_name_prefix="hash")
        self._waiting: deque[_File] = deque()
        self._n_unfinished = 0
        self._n_threads = 0
        self._lock = threading.Lock()

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def hash_file(self, fd: int) -> str:
        """Return the SHA-256 of an open file; may be called from any number of threads."""
        file = _File(fd, self._hasher)
        with self._lock:
            self._waiting.append(file)
            self._n_unfinished += 1
            if self._n_threads < self._n_useful_threads():
                self._n_threads += 1
                self._pool.submit(self._work)
        return file.result.result()

    def _n_useful_threads(self) -> int:
        return min(self._hasher.n_chains, -(-self._n_unfinished // self._hasher.n_lanes))

    def _work(self) -> None:
        scratch = Scratch()
        while files := self._take():
            try:
                pieces = [file.read(scratch.take(str(i), _PIECE_NBYTES)) for i, file in enumerate(files)]
                self._hasher.update([file.digest for file in files], pieces)
                for file, piece in zip(files, pieces, strict=True):
                    if len(piece) < _PIECE_NBYTES:
                        file.result.set_result(file.digest.hexdigest())
            except BaseException as error:
                for file in files:
                    if not file.result.done():
                        file.result.set_exception(error)
            with self._lock:
                self._waiting += [file for file in files if not file.result.done()]
                self._n_unfinished -= sum(file.result.done() for file in files)

    def _take(self) -> "list[_File]":
        """Return the files of the next step; none where the other threads are enough."""
        with self._lock:
            if self._n_threads > self._n_useful_threads():
                self._n_threads -= 1
                return []
            return [self._waiting.popleft() for _ in range(min(self._hasher.n_lanes, len(self._waiting)))]


class _File:
    """An open file, hashed up to ``offset``."""

    def __init__(self, fd: int, hasher: Hasher):
        self._fd = fd
        self._offset = 0
        self.digest = hasher.open()
        self.result: Future[str] = Future()

    def read(self, out: np.ndarray) -> np.ndarray:
        """Return the next bytes, fewer than asked for at the end alone."""
        n_read = 0
        while n_read < len(out) and (n := os.preadv(self._fd, [out.data[n_read:]], self._offset + n_read)):
            n_read += n
        self._offset += n_read
        return out[:n_read]
