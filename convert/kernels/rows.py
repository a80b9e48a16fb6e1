"""Steps on one row that both formats share: magnitudes, maxima, and the error of a decoded row.

A weight comes as its bits, int16 for BF16 and int32 for F32. Clearing the sign bit gives an integer
that orders like the magnitude, and shifting it left by ``widen`` (16 or 0) gives float32 bits.
Each step is a plain loop over arrays that LLVM turns into vector code; keep them apart, for in one
large function it gives up (too many arrays that might overlap).
"""

import numpy as np
from numba import float32, float64, njit, uint32

JIT = {"nogil": True, "cache": True, "boundscheck": False, "error_model": "numpy"}

# The lanes of an error sum. Each adds up its own columns, whatever the vector width of the machine,
# so that the sums have the same bits everywhere.
LANES = 32


@njit(**JIT)
def magnitudes(row, mask, out):
    """out[k] = row[k] without its sign bit."""
    for k in range(row.shape[0]):
        out[k] = row[k] & mask


@njit(**JIT)
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


@njit(**JIT)
def maximum(magnitude):
    """The largest element of a row."""
    lanes = np.zeros(LANES, magnitude.dtype)
    n_whole = magnitude.shape[0] // LANES
    for b in range(n_whole):
        for j in range(LANES):
            x = magnitude[b * LANES + j]
            lanes[j] = x if x > lanes[j] else lanes[j]
    for k in range(n_whole * LANES, magnitude.shape[0]):
        x = magnitude[k]
        lanes[0] = x if x > lanes[0] else lanes[0]
    return lanes.max()


@njit(**JIT)
def to_float_bits(magnitude, widen, out):
    """out[k] = float32 bits of the magnitude."""
    for k in range(magnitude.shape[0]):
        out[k] = uint32(magnitude[k]) << uint32(widen)


@njit(**JIT)
def add_errors(value, decoded, errors, signals, largest):
    """Add a row's squared errors and squares to the lanes, and keep the largest |error| of each.

    value, decoded: float32 [K]; their difference is taken in float32, its square in float64.
    """
    n_whole = value.shape[0] // LANES
    for b in range(n_whole):
        for j in range(LANES):
            x = value[b * LANES + j]
            error = abs(x - decoded[b * LANES + j])
            largest[j] = error if error > largest[j] else largest[j]
            errors[j] += float64(error) * float64(error)
            signals[j] += float64(x) * float64(x)
    for k in range(n_whole * LANES, value.shape[0]):
        j = k - n_whole * LANES
        error = abs(value[k] - decoded[k])
        largest[j] = error if error > largest[j] else largest[j]
        errors[j] += float64(error) * float64(error)
        signals[j] += float64(value[k]) * float64(value[k])


@njit(**JIT)
def fold_lanes(lanes):
    """The sum of the lanes, upper half onto lower half until one is left."""
    n = lanes.shape[0]
    while n > 1:
        n //= 2
        for j in range(n):
            lanes[j] += lanes[j + n]
    return lanes[0]
