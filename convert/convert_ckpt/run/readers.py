"""The source shards of one component: waited for, read, hashed in order, and released."""

import os
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
from blake3 import blake3

from convert_ckpt.run.schedule import Slab, list_fetches
from convert_ckpt.run.wait import Signal
from convert_ckpt.source.shards import ShardProvider
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.reader import read_fully
from run_ckpt.storage.shards import Shard

# From a cold disk, reading without it took twice as long.
_READ_AHEAD_NBYTES = 128 * 2**20


class ShardReaders:
    """What the workers read. ``slabs`` are all that will be read, in the order in which they are taken."""

    def __init__(self, shards: Iterable[Shard], provider: ShardProvider, slabs: list[Slab], signal: Signal):
        self._provider = provider
        self._signal = signal
        self._fetches = list_fetches(slabs)
        self._shards = {shard.name: shard for shard in shards}
        self._digests = {shard.name: blake3(shard.header.data) for shard in self._shards.values()}
        self._n_hashed: Counter[str] = Counter()
        self._unread = Counter(shard for slab in slabs for shard in slab.shards)
        self._fds: dict[str, int] = {}

    def start(self) -> None:
        """Begin to bring the shards."""
        self._provider.start(self._fetches)

    def read(self, slab: Slab, out: np.ndarray) -> None:
        """Fill ``out``; wait for the shard to come."""
        if slab.hash_order is not None:
            self._read_ahead(slab)
        shard, view = slab.tensor.shard, slab.tensor.view
        if view.columns and slab.action != "hash":
            view.read(slab.start, out, lambda offset, part: read_fully(self._open(shard), part, offset, shard))
        else:
            self._read(shard, slab.offset, out)

    def read_part(self, shard: str, offset: int, nbytes: int) -> np.ndarray:
        """Return bytes of a shard, which a slab in work reads beside its own."""
        out = np.empty(nbytes, np.uint8)
        self._read(shard, offset, out)
        return out

    def hash(self, slab: Slab, raw: np.ndarray) -> None:
        """Add the bytes of a first reading to the hash of their shard, after those before them."""
        shard = slab.tensor.shard
        if slab.hash_order is None:
            return
        self._signal.wait_until(lambda: self._n_hashed[shard] == slab.hash_order)
        self._digests[shard].update(raw.data)
        with self._signal.notify():
            self._n_hashed[shard] += 1

    def count(self, slab: Slab) -> None:
        """Note that a slab is done; after its last one a shard is released."""
        with self._signal.notify():
            self._unread.subtract(slab.shards)
            done = [shard for shard in slab.shards if not self._unread[shard]]
        for shard in done:
            os.close(self._fds.pop(shard))
            self._provider.release(shard)

    def describe(self, shard: str) -> dict[str, Any]:
        """Return the size in bytes and the BLAKE3 of a fully read shard."""
        return {"nbytes": self._shards[shard].header.file_nbytes, "blake3": self._digests[shard].hexdigest()}

    def stop(self) -> None:
        """Wait for no shard any longer."""
        self._provider.stop()

    def close(self) -> None:
        """Stop, and close all files. No thread may be reading."""
        self._provider.stop()
        while self._fds:
            os.close(self._fds.popitem()[1])

    def _open(self, shard: str) -> int:
        """Return the shard's file, open to read, once it is here."""
        if shard not in self._fds:
            path = self._provider.wait(shard)
            with self._signal.notify():
                if shard not in self._fds:
                    self._fds[shard] = open_to_read(path)
        return self._fds[shard]

    def _read_ahead(self, slab: Slab) -> None:
        """Let the kernel begin to bring what follows in the shard into its page cache."""
        start = slab.offset + (_READ_AHEAD_NBYTES if slab.hash_order else 0)
        nbytes = slab.nbytes if slab.hash_order else _READ_AHEAD_NBYTES
        os.posix_fadvise(self._open(slab.tensor.shard), start, nbytes, os.POSIX_FADV_WILLNEED)

    def _read(self, shard: str, offset: int, out: np.ndarray) -> None:
        read_fully(self._open(shard), out.data, offset, shard)
