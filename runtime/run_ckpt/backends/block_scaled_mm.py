"""MXFP8 and NVFP4 weights by activations of the same format, through torch's matmul of blocks with scales."""

import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.backends.activations import encode_rows
from run_ckpt.backends.backend import Backend, Device, Tensors, finish
from run_ckpt.backends.operators import define_operator
from run_ckpt.contract.codec import tensor_scale
from run_ckpt.contract.formats import MXFP8, NVFP4
from run_ckpt.contract.layouts import CUBLAS_SCALE
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer

_FORMATS = (MXFP8, NVFP4)
# cuBLAS has these from Blackwell on. For ROCm torch wants the scales in another order with each of ROCm 7.0, 7.13 and
# 7.14 (aten/src/ATen/native/cuda/ScaledBlas.cpp), for XPU in a third: not here.
_MIN_SM = 100
_N_MULTIPLE = 16


def _unsupported(layer: Layer, device: Device) -> str | None:
    if layer.format not in _FORMATS:
        return f"it takes {' and '.join(map(str, _FORMATS))} weights, this one is {layer.format}"
    if layer.N % _N_MULTIPLE or layer.K % layer.format.K_multiple:
        return f"N = {layer.N}, K = {layer.K} are no multiples of {_N_MULTIPLE} and {layer.format.K_multiple}"
    if device.kind != "cuda" or int(device.arch.removeprefix("sm")) < _MIN_SM:
        return f"torch multiplies blocks with scales by NVIDIA GPUs from sm{_MIN_SM} on, this is {device}"
    if device.is_here and not hasattr(F, "scaled_mm"):
        return "this torch has no torch.nn.functional.scaled_mm; a newer one has"
    return None


def _prepare(layer: Layer, tensors: Tensors) -> Tensors:
    """Weight as on disk; its scales as bytes in the order of cuBLAS, padded with 0x00 to [128 r, 4 c]."""
    scale = tensors[WEIGHT_SCALE].reshape(layer.scheme.scale_grid(layer.N, layer.K))
    return {**tensors, WEIGHT_SCALE: _tile(scale.view(torch.uint8))}


def _tile(scale: Tensor) -> Tensor:
    return CUBLAS_SCALE.shuffle(CUBLAS_SCALE.pad_to_tile(scale))


def _restore(layer: Layer, operands: Tensors) -> Tensors:
    rows, cols = layer.scheme.scale_grid(layer.N, layer.K)
    scale = CUBLAS_SCALE.unshuffle(operands[WEIGHT_SCALE])[:rows, :cols].contiguous()
    stored = torch.float8_e4m3fn if layer.format == NVFP4 else torch.uint8
    return {**operands, WEIGHT_SCALE: scale.view(stored).reshape(layer.scale_shape)}


def _multiply(layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    second = tensor_scale(operands)
    return finish(_product(x, operands[WEIGHT], operands[WEIGHT_SCALE], second, layer.format.name), x, bias)


def multiply_blocks(x: Tensor, weight: Tensor, scale: Tensor, second: Tensor | None, format_: str) -> Tensor:
    """Return x [M, K], rounded to ``format_``, by weight.T, as bfloat16 [M, N]. The rest: as _prepare has them.

    Sums are in float32, and there the scales of both whole tensors are multiplied, those of NVFP4.
    """
    from torch.nn.functional import ScalingType, SwizzleType  # not of every torch that this package runs with

    if not len(x):
        return x.new_empty(0, len(weight), dtype=torch.bfloat16)
    codes, code_scales, own = encode_rows(x, format_)
    if own is None or second is None:
        recipes, element, scale_dtype = [ScalingType.BlockWise1x32], torch.float8_e4m3fn, torch.float8_e8m0fnu
    else:
        recipes = [ScalingType.BlockWise1x16, ScalingType.TensorWise]
        element, scale_dtype = torch.float4_e2m1fn_x2, torch.float8_e4m3fn
    swizzles = [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE][: len(recipes)]
    of_x, of_weight = (
        [tiled.view(scale_dtype), *([] if whole is None else [whole])]
        for tiled, whole in ((_tile(code_scales.view(torch.uint8)), own), (scale, second))
    )
    return F.scaled_mm(
        codes.view(element), weight.view(element).t(), of_x, recipes, of_weight, recipes, swizzles, swizzles
    )


def _empty_product(x: Tensor, weight: Tensor, scale: Tensor, second: Tensor | None, format_: str) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0], dtype=torch.bfloat16)


_product = define_operator(
    "block_scaled_mm(Tensor x, Tensor weight, Tensor scale, Tensor? second, str format) -> Tensor",
    multiply_blocks,
    _empty_product,
)


def _unasked(device: Device, activations: str | None) -> str | None:
    if activations in [quant_format.name for quant_format in _FORMATS]:
        return None
    return "it rounds activations to the format of the weights; ask for such activations"


BLOCK_SCALED_MM = Backend(
    "block_scaled_mm",
    unsupported=_unsupported,
    prepare=_prepare,
    matmul=_multiply,
    restore=_restore,
    only_if_asked=_unasked,
    activations=lambda layer: layer.format.name,
)
