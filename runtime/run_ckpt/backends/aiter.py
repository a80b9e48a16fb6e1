"""AMD's AITER: MXFP4 weights and activations on gfx950, FP8 on gfx942 and gfx950."""

from dataclasses import replace

import torch
from torch import Tensor

from run_ckpt.backends.backend import Backend, Device, Tensors, finish
from run_ckpt.backends.fp8 import quantize_rows, refuse_fnuz, to_device_fp8
from run_ckpt.backends.operators import define_operator
from run_ckpt.backends.packages import why_no_aiter
from run_ckpt.backends.reference import shuffle, to_plain
from run_ckpt.contract.formats import AITER_MXFP4, BLOCK_FP8, FP8, MXFP4, TENSOR_FP8, QuantFormat
from run_ckpt.contract.layouts import AITER_WEIGHT
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, Layer

_ARCHITECTURES: dict[QuantFormat, tuple[str, ...]] = {
    MXFP4: (AITER_MXFP4.layout.target_arch,),
    FP8: ("gfx942", "gfx950"),
}
# AITER's own choice of types (aiter/utility/dtypes.py): bytes where torch lacks them.
_E2M1_PAIR: torch.dtype = getattr(torch, "float4_e2m1fn_x2", torch.uint8)
_E8M0: torch.dtype = getattr(torch, "float8_e8m0fnu", torch.uint8)

# csrc/ck_gemm_a8w8_bpreshuffle/gemm_a8w8_bpreshuffle.cu
_FP8_N_MULTIPLE, _FP8_K_MULTIPLE, _FP8_MIN_K = 16, 64, 192


def _unsupported(layer: Layer, device: Device) -> str | None:
    if layer.format not in _ARCHITECTURES:
        return (
            f"AITER's products here take {' and '.join(map(str, _ARCHITECTURES))} weights, this one is {layer.format}"
        )
    architectures = _ARCHITECTURES[layer.format]
    if device.kind != "rocm" or device.arch not in architectures:
        return f"AITER multiplies {layer.format} on {' and '.join(architectures)} alone"
    unsupported_shape = _unsupported_mxfp4_shape if layer.format == MXFP4 else _unsupported_fp8_shape
    return unsupported_shape(layer) or (why_no_aiter() if device.is_here else None)


def _unsupported_mxfp4_shape(layer: Layer) -> str | None:
    rows, cols = AITER_MXFP4.alignment
    if MXFP4.min_N > layer.N:
        return f"N = {layer.N} is below {MXFP4.min_N}, where AITER's FP4 kernels lose precision"
    if layer.N % rows:
        return f"N = {layer.N} is not a multiple of {rows}"
    if layer.K % cols:
        return f"K = {layer.K} is not a multiple of {cols}"
    return None


def _unsupported_fp8_shape(layer: Layer) -> str | None:
    if layer.scheme == BLOCK_FP8:
        return "AITER's pre-shuffled FP8 product takes one scale a row, this weight has one a block"
    if layer.N % _FP8_N_MULTIPLE:
        return f"N = {layer.N} is not a multiple of {_FP8_N_MULTIPLE}"
    if layer.K % _FP8_K_MULTIPLE or layer.K < _FP8_MIN_K:
        return f"K = {layer.K} is not a multiple of {_FP8_K_MULTIPLE} from {_FP8_MIN_K} on"
    return None


def _prepare(layer: Layer, tensors: Tensors) -> Tensors:
    if layer.format == MXFP4:
        return tensors if layer.scheme == AITER_MXFP4 else shuffle(tensors, AITER_MXFP4.layout)
    fp8 = to_device_fp8(layer, tensors)
    weight = fp8[WEIGHT]
    shuffled = AITER_WEIGHT.shuffle(weight.view(torch.uint8)).view(weight.dtype)
    scale = fp8[WEIGHT_SCALE].reshape(-1, 1).expand(layer.N, 1).contiguous()
    return {**fp8, WEIGHT: shuffled, WEIGHT_SCALE: scale}


def _restore(layer: Layer, operands: Tensors) -> Tensors:
    if layer.format == MXFP4:
        return operands if layer.scheme == AITER_MXFP4 else to_plain(replace(layer, scheme=AITER_MXFP4), operands)
    weight, scale = operands[WEIGHT], operands[WEIGHT_SCALE]
    refuse_fnuz(layer, weight)
    plain = AITER_WEIGHT.unshuffle(weight.view(torch.uint8)).view(weight.dtype)
    on_disk = scale[:1] if layer.scheme == TENSOR_FP8 else scale
    return {**operands, WEIGHT: plain, WEIGHT_SCALE: on_disk.reshape(layer.scale_shape)}


def _multiply(layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    weight, scale = operands[WEIGHT], operands[WEIGHT_SCALE]
    if layer.format == MXFP4:
        return finish(_aiter_mxfp4(x.bfloat16(), weight, scale), x, bias)
    codes, code_scale = quantize_rows(x, weight.dtype, operands.get(INPUT_SCALE))
    rows = code_scale.expand(x.shape[0], 1).contiguous()
    return finish(_aiter_fp8(codes, weight, rows, scale), x, bias)


def _multiply_mxfp4(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Return bfloat16 [M, N] from x bfloat16 [M, K], quantized on the way by AITER's rule ``even``."""
    from aiter import gemm_a4w4
    from aiter.utility.fp4_utils import dynamic_mxfp4_quant

    if not len(x):
        return x.new_empty(0, len(weight))
    codes, code_scale = dynamic_mxfp4_quant(x, shuffle=True)
    # Its "bias" is an [M, N] operand that is ignored unless beta is set: it is added outside.
    product: Tensor = gemm_a4w4(codes, weight.view(_E2M1_PAIR), code_scale, scale.view(_E8M0))
    return product


def _multiply_fp8(codes: Tensor, weight: Tensor, code_scale: Tensor, scale: Tensor) -> Tensor:
    """Return bfloat16 [M, N] from FP8 codes [M, K] with scales [M, 1] and a weight with scales [N, 1]."""
    from aiter import gemm_a8w8_bpreshuffle

    if not len(codes):
        return codes.new_empty(0, len(weight), dtype=torch.bfloat16)
    product: Tensor = gemm_a8w8_bpreshuffle(codes, weight, code_scale, scale, dtype=torch.bfloat16)
    return product


def _empty_product(x: Tensor, weight: Tensor, *scales: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)


_aiter_mxfp4 = define_operator(
    "aiter_mxfp4(Tensor x, Tensor weight, Tensor scale) -> Tensor", _multiply_mxfp4, _empty_product
)
_aiter_fp8 = define_operator(
    "aiter_fp8(Tensor codes, Tensor weight, Tensor code_scale, Tensor scale) -> Tensor", _multiply_fp8, _empty_product
)

# Its mixed products are not used. gemm_a16wfp4 rounds activations to MXFP4 itself. gemm_a8wfp4 (FP8 by token) loops to
# 2 K with masked loads that give no value past K, and its split-K summed few rows wrongly on gfx950 until a fix that no
# version number tells. gemm_a8w4_mxfp8 is for gfx1250.
AITER = Backend(
    "aiter",
    unsupported=_unsupported,
    prepare=_prepare,
    matmul=_multiply,
    restore=_restore,
    activations=lambda layer: layer.format.name,
)
