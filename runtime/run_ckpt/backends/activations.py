"""What a product may make of its activations, in plain torch: the reference of every kernel that rounds them."""

import torch
from torch import Tensor

from run_ckpt.backends.backend import FP8, MXFP4, MXFP8
from run_ckpt.backends.fp8 import quantize_rows
from run_ckpt.backends.operators import define_operator
from run_ckpt.contract.codec import dequantize, quantize
from run_ckpt.contract.formats import E8M0_NAN, MX_BLOCK_SIZE, PLAIN_MXFP4, PLAIN_MXFP8, Scheme

# How blocked activations are coded, and by which scale rule: none saturates; as by AITER's dynamic_mxfp4_quant.
BLOCKED: dict[str, tuple[Scheme, str]] = {MXFP8: (PLAIN_MXFP8, "roundup"), MXFP4: (PLAIN_MXFP4, "even")}


def round_rows(x: Tensor, activations: str, input_scale: Tensor | None) -> Tensor:
    """Return what the codes of x [M, K] stand for, in x's dtype; bfloat16 and float32 hold blocked values exactly.

    activations: one of backend.ACTIVATIONS but for BF16; blocked ones want K to be a multiple of 32.
    input_scale: float32 [1] or None, for FP8 alone.
    A block with NaN or Inf becomes NaN; FP8 has a code for NaN, and Inf makes its row NaN.
    """
    rounded: Tensor = _rounded(x, activations, input_scale)
    return rounded


def _round_rows(x: Tensor, activations: str, input_scale: Tensor | None) -> Tensor:
    if activations == FP8:
        codes, scale = quantize_rows(x, torch.float8_e4m3fn, input_scale)
        rounded = codes.float() * scale
    else:
        scheme, rule = BLOCKED[activations]
        codes, scales = quantize(x, scheme, rule)
        # E2M1 has no code for NaN or Inf.
        is_finite = x.isfinite().reshape(*scales.shape, MX_BLOCK_SIZE).all(-1)
        rounded = dequantize(codes, scales.masked_fill(~is_finite, E8M0_NAN), scheme)
    limit = torch.finfo(x.dtype).max
    return rounded.clamp(-limit, limit).to(x.dtype)


def _empty_rows(x: Tensor, activations: str, input_scale: Tensor | None) -> Tensor:
    return torch.empty_like(x)


_rounded = define_operator(
    "round_rows(Tensor x, str activations, Tensor? input_scale) -> Tensor", _round_rows, _empty_rows
)
