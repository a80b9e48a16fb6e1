"""One output shard: planned header first, bytes at their offset, its final name when complete."""

import os
from concurrent.futures import Executor, Future, wait
from threading import Lock
from typing import Any

from run_ckpt.storage.folders import Folder, write_all
from run_ckpt.storage.hashing import hash_file
from run_ckpt.storage.header import Header

_FLUSH_NBYTES = 64 * 2**20


class ShardWriter:
    """Writes the tensors of ``header`` to the file ``name`` in ``folder``, in any order, from any thread.

    The file has a random name until finish(). Bytes that are never written are zero. Long writes are
    flushed early on ``background`` so that the last fsync finds little to do.
    """

    def __init__(self, folder: Folder, name: str, header: Header, background: Executor):
        self._folder = folder
        self._name = name
        self._places = {stored.spec.name: stored for stored in header.tensors}
        self._nbytes = header.file_nbytes
        self._background = background
        self._lock = Lock()
        self._unflushed = 0
        self._flush: Future[None] = Future()
        self._flush.set_result(None)
        self._temporary, self._fd = folder.create()
        os.ftruncate(self._fd, self._nbytes)
        write_all(self._fd, memoryview(header.data), 0)

    def write(self, name: str, offset: int, data: bytes | memoryview) -> None:
        """Write ``data`` (contiguous) at byte ``offset`` of tensor ``name``."""
        view = memoryview(data).cast("B")
        with self._lock:  # the kernel lets one thread at a time write to a file, and the others spin
            write_all(self._fd, view, self._places[name].offset + offset)
            self._unflushed += len(view)
            if self._unflushed >= _FLUSH_NBYTES and self._flush.done():
                self._flush.result()  # the kernel reports a failed write once, so look at every answer
                self._unflushed = 0
                self._flush = self._background.submit(os.fdatasync, self._fd)

    def close(self) -> None:
        """Let go of the file, and remove it if it is not finished. May be called twice."""
        self._close()
        self._folder.remove(self._temporary)

    def finish(self) -> dict[str, Any]:
        """Make the file durable under its final name; return what the manifest says of it (hashing.describe_file)."""
        digest = hash_file(self._fd)
        self._flush.result()
        os.fsync(self._fd)
        self._close()
        self._folder.rename(self._temporary, self._name)
        return {"nbytes": self._nbytes, "blake3": digest}

    def _close(self) -> None:
        wait([self._flush])
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
