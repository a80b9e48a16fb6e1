"""BF16 or F32 rows -> amax of tiles, and E4M3 codes given the scale of each tile.

Twin of runtime.contract.codec.quantize_fp8. A tile is the reach of one scale: the whole slab, a row,
or 128 x 128.
"""

import numpy as np
from numba import float32, uint8, uint32

from convert.kernels.rows import (
    add_errors,
    as_bits,
    as_float,
    compiled,
    magnitudes,
    row_maximum,
    row_unit,
    widen,
)
from runtime.contract.formats import E4M3_MAX

# float32 bits of 2^-6, the smallest normal E4M3 value.
_SMALLEST_NORMAL_BITS = 0x3C800000
# Adding 2^14 to |x| < 2^-6 leaves it in steps of 2^-9, the subnormal step, rounded to nearest even.
_SUBNORMAL_SHIFTER = float(2**14)
# Of a float32's bits, 20 mantissa bits go and the exponent bias falls from 127 to 7.
_DROPPED_BITS = 20
_REBIAS = (127 - 7) << 3


@compiled
def tile_maxima(weight, tile_rows, tile_cols, out_bits):
    """out_bits[i, j] = float32 bits of the largest magnitude of tile (i, j).

    weight: int16 (BF16) or int32 (F32) bits [n, K]. out_bits: uint32 [ceil(n/rows), ceil(K/cols)].
    """
    n_rows, K = weight.shape
    magnitude = np.empty(K, weight.dtype)
    scratch = np.empty(K, weight.dtype)
    out_bits[:] = 0
    for n in range(n_rows):
        magnitudes(weight[n], magnitude)
        for tile in range(out_bits.shape[1]):
            part = magnitude[tile * tile_cols : min(K, (tile + 1) * tile_cols)]
            bits = uint32(row_maximum(part, scratch)) << widen(magnitude)
            out_bits[n // tile_rows, tile] = max(out_bits[n // tile_rows, tile], bits)


@compiled
def _encode(magnitude, scale, codes, decoded):
    """codes[k] = E4M3 code of magnitude / scale, at most 448; decoded[k] = float32 bits of its value."""
    for k in range(magnitude.shape[0]):
        quotient = as_float(uint32(magnitude[k]) << widen(magnitude)) / scale
        quotient = min(quotient, float32(E4M3_MAX))
        bits = as_bits(quotient)
        is_normal = bits >= uint32(_SMALLEST_NORMAL_BITS)
        # Casts keep numba from widening each step to 64 bits.
        rounded = uint32(bits + uint32(0x7FFFF) + uint32((bits >> uint32(_DROPPED_BITS)) & uint32(1)))
        normal_code = uint32((rounded >> uint32(_DROPPED_BITS)) - uint32(_REBIAS))
        shifted = quotient + float32(_SUBNORMAL_SHIFTER)
        codes[k] = uint8(normal_code) if is_normal else uint8(as_bits(shifted) & uint32(0xFF))
        value = as_float(uint32(rounded & uint32(0xFFF00000)))
        decoded[k] = as_bits((value if is_normal else shifted - float32(_SUBNORMAL_SHIFTER)) * scale)


@compiled
def _add_signs(row, codes):
    for k in range(row.shape[0]):
        codes[k] |= uint8(0x80) if row[k] < 0 else uint8(0)


@compiled
def encode_slab(weight, scales, tile_rows, tile_cols, out, measured):
    """Write the E4M3 codes of the rows of ``weight`` to ``out`` uint8 [n, K].

    weight: int16 (BF16) or int32 (F32) bits [n, K], K a multiple of 16.
    scales: float32 [ceil(n / tile_rows), ceil(K / tile_cols)].
    measured: float64 [3], set to the sum of squared errors, of squares, and the largest |error|.
    """
    n_rows, K = weight.shape
    magnitude = np.empty(K, weight.dtype)
    scratch = np.empty(K, weight.dtype)
    decoded = np.empty(K, np.uint32)
    values = np.empty(K, np.float32)
    value_scratch = np.empty(K, np.float32)
    measured[:] = 0
    for n in range(n_rows):
        magnitudes(weight[n], magnitude)
        unit = row_unit(uint32(row_maximum(magnitude, scratch)) << widen(magnitude))
        for tile in range(scales.shape[1]):
            cols = slice(tile * tile_cols, min(K, (tile + 1) * tile_cols))
            _encode(magnitude[cols], scales[n // tile_rows, tile], out[n, cols], decoded[cols])
        add_errors(magnitude, decoded, unit, values, value_scratch, measured)
        _add_signs(weight[n], out[n])
