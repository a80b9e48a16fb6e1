"""STAND-IN for the device calls of AMD's AITER, which need a GPU: what they would read, multiplied in float64.

Bytes are addressed by the index arithmetic of AITER's sources (csrc/include/mx_quant_utils.h and
quant_mxfp4.cu), not by runtime's layouts. What the real calls refuse or read wrongly raises Refused.
test_aiter.py holds this against outputs that AITER's own code computed (tests/golden).
"""

import torch
from torch import Tensor

from tests.codec import quantize_mxfp4

_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
# AITER leaves the scale rows past the next multiple of 32 as the allocator gave them.
_GARBAGE = 0xAB


class Refused(Exception):
    """The real call would fail, or give wrong numbers."""


def dynamic_mxfp4_quant(x: Tensor, scaling_mode: str = "even", shuffle: bool = False) -> tuple[Tensor, Tensor]:
    _require(x.dim() == 2 and x.is_contiguous() and x.dtype == torch.bfloat16, "x is not contiguous BF16 [M, K]")
    _require(scaling_mode == "even" and shuffle, "the GEMM reads shuffled scales")
    packed, codes = quantize_mxfp4(x, "even")
    M, n_scales = codes.shape
    scale = torch.full((-(-M // 256) * 256, -(-n_scales // 8) * 8), _GARBAGE, dtype=torch.uint8)
    written = -(-M // 32) * 32
    scale[:written] = 0
    scale.view(-1)[_scale_offsets(M, n_scales, scale.shape[1])] = codes
    return packed.view(torch.float4_e2m1fn_x2), scale.view(torch.float8_e8m0fnu)


def gemm_a4w4(
    A: Tensor,
    B: Tensor,
    A_scale: Tensor,
    B_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    alpha: float = 1.0,
    beta: float = 0.0,
    bpreshuffle: bool = True,
) -> Tensor:
    _require(bias is None and (alpha, beta) == (1.0, 0.0), "bias is an [M, N] operand that beta = 0 ignores")
    _require(bpreshuffle and dtype == torch.bfloat16, "the tuned kernels take shuffled weights and give BF16")
    _require(A.dtype == B.dtype == torch.float4_e2m1fn_x2, "A and B are not both FP4 pairs")
    _require(A_scale.dtype == B_scale.dtype == torch.float8_e8m0fnu, "the scales are not both E8M0")
    _require(all(t.dim() == 2 and t.is_contiguous() for t in (A, B, A_scale, B_scale)), "not contiguous 2-D")
    (M, width), N = A.shape, len(B)
    _require(B.shape[1] == width and N % 32 == 0 and width % 32 == 0, "K differs, or N % 32, or K % 64")
    n_scales = width // 16
    pitch = -(-n_scales // 8) * 8
    _require(A_scale.shape == (-(-M // 256) * 256, pitch), "A_scale is not padded to [256, 8]")
    _require(B_scale.shape == (-(-N // 256) * 256, pitch), "B_scale is not padded to [256, 8]")
    weight = _decode(_unshuffled_bytes(B.view(torch.uint8)), _unshuffled_scales(B_scale, N, n_scales))
    _require_zero_padding(B_scale, N, n_scales)
    activations = _decode(A.view(torch.uint8), _unshuffled_scales(A_scale, M, n_scales))
    return (activations @ weight.T).float().to(dtype)


def gemm_a8w8_bpreshuffle(
    XQ: Tensor,
    WQ: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    _require(bias is None, "bias is not supported")
    _require(dtype in (torch.bfloat16, torch.float16), "the output is BF16 or F16")
    _require(XQ.dtype == WQ.dtype and WQ.dtype in (torch.float8_e4m3fn, torch.float8_e4m3fnuz), "not E4M3")
    (M, K), N = XQ.shape, len(WQ)
    _require(N % 16 == 0 and K % 64 == 0 and K >= 192 and WQ.shape[1] == K, "a shape that CK does not take")
    _require(x_scale.shape == (M, 1) and w_scale.shape == (N, 1), "the scales are not [M, 1] and [N, 1]")
    _require(x_scale.dtype == w_scale.dtype == torch.float32, "the scales are not float32")
    _require(all(t.is_contiguous() for t in (XQ, WQ, x_scale, w_scale)), "not contiguous")
    weight = _unshuffled_bytes(WQ.view(torch.uint8)).view(WQ.dtype).double()
    product = XQ.double() @ weight.T * x_scale.double() * w_scale.double().T
    return product.float().to(dtype)


def _unshuffled_bytes(stored: Tensor) -> Tensor:
    rows, width = stored.shape
    n, kb = torch.arange(rows)[:, None], torch.arange(width)[None, :]
    return stored.reshape(-1)[n // 16 * 16 * width + kb // 16 * 256 + n % 16 * 16 + kb % 16]


def _unshuffled_scales(stored: Tensor, rows: int, n_scales: int) -> Tensor:
    return stored.view(torch.uint8).reshape(-1)[_scale_offsets(rows, n_scales, stored.shape[1])]


def _scale_offsets(rows: int, n_scales: int, pitch: int) -> Tensor:
    n, s = torch.arange(rows)[:, None], torch.arange(n_scales)[None, :]
    return n // 32 * 32 * pitch + s // 8 * 256 + s % 4 * 64 + n % 16 * 4 + s % 8 // 4 * 2 + n % 32 // 16


def _require_zero_padding(stored: Tensor, rows: int, n_scales: int) -> None:
    is_padding = torch.ones(stored.numel(), dtype=torch.bool)
    is_padding[_scale_offsets(rows, n_scales, stored.shape[1]).flatten()] = False
    _require(not stored.view(torch.uint8).reshape(-1)[is_padding].any(), "scale padding is not 0x00")


def _decode(packed: Tensor, scale_codes: Tensor) -> Tensor:
    codes = torch.stack((packed & 0xF, packed >> 4), -1).flatten(1).long()
    scale = torch.exp2(scale_codes.double() - 127)
    return _E2M1[codes] * scale.repeat_interleave(32, dim=1)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Refused(otherwise)
