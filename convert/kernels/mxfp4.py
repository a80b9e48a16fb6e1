"""BF16 or F32 rows -> packed E2M1 codes and E8M0 scales, tiled or row-major, in one pass.

Twin of runtime.contract.codec.quantize_mxfp4 followed by runtime.contract.layouts.
"""

from dataclasses import dataclass
from functools import cache

import numpy as np
from numba import float32, float64, int16, uint8, uint32

from convert.kernels.rows import (
    add_errors,
    as_bits,
    as_float,
    block_maxima,
    compiled,
    magnitudes,
    row_maximum,
    row_sum,
    row_unit,
    widen,
)
from runtime.contract.formats import (
    E2M1_MIDPOINTS,
    E2M1_TIE_ROUNDS_UP,
    E2M1_VALUES,
    E8M0_BIAS,
    MXFP4_BLOCK_SIZE,
    SCALE_RULES,
)

BLOCK = MXFP4_BLOCK_SIZE
EVEN, _FLOOR, ROUNDUP, MSE = range(len(SCALE_RULES))
RULE_IDS = {rule: SCALE_RULES.index(rule) for rule in SCALE_RULES}

# 2^(code - 127), float64: code 254 times 6 is beyond float32.
_SCALES = np.array([2.0 ** (code - E8M0_BIAS) for code in range(255)])
_E2M1_F64 = np.array(E2M1_VALUES)


@dataclass(frozen=True)
class Tables:
    """What the kernel looks up for one kind of input, by scale code.

    thresholds [255, 7]: magnitude bits t such that an E2M1 code is the count of t < magnitude.
    decoded [255, 8]: magnitude bits of the value of each E2M1 code.
    """

    thresholds: np.ndarray
    decoded: np.ndarray


@cache
def make_tables(dtype: np.dtype) -> Tables:
    """Return the tables for BF16 bits (int16) or float32 bits (int32)."""
    shift = 32 - 8 * dtype.itemsize
    # Where a tie rounds up the threshold is just below the midpoint.
    thresholds = _magnitude_bits(_SCALES[:, None] * np.array(E2M1_MIDPOINTS), shift) - np.array(E2M1_TIE_ROUNDS_UP)
    decoded = _magnitude_bits(_SCALES[:, None] * np.array(E2M1_VALUES), shift)
    return Tables(thresholds.astype(dtype), decoded.astype(dtype))


def _magnitude_bits(values: np.ndarray, shift: int) -> np.ndarray:
    with np.errstate(over="ignore"):  # beyond float32: infinity, which no magnitude reaches
        return values.astype(np.float32).view(np.int32) >> shift


@compiled
def _choose_scales(rule, maxima, scale_codes):
    """scale_codes[b] from the block maxima; see runtime/contract/scales.py."""
    if rule == ROUNDUP:
        for b in range(scale_codes.shape[0]):
            bits = as_bits(as_float(uint32(maxima[b]) << widen(maxima)) / float32(6.0))
            code = (bits >> uint32(23)) + uint32((bits & uint32(0x7FFFFF)) != 0)
            scale_codes[b] = min(code, uint32(254))
    else:
        rounding = uint32(0x200000) if rule == EVEN else uint32(0)
        for b in range(scale_codes.shape[0]):
            exponent = ((uint32(maxima[b]) << widen(maxima)) + rounding) >> uint32(23)
            code = exponent - uint32(2) if exponent > uint32(2) else uint32(0)
            scale_codes[b] = uint32(254) if exponent >= uint32(255) else code


@compiled
def _encode(magnitude, scale_codes, thresholds, codes):
    """codes[k] = E2M1 code of |w[k]| against its block's scale."""
    for b in range(scale_codes.shape[0]):
        s = scale_codes[b]
        t0 = thresholds[s, 0]
        t1 = thresholds[s, 1]
        t2 = thresholds[s, 2]
        t3 = thresholds[s, 3]
        t4 = thresholds[s, 4]
        t5 = thresholds[s, 5]
        t6 = thresholds[s, 6]
        for j in range(BLOCK):
            a = magnitude[b * BLOCK + j]
            codes[b * BLOCK + j] = (
                int16(a > t0)
                + int16(a > t1)
                + int16(a > t2)
                + int16(a > t3)
                + int16(a > t4)
                + int16(a > t5)
                + int16(a > t6)
            )


@compiled
def _decode(codes, scale_codes, table, decoded):
    """decoded[k] = magnitude bits of the code's value.

    The value has one mantissa bit: its bits are the code placed on the mantissa's top bit, plus the
    scale's exponent less one. Code 1 (a half) has no mantissa, code 0 nothing at all. Where that
    would be subnormal the table knows.
    """
    # Every step is cast back to the array's own type: numba would widen it to 64 bits, and LLVM then
    # use a quarter of the vector.
    integer = decoded.dtype.type
    top_bit = integer(uint32(1 << 22) >> widen(decoded))
    one = integer(1)
    for b in range(scale_codes.shape[0]):
        s = scale_codes[b]
        if s < 2:
            for j in range(BLOCK):
                decoded[b * BLOCK + j] = table[s, codes[b * BLOCK + j]]
        else:
            base = integer((np.int32(s) - 1) * 2 * np.int32(top_bit))
            for j in range(BLOCK):
                c = integer(codes[b * BLOCK + j])
                bits = integer(integer(c * top_bit) + base)
                bits = integer(bits - top_bit) if c == one else bits
                decoded[b * BLOCK + j] = bits if c >= one else integer(0)


@compiled
def _block_errors(magnitude, scale_codes, thresholds, codes, errors):
    """errors[b] = sum of squared errors of block b, float64, by halves."""
    _encode(magnitude, scale_codes, thresholds, codes)
    squares = np.empty(BLOCK, np.float64)
    for b in range(scale_codes.shape[0]):
        for j in range(BLOCK):
            x = float64(as_float(uint32(magnitude[b * BLOCK + j]) << widen(magnitude)))
            error = x - _E2M1_F64[codes[b * BLOCK + j]] * _SCALES[scale_codes[b]]
            squares[j] = error * error
        errors[b] = row_sum(squares)


@compiled
def _try_larger_scales(magnitude, thresholds, codes, scale_codes):
    """Raise scale_codes[b] by one where that makes the block's squared error smaller."""
    n_blocks = scale_codes.shape[0]
    larger = np.empty(n_blocks, np.uint8)
    errors = np.empty(n_blocks, np.float64)
    larger_errors = np.empty(n_blocks, np.float64)
    for b in range(n_blocks):
        larger[b] = min(scale_codes[b] + 1, 254)
    _block_errors(magnitude, scale_codes, thresholds, codes, errors)
    _block_errors(magnitude, larger, thresholds, codes, larger_errors)
    for b in range(n_blocks):
        if larger_errors[b] < errors[b]:
            scale_codes[b] = larger[b]


@compiled
def _add_signs(row, codes):
    for k in range(row.shape[0]):
        codes[k] |= int16(8) if row[k] < 0 else int16(0)


@compiled
def _pack(code_pairs, packed):
    """packed[i] = low nibble of pair i's first code, high nibble its second."""
    for i in range(packed.shape[0]):
        pair = code_pairs[i]
        packed[i] = uint8(pair | (pair >> uint32(12)))


@compiled
def _store_tiled(n, packed_words, scale_codes, weight_words, scale_out, scale_pitch):
    """Put row n's bytes where contract.layouts.AITER_WEIGHT and AITER_SCALE want them.

    A block's 16 packed bytes stay together: 16 rows of them make a 256-byte tile.
    """
    n_blocks = scale_codes.shape[0]
    word = (n // 16) * n_blocks * 32 + (n % 16) * 2
    for b in range(n_blocks):
        weight_words[word] = packed_words[2 * b]
        weight_words[word + 1] = packed_words[2 * b + 1]
        word += 32
    base = (n // 32) * 32 * scale_pitch + (n % 16) * 4 + (n % 32) // 16
    for b in range(n_blocks):
        scale_out[base + (b // 8) * 256 + (b % 4) * 64 + ((b % 8) // 4) * 2] = scale_codes[b]


@compiled
def quantize_slab(weight, thresholds, table, rule, tiled, weight_out, scale_out, scale_pitch, measure, measured):
    """Quantize the rows of ``weight``; return the float32 bits of the largest magnitude.

    weight: int16 (BF16) or int32 (F32) bits [n, K], K a multiple of 32; tiled needs n % 32 == 0.
    thresholds, table: the fields of Tables.
    weight_out: uint8 [n * K / 2]. scale_out: uint8 [n * scale_pitch], zero where nothing is written.
    measured: float64 [3], set to the sum of squared errors, of squares, and the largest |error|, or to
    zeros unless ``measure``.
    """
    n_rows, K = weight.shape
    n_blocks = K // BLOCK
    magnitude = np.empty(K, weight.dtype)
    maxima = np.empty(K // 2, weight.dtype)
    scratch = np.empty(n_blocks, weight.dtype)
    decoded = np.empty(K, weight.dtype)
    codes = np.empty(K, np.int16)
    packed = np.empty(K // 2, np.uint8)
    scale_codes = np.empty(n_blocks, np.uint8)
    values = np.empty(K, np.float32)
    value_scratch = np.empty(K, np.float32)
    largest_bits = uint32(0)
    measured[:] = 0
    for n in range(n_rows):
        row = weight[n]
        magnitudes(row, magnitude)
        block_maxima(magnitude, maxima)
        row_bits = uint32(row_maximum(maxima[:n_blocks], scratch)) << widen(maxima)
        largest_bits = max(largest_bits, row_bits)
        _choose_scales(rule, maxima, scale_codes)
        if rule == MSE:
            _try_larger_scales(magnitude, thresholds, codes, scale_codes)
        _encode(magnitude, scale_codes, thresholds, codes)
        if measure:
            _decode(codes, scale_codes, table, decoded)
            add_errors(magnitude, decoded, row_unit(row_bits), values, value_scratch, measured)
        _add_signs(row, codes)
        if tiled:
            _pack(codes.view(np.uint32), packed)
            _store_tiled(n, packed.view(np.uint64), scale_codes, weight_out.view(np.uint64), scale_out, scale_pitch)
        else:
            _pack(codes.view(np.uint32), weight_out[n * (K // 2) : (n + 1) * (K // 2)])
            scale_out[n * scale_pitch : n * scale_pitch + n_blocks] = scale_codes
    return largest_bits
