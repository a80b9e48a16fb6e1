"""BF16 or F32 rows -> codes of an MX format and E8M0 scales in the order of a layout, and their errors.

Twin of run_ckpt.contract.codec.quantize_mx followed by run_ckpt.contract.layouts. A row is read twice: for
its scales, and to encode it; the second time it is still in the cache.
"""

from functools import cache

import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import F32, F64, I8, I32, Array, FunctionBuilder, Vector, larger, smaller
from convert_ckpt.kernels.jit import Kernel
from convert_ckpt.kernels.layouts import storage_index
from convert_ckpt.kernels.rounding import (
    MANTISSA_BITS,
    STEP,
    RowErrors,
    SlabErrors,
    element_of,
    in_order,
    magnitudes,
    pack_nibbles,
    round_to,
    to_float_bits,
    to_floats,
)
from run_ckpt.contract.formats import (
    E8M0_BIAS,
    E8M0_LARGEST,
    MX_BLOCK_SIZE,
    ROUND_UP_FROM_1_75,
    ElementFormat,
    Scheme,
)
from run_ckpt.contract.layouts import Layout

BLOCK = MX_BLOCK_SIZE
# Instead of a rule: the scales are there, and the weight is already made of values under them.
GIVEN = "given"
# float32 2^(code - 127), by scale code.
SCALES = np.ldexp(np.float32(1), np.arange(E8M0_LARGEST + 1) - E8M0_BIAS)


def quantize_slab(
    weight: np.ndarray, rule: str, scheme: Scheme, *, weight_out: np.ndarray, scale_out: np.ndarray, scale_pitch: int
) -> tuple[np.ndarray, int]:
    """Quantize rows; return their errors and the float32 bits of the largest magnitude.

    weight: int16 (BF16) or int32 (F32) bits [n, K], K a multiple of 32, n of the rows of the layout's tiles. Where
    it holds NaN or infinity, the largest magnitude's bits are 0x7F800000 or above; codes and errors mean nothing.
    rule: one of the format's scale_rules, or GIVEN. weight_out: uint8 [n * K / elements a byte]. scale_out: uint8
    [n * scale_pitch], zero where nothing is written; with GIVEN the scales to take. The errors are float64 [3]: the sum
    of squared errors, of squares, the largest |error|.
    """
    errors, largest = np.empty(3), np.empty(1, np.uint32)
    kernel = _quantize_kernel(element_of(weight), scheme.format.element, rule, scheme.layout)
    kernel(weight, weight_out, scale_out, SCALES, errors, largest, *weight.shape, scale_pitch)
    return errors, int(largest[0])


@cache
def _quantize_kernel(element: ir.IntType, target: ElementFormat, rule: str, layout: Layout) -> Kernel:
    def write(
        build: FunctionBuilder,
        weight: Array,
        weight_out: Array,
        scale_out: Array,
        scales: Array,
        errors: Array,
        largest: Array,
        n_rows: Vector,
        K: Vector,
        scale_pitch: Vector,
    ) -> None:
        width = 8 // target.per_byte
        slab_errors = SlabErrors(build)
        slab_largest = build.variable(build.constant(I32, 0))
        for n in build.range(n_rows):
            row = weight.at(n * K)
            lanes_largest = build.variable(build.constant(element, 0, STEP))
            for b in build.range(K // BLOCK):
                magnitude = magnitudes(row.load(b * BLOCK, BLOCK))
                block_largest = magnitude.fold(larger, STEP)
                if rule != GIVEN:
                    scale_code = _choose_scale(
                        rule, target, magnitude, to_float_bits(block_largest.fold(larger)), scales
                    )
                    scale_out.store(storage_index(layout.scale, n, b, scale_pitch), scale_code.narrow(I8))
                lanes_largest.value = larger(lanes_largest.value, block_largest)
            row_largest = to_float_bits(lanes_largest.value.fold(larger))
            row_errors = RowErrors(build, row_largest)
            for b in build.range(K // BLOCK):
                scale_code = scale_out.load(storage_index(layout.scale, n, b, scale_pitch)).widen(I32)
                scale = scales.load(scale_code).splat(STEP)
                halves = []
                # Halves, as a whole block needs more registers than there are.
                for half in row.load(b * BLOCK, BLOCK).halves():
                    x = to_floats(magnitudes(half))
                    codes, values = _encode(x, target, scales, scale_code)
                    sign = (half >> (element.width - width)) & (1 << (width - 1))
                    halves.append(in_order(codes, element) | sign)
                    row_errors.add(x, values * scale)
                first = b * (BLOCK // target.per_byte)
                for i, packed in enumerate([pack_nibbles(halves[0].join(halves[1]))] if width == 4 else halves):
                    place = storage_index(layout.weight, n, first + i * STEP, K // target.per_byte)
                    weight_out.store(place, packed.narrow(I8))
            slab_errors.add(row_errors)
            slab_largest.value = larger(slab_largest.value, row_largest)
        slab_errors.store(errors)
        largest.store(0, slab_largest.value)

    return Kernel(write, (element, I8, I8, F32, F64, I32))


def _choose_scale(rule: str, target: ElementFormat, magnitude: Vector, maximum: Vector, scales: Array) -> Vector:
    """The scale code, int32, of a block whose largest magnitude has the float32 bits ``maximum``.

    The exponent field of float32 is E8M0: both are shifted by 127. Twin of run_ckpt.contract.scale_rules.
    """
    if rule == "roundup":
        quotient = (maximum.reinterpret(F32) / target.largest).reinterpret(I32)
        has_mantissa = (quotient & ((1 << MANTISSA_BITS) - 1)) > 0
        return smaller((quotient >> MANTISSA_BITS) + has_mantissa.widen(I32), E8M0_LARGEST)
    exponent = (maximum + ROUND_UP_FROM_1_75 if rule == "even" else maximum) >> MANTISSA_BITS
    # 255: amax was rounded up beyond float32.
    scale_code = (exponent < 255).where(larger(exponent - target.emax, 0), E8M0_LARGEST)
    if rule != "mse":
        return scale_code
    next_code = smaller(scale_code + 1, E8M0_LARGEST)
    x = to_floats(magnitude)
    next_error, error = (_squared_error(magnitude.element, target, x, scales, code) for code in (next_code, scale_code))
    return (next_error < error).where(next_code, scale_code)


def _squared_error(element: ir.IntType, target: ElementFormat, x: Vector, scales: Array, scale_code: Vector) -> Vector:
    """The float64 sum of a block's squared errors, added by halves in the order of the elements as the rule has it."""
    _, values = _encode(x, target, scales, scale_code)
    error = x.widen(F64) - values.widen(F64) * scales.load(scale_code).widen(F64).splat(BLOCK)
    squares = error * error
    if element == I32:
        return squares.fold(Vector.__add__)
    # In order, even k would be added to even ones until the last step, since halves are 16, 8, 4 and 2 apart.
    even, odd = squares.halves()
    return even.fold(Vector.__add__) + odd.fold(Vector.__add__)


def _encode(x: Vector, target: ElementFormat, scales: Array, scale_code: Vector) -> tuple[Vector, Vector]:
    """The codes of float32 magnitudes under a scale, as int32, and their values under scale 1."""
    # 1 / 2^(c - 127), exact, is 2^(d - 127) for d = 254 - c.
    inverse = scales.load(scale_code.like(2 * E8M0_BIAS) - scale_code)
    return round_to(x * inverse.splat(x.lanes), target.name)
