"""The bits, in plain torch: quantize and dequantize whole weights.

This file is the reference. Every faster kernel must return the same bytes.
"""

import torch
from torch import Tensor

from run_ckpt.contract.elements import (
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    pack_nibbles,
    scale_to_units,
    unpack_nibbles,
)
from run_ckpt.contract.formats import E4M3_MAX, FP8_BLOCK_SIZE, MXFP4_BLOCK_SIZE
from run_ckpt.contract.scale_rules import choose_scale_codes


def quantize_mxfp4(weight: Tensor, scale_rule: str) -> tuple[Tensor, Tensor]:
    """Return packed E2M1 codes uint8 [N, K/2] and E8M0 scales uint8 [N, K/32], row-major.

    weight: float32, bfloat16 or float16 [N, K], finite, K a multiple of 32.
    scale_rule: one of formats.SCALE_RULES, see scale_rules.py.
    Source: OCP MX v1.0, 6.3; rule ``even`` gives the bytes of AITER's Triton quantizer.
    """
    rows, cols = weight.shape
    blocks = weight.float().reshape(rows, cols // MXFP4_BLOCK_SIZE, MXFP4_BLOCK_SIZE)
    scale_codes = choose_scale_codes(blocks, scale_rule)
    codes = encode_e2m1(scale_to_units(blocks, scale_codes))
    return pack_nibbles(codes.reshape(rows, cols)), scale_codes


def dequantize_mxfp4(packed: Tensor, scale_codes: Tensor) -> Tensor:
    """Return float32 [N, K] from packed codes uint8 [N, K/2] and E8M0 codes uint8 [N, K/32]."""
    rows, n_blocks = scale_codes.shape
    values = decode_e2m1(unpack_nibbles(packed)).reshape(rows, n_blocks, MXFP4_BLOCK_SIZE)
    return (values * decode_e8m0(scale_codes).unsqueeze(-1)).reshape(rows, -1)


def quantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Return float8_e4m3fn [N, K]: e4m3(clamp(weight / scale, +-448)), nearest, ties to even.

    weight: float32, bfloat16 or float16 [N, K]. scale: float32, broadcastable to [N, K].
    The division is in float32. torch before 2.13 gave NaN on overflow, hence the clamp.
    """
    return (weight.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def fp8_scale(amax: Tensor) -> Tensor:
    """Return float32 amax / 448, or 1 where that is zero (an all-zero weight)."""
    scale = amax.float() / E4M3_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def expand_fp8_scale(scale: Tensor, rows: int, cols: int) -> Tensor:
    """Return a scale [1], [N], [N, 1] or [ceil(N/128), ceil(K/128)] as float32 broadcastable to [N, K]."""
    if scale.numel() == 1:
        return scale.reshape(1, 1)
    if scale.numel() == rows and (scale.dim() == 1 or scale.shape[1] == 1):
        return scale.reshape(rows, 1)
    by_row = scale.repeat_interleave(FP8_BLOCK_SIZE, dim=0)[:rows]
    return by_row.repeat_interleave(FP8_BLOCK_SIZE, dim=1)[:, :cols]


def dequantize_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [N, K] from float8_e4m3fn codes [N, K] and any scale of expand_fp8_scale."""
    return codes.float() * expand_fp8_scale(scale, *codes.shape)
