"""A source shard, read slab by slab into buffers that the caller reuses."""

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from convert_ckpt.run.digest import Digest
from convert_ckpt.run.slab import weight_bits
from run_ckpt.storage.header import StoredTensor
from run_ckpt.storage.reader import read_fully
from run_ckpt.storage.shards import Shard


class ShardReader:
    """A source shard to read, and the hash of the bytes that passed in order.

    ``digest`` holds the header; the owner adds every slab once, by rising offset.
    """

    def __init__(self, shard: Shard, digest: Digest):
        self._shard = shard
        self.digest = digest
        self._fd: int | None = None
        self._opening = threading.Lock()

    def open(self, find: Callable[[str], Path]) -> None:
        """Open the file that ``find`` returns, read-only, unless it is open."""
        with self._opening:
            if self._fd is None:
                self._fd = os.open(find(self._shard.name), os.O_RDONLY)
                os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def announce(self, offset: int, nbytes: int) -> None:
        """Let the kernel begin to read these bytes into its page cache."""
        if (fd := self._fd) is not None:
            os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_WILLNEED)

    def drop(self, span: range) -> None:
        """Take these bytes out of the kernel's page cache, so that their memory is there for what is written.

        Without it a conversion would push other files out of the cache; and where memory that is free goes back to
        a hypervisor, each new page would have to be fetched from there.
        """
        assert self._fd is not None
        os.posix_fadvise(self._fd, span.start, len(span), os.POSIX_FADV_DONTNEED)

    def read(self, out: np.ndarray, offset: int) -> None:
        """Fill ``out`` from byte ``offset`` of the file."""
        assert self._fd is not None
        read_fully(self._fd, out.data, offset, self._shard.name)

    def describe(self) -> dict[str, Any]:
        """Return the file's size in bytes and SHA-256, once all of it has passed."""
        return {"nbytes": self._shard.header.file_nbytes, "sha256": self.digest.hexdigest()}

    def describe_nonfinite(self, tensor: StoredTensor) -> str:
        """Name the first element of a weight that is NaN or infinite."""
        N, K = tensor.spec.shape
        row = np.empty(tensor.spec.nbytes // N, np.uint8)
        for n in range(N):
            self.read(row, tensor.offset + n * row.nbytes)
            bits = weight_bits(row, tensor.spec.dtype, K)
            values = (bits.view(np.uint16).astype(np.uint32) << 16 if tensor.spec.dtype == "BF16" else bits).view(
                np.float32
            )[0]
            if not np.isfinite(values).all():
                k = int(np.argmin(np.isfinite(values)))
                return (
                    f"{self._shard.name}: {tensor.spec.name}[{n}, {k}] is {values[k]}: no code stands for it."
                    " Repair the source, or keep this layer with --ignore."
                )
        raise AssertionError("a non-finite weight was reported, but all its rows are finite")
