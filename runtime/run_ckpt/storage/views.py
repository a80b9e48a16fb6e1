"""Tensors made of rows of stored ones: a checkpoint under other names than its file's."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.header import StoredTensor
from run_ckpt.storage.shards import Shard, TensorFolder

Places = Mapping[str, tuple[Shard, StoredTensor]]


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a stored tensor, which are contiguous bytes."""

    tensor: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class View:
    """A tensor, and where its bytes lie in ``shard``: (offset, nbytes) of each range, in the tensor's order.

    ``rows`` are what it is made of; () for a tensor that is stored just so.
    """

    spec: TensorSpec
    shard: str
    ranges: tuple[tuple[int, int], ...]
    rows: tuple[Rows, ...] = ()

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in the shard: not those of ``spec`` where it is stored in codes."""
        return sum(length for _, length in self.ranges)

    @property
    def offset(self) -> int:
        """Where the first of its bytes in the shard lies."""
        return min(offset for offset, _ in self.ranges)

    def pieces(self, start: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield (offset in the shard, nbytes) of the bytes ``start``.. of the tensor."""
        for offset, length in self.ranges:
            count = min(length - start, nbytes)
            if count > 0:
                yield offset + start, count
                nbytes -= count
            start = max(0, start - length)


def whole_views(folder: TensorFolder) -> tuple[View, ...]:
    """Return every tensor of a folder as it is stored, shard by shard, by rising offset."""
    return tuple(
        View(stored.spec, shard.name, ((stored.offset, stored.spec.nbytes),)) for shard, stored in folder.tensors()
    )


def recorded_views(folder: TensorFolder, recorded: Mapping[str, Sequence[Sequence[Any]]] | None) -> tuple[View, ...]:
    """Return the tensors that a manifest says were made of this folder's, as far as the folder has what it takes.

    recorded: name -> (stored tensor, first row, last row + 1) of each part; None where all are as they are stored.
    """
    if recorded is None:
        return whole_views(folder)
    places = tensor_places(folder)
    views = []
    for name, parts in recorded.items():
        rows = [Rows(*part) for part in parts]
        if all(part.tensor in places and part.stop <= _n_rows(places[part.tensor][1].spec) for part in rows):
            views.append(make_view(name, rows, places))
    return tuple(views)


def tensor_places(folder: TensorFolder) -> Places:
    """Return name -> shard and place of every stored tensor."""
    return {stored.spec.name: (shard, stored) for shard, stored in folder.tensors()}


def all_rows(spec: TensorSpec) -> Rows:
    """Return all rows of a stored tensor; one without dimension has one."""
    return Rows(spec.name, 0, _n_rows(spec))


def make_view(name: str, rows: Sequence[Rows], places: Places) -> View:
    """Return the tensor ``name`` that ``rows``, all in one shard, make one below the other."""
    shard, first = places[rows[0].tensor]
    spec = first.spec
    row_nbytes = spec.nbytes // max(1, _n_rows(spec))
    ranges = tuple(
        (places[part.tensor][1].offset + part.start * row_nbytes, (part.stop - part.start) * row_nbytes)
        for part in rows
    )
    shape = (sum(part.stop - part.start for part in rows), *spec.shape[1:]) if spec.shape else ()
    return View(TensorSpec(name, spec.dtype, shape), shard.name, ranges, tuple(rows))


def _n_rows(spec: TensorSpec) -> int:
    return spec.shape[0] if spec.shape else 1
