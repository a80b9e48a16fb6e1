"""BF16 or F32 rows -> amax of tiles, and E4M3 codes given the scale of each tile.

Twin of runtime.contract.codec.quantize_fp8. A tile is the reach of one scale: the whole slab, a row,
or 128 x 128.
"""

import numpy as np
from numba import float32, njit, uint8, uint32

from convert.kernels.rows import JIT, LANES, add_errors, fold_lanes, magnitudes, maximum, to_float_bits
from runtime.contract.formats import E4M3_MAX

# float32 bits of 2^-6, the smallest normal E4M3 value.
_SMALLEST_NORMAL_BITS = 0x3C800000
# Adding 2^14 to |x| < 2^-6 leaves it in steps of 2^-9, the subnormal step, rounded to nearest even.
_SUBNORMAL_SHIFTER = float(2**14)
# Of a float32's bits, 20 mantissa bits go and the exponent bias falls from 127 to 7.
_DROPPED_BITS = 20
_REBIAS = (127 - 7) << 3


@njit(**JIT)
def tile_maxima(weight, widen, tile_rows, tile_cols, out_bits):
    """out_bits[i, j] = float32 bits of the largest magnitude of tile (i, j).

    weight: int16 (BF16) or int32 (F32) bits [n, K]. out_bits: uint32 [ceil(n/rows), ceil(K/cols)].
    """
    n_rows, K = weight.shape
    mask = (1 << 15) - 1 if widen else (1 << 31) - 1
    magnitude = np.empty(K, weight.dtype)
    out_bits[:] = 0
    for n in range(n_rows):
        magnitudes(weight[n], mask, magnitude)
        for tile in range(out_bits.shape[1]):
            part = magnitude[tile * tile_cols : min(K, (tile + 1) * tile_cols)]
            bits = uint32(maximum(part)) << uint32(widen)
            out_bits[n // tile_rows, tile] = max(out_bits[n // tile_rows, tile], bits)


@njit(**JIT)
def _divide(value, scale, quotient, shifted):
    """quotient = min(value / scale, 448); shifted = quotient + 2^14, which rounds subnormals."""
    for k in range(value.shape[0]):
        x = value[k] / scale
        quotient[k] = x if x < float32(E4M3_MAX) else float32(E4M3_MAX)
    for k in range(value.shape[0]):
        shifted[k] = quotient[k] + float32(_SUBNORMAL_SHIFTER)


@njit(**JIT)
def _round(quotient_bits, shifted_bits, rounded_bits, restored_bits, codes):
    """codes = E4M3 codes of the quotients; rounded_bits = float32 bits of their values."""
    for k in range(codes.shape[0]):
        bits = quotient_bits[k]
        up = bits + uint32(0x7FFFF) + ((bits >> uint32(_DROPPED_BITS)) & uint32(1))
        normal = bits >= uint32(_SMALLEST_NORMAL_BITS)
        code = (up >> uint32(_DROPPED_BITS)) - uint32(_REBIAS)
        codes[k] = uint8(code if normal else shifted_bits[k] & uint32(0xFF))
        rounded_bits[k] = (up & uint32(0xFFF00000)) if normal else restored_bits[k]


@njit(**JIT)
def _add_signs(row, shift, codes):
    for k in range(row.shape[0]):
        codes[k] |= uint8((row[k] >> shift) & 0x80)


@njit(**JIT)
def _subtract_shifter(shifted, out):
    for k in range(out.shape[0]):
        out[k] = shifted[k] - float32(_SUBNORMAL_SHIFTER)


@njit(**JIT)
def _multiply(rounded, scale, out):
    for k in range(out.shape[0]):
        out[k] = rounded[k] * scale


@njit(**JIT)
def encode_slab(weight, widen, scales, tile_rows, tile_cols, out, measured):
    """Write the E4M3 codes of the rows of ``weight`` to ``out`` uint8 [n, K].

    weight: int16 (BF16) or int32 (F32) bits [n, K]. scales: float32 [ceil(n/rows), ceil(K/cols)].
    measured: float64 [3], set to the sum of squared errors, of squares, and the largest |error|.
    """
    n_rows, K = weight.shape
    mask = (1 << 15) - 1 if widen else (1 << 31) - 1
    magnitude = np.empty(K, weight.dtype)
    value_bits = np.empty(K, np.uint32)
    value = value_bits.view(np.float32)
    quotient = np.empty(K, np.float32)
    shifted = np.empty(K, np.float32)
    restored = np.empty(K, np.float32)
    rounded = np.empty(K, np.float32)
    decoded = np.empty(K, np.float32)
    errors = np.zeros(LANES, np.float64)
    signals = np.zeros(LANES, np.float64)
    largest = np.zeros(LANES, np.float32)
    for n in range(n_rows):
        magnitudes(weight[n], mask, magnitude)
        to_float_bits(magnitude, widen, value_bits)
        for tile in range(scales.shape[1]):
            cols = slice(tile * tile_cols, min(K, (tile + 1) * tile_cols))
            _divide(value[cols], scales[n // tile_rows, tile], quotient[cols], shifted[cols])
        _subtract_shifter(shifted, restored)
        _round(
            quotient.view(np.uint32),
            shifted.view(np.uint32),
            rounded.view(np.uint32),
            restored.view(np.uint32),
            out[n],
        )
        for tile in range(scales.shape[1]):
            cols = slice(tile * tile_cols, min(K, (tile + 1) * tile_cols))
            _multiply(rounded[cols], scales[n // tile_rows, tile], decoded[cols])
        add_errors(value, decoded, errors, signals, largest)
        _add_signs(weight[n], 8 if widen else 24, out[n])
    measured[0] = fold_lanes(errors)
    measured[1] = fold_lanes(signals)
    measured[2] = largest.max()
