"""What a product may make of its activations, in plain torch: the reference of every kernel that rounds them."""

import torch
from torch import Tensor

from run_ckpt.backends.backend import FP8, MXFP4, MXFP8, NVFP4
from run_ckpt.backends.fp8 import quantize_rows
from run_ckpt.backends.operators import define_operator
from run_ckpt.contract.codec import dequantize, nvfp4_tensor_scale, quantize
from run_ckpt.contract.formats import E4M3_NAN_MAGNITUDE, E8M0_NAN, PLAIN_MXFP4, PLAIN_MXFP8, PLAIN_NVFP4, Scheme

# How blocked activations are coded, and by which scale rule: none saturates; MXFP4 as by AITER's dynamic_mxfp4_quant.
BLOCKED: dict[str, tuple[Scheme, str]] = {
    MXFP8: (PLAIN_MXFP8, "roundup"),
    NVFP4: (PLAIN_NVFP4, "amax_over_6"),
    MXFP4: (PLAIN_MXFP4, "even"),
}


def round_rows(x: Tensor, activations: str, input_scale: Tensor | None) -> Tensor:
    """Return what the codes of x [M, K] stand for, in x's dtype; bfloat16 holds MX values exactly, float32 all blocked.

    activations: one of backend.ACTIVATIONS but for BF16; blocked ones want K to be a multiple of their block.
    input_scale: float32 [1] or None, for FP8 alone.
    A block with NaN or Inf becomes NaN; FP8 has a code for NaN, and Inf makes its row NaN.
    """
    rounded: Tensor = _rounded(x, activations, input_scale)
    return rounded


def _round_rows(x: Tensor, activations: str, input_scale: Tensor | None) -> Tensor:
    if not x.numel():
        return torch.empty_like(x)
    if activations == FP8:
        codes, scale = quantize_rows(x, torch.float8_e4m3fn, input_scale)
        rounded = codes.float() * scale
    else:
        codes, scales, second = encode_rows(x, activations)
        rounded = dequantize(codes, scales, BLOCKED[activations][0], second)
    limit = torch.finfo(x.dtype).max
    return rounded.clamp(-limit, limit).to(x.dtype)


def encode_rows(x: Tensor, activations: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return the codes of x [M, K] in a blocked format, the scales [M, K / block] of its blocks, and that of all of x.

    x: not empty. Each in its dtype on disk; the last is float32 [1] of NVFP4, else None. The scale of a block with NaN
    or Inf is NaN: E2M1 has no code for them.
    """
    scheme, rule = BLOCKED[activations]
    is_finite, second = x.isfinite(), None
    if scheme.format.is_two_level:
        finite = x.abs().masked_fill(~is_finite, 0)
        second = nvfp4_tensor_scale(finite.amax())
    codes, scales = quantize(x, scheme, rule, second)
    is_whole = is_finite.reshape(*scales.shape, -1).all(-1)
    code_of_nan = E4M3_NAN_MAGNITUDE if scheme.format.is_two_level else E8M0_NAN
    return codes, scales.view(torch.uint8).masked_fill(~is_whole, code_of_nan).view(scales.dtype), second


def _empty_rows(x: Tensor, activations: str, input_scale: Tensor | None) -> Tensor:
    return torch.empty_like(x)


_rounded = define_operator(
    "round_rows(Tensor x, str activations, Tensor? input_scale) -> Tensor", _round_rows, _empty_rows
)
