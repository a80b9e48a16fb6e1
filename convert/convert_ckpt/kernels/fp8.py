"""BF16 or F32 rows -> amax of tiles, and E4M3 codes given the scale of each tile.

Twin of run_ckpt.contract.codec.quantize_fp8. A tile is the reach of one scale: the whole slab, a row,
or 128 x 128.
"""

from functools import cache

import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import F32, F64, I8, I32, Array, FunctionBuilder, Vector, larger, smaller
from convert_ckpt.kernels.jit import Kernel
from convert_ckpt.kernels.rounding import (
    STEP,
    RowErrors,
    SlabErrors,
    element_of,
    in_order,
    magnitudes,
    round_to,
    row_maximum,
    to_floats,
)
from run_ckpt.contract.formats import E4M3


def tile_maxima(weight: np.ndarray, tile_rows: int, tile_cols: int) -> np.ndarray:
    """Return the float32 bits of the largest magnitude of each tile, uint32 [ceil(n / rows), ceil(K / cols)].

    weight: int16 (BF16) or int32 (F32) bits [n, K], K and tile_cols multiples of 16. A tile that holds NaN or
    infinity gets bits from 0x7F800000 on.
    """
    n_rows, K = weight.shape
    maxima = np.zeros((-(-n_rows // tile_rows), -(-K // tile_cols)), np.uint32)
    _maxima_kernel(element_of(weight))(weight, maxima, n_rows, K, tile_rows, tile_cols, maxima.shape[1])
    return maxima


def encode_slab(weight: np.ndarray, scales: np.ndarray, tile_rows: int, tile_cols: int, out: np.ndarray) -> np.ndarray:
    """Write the E4M3 codes of ``weight`` / ``scales`` to ``out`` uint8 [n, K]; return the errors.

    weight: int16 (BF16) or int32 (F32) bits [n, K], finite, K and tile_cols multiples of 16.
    scales: float32 [ceil(n / tile_rows), ceil(K / tile_cols)], positive. The errors are float64 [3]: the sum of
    squared errors, of squares, and the largest |error|.
    """
    errors = np.empty(3)
    kernel = _encode_kernel(element_of(weight))
    kernel(weight, scales, out, errors, *weight.shape, tile_rows, tile_cols, scales.shape[1])
    return errors


@cache
def _maxima_kernel(element: ir.IntType) -> Kernel:
    def write(
        build: FunctionBuilder,
        weight: Array,
        maxima: Array,
        n_rows: Vector,
        K: Vector,
        tile_rows: Vector,
        tile_cols: Vector,
        n_tiles: Vector,
    ) -> None:
        for n in build.range(n_rows):
            row_maxima = maxima.at(n // tile_rows * n_tiles)
            for tile in build.range(n_tiles):
                first = tile * tile_cols
                largest = row_maximum(build, weight.at(n * K + first), smaller(K - first, tile_cols))
                row_maxima.store(tile, larger(largest, row_maxima.load(tile)))

    return Kernel(write, (element, I32))


@cache
def _encode_kernel(element: ir.IntType) -> Kernel:
    def write(
        build: FunctionBuilder,
        weight: Array,
        scales: Array,
        out: Array,
        errors: Array,
        n_rows: Vector,
        K: Vector,
        tile_rows: Vector,
        tile_cols: Vector,
        n_tiles: Vector,
    ) -> None:
        slab_errors = SlabErrors(build)
        for n in build.range(n_rows):
            row, row_out, row_scales = weight.at(n * K), out.at(n * K), scales.at(n // tile_rows * n_tiles)
            row_errors = RowErrors(build, row_maximum(build, row, K))
            for tile in build.range(n_tiles):
                scale = row_scales.load(tile).splat(STEP)
                first = tile * tile_cols
                for i in build.range(smaller(K - first, tile_cols) // STEP):
                    k = first + i * STEP
                    bits = row.load(k, STEP)
                    x = to_floats(magnitudes(bits))
                    codes, values = round_to(x / scale, E4M3.name)
                    row_errors.add(x, values * scale)
                    signs = (bits >> (element.width - 8)) & 0x80
                    row_out.store(k, (in_order(codes, element) | signs).narrow(I8))
            slab_errors.add(row_errors)
        slab_errors.store(errors)

    return Kernel(write, (element, F32, I8, F64))
