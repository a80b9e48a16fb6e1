"""BF16 or F32 rows -> packed E2M1 codes and E8M0 scales, tiled or row-major, and their errors.

Twin of run_ckpt.contract.codec.quantize_mxfp4 followed by run_ckpt.contract.layouts. A row is read twice: for
its scales, and to encode it; the second time it is still in the cache.
"""

from functools import cache

import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import F32, F64, I8, I16, I32, I64, Code, Value, larger
from convert_ckpt.kernels.jit import Kernel, address
from convert_ckpt.kernels.rounding import (
    STEP,
    RowErrors,
    element_of,
    in_order,
    magnitudes,
    no_errors,
    round_to,
    store_errors,
    to_float_bits,
    to_floats,
)
from run_ckpt.contract.formats import E2M1_VALUES, E8M0_BIAS, MXFP4_BLOCK_SIZE

BLOCK = MXFP4_BLOCK_SIZE
_LARGEST_SCALE_CODE = 254
# float32 2^(code - 127), by scale code.
_SCALES = np.ldexp(np.float32(1), np.arange(_LARGEST_SCALE_CODE + 1) - E8M0_BIAS)


def quantize_slab(
    weight: np.ndarray, rule: str, *, tiled: bool, weight_out: np.ndarray, scale_out: np.ndarray, scale_pitch: int
) -> tuple[np.ndarray, int]:
    """Quantize rows; return their errors and the float32 bits of the largest magnitude.

    weight: int16 (BF16) or int32 (F32) bits [n, K], K a multiple of 32; tiled needs n % 32 == 0.
    rule: one of SCALE_RULES. weight_out: uint8 [n * K / 2]. scale_out: uint8 [n * scale_pitch], zero where nothing
    is written. The errors are float64 [3]: the sum of squared errors, of squares, and the largest |error|.
    """
    errors, largest = np.empty(3), np.empty(1, np.uint32)
    kernel = _make_kernel(element_of(weight), rule, tiled)
    arrays = (weight, weight_out, scale_out, _SCALES, errors, largest)
    kernel(*(address(array) for array in arrays), *weight.shape, scale_pitch)
    return errors, int(largest[0])


@cache
def _make_kernel(element: ir.IntType, rule: str, tiled: bool) -> Kernel:
    def write(
        code: Code,
        weight: Value,
        weight_out: Value,
        scale_out: Value,
        scales: Value,
        errors: Value,
        largest: Value,
        n_rows: Value,
        K: Value,
        scale_pitch: Value,
    ) -> None:
        def quantize_row(n: Value, carried: list[Value]) -> list[Value]:
            row = weight + n * K * (element.width // 8)

            def scale_block(b: Value, carried: list[Value]) -> list[Value]:
                magnitude = magnitudes(code.load_nth(row, b, element, BLOCK))
                largest = magnitude.fold(larger, STEP)
                scale_code = _choose_scale(code, rule, magnitude, to_float_bits(largest.fold(larger)), scales)
                code.store(scale_code.narrow(I8), scale_out + _scale_place(n, b, scale_pitch, tiled))
                return [larger(carried[0], largest)]

            (row_lanes,) = code.loop(K // BLOCK, [code.constant(element, [0] * STEP)], scale_block)
            row_largest = to_float_bits(row_lanes.fold(larger))
            row_errors = RowErrors(code, row_largest)

            def encode_block(b: Value, sums: list[Value]) -> list[Value]:
                scale_code = code.load(scale_out + _scale_place(n, b, scale_pitch, tiled), I8).widen(I64)
                scale = _scale(code, scales, scale_code).splat(STEP)
                codes = []
                # Halves, as a whole block needs more registers than there are.
                for half in code.load_nth(row, b, element, BLOCK).halves():
                    x = to_floats(magnitudes(half))
                    magnitude_codes, values = _encode(code, x, scales, scale_code)
                    codes.append(in_order(magnitude_codes, element) | ((half >> (element.width - 4)) & 8))
                    sums = row_errors.add(sums, x, values * scale)
                code.store(_pack(codes[0].join(codes[1])), weight_out + _weight_place(n, b, K, tiled))
                return sums

            sums = code.loop(K // BLOCK, row_errors.start, encode_block)
            return [larger(carried[0], row_largest), *row_errors.add_to(carried[1:], sums)]

        end = code.loop(n_rows, [code.constant(I32, [0]), *no_errors(code)], quantize_row)
        code.store(end[0], largest)
        store_errors(code, end[1:], errors)

    return Kernel(f"mxfp4_{element}_{rule}_{'aiter' if tiled else 'plain'}", 9, write)


def _weight_place(n: Value, b: Value, K: Value, tiled: bool) -> Value:
    """Where the 16 bytes of block b of row n go (contract.layouts.AITER_WEIGHT: 16 rows of them make a tile)."""
    if tiled:
        return n // 16 * 16 * (K // 2) + n % 16 * 16 + b * 256
    return n * (K // 2) + b * 16


def _scale_place(n: Value, b: Value, pitch: Value, tiled: bool) -> Value:
    """Where the scale of block b of row n goes (contract.layouts.AITER_SCALE)."""
    if tiled:
        return n // 32 * 32 * pitch + n % 16 * 4 + n % 32 // 16 + b // 8 * 256 + b % 4 * 64 + b % 8 // 4 * 2
    return n * pitch + b


def _choose_scale(code: Code, rule: str, magnitude: Value, maximum: Value, scales: Value) -> Value:
    """The scale code, int32, of a block whose largest magnitude has the float32 bits ``maximum``.

    See contract/scale_rules.py.
    """
    if rule == "roundup":
        sixth = (maximum.reinterpret(F32) / 6.0).reinterpret(I32)
        rounded = (sixth >> 23) + ((sixth & 0x7FFFFF) > 0).widen(I32)
        return (rounded < _LARGEST_SCALE_CODE).where(rounded, _LARGEST_SCALE_CODE)
    exponent = (maximum + 0x200000 if rule == "even" else maximum) >> 23
    scale_code = (exponent > 2).where(exponent - 2, 0)
    scale_code = (exponent < 255).where(scale_code, _LARGEST_SCALE_CODE)
    if rule != "mse":
        return scale_code
    next_code = (scale_code < _LARGEST_SCALE_CODE).where(scale_code + 1, _LARGEST_SCALE_CODE)
    x = to_floats(magnitude)
    choices = [choice.widen(I64) for choice in (next_code, scale_code)]
    squared_errors = [_squared_error(code, magnitude.element, x, scales, choice) for choice in choices]
    return (squared_errors[0] < squared_errors[1]).where(next_code, scale_code)


def _squared_error(code: Code, element: ir.IntType, x: Value, scales: Value, scale_code: Value) -> Value:
    """The float64 sum of a block's squared errors, added by halves in the order of the elements as the rule has it."""
    _, values = _encode(code, x, scales, scale_code)
    error = x.widen(F64) - values.widen(F64) * _scale(code, scales, scale_code).widen(F64).splat(BLOCK)
    squares = error * error
    if element == I32:
        return squares.fold(Value.__add__)
    even, odd = squares.halves()
    return even.fold(Value.__add__) + odd.fold(Value.__add__)


def _scale(code: Code, scales: Value, scale_code: Value) -> Value:
    return code.load(scales + scale_code * 4, F32)


def _encode(code: Code, x: Value, scales: Value, scale_code: Value) -> tuple[Value, Value]:
    """The E2M1 codes of float32 magnitudes under a scale, as int32, and their values under scale 1."""
    # 1 / 2^(c - 127), exact, is 2^(d - 127) for d = 254 - c.
    inverse = _scale(code, scales, scale_code.like(2 * E8M0_BIAS) - scale_code)
    return round_to(x * inverse.splat(x.lanes), mantissa_bits=1, smallest_normal=1.0, largest=E2M1_VALUES[-1])


def _pack(codes: Value) -> Value:
    """Low nibble: the code of even lanes; high nibble: of odd lanes. Returns half as many bytes."""
    narrow = codes if codes.element == I16 else codes.narrow(I16)
    pairs = narrow.reinterpret(I32, codes.lanes // 2)
    return (pairs | (pairs >> 12)).narrow(I8)
