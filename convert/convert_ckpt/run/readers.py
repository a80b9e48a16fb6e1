"""The source shards of one component: brought, read ahead, read, hashed in order, and given up."""

import contextlib
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from convert_ckpt.plan.plan import TensorPlan
from convert_ckpt.run.digest import Hasher
from convert_ckpt.run.reader import ShardReader
from convert_ckpt.run.schedule import Batch, Slab, list_fetches
from convert_ckpt.run.wait import Gate
from convert_ckpt.source.shards import ShardProvider
from run_ckpt.storage.shards import Shard


class Sources:
    """What the workers read. ``slabs`` are all that will be read, in the order in which work is taken."""

    def __init__(self, shards: Iterable[Shard], supply: ShardProvider, hasher: Hasher, slabs: list[Slab], gate: Gate):
        self._supply = supply
        self._hasher = hasher
        self._gate = gate
        self._fetches = list_fetches(slabs)
        self._readers = {shard.name: ShardReader(shard, hasher.open(shard.header.data)) for shard in shards}
        self._next_turn: Counter[str] = Counter()
        self._unread = Counter(slab.tensor.shard for slab in slabs)

    def start(self) -> None:
        """Begin to bring the shards."""
        self._supply.start(self._fetches)

    def announce(self, batch: Batch) -> None:
        """Let the kernel begin to read a batch, as far as its shards are here.

        A thread that comes late may find the shard done with, closed and gone: it needs no advice any more.
        """
        for slab in batch:
            if self._supply.is_here(slab.tensor.shard):
                with contextlib.suppress(OSError):
                    self._open(slab).announce(slab.offset, slab.nbytes)

    def read(self, slab: Slab, out: np.ndarray) -> None:
        """Fill ``out``; wait for the shard to come."""
        self._open(slab).read(out, slab.offset)

    def hash(self, batch: Batch, raws: list[np.ndarray]) -> None:
        """Add the bytes of a first reading to the digests of their shards, in each shard's order."""
        if batch[0].turn is None:
            return
        self._gate.wait_until(lambda: all(self._next_turn[slab.tensor.shard] == slab.turn for slab in batch))
        self._hasher.update([self._readers[slab.tensor.shard].digest for slab in batch], raws)
        with self._gate.changing():
            self._next_turn.update(slab.tensor.shard for slab in batch)

    def count(self, slab: Slab) -> None:
        """Note that a slab is done with; after its last one a shard is given up."""
        shard = slab.tensor.shard
        if replaced := slab.replaced:
            self._readers[shard].drop(replaced)
        with self._gate.changing():
            self._unread[shard] -= 1
            done = self._unread[shard] == 0
        if done:
            self._readers[shard].close()
            self._supply.release(shard)

    def describe(self, shard: str) -> dict[str, Any]:
        """Return the size and the SHA-256 of a shard of which all has passed."""
        return self._readers[shard].describe()

    def describe_nonfinite(self, tensor: TensorPlan) -> str:
        return self._readers[tensor.shard].describe_nonfinite(tensor.stored)

    def stop(self) -> None:
        """Wait for no shard any longer."""
        self._supply.stop()

    def close(self) -> None:
        self._supply.stop()
        for reader in self._readers.values():
            reader.close()

    def _open(self, slab: Slab) -> ShardReader:
        reader = self._readers[slab.tensor.shard]
        reader.open(self._supply.wait)
        return reader
