"""BF16 or F32 rows -> packed E2M1 codes and E4M3 scales for each 16, given that of the tensor, and their errors.

Twin of run_ckpt.contract.codec.quantize_nvfp4.
"""

from functools import cache

import numpy as np
from llvmlite import ir

from convert_ckpt.kernels.ir import F32, F64, I8, I32, Array, FunctionBuilder, Vector, larger
from convert_ckpt.kernels.jit import Kernel
from convert_ckpt.kernels.rounding import (
    RowErrors,
    SlabErrors,
    element_of,
    in_order,
    magnitudes,
    pack_nibbles,
    round_to,
    row_maximum,
    to_float_bits,
    to_floats,
)
from run_ckpt.contract.formats import E2M1, E4M3, E4M3_SMALLEST, NVFP4_BLOCK_SIZE

BLOCK = NVFP4_BLOCK_SIZE
# float32 by E4M3 code without sign: exponent field (bias 7) and 3 bits of mantissa; 0x7F, NaN, is never looked up.
_FIELDS = np.arange(0x80)
SCALES = np.ldexp(np.where(_FIELDS < 8, _FIELDS, 8 + _FIELDS % 8).astype(np.float32), np.maximum(_FIELDS >> 3, 1) - 10)


def quantize_slab(
    weight: np.ndarray, tensor_scale: np.ndarray, *, weight_out: np.ndarray, scale_out: np.ndarray, given: bool = False
) -> np.ndarray:
    """Quantize rows; return their errors: float64 [3], the sum of squared errors, of squares, the largest |error|.

    weight: int16 (BF16) or int32 (F32) bits [n, K], finite, K a multiple of 16. tensor_scale: float32 [1], positive.
    weight_out: uint8 [n * K / 2]. scale_out: uint8 [n * K / 16]; with ``given`` these scales are there already, and
    the weight is made of values under them.
    """
    errors = np.empty(3)
    kernel = _quantize_kernel(element_of(weight), given)
    kernel(weight, weight_out, scale_out, tensor_scale, SCALES, errors, *weight.shape)
    return errors


@cache
def _quantize_kernel(element: ir.IntType, given: bool) -> Kernel:
    def write(
        build: FunctionBuilder,
        weight: Array,
        weight_out: Array,
        scale_out: Array,
        tensor_scale: Array,
        scales: Array,
        errors: Array,
        n_rows: Vector,
        K: Vector,
    ) -> None:
        unit = tensor_scale.load(0)
        slab_errors = SlabErrors(build)
        for n in build.range(n_rows):
            row, row_out, row_scales = (weight.at(n * K), weight_out.at(n * K // 2), scale_out.at(n * K // BLOCK))
            row_errors = RowErrors(build, row_maximum(build, row, K))
            for b in build.range(K // BLOCK):
                bits = row.load(b * BLOCK, BLOCK)
                if not given:
                    amax = to_float_bits(magnitudes(bits).fold(larger)).reinterpret(F32)
                    row_scales.store(b, _choose_scale(amax, unit).narrow(I8))
                scale = (scales.load(row_scales.load(b).widen(I32)) * unit).splat(BLOCK)
                x = to_floats(magnitudes(bits))
                codes, values = round_to(x / scale, E2M1.name)
                row_errors.add(x, values * scale)
                signs = (bits >> (element.width - 4)) & 8
                row_out.store(b * (BLOCK // 2), pack_nibbles(in_order(codes, element) | signs).narrow(I8))
            slab_errors.add(row_errors)
        slab_errors.store(errors)

    return Kernel(write, (element, I8, I8, F32, F32, F64))


def _choose_scale(amax: Vector, unit: Vector) -> Vector:
    """The E4M3 code, int32, of the scale of a block: amax / (6 * unit), 1 where that is zero, at least 2^-9."""
    quotient = amax / (unit * E2M1.largest)
    codes, _ = round_to(larger((quotient > 0.0).where(quotient, 1.0), E4M3_SMALLEST), E4M3.name)
    return codes
