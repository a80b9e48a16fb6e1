"""Tensors made of parts of stored ones: a checkpoint under other names than its file's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.shards import TensorFolder

if TYPE_CHECKING:
    import numpy as np

# Fills memory with the bytes of a shard from an offset on.
ReadAt = Callable[[int, memoryview], None]


@dataclass(frozen=True)
class Rows:
    """Rows [start, stop) of a whole tensor, which are contiguous bytes.

    With ``matrix``: of that one of a tensor [matrices, rows, columns]. With ``step`` too: its columns start,
    start + step, ... below stop, each a row of what they make; so a weight is read that is stored transposed.
    """

    tensor: str
    start: int
    stop: int
    matrix: int | None = None
    step: int | None = None

    def to_json(self) -> list[Any]:
        """Return the fields that are set."""
        return [value for value in vars(self).values() if value is not None]


@dataclass(frozen=True, slots=True)
class Columns:
    """Columns first, first + step, ... of ``n_matrices`` matrices of ``width`` columns, from byte ``offset`` on.

    Those of one matrix come after those of the one before.
    """

    offset: int
    width: int
    first: int
    step: int
    n_matrices: int = 1

    def read(self, matrix: int, start: int, rows: np.ndarray, read_at: ReadAt) -> None:
        """Fill ``rows`` [n, K] with columns number ``start``.. of those that are taken of a matrix."""
        import numpy as np  # commands that read no tensor do without

        n, K = rows.shape
        # [K, elements from the first to the last column]
        span = np.empty((K, (n - 1) * self.step + 1), rows.dtype)
        at = self.offset + (matrix * K * self.width + self.first + start * self.step) * rows.itemsize
        for k, part in enumerate(span):
            read_at(at + k * self.width * rows.itemsize, part.data.cast("B"))
        rows[:] = span[:, :: self.step].T


@dataclass(frozen=True, slots=True)
class View:
    """A tensor, and where its bytes lie in ``shard``: ``nbytes`` of them from ``offset`` on.

    They are not those of ``spec`` where it is stored in codes. ``pieces`` are (offset, nbytes) of each range where it
    lies in several, in the tensor's order; ``offset`` is that of the first in the shard then. ``rows`` are what it is
    made of; () for a tensor that is stored just so. With ``columns`` its rows are columns there, and ``offset`` says no
    more than where its matrix begins.
    """

    spec: TensorSpec
    shard: str
    offset: int
    nbytes: int
    rows: tuple[Rows, ...] = ()
    columns: Columns | None = None
    pieces: tuple[tuple[int, int], ...] = ()

    @property
    def ranges(self) -> tuple[tuple[int, int], ...]:
        """(offset, nbytes) of each range, in the tensor's order."""
        return self.pieces or ((self.offset, self.nbytes),)

    @property
    def n_rows(self) -> int:
        """Rows; a tensor without dimension has one."""
        return self.spec.shape[0] if self.spec.shape else 1

    def read(self, start: int, out: np.ndarray, read_at: ReadAt) -> None:
        """Fill ``out``, uint8 [nbytes], with the bytes ``start``.. of the tensor."""
        if self.columns:
            self._read_columns(self.columns, start, out, read_at)
            return
        rest = out.data
        for offset, nbytes in self._pieces(start, len(rest)):
            read_at(offset, rest[:nbytes])
            rest = rest[nbytes:]

    def _pieces(self, start: int, nbytes: int) -> Iterator[tuple[int, int]]:
        """Yield (offset in the shard, nbytes) of the bytes ``start``.. of the tensor."""
        for offset, length in self.ranges:
            count = min(length - start, nbytes)
            if count > 0:
                yield offset + start, count
                nbytes -= count
            start = max(0, start - length)

    def _read_columns(self, columns: Columns, start: int, out: np.ndarray, read_at: ReadAt) -> None:
        import numpy as np

        n_rows, K = self.spec.shape
        row_nbytes, n_of_each = self.nbytes // n_rows, n_rows // columns.n_matrices
        first, last = start // row_nbytes, -(-(start + len(out)) // row_nbytes)
        rows = np.empty((last - first, K), f"u{row_nbytes // K}")
        for at in range(first // n_of_each * n_of_each, last, n_of_each):
            begin, end = max(first, at), min(last, at + n_of_each)
            columns.read(at // n_of_each, begin - at, rows[begin - first : end - first], read_at)
        skipped = start - first * row_nbytes
        out[:] = rows.view(np.uint8).reshape(-1)[skipped : skipped + len(out)]


def whole_views(folder: TensorFolder) -> tuple[View, ...]:
    """Return every tensor of a folder as it is stored, shard by shard, by rising offset."""
    return tuple(View(stored.spec, shard.name, stored.offset, stored.spec.nbytes) for shard, stored in folder.tensors())


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
        if _is_makeable(rows, whole):
            made.append(make_view(name, rows, whole))
    return tuple(made)


def all_rows(view: View) -> Rows:
    """Return all rows of a whole tensor."""
    return Rows(view.spec.name, 0, view.n_rows)


def make_view(name: str, rows: Sequence[Rows], whole: Mapping[str, View]) -> View:
    """Return the tensor ``name`` that ``rows`` of whole tensors, all in one shard, make one below the other.

    A bias is a vector, also where it is stored as [1, C, 1, 1]; Wan Animate's are.
    """
    first = whole[rows[0].tensor]
    if rows[0].matrix is not None:
        return _matrix_view(name, rows, first)
    row_nbytes = first.nbytes // max(1, first.n_rows)
    ranges = tuple(
        (whole[part.tensor].offset + part.start * row_nbytes, (part.stop - part.start) * row_nbytes) for part in rows
    )
    shape = (sum(part.stop - part.start for part in rows), *first.spec.shape[1:]) if first.spec.shape else ()
    shape = (math.prod(shape),) if name.endswith(".bias") else shape
    spec, nbytes = TensorSpec(name, first.spec.dtype, shape), sum(length for _, length in ranges)
    pieces = ranges if len(ranges) > 1 else ()
    return View(spec, first.shard, min(ranges)[0], nbytes, tuple(rows), pieces=pieces)


def _matrix_view(name: str, rows: Sequence[Rows], whole: View) -> View:
    """Return what a part of one of the matrices of a tensor makes, or the same part of several in a row."""
    n_matrices, n_rows, width = whole.spec.shape
    part = rows[0]
    assert part.matrix is not None
    offset = whole.offset + part.matrix * (whole.nbytes // n_matrices)
    count = len(range(part.start, part.stop, part.step or 1)) * len(rows)
    spec = TensorSpec(name, whole.spec.dtype, (count, n_rows if part.step else width))
    if part.step:
        columns = Columns(offset, width, part.start, part.step, len(rows))
        return View(spec, whole.shard, offset, spec.nbytes, tuple(rows), columns)
    start = offset + part.start * (whole.nbytes // (n_matrices * n_rows))
    return View(spec, whole.shard, start, spec.nbytes, tuple(rows))


def _is_makeable(rows: Sequence[Rows], whole: Mapping[str, View]) -> bool:
    """True where make_view makes a tensor of parts that a file names: rows, or like columns of matrices in a row."""
    if not all(part.tensor in whole and _fits(part, whole[part.tensor].spec.shape) for part in rows):
        return False
    first = rows[0].matrix
    if first is None or len(rows) == 1:
        return all(part.matrix == first for part in rows)
    return all(part.step and part == replace(rows[0], matrix=first + i) for i, part in enumerate(rows))


def _fits(part: Rows, shape: tuple[int, ...]) -> bool:
    """True where a tensor of that shape has the part."""
    if part.matrix is None:
        return part.stop <= (shape[0] if shape else 1)
    return (
        len(shape) == 3 and 0 <= part.matrix < shape[0] and 0 <= part.start < part.stop <= shape[2 if part.step else 1]
    )
