"""Steps on one row that both formats share: magnitudes, maxima, and the error of a decoded row.

A weight comes as its bits, int16 for BF16 and int32 for F32. Clearing the sign bit gives an integer
that orders like the magnitude, and shifting it left by ``widen(array)`` (16 or 0) gives float32 bits.
The shift follows from the array's type, so that it is a constant when LLVM sees it.
Each step is a plain loop over two or three arrays, which LLVM turns into vector code wherever it is
inlined; with more arrays it gives up, for too many might overlap. Sums add halves onto halves, an
order that no vector width changes, so that they have the same bits on every machine.
"""

from llvmlite import ir
from numba import float32, float64, njit, types, uint32
from numba.extending import intrinsic


def compiled(function):
    """Compile without the interpreter lock; keep the machine code on disk for the next start.

    The code on disk is renewed when the file of the outermost function changes: after editing this
    file alone, remove convert/kernels/__pycache__. Where no folder can be written (NUMBA_CACHE_DIR names
    one) the code is compiled at each start.
    """
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy"}
    try:
        return njit(cache=True, **options)(function)
    except RuntimeError:
        return njit(**options)(function)


@intrinsic
def as_float(typing_context, bits):
    """The float32 with the given uint32 bits."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return float32(types.uint32), generate


@intrinsic
def as_bits(typing_context, value):
    """The uint32 bits of a float32."""

    def generate(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.uint32(types.float32), generate


@intrinsic
def widen(typing_context, array):
    """How far the array's elements are shifted left to become float32 bits; a constant of its type."""
    shift = 32 - array.dtype.bitwidth

    def generate(context, builder, signature, arguments):
        return ir.Constant(ir.IntType(32), shift)

    return types.uint32(array), generate


@compiled
def magnitudes(row, out):
    """out[k] = row[k] without its sign bit."""
    mask = row.dtype.type(uint32(0x7FFFFFFF) >> widen(row))
    for k in range(row.shape[0]):
        out[k] = row[k] & mask


@compiled
def block_maxima(magnitude, out):
    """out[b] = the largest of magnitude[32 b : 32 b + 32]; pairs, pairs of pairs, ..."""
    n = magnitude.shape[0] // 2
    for k in range(n):
        x = magnitude[2 * k]
        y = magnitude[2 * k + 1]
        out[k] = x if x > y else y
    for _ in range(4):
        n //= 2
        for k in range(n):
            x = out[2 * k]
            y = out[2 * k + 1]
            out[k] = x if x > y else y


@compiled
def row_maximum(row, scratch):
    """The largest element of a row; ``scratch`` is another row of its type."""
    n = row.shape[0]
    quarter = n // 4
    largest = row[n - 1]
    for k in range(4 * quarter, n):
        largest = max(largest, row[k])
    first, second = row[:quarter], row[quarter : 2 * quarter]
    third, fourth = row[2 * quarter : 3 * quarter], row[3 * quarter : 4 * quarter]
    for k in range(quarter):
        x = first[k] if first[k] > second[k] else second[k]
        y = third[k] if third[k] > fourth[k] else fourth[k]
        scratch[k] = x if x > y else y
    n = quarter
    while n > 1:
        largest = max(largest, scratch[n - 1])
        n //= 2
        for k in range(n):
            x = scratch[k]
            y = scratch[n + k]
            scratch[k] = x if x > y else y
    return max(largest, scratch[0]) if quarter else largest


@compiled
def row_sum(row):
    """The sum of a row, upper half added onto lower half until one is left; overwrites the row."""
    n = row.shape[0]
    while n > 1:
        half = n // 2
        if n % 2:
            row[0] += row[n - 1]
        for k in range(half):
            row[k] += row[half + k]
        n = half
    return row[0]


@compiled
def row_unit(largest_bits):
    """A power of two near the row's largest magnitude: squares of the quotients keep in range."""
    exponent = min(max(largest_bits >> uint32(23), uint32(1)), uint32(253))
    return as_float(uint32(exponent) << uint32(23))


@compiled
def add_errors(magnitude, decoded, unit, values, scratch, measured):
    """Add a row's squared errors and squares to measured[0] and [1]; measured[2] is the largest error.

    magnitude, decoded: bits that become float32 bits when shifted left by ``widen``; K a multiple of 4.
    values, scratch: float32 rows. Squares are summed in float32 in units of ``unit`` squared, and over
    the rows in float64.
    """
    per_unit = float32(1.0) / unit
    square_unit = float64(unit) * float64(unit)
    for k in range(magnitude.shape[0]):
        values[k] = as_float(uint32(magnitude[k]) << widen(magnitude))
    measured[1] += float64(_sum_of_squares(values, per_unit, scratch)) * square_unit
    for k in range(magnitude.shape[0]):
        x = as_float(uint32(magnitude[k]) << widen(magnitude))
        values[k] = abs(x - as_float(uint32(decoded[k]) << widen(decoded)))
    measured[0] += float64(_sum_of_squares(values, per_unit, scratch)) * square_unit
    measured[2] = max(measured[2], float64(row_maximum(values, scratch)))


@compiled
def _sum_of_squares(values, factor, scratch):
    """The sum of (value * factor)^2; quarters of the row are added first, element by element."""
    quarter = values.shape[0] // 4
    first, second = values[:quarter], values[quarter : 2 * quarter]
    third, fourth = values[2 * quarter : 3 * quarter], values[3 * quarter :]
    for k in range(quarter):
        a = first[k] * factor
        b = second[k] * factor
        c = third[k] * factor
        d = fourth[k] * factor
        scratch[k] = (a * a + b * b) + (c * c + d * d)
    return row_sum(scratch[:quarter])
