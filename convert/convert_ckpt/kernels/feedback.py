"""Columns rounded one after the other, each with the errors of those before it fed back into it.

The inner loop of convert_ckpt.methods.gptq: rows are the lanes, so a column is a few vectors.
"""

from functools import cache

import numpy as np

from convert_ckpt.kernels.ir import F32, I32, I64, Array, FunctionBuilder, Vector
from convert_ckpt.kernels.jit import Kernel
from convert_ckpt.kernels.rounding import MAGNITUDE_MASK, SIGN_MASK, round_to

# Rows at a time: four registers of AVX-512 hide the latency of the additions.
LANES = 64


def round_columns(
    element: str,
    values: np.ndarray,
    feedback: np.ndarray,
    coefficients: np.ndarray,
    scales: np.ndarray,
    scale_rows: np.ndarray,
) -> None:
    """Round the columns of a panel from the last to the first; all arrays are contiguous.

    values: float32 [width, n], n a multiple of LANES, a column of the weight in each row; afterwards its decoded
    values. feedback: float32 [width, n], what the errors of earlier panels subtract; afterwards this panel's errors,
    decoded - weight. coefficients: float32 [width, width]; [j, k], j > k, is how much of column j's error is
    subtracted from column k. scales: float32 [n_scales, n], and scale_rows int64 [width] says which is whose.
    A value is divided by its scale, rounded to the nearest element (ties to even, saturating) and multiplied by it.
    """
    width, n = values.shape
    assert n % LANES == 0
    _round_kernel(element)(values, feedback, coefficients, scales, scale_rows, width, n)


@cache
def _round_kernel(element: str) -> Kernel:
    def write(
        build: FunctionBuilder,
        values: Array,
        feedback: Array,
        coefficients: Array,
        scales: Array,
        scale_rows: Array,
        width: Vector,
        n: Vector,
    ) -> None:
        for tile in build.range(n // LANES):
            first = tile * LANES
            for i in build.range(width):
                k = width - 1 - i
                # + 0.0 makes -0 to 0, which leaves the sign of a zero in the weight as it is.
                fed = build.variable(feedback.load(k * n + first, LANES) + 0.0)
                for later in build.range(width - 1 - k):
                    j = k + 1 + later
                    factor = coefficients.load(j * width + k).splat(LANES)
                    fed.value += feedback.load(j * n + first, LANES) * factor
                weight = values.load(k * n + first, LANES)
                scale = scales.load(scale_rows.load(k) * n + first, LANES)
                quotient = ((weight - fed.value) / scale).reinterpret(I32)
                _, rounded = round_to((quotient & MAGNITUDE_MASK).reinterpret(F32), element)
                decoded = ((rounded * scale).reinterpret(I32) | (quotient & SIGN_MASK)).reinterpret(F32)
                values.store(k * n + first, decoded)
                feedback.store(k * n + first, decoded - weight)

    return Kernel(write, (F32, F32, F32, F32, I64))
