"""Steps that the kernels share: magnitudes, rounding to a small float, and the errors of decoded values.

A weight comes as its ``bits``: int16 for BF16 and int32 for F32. Without the sign bit they order like the magnitudes
that they stand for, so that amax is a maximum of integers. Those of BF16 are the upper half of a float32's.
The bits of NaN and infinity are above those of any number: amax tells them, and the caller refuses the weight.
"""

import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import F32, F64, I16, I32, Array, FunctionBuilder, Vector, larger, smaller
from run_ckpt.contract.formats import E2M1, E2M1_VALUES, E4M3, E4M3_MAX

# K is a multiple of this many elements.
STEP = 16
# float32: sign, 8 bits of exponent with the bias 127, 23 bits of mantissa.
MANTISSA_BITS = 23
_EXPONENT_MASK = 0xFF << MANTISSA_BITS
MAGNITUDE_MASK = 0x7FFFFFFF
SIGN_MASK = 0x80000000
# Element -> bits of mantissa, smallest normal value, largest value.
_SMALL_FLOATS = {E2M1.name: (1, 1.0, E2M1_VALUES[-1]), E4M3.name: (3, 2.0**-6, E4M3_MAX)}
# Lanes in which a row's errors are added up.
_SUM_LANES = 8


def element_of(weight: np.ndarray) -> ir.IntType:
    """The type of a weight's bits."""
    return ir.IntType(8 * weight.itemsize)


def magnitudes(bits: Vector) -> Vector:
    """``bits`` without their signs."""
    mask: int = (1 << (bits.element.width - 1)) - 1
    return bits & mask


def to_float_bits(magnitude: Vector) -> Vector:
    """One magnitude as float32 bits."""
    return magnitude if magnitude.element == I32 else magnitude.widen(I32) << 16


def to_floats(magnitude: Vector) -> Vector:
    """Magnitude bits as float32; of 16-bit lanes first those with even numbers, then those with odd ones.

    A pair of BF16 is one 32-bit lane. Its upper half, the odd one, is a float32 once the lower half is cleared, and
    the lower half is one once it is shifted up: two steps for two lanes, and none that crosses lanes.
    """
    if magnitude.element == I32:
        return magnitude.reinterpret(F32)
    pairs = magnitude.reinterpret(I32, magnitude.lanes // 2)
    return (pairs << 16).join(pairs & 0xFFFF0000).reinterpret(F32)


def in_order(values: Vector, element: ir.IntType) -> Vector:
    """32-bit lanes in the order of ``to_floats`` as lanes of ``element``, in their own order; the low bits."""
    if element == I32:
        return values
    even, odd = values.halves()
    return ((even & 0xFFFF) | (odd << 16)).reinterpret(I16, values.lanes)


def round_to(quotient: Vector, element: str) -> tuple[Vector, Vector]:
    """Round float32, at least 0, to the nearest value of a small float, ties to even; NaN becomes the largest.

    element: the name of one of contract.formats. Returns codes as int32 (the low 16 bits are valid) and their values
    as float32.

    The processor rounds, to nearest even, when a sum does not fit into its 24 bits. For x in [2^e, 2^(e+1)) the sum
    x + 2^(e + dropped_bits) has steps of 2^(e - mantissa_bits), which are those of the small format. Subtracting the
    power again gives the value. Below the smallest normal all steps are as wide as there: subnormals.
    """
    mantissa_bits, smallest_normal, largest = _SMALL_FLOATS[element]
    dropped_bits = MANTISSA_BITS - mantissa_bits
    clipped = smaller(quotient, largest)
    power = larger(clipped, smallest_normal).reinterpret(I32) & _EXPONENT_MASK
    shifter = (power + (dropped_bits << MANTISSA_BITS)).reinterpret(F32)
    shifted = clipped + shifter
    # The low bits of ``shifted`` are the value in steps. That is its code where the steps are the subnormals'; each
    # exponent above has 2^mantissa_bits more codes below it than its own steps count.
    smallest_power = int(np.float32(smallest_normal).view(np.int32)) >> dropped_bits
    codes = shifted.reinterpret(I32) + (power >> dropped_bits) - smallest_power
    return codes, shifted - shifter


def pack_nibbles(codes: Vector) -> Vector:
    """4-bit codes, 16 or 32 bits wide, as half as many bytes, the low ones of 32 bits: low nibble the even lane's."""
    narrow = codes if codes.element == I16 else codes.narrow(I16)
    pairs = narrow.reinterpret(I32, codes.lanes // 2)
    # The odd code lies 16 bits above the even one, and 4 are wanted.
    return pairs | (pairs >> 12)


def row_maximum(build: FunctionBuilder, row: Array, K: Vector) -> Vector:
    """The largest magnitude of the first K elements of ``row``, as float32 bits."""
    largest = build.variable(build.constant(row.element, 0, STEP))
    for i in build.range(K // STEP):
        largest.value = larger(largest.value, magnitudes(row.load(i * STEP, STEP)))
    return to_float_bits(largest.value.fold(larger))


class RowErrors:
    """The squared errors, the squares and the largest |error| of one row.

    They are added up in a fixed number of lanes, and those by halves in the end, so that they have the same bits
    on every machine. Squares are in units of a power of two near the row's largest magnitude: they stay in range.
    """

    def __init__(self, build: FunctionBuilder, row_maximum: Vector):
        # From 1 to 253, so that the unit 2^(exponent - 127) and its inverse are normal float32.
        exponent = smaller(larger(row_maximum >> MANTISSA_BITS, 1), 253)
        self._unit = (exponent << MANTISSA_BITS).reinterpret(F32)
        self._per_unit = self._unit.like(1.0) / self._unit
        zeros = build.constant(F32, 0.0, _SUM_LANES)
        self._squared_error, self._squares, self._largest = (build.variable(zeros) for _ in range(3))

    def add(self, x: Vector, decoded: Vector) -> None:
        """Add those of float32 ``x`` and ``decoded``."""
        per_unit = self._per_unit.splat(x.lanes)
        error = ((x - decoded).reinterpret(I32) & MAGNITUDE_MASK).reinterpret(F32)
        scaled_error, scaled = error * per_unit, x * per_unit
        self._squared_error.value += (scaled_error * scaled_error).fold(Vector.__add__, _SUM_LANES)
        self._squares.value += (scaled * scaled).fold(Vector.__add__, _SUM_LANES)
        self._largest.value = larger(self._largest.value, error.fold(larger, _SUM_LANES))

    def sums(self) -> tuple[Vector, Vector, Vector]:
        """Return the three, float64."""
        unit = self._unit.widen(F64)
        squared_error, squares = (
            sums.value.fold(Vector.__add__).widen(F64) * (unit * unit) for sums in (self._squared_error, self._squares)
        )
        return squared_error, squares, self._largest.value.fold(larger).widen(F64)


class SlabErrors:
    """Those of all rows of a slab, float64."""

    def __init__(self, build: FunctionBuilder):
        zero = build.constant(F64, 0.0)
        self._squared_error, self._squares, self._largest = (build.variable(zero) for _ in range(3))

    def add(self, row: RowErrors) -> None:
        squared_error, squares, largest = row.sums()
        self._squared_error.value += squared_error
        self._squares.value += squares
        self._largest.value = larger(self._largest.value, largest)

    def store(self, out: Array) -> None:
        """Write them to float64 [3]."""
        for i, total in enumerate((self._squared_error, self._squares, self._largest)):
            out.store(i, total.value)
