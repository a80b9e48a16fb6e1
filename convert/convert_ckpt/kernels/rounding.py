"""Steps that both formats share: magnitudes, rounding to a small float, and the error of decoded values.

A weight comes as its bits, int16 for BF16 and int32 for F32. Without the sign bit they order like the magnitude;
those of BF16 are the upper half of a float32's.
"""

import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import F32, F64, I16, I32, Code, Value, larger

# K is a multiple of this many elements.
STEP = 16
# Lanes in which a row's errors are added up.
_SUM_LANES = 8
_EXPONENT_MASK = 0x7F800000


def element_of(weight: np.ndarray) -> ir.IntType:
    return ir.IntType(8 * weight.itemsize)


def magnitudes(bits: Value) -> Value:
    """``bits`` without their signs."""
    mask: int = (1 << (bits.element.width - 1)) - 1
    return bits & mask


def to_float_bits(magnitude: Value) -> Value:
    """One magnitude as float32 bits."""
    return magnitude if magnitude.element == I32 else magnitude.widen(I32) << 16


def to_floats(magnitude: Value) -> Value:
    """Magnitude bits as float32; of 16-bit lanes first those with even numbers, which takes the fewest steps."""
    if magnitude.element == I32:
        return magnitude.reinterpret(F32)
    pairs = magnitude.reinterpret(I32, magnitude.lanes // 2)
    return (pairs << 16).join(pairs & 0xFFFF0000).reinterpret(F32)


def in_order(values: Value, element: ir.IntType) -> Value:
    """32-bit lanes in the order of ``to_floats`` as lanes of ``element``, in their own order; the low bits."""
    if element == I32:
        return values
    even, odd = values.halves()
    return ((even & 0xFFFF) | (odd << 16)).reinterpret(I16, values.lanes)


def round_to(quotient: Value, *, mantissa_bits: int, smallest_normal: float, largest: float) -> tuple[Value, Value]:
    """Round float32, at least 0, to a small float format, nearest, ties to even, at most ``largest``.

    Returns its codes as int32 (the low 16 bits are valid) and their values as float32. Adding a power of two that
    is larger by all the bits of mantissa that go makes the processor round, and subtracting it gives the value.
    """
    dropped_bits = 23 - mantissa_bits
    clipped = (quotient < largest).where(quotient, largest)
    power = larger(clipped, clipped.like(smallest_normal)).reinterpret(I32) & _EXPONENT_MASK
    shifter = (power + (dropped_bits << 23)).reinterpret(F32)
    shifted = clipped + shifter
    # The lowest bits of ``shifted`` count the steps of this power of two.
    smallest_power = int(np.float32(smallest_normal).view(np.int32)) >> dropped_bits
    codes = shifted.reinterpret(I32) + (power >> dropped_bits) - smallest_power
    return codes, shifted - shifter


def row_maximum(code: Code, row: Value, K: Value, element: ir.IntType) -> Value:
    """The largest magnitude of the K elements from the address ``row`` on, as float32 bits."""

    def look(i: Value, carried: list[Value]) -> list[Value]:
        return [larger(carried[0], magnitudes(code.load_nth(row, i, element, STEP)))]

    (largest,) = code.loop(K // STEP, [code.constant(element, [0] * STEP)], look)
    return to_float_bits(largest.fold(larger))


class RowErrors:
    """The squared errors, the squares and the largest |error| of one row.

    They are added up in a fixed number of lanes, and those by halves in the end, so that they have the same bits
    on every machine. Squares are in units of a power of two near the row's largest magnitude: they stay in range.
    """

    def __init__(self, code: Code, row_maximum: Value):
        exponent = row_maximum >> 23
        exponent = (exponent > 1).where(exponent, 1)
        self._unit = ((exponent < 253).where(exponent, 253) << 23).reinterpret(F32)
        self._per_unit = self._unit.like(1.0) / self._unit
        self.start = [code.constant(F32, [0.0] * _SUM_LANES)] * 3

    def add(self, sums: list[Value], x: Value, decoded: Value) -> list[Value]:
        """``sums``, first ``start``, with those of float32 ``x`` and ``decoded`` added."""
        per_unit = self._per_unit.splat(x.lanes)
        error = ((x - decoded).reinterpret(I32) & 0x7FFFFFFF).reinterpret(F32)
        scaled_error, scaled = error * per_unit, x * per_unit
        return [
            sums[0] + (scaled_error * scaled_error).fold(Value.__add__, _SUM_LANES),
            sums[1] + (scaled * scaled).fold(Value.__add__, _SUM_LANES),
            larger(sums[2], error.fold(larger, _SUM_LANES)),
        ]

    def add_to(self, total: list[Value], sums: list[Value]) -> list[Value]:
        """``total`` over rows, float64, with a row's sums added."""
        unit = self._unit.widen(F64)
        squared_error, squares = (part.fold(Value.__add__).widen(F64) * (unit * unit) for part in sums[:2])
        return [total[0] + squared_error, total[1] + squares, larger(total[2], sums[2].fold(larger).widen(F64))]


def no_errors(code: Code) -> list[Value]:
    """The total over no rows."""
    return [code.constant(F64, [0.0])] * 3


def store_errors(code: Code, total: list[Value], out: Value) -> None:
    """Write a total to float64 [3]."""
    for i, part in enumerate(total):
        code.store(part, out + 8 * i)
