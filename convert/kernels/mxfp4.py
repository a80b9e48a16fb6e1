"""BF16 or F32 rows -> packed E2M1 codes and E8M0 scales, tiled or row-major, in one pass.

Twin of runtime.contract.codec.quantize_mxfp4 followed by runtime.contract.layouts.
"""

import numpy as np
from numba import float32, float64, int16, njit, uint8, uint32

from convert.kernels.rows import (
    JIT,
    LANES,
    add_errors,
    block_maxima,
    fold_lanes,
    magnitudes,
    maximum,
    to_float_bits,
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
BLOCK_NBYTES = BLOCK // 2
EVEN, FLOOR, ROUNDUP, MSE = range(4)
RULE_IDS = {rule: SCALE_RULES.index(rule) for rule in SCALE_RULES}

# 2^(code - 127) as float32 and float64, code 0..254.
SCALE_F32 = np.array([2.0 ** (code - E8M0_BIAS) for code in range(255)] + [np.nan], dtype=np.float32)
E2M1_F32 = np.array(E2M1_VALUES, dtype=np.float32)


def threshold_table(widen: int) -> np.ndarray:
    """Return [255, 7] magnitude bits t such that an E2M1 code is the count of t < magnitude.

    Row s is for the scale code s. Where a tie rounds up the bits just below the midpoint stand.
    """
    scales = np.array([2.0 ** (code - E8M0_BIAS) for code in range(255)])
    with np.errstate(over="ignore"):  # beyond float32 no magnitude reaches the threshold
        midpoints = (scales[:, None] * np.array(E2M1_MIDPOINTS)).astype(np.float32)
    bits = midpoints.view(np.int32) >> widen
    return (bits - np.array(E2M1_TIE_ROUNDS_UP)).astype(np.int16 if widen else np.int32)


@njit(**JIT)
def _choose_scales(rule, amax, amax_bits, scale_codes):
    """scale_codes[b] from the float32 block maxima; amax_bits is their bits. See contract/scales.py."""
    if rule == ROUNDUP:
        for b in range(scale_codes.shape[0]):
            amax[b] = amax[b] / float32(6.0)
        for b in range(scale_codes.shape[0]):
            code = (amax_bits[b] >> uint32(23)) + uint32((amax_bits[b] & uint32(0x7FFFFF)) != 0)
            scale_codes[b] = min(code, uint32(254))
    else:
        rounding = uint32(0x200000) if rule == EVEN else uint32(0)
        for b in range(scale_codes.shape[0]):
            exponent = (amax_bits[b] + rounding) >> uint32(23)
            code = exponent - uint32(2) if exponent > uint32(2) else uint32(0)
            scale_codes[b] = uint32(254) if exponent >= uint32(255) else code


@njit(**JIT)
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


@njit(**JIT)
def _decode(codes, scale_codes, scale_values, decoded):
    """decoded[k] = float32 value of the code. 2 x value = code, and 6, 8, 12 for codes 5, 6, 7."""
    for b in range(scale_codes.shape[0]):
        half = scale_values[scale_codes[b]]
        for j in range(BLOCK):
            c = codes[b * BLOCK + j]
            doubled = c + int16(c > int16(4)) + int16(c > int16(5)) + int16(c > int16(6)) * int16(3)
            decoded[b * BLOCK + j] = (float32(doubled) * float32(0.5)) * half


@njit(**JIT)
def _squared_errors(magnitude, value, scale_codes, thresholds, scale_values, codes, decoded, errors):
    """errors[b] = sum of squared errors of block b, float64, folded by halves."""
    _encode(magnitude, scale_codes, thresholds, codes)
    _decode(codes, scale_codes, scale_values, decoded)
    squares = np.empty(BLOCK, np.float64)
    for b in range(scale_codes.shape[0]):
        for j in range(BLOCK):
            error = float64(value[b * BLOCK + j]) - float64(decoded[b * BLOCK + j])
            squares[j] = error * error
        errors[b] = fold_lanes(squares)


@njit(**JIT)
def _add_signs(row, shift, codes):
    for k in range(row.shape[0]):
        codes[k] |= (row[k] >> shift) & 8


@njit(**JIT)
def _pack(code_pairs, packed):
    """packed[i] = low nibble of pair i's first code, high nibble its second."""
    for i in range(packed.shape[0]):
        pair = code_pairs[i]
        packed[i] = uint8(pair | (pair >> uint32(12)))


@njit(**JIT)
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


@njit(**JIT)
def quantize_slab(weight, widen, thresholds, scale_values, rule, tiled, weight_out, scale_out, scale_pitch, measured):
    """Quantize the rows of ``weight``; return the largest magnitude's bits.

    weight: int16 (BF16) or int32 (F32) bits [n, K], K a multiple of 32; tiled needs n % 32 == 0.
    weight_out: uint8 [n * K / 2]. scale_out: uint8 [n * scale_pitch], zero where nothing is written.
    measured: float64 [3], set to the sum of squared errors, of squares, and the largest |error|.
    """
    n_rows, K = weight.shape
    n_blocks = K // BLOCK
    mask = (1 << 15) - 1 if widen else (1 << 31) - 1
    magnitude = np.empty(K, weight.dtype)
    maxima = np.empty(K // 2, weight.dtype)
    amax_bits = np.empty(n_blocks, np.uint32)
    value_bits = np.empty(K, np.uint32)
    value = value_bits.view(np.float32)
    decoded = np.empty(K, np.float32)
    codes = np.empty(K, np.int16)
    packed = np.empty(K // 2, np.uint8)
    scale_codes = np.empty(n_blocks, np.uint8)
    other_codes = np.empty(n_blocks, np.uint8)
    low_errors = np.empty(n_blocks, np.float64)
    high_errors = np.empty(n_blocks, np.float64)
    errors = np.zeros(LANES, np.float64)
    signals = np.zeros(LANES, np.float64)
    largest = np.zeros(LANES, np.float32)
    largest_bits = uint32(0)
    for n in range(n_rows):
        row = weight[n]
        magnitudes(row, mask, magnitude)
        block_maxima(magnitude, maxima)
        to_float_bits(maxima[:n_blocks], widen, amax_bits)
        largest_bits = max(largest_bits, maximum(amax_bits))
        to_float_bits(magnitude, widen, value_bits)
        _choose_scales(rule, amax_bits.view(np.float32), amax_bits, scale_codes)
        if rule == MSE:
            for b in range(n_blocks):
                other_codes[b] = min(scale_codes[b] + 1, 254)
            _squared_errors(magnitude, value, scale_codes, thresholds, scale_values, codes, decoded, low_errors)
            _squared_errors(magnitude, value, other_codes, thresholds, scale_values, codes, decoded, high_errors)
            for b in range(n_blocks):
                if high_errors[b] < low_errors[b]:
                    scale_codes[b] = other_codes[b]
        _encode(magnitude, scale_codes, thresholds, codes)
        _decode(codes, scale_codes, scale_values, decoded)
        add_errors(value, decoded, errors, signals, largest)
        _add_signs(row, 12 if widen else 28, codes)
        if tiled:
            _pack(codes.view(np.uint32), packed)
            _store_tiled(n, packed.view(np.uint64), scale_codes, weight_out.view(np.uint64), scale_out, scale_pitch)
        else:
            _pack(codes.view(np.uint32), weight_out[n * (K // 2) : (n + 1) * (K // 2)])
            scale_out[n * scale_pitch : n * scale_pitch + n_blocks] = scale_codes
    measured[0] = fold_lanes(errors)
    measured[1] = fold_lanes(signals)
    measured[2] = largest.max()
    return largest_bits
