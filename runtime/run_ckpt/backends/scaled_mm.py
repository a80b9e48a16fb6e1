"""FP8 weights and activations through torch's own scaled matmul."""

import torch
from torch import Tensor

from run_ckpt.backends.backend import Backend, Device, Tensors, finish
from run_ckpt.backends.fp8 import quantize_rows, refuse_fnuz, to_device_fp8
from run_ckpt.contract.formats import BLOCK_FP8, FP8, TENSOR_FP8
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, Layer

# Those that torch's _scaled_mm takes (_scaled_mm_allowed_device in aten/src/ATen/native/cuda).
_MIN_SM = 89
_AMD_ARCHITECTURES = ("gfx942", "gfx950", "gfx1200", "gfx1201")
# cuBLASLt wants rows of 16 bytes.
_MULTIPLE = 16


def _unsupported(layer: Layer, device: Device) -> str | None:
    if layer.format != FP8:
        return f"torch's scaled matmul takes FP8 weights here, this one is {layer.format}"
    if layer.scheme == BLOCK_FP8:
        return "torch's scaled matmul takes one scale a tensor or a row, this weight has one a block"
    if layer.N % _MULTIPLE or layer.K % _MULTIPLE:
        return f"N = {layer.N} and K = {layer.K} are not both multiples of {_MULTIPLE}"
    return _unsupported_device(device)


def _unsupported_device(device: Device) -> str | None:
    if device.kind == "cpu":
        return None
    if device.kind == "cuda":
        has_fp8 = int(device.arch.removeprefix("sm")) >= _MIN_SM
        return None if has_fp8 else f"NVIDIA GPUs multiply FP8 from sm{_MIN_SM} on, this is {device.arch}"
    if device.kind == "rocm" and device.arch in _AMD_ARCHITECTURES:
        return None
    return f"torch's scaled matmul runs on NVIDIA sm{_MIN_SM} or newer and on AMD {', '.join(_AMD_ARCHITECTURES)}"


def _prepare(layer: Layer, tensors: Tensors) -> Tensors:
    """Weight [N, K], whose transpose is column-major without a copy; scale [1] (tensor-wise) or [1, N] (row-wise)."""
    fp8 = to_device_fp8(layer, tensors)
    scale = fp8[WEIGHT_SCALE].reshape(1, -1)
    if layer.scheme == TENSOR_FP8 and INPUT_SCALE in fp8:
        return {**fp8, WEIGHT_SCALE: scale[0]}
    return {**fp8, WEIGHT_SCALE: scale.expand(1, layer.N).contiguous()}


def _restore(layer: Layer, operands: Tensors) -> Tensors:
    refuse_fnuz(layer, operands[WEIGHT])
    scale = operands[WEIGHT_SCALE].flatten()
    on_disk = scale[:1] if layer.scheme == TENSOR_FP8 else scale
    return {**operands, WEIGHT_SCALE: on_disk.reshape(layer.scale_shape)}


def _multiply(layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    weight, scale = operands[WEIGHT], operands[WEIGHT_SCALE]
    codes, code_scale = quantize_rows(x, weight.dtype, operands.get(INPUT_SCALE))
    if scale.dim() == 2:
        code_scale = code_scale.expand(x.shape[0], 1).contiguous()
    # Row-wise scaling gives BF16 alone, and takes a BF16 bias into its float32 sum.
    is_fused = bias is not None and bias.dtype == x.dtype == torch.bfloat16
    product = torch._scaled_mm(
        codes, weight.t(), code_scale, scale, bias=bias if is_fused else None, out_dtype=torch.bfloat16
    )
    return finish(product, x, None if is_fused else bias)


def _inexact_on_a_cpu(device: Device, activations: str | None) -> str | None:
    return "on a CPU the reference is as fast and leaves activations as they are" if device.kind == "cpu" else None


SCALED_MM = Backend(
    "scaled_mm",
    unsupported=_unsupported,
    prepare=_prepare,
    matmul=_multiply,
    restore=_restore,
    only_if_asked=_inexact_on_a_cpu,
    activations=lambda layer: layer.format.name,
)
