"""FP8 in the E4M3 variant of the GPU: weights converted at load, activations quantized for each product."""

import torch
from torch import Tensor

from run_ckpt.backends.backend import Tensors, describe_device
from run_ckpt.contract.errors import BackendError
from run_ckpt.contract.formats import E4M3_NAN_MAGNITUDE
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, Layer

# These multiply e4m3fnuz: the same codes stand for half the values, 0x80 is NaN and there is no -0.
FNUZ_ARCHITECTURES = ("gfx940", "gfx941", "gfx942")
_MINUS_ZERO = 0x80


def to_device_fp8(layer: Layer, tensors: Tensors) -> Tensors:
    """Return weight [N, K] in the E4M3 variant of its GPU, with the scales that go with it. Changes the weight.

    On gfx942 the code of -0 becomes +0 and the scales double: exact for every finite weight.
    Raises BackendError for a NaN code there, which would turn into a number.
    """
    weight = tensors[WEIGHT]
    device = describe_device(weight.device)
    if device.kind != "rocm" or device.arch not in FNUZ_ARCHITECTURES:
        return tensors
    codes = weight.view(torch.uint8)
    if bool(((codes & E4M3_NAN_MAGNITUDE) == E4M3_NAN_MAGNITUDE).any()):
        raise BackendError(
            f"{layer.module}: the weight holds NaN, which {device} can't say in FP8. Convert the source again."
        )
    codes.masked_fill_(codes == _MINUS_ZERO, 0)
    scales = {role: tensors[role] * 2 for role in (WEIGHT_SCALE, INPUT_SCALE) if role in tensors}
    return {**tensors, WEIGHT: codes.view(torch.float8_e4m3fnuz), **scales}


def refuse_fnuz(layer: Layer, weight: Tensor) -> None:
    """Raise BackendError for a weight whose bytes on disk can't be told any more."""
    if weight.dtype == torch.float8_e4m3fnuz:
        raise BackendError(
            f"{layer.module}: this GPU's FP8 has no -0, so the bytes on disk can't be restored."
            " Save from the folder it was loaded from, or load it on a CPU first."
        )


def quantize_rows(x: Tensor, dtype: torch.dtype, input_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return FP8 codes [M, K] and float32 scales of x [M, K]: [M, 1], or ``input_scale`` [1] where that is given.

    Without it a row's scale is amax / the largest value of dtype, or 1 where that is zero.
    """
    # In torch, not by AITER's per_token_quant_hip, which divides a row of zeros by zero.
    limit = torch.finfo(dtype).max
    scale = input_scale
    if scale is None:
        scale = x.abs().amax(1, keepdim=True).float() / limit
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (x.float() / scale).clamp(-limit, limit).to(dtype), scale
