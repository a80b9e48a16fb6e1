"""Storage orders of weight and scale bytes: tiles, their exact inverse, their padding."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TileLayout:
    """Storage order of a [rows, cols] byte tensor that is made of equal tiles.

    Splitting both dimensions gives the axes (row_tile, *row_split, col_tile, *col_split);
    ``order`` lists these axes from the slowest to the fastest in memory.
    ``pad_to`` is the granule (rows, cols) up to which the tensor is padded with 0x00 first.
    """

    name: str
    row_split: tuple[int, ...]
    col_split: tuple[int, ...]
    order: tuple[int, ...]
    pad_to: tuple[int, int]

    @property
    def tile(self) -> tuple[int, int]:
        return math.prod(self.row_split), math.prod(self.col_split)

    def padded_shape(self, rows: int, cols: int) -> tuple[int, int]:
        """Shape in storage of a logical [rows, cols] tensor."""
        return round_up(rows, self.pad_to[0]), round_up(cols, self.pad_to[1])

    def shuffle(self, logical: Tensor) -> Tensor:
        """Return the [rows, cols] byte tensor in storage order, same shape.

        Raises ValueError unless rows and cols are multiples of the tile.
        """
        rows, cols = logical.shape
        split = self.axes(rows, cols)
        return logical.reshape(split).permute(self.order).reshape(rows, cols)

    def unshuffle(self, stored: Tensor) -> Tensor:
        """Return the logical order of a tensor in storage order; the exact inverse of shuffle."""
        rows, cols = stored.shape
        split = self.axes(rows, cols)
        return stored.reshape([split[axis] for axis in self.order]).permute(self.inverse).reshape(rows, cols)

    def pad_to_tile(self, logical: Tensor) -> Tensor:
        """Return ``logical`` [rows, cols] extended with 0x00 to its padded shape."""
        padded = logical.new_zeros(self.padded_shape(*logical.shape))
        padded[: logical.shape[0], : logical.shape[1]] = logical
        return padded

    @property
    def inverse(self) -> tuple[int, ...]:
        """The place in ``order`` of each axis."""
        return tuple(sorted(range(len(self.order)), key=self.order.__getitem__))

    def axes(self, rows: int, cols: int) -> tuple[int, ...]:
        """Return the sizes of the axes. Raises ValueError unless rows and cols are multiples of the tile."""
        tile_rows, tile_cols = self.tile
        if rows % tile_rows or cols % tile_cols:
            raise ValueError(
                f"layout {self.name}: shape [{rows}, {cols}] is not a multiple of the tile"
                f" [{tile_rows}, {tile_cols}]; pad it first"
            )
        return (rows // tile_rows, *self.row_split, cols // tile_cols, *self.col_split)


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is at least ``value``."""
    return -(-value // multiple) * multiple


# The order that a tensor has by itself: a tile of one byte.
ROW_MAJOR = TileLayout("row_major", (1,), (1,), order=(0, 1, 2, 3), pad_to=(1, 1))
# shuffle_weight(layout=(16, 16)) in aiter/ops/shuffle.py; cols are packed bytes (K / 2).
AITER_WEIGHT = TileLayout("aiter_weight_16x16", (16,), (2, 16), order=(0, 2, 3, 1, 4), pad_to=(1, 1))
# shuffle_scale, also called e8m0_shuffle, same file: rows are padded to 256, cols to 8. AITER
# leaves the padding uninitialised; here it is 0x00, since kernels read padded K columns.
AITER_SCALE = TileLayout("aiter_scale_32x8", (2, 16), (2, 4), order=(0, 3, 5, 2, 4, 1), pad_to=(256, 8))

# "1D Block Scaling Factors Layout" of cuBLAS: in each tile of [128, 4] the rows 32 i + j lie at [j, i].
CUBLAS_SCALE = TileLayout("cublas_scale_128x4", (4, 32), (4,), order=(0, 3, 2, 1, 4), pad_to=(128, 4))


@dataclass(frozen=True, repr=False)
class Layout:
    """The storage orders of a weight and its scales, and the GPU architecture that multiplies them as they are.

    ``tuned_K`` is what K is a multiple of in every shape that its kernels are tuned for.
    ``machines`` says in a card what runs it, "" where that follows from the format.
    """

    name: str
    label: str
    weight: TileLayout
    scale: TileLayout
    target_arch: str = "any"
    tuned_K: int = 1
    machines: str = ""

    def __repr__(self) -> str:
        return self.name

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def facts(self) -> dict[str, str]:
        """What manifests and quantization_configs say of the storage orders."""
        return {"weight_layout": self.weight.name, "scale_layout": self.scale.name}


PLAIN = Layout("plain", "row-major", ROW_MAJOR, ROW_MAJOR)
AITER = Layout(
    "aiter",
    "pre-shuffled",
    AITER_WEIGHT,
    AITER_SCALE,
    target_arch="gfx950",
    tuned_K=256,
    machines=(
        "AMD Instinct MI350 series (gfx950) with AITER 0.1.14 or newer; the order was compared with what AITER's own"
        " code makes at commit e4048607a535 (2026-08-22). Weights lie in the order of"
        " `shuffle_weight(w, (16, 16))` and scales in that of `e8m0_shuffle`, so `gemm_a4w4` reads both as they are"
        " stored. Every other machine needs a loader that undoes the order, which is exact; what does not know the"
        " order must not load it."
    ),
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (AITER, PLAIN)}
