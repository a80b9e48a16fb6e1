"""Where a storage order puts an element; twin of run_ckpt.contract.layouts."""

from functools import reduce

from convert_ckpt.kernels.ir import Operand, Vector
from run_ckpt.contract.layouts import TileLayout


def storage_index(layout: TileLayout, row: Vector, col: Vector, cols: Vector) -> Vector:
    """Return the index in storage of element (row, col) of a tensor that is ``cols`` wide, padding included.

    Tiles of rows must be the slowest axis: then the number of rows does not matter, and a slab can be any of them.
    """
    assert layout.order[0] == 0
    positions = [*_split(row, layout.row_split), *_split(col, layout.col_split)]
    sizes: list[Operand] = [1, *layout.row_split, cols // layout.tile[1], *layout.col_split]
    strides, stride = {}, row.like(1)
    for axis in reversed(layout.order):
        strides[axis] = stride
        stride = stride * sizes[axis]
    # Those of the row come first: what does not change along a row is then added up once.
    return reduce(Vector.__add__, (position * strides[axis] for axis, position in enumerate(positions)))


def _split(position: Vector, sizes: tuple[int, ...]) -> list[Vector]:
    """Return a position along one dimension as the tile's number, then the position along each axis of the tile."""
    axes: list[Vector] = []
    for size in reversed(sizes):
        axes.insert(0, position % size)
        position = position // size
    return [position, *axes]
