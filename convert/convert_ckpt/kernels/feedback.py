"""Columns rounded one after the other, each with the errors of those before it fed back into it.

The inner loop of convert_ckpt.methods.gptq: rows are the lanes, so a column is a few vectors.
"""

from functools import cache

import numpy as np

from convert_ckpt.kernels.ir import F32, I32, I64, Code, Value
from convert_ckpt.kernels.jit import Kernel, address
from convert_ckpt.kernels.rounding import round_to
from run_ckpt.contract.formats import E2M1, E2M1_VALUES, E4M3, E4M3_MAX

# Rows at a time: four registers of AVX-512 hide the latency of the additions.
LANES = 64
# Element -> (mantissa bits, smallest normal value, largest value).
_ELEMENTS = {E2M1.name: (1, 1.0, E2M1_VALUES[-1]), E4M3.name: (3, 2.0**-6, E4M3_MAX)}
_SIGN = 0x80000000
_F32_NBYTES = 4


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
    arrays = (values, feedback, coefficients, scales, scale_rows)
    _make_kernel(element)(*(address(array) for array in arrays), width, n)


@cache
def _make_kernel(element: str) -> Kernel:
    mantissa_bits, smallest_normal, largest = _ELEMENTS[element]

    def write(
        code: Code,
        values: Value,
        feedback: Value,
        coefficients: Value,
        scales: Value,
        scale_rows: Value,
        width: Value,
        n: Value,
    ) -> None:
        def round_rows(tile: Value, _: list[Value]) -> list[Value]:
            def at(array: Value, row: Value) -> Value:
                return array + (row * n + tile * LANES) * _F32_NBYTES

            def round_column(i: Value, _: list[Value]) -> list[Value]:
                k = width - 1 - i
                start = at(feedback, k)

                def subtract(i: Value, carried: list[Value]) -> list[Value]:
                    j = k + 1 + i
                    factor = code.load(coefficients + (j * width + k) * _F32_NBYTES, F32)
                    return [carried[0] + code.load(at(feedback, j), F32, LANES) * factor.splat(LANES)]

                # + 0.0 makes -0 to 0, which leaves the sign of a zero in the weight as it is.
                (fed,) = code.loop(width - 1 - k, [code.load(start, F32, LANES) + 0.0], subtract)
                weight = code.load(at(values, k), F32, LANES)
                scale = code.load(at(scales, code.load(scale_rows + k * 8, I64)), F32, LANES)
                quotient = ((weight - fed) / scale).reinterpret(I32)
                magnitude = (quotient & 0x7FFFFFFF).reinterpret(F32)
                rounded = round_to(
                    magnitude, mantissa_bits=mantissa_bits, smallest_normal=smallest_normal, largest=largest
                )[1]
                decoded = ((rounded * scale).reinterpret(I32) | (quotient & _SIGN)).reinterpret(F32)
                code.store(decoded, at(values, k))
                code.store(decoded - weight, start)
                return []

            code.loop(width, [], round_column)
            return []

        code.loop(n // LANES, [], round_rows)

    return Kernel(f"round_columns_{element}", 7, write)
