"""Triton kernels that decode weights on the way to the matrix units: any GPU that Triton serves."""

import torch
from torch import Tensor

from run_ckpt.backends.activations import BLOCKED, round_rows
from run_ckpt.backends.backend import Backend, Device, Tensors
from run_ckpt.backends.operators import define_operator
from run_ckpt.backends.packages import why_no_triton
from run_ckpt.backends.reference import from_plain, to_plain
from run_ckpt.contract.codec import tensor_scale
from run_ckpt.contract.formats import FP8, GROUP, MXFP4, MXFP8, NVFP4
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer

# The first NVIDIA GPUs with matrix units for BF16.
_MIN_SM = 80
_FORMATS = (MXFP4, NVFP4, MXFP8, FP8)


def _unsupported(layer: Layer, device: Device) -> str | None:
    if device.kind not in ("cuda", "rocm"):
        return f"Triton compiles for GPUs, not for {device}"
    if device.kind == "cuda" and int(device.arch.removeprefix("sm")) < _MIN_SM:
        return f"NVIDIA GPUs multiply BF16 from sm{_MIN_SM} on, this is {device.arch}"
    if layer.format not in _FORMATS:
        return f"the Triton kernels decode {', '.join(map(str, _FORMATS))}, this one is {layer.format}"
    return why_no_triton() if device.is_here else None


def _multiply(layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    # As the kernels call it: by what shares a scale where a format leaves that open.
    scales = layer.format.name if layer.scheme.granularity == GROUP else layer.scheme.granularity
    return _linear(x, operands[WEIGHT], operands[WEIGHT_SCALE], tensor_scale(operands), scales, bias)


def _multiply_decoding(
    x: Tensor, weight: Tensor, scale: Tensor, second: Tensor | None, scales: str, bias: Tensor | None
) -> Tensor:
    from run_ckpt.backends.triton.matmul import multiply

    return multiply(x, weight, scale, second, scales, bias)


def _empty_product(
    x: Tensor, weight: Tensor, scale: Tensor, second: Tensor | None, scales: str, bias: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_linear = define_operator(
    "triton_linear(Tensor x, Tensor weight, Tensor scale, Tensor? second, str scales, Tensor? bias) -> Tensor",
    _multiply_decoding,
    _empty_product,
)


def _round(x: Tensor, activations: str, input_scale: Tensor | None) -> Tensor:
    has_kernel = activations in BLOCKED and not BLOCKED[activations][0].format.is_two_level
    return _round_rows(x, activations) if has_kernel else round_rows(x, activations, input_scale)


def _round_blocks(x: Tensor, activations: str) -> Tensor:
    from run_ckpt.backends.triton.round import round_blocks

    return round_blocks(x, activations)


_round_rows = define_operator(
    "triton_round(Tensor x, str activations) -> Tensor", _round_blocks, lambda x, activations: torch.empty_like(x)
)

# Activations stay as they are unless other ones are asked for, so the error is that of the weights.
TRITON = Backend(
    "triton", unsupported=_unsupported, prepare=to_plain, matmul=_multiply, restore=from_plain, round_rows=_round
)
