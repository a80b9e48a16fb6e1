"""One output shard: planned header first, bytes at their offset, its final name when complete."""

import os
from concurrent.futures import Executor, Future, wait
from pathlib import Path
from threading import Lock
from typing import Any

from run_ckpt.storage.atomic import sync_folder
from run_ckpt.storage.hashing import hash_file
from run_ckpt.storage.header import Header

_FLUSH_NBYTES = 64 * 2**20
_PART_SUFFIX = ".part"


class ShardWriter:
    """Writes the tensors of ``header`` to ``path`` in any order, from any thread.

    The file has another name until finish(). Bytes that are never written are zero. Long writes are
    flushed early on ``background`` so that the last fsync finds little to do.
    """

    def __init__(self, path: Path, header: Header, background: Executor):
        self._path = path
        self._part = path.with_name(path.name + _PART_SUFFIX)
        self._places = {stored.spec.name: stored for stored in header.tensors}
        self._nbytes = header.file_nbytes
        self._background = background
        self._lock = Lock()
        self._unflushed = 0
        self._flush: Future[None] = Future()
        self._flush.set_result(None)
        self._fd = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        os.ftruncate(self._fd, self._nbytes)
        _write_all(self._fd, memoryview(header.data), 0)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` (contiguous) at byte ``offset`` of tensor ``name``."""
        view = memoryview(data).cast("B")
        with self._lock:  # the kernel lets one thread at a time write to a file, and the others spin
            _write_all(self._fd, view, self._places[name].offset + offset)
            self._unflushed += len(view)
            if self._unflushed >= _FLUSH_NBYTES and self._flush.done():
                self._flush.result()  # the kernel reports a failed write once, so look at every answer
                self._unflushed = 0
                self._flush = self._background.submit(os.fdatasync, self._fd)

    def close(self) -> None:
        """Let go of the file, finished or not. May be called twice."""
        wait([self._flush])
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def finish(self) -> dict[str, Any]:
        """Make the file durable under its final name; return what the manifest says of it (hashing.describe_file)."""
        digest = hash_file(self._fd)
        self._flush.result()
        os.fsync(self._fd)
        self.close()
        self._part.replace(self._path)
        sync_folder(self._path.parent)
        return {"nbytes": self._nbytes, "blake3": digest}


def _write_all(fd: int, data: memoryview, offset: int) -> None:
    while data:
        n_written = os.pwrite(fd, data, offset)
        data, offset = data[n_written:], offset + n_written
