"""BF16 or F32 rows -> amax of tiles, and E4M3 codes given the scale of each tile.

Twin of run_ckpt.contract.codec.quantize_fp8. A tile is the reach of one scale: the whole slab, a row,
or 128 x 128.
"""

from functools import cache

import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import F32, I8, I32, Code, Value, larger
from convert_ckpt.kernels.jit import Kernel, address
from convert_ckpt.kernels.rounding import (
    STEP,
    RowErrors,
    element_of,
    in_order,
    magnitudes,
    no_errors,
    round_to,
    row_maximum,
    store_errors,
    to_floats,
)
from run_ckpt.contract.formats import E4M3_MAX


def tile_maxima(weight: np.ndarray, tile_rows: int, tile_cols: int) -> np.ndarray:
    """Return the float32 bits of the largest magnitude of each tile, uint32 [ceil(n / rows), ceil(K / cols)].

    weight: int16 (BF16) or int32 (F32) bits [n, K], K and tile_cols multiples of 16.
    """
    n_rows, K = weight.shape
    out = np.zeros((-(-n_rows // tile_rows), -(-K // tile_cols)), np.uint32)
    _make_maxima(element_of(weight))(address(weight), address(out), n_rows, K, tile_rows, tile_cols, out.shape[1])
    return out


def encode_slab(weight: np.ndarray, scales: np.ndarray, tile_rows: int, tile_cols: int, out: np.ndarray) -> np.ndarray:
    """Write the E4M3 codes of ``weight`` to ``out`` uint8 [n, K]; return the errors.

    weight: int16 (BF16) or int32 (F32) bits [n, K], K and tile_cols multiples of 16.
    scales: float32 [ceil(n / tile_rows), ceil(K / tile_cols)]. The errors are float64 [3]: the sum of squared
    errors, of squares, and the largest |error|.
    """
    errors = np.empty(3)
    arrays = (weight, scales, out, errors)
    kernel = _make_encoder(element_of(weight))
    kernel(*(address(array) for array in arrays), *weight.shape, tile_rows, tile_cols, scales.shape[1])
    return errors


@cache
def _make_maxima(element: ir.IntType) -> Kernel:
    def write(
        code: Code,
        weight: Value,
        out: Value,
        n_rows: Value,
        K: Value,
        tile_rows: Value,
        tile_cols: Value,
        n_tiles: Value,
    ) -> None:
        def look_at_row(n: Value, _: list[Value]) -> list[Value]:
            def look_at_tile(tile: Value, _: list[Value]) -> list[Value]:
                first = tile * tile_cols
                start = weight + (n * K + first) * (element.width // 8)
                largest = row_maximum(code, start, _tile_width(K, first, tile_cols), element)
                place = out + (n // tile_rows * n_tiles + tile) * 4
                code.store(larger(largest, code.load(place, I32)), place)
                return []

            code.loop(n_tiles, [], look_at_tile)
            return []

        code.loop(n_rows, [], look_at_row)

    return Kernel(f"fp8_maxima_{element}", 7, write)


@cache
def _make_encoder(element: ir.IntType) -> Kernel:
    def write(
        code: Code,
        weight: Value,
        scales: Value,
        out: Value,
        errors: Value,
        n_rows: Value,
        K: Value,
        tile_rows: Value,
        tile_cols: Value,
        n_tiles: Value,
    ) -> None:
        def encode_row(n: Value, total: list[Value]) -> list[Value]:
            row, row_out = weight + n * K * (element.width // 8), out + n * K
            row_scales = scales + n // tile_rows * n_tiles * 4
            row_errors = RowErrors(code, row_maximum(code, row, K, element))

            def encode_tile(tile: Value, sums: list[Value]) -> list[Value]:
                scale = code.load(row_scales + tile * 4, F32).splat(STEP)
                first = tile * tile_cols

                def encode_step(i: Value, sums: list[Value]) -> list[Value]:
                    k = first + i * STEP
                    bits = code.load(row + k * (element.width // 8), element, STEP)
                    x = to_floats(magnitudes(bits))
                    codes, values = round_to(x / scale, mantissa_bits=3, smallest_normal=2.0**-6, largest=E4M3_MAX)
                    signs = (bits >> (element.width - 8)) & 0x80
                    code.store((in_order(codes, element) | signs).narrow(I8), row_out + k)
                    return row_errors.add(sums, x, values * scale)

                return code.loop(_tile_width(K, first, tile_cols) // STEP, sums, encode_step)

            return row_errors.add_to(total, code.loop(n_tiles, row_errors.start, encode_tile))

        store_errors(code, code.loop(n_rows, no_errors(code), encode_row), errors)

    return Kernel(f"fp8_encode_{element}", 9, write)


def _tile_width(K: Value, first: Value, tile_cols: Value) -> Value:
    """Columns of the tile that begins at ``first``; the last one may be narrower."""
    left = K - first
    return (left < tile_cols).where(left, tile_cols)
