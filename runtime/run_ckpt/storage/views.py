"""Tensors made of rows of stored ones: a checkpoint under other names than its file's."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.shards import TensorFolder


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a whole tensor, which are contiguous bytes."""

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
    def n_rows(self) -> int:
        """Rows; a tensor without dimension has one."""
        return self.spec.shape[0] if self.spec.shape else 1

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


def recorded_views(views: Iterable[View], recorded: Mapping[str, Sequence[Sequence[Any]]] | None) -> tuple[View, ...]:
    """Return the tensors that a manifest says were made of ``views``, as far as these have what it takes.

    recorded: name -> (tensor, first row, last row + 1) of each part; None where all are as they are.
    """
    if recorded is None:
        return tuple(views)
    whole = {view.spec.name: view for view in views}
    made = []
    for name, parts in recorded.items():
        rows = [Rows(*part) for part in parts]
        if all(part.tensor in whole and part.stop <= whole[part.tensor].n_rows for part in rows):
            made.append(make_view(name, rows, whole))
    return tuple(made)


def all_rows(view: View) -> Rows:
    """Return all rows of a whole tensor."""
    return Rows(view.spec.name, 0, view.n_rows)


def make_view(name: str, rows: Sequence[Rows], whole: Mapping[str, View]) -> View:
    """Return the tensor ``name`` that ``rows`` of whole tensors, all in one shard, make one below the other."""
    first = whole[rows[0].tensor]
    row_nbytes = first.nbytes // max(1, first.n_rows)
    ranges = tuple(
        (whole[part.tensor].offset + part.start * row_nbytes, (part.stop - part.start) * row_nbytes) for part in rows
    )
    shape = (sum(part.stop - part.start for part in rows), *first.spec.shape[1:]) if first.spec.shape else ()
    return View(TensorSpec(name, first.spec.dtype, shape), first.shard, ranges, tuple(rows))
