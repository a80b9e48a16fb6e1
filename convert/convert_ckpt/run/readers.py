"""The source shards of one component: waited for, read, hashed in order, and released."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from blake3 import blake3

from convert_ckpt.run.schedule import Slab, list_fetches
from convert_ckpt.run.wait import Signal
from convert_ckpt.source.shards import ShardProvider
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.reader import read_fully, read_parts
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

    def read(self, slabs: list[Slab], outs: list[np.ndarray]) -> None:
        """Fill ``outs``; wait for the shards to come."""
        for shard, group in _neighbours(slabs, outs):
            slab, out = group[0]
            if slab.hash_order is not None:
                self._read_ahead(shard, slab, sum(slab.nbytes for slab, _ in group))
            if _is_column(slab):
                self._read_columns(slab, out)
            else:
                read_parts(self._open(shard), [out.data for _, out in group], slab.offset, shard)

    def _read_columns(self, slab: Slab, out: np.ndarray) -> None:
        shard = slab.tensor.shard
        slab.tensor.view.read(slab.start, out, lambda at, part: read_fully(self._open(shard), part, at, shard))

    def read_part(self, shard: str, offset: int, nbytes: int) -> np.ndarray:
        """Return bytes of a shard, which a slab in work reads beside its own."""
        out = np.empty(nbytes, np.uint8)
        read_fully(self._open(shard), out.data, offset, shard)
        return out

    def hash(self, slabs: list[Slab], raws: list[np.ndarray]) -> None:
        """Add the bytes of first readings to the hash of their shard, after those before them."""
        read = [pair for pair in zip(slabs, raws, strict=True) if pair[0].hash_order is not None]
        for shard, group in groupby(read, key=lambda pair: pair[0].tensor.shard):
            pairs = list(group)
            self._wait_for_turn(pairs[0][0])
            for _, raw in pairs:
                self._digests[shard].update(raw.data)
            with self._signal.notify():
                self._n_hashed[shard] += len(pairs)

    def _wait_for_turn(self, slab: Slab) -> None:
        self._signal.wait_until(lambda: self._n_hashed[slab.tensor.shard] == slab.hash_order)

    def count(self, slabs: list[Slab]) -> None:
        """Note that slabs are done; after its last one a shard is released."""
        read = Counter(shard for slab in slabs for shard in slab.shards)
        with self._signal.notify():
            self._unread.subtract(read)
            done = [shard for shard in read if not self._unread[shard]]
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
                    self._fds[shard] = _open_unchanged(self._shards[shard], path)
        return self._fds[shard]

    def _read_ahead(self, shard: str, slab: Slab, nbytes: int) -> None:
        """Let the kernel begin to bring what follows in the shard into its page cache."""
        start = slab.offset + (_READ_AHEAD_NBYTES if slab.hash_order else 0)
        nbytes = nbytes if slab.hash_order else _READ_AHEAD_NBYTES
        os.posix_fadvise(self._open(shard), start, nbytes, os.POSIX_FADV_WILLNEED)


def _open_unchanged(shard: Shard, path: Path) -> int:
    """Return a descriptor of the file whose header was read, on this machine or another, before the plan was made."""
    fd, header = open_to_read(path), shard.header
    if os.fstat(fd).st_size == header.file_nbytes and os.pread(fd, len(header.data), 0) == header.data:
        return fd
    os.close(fd)
    raise CheckpointError(f"{shard.name}: is not the file whose header was read. Give the same command again.")


def _neighbours(slabs: list[Slab], outs: list[np.ndarray]) -> Iterator[tuple[str, list[tuple[Slab, np.ndarray]]]]:
    """Yield the shard and the slabs of each row of slabs that follow each other in it."""
    row: list[tuple[Slab, np.ndarray]] = []
    for slab, out in zip(slabs, outs, strict=True):
        before = row[-1][0] if row else None
        if before and not _is_next(before, slab):
            yield before.tensor.shard, row
            row = []
        row.append((slab, out))
    yield row[0][0].tensor.shard, row


def _is_next(before: Slab, slab: Slab) -> bool:
    is_behind = (before.tensor.shard, before.offset + before.nbytes) == (slab.tensor.shard, slab.offset)
    return is_behind and not _is_column(before) and not _is_column(slab)


def _is_column(slab: Slab) -> bool:
    return bool(slab.tensor.view.columns) and slab.action != "hash"
