"""The contract's codec for tests: MXFP4 and FP8 in row-major order, FP8's granularity told by the scale's shape."""

from torch import Tensor

from run_ckpt.contract.codec import dequantize, expand_scales, quantize
from run_ckpt.contract.formats import BLOCK_FP8, CHANNEL_FP8, PLAIN_MXFP4, PLAIN_MXFP8, TENSOR_FP8, Scheme


def quantize_mxfp4(weight: Tensor, scale_rule: str) -> tuple[Tensor, Tensor]:
    """Return uint8 [N, K/2] and uint8 [N, K/32] of a weight [N, K]."""
    return quantize(weight, PLAIN_MXFP4, scale_rule)


def dequantize_mxfp4(packed: Tensor, scale_codes: Tensor) -> Tensor:
    """Return float32 [N, K] from uint8 [N, K/2] and uint8 [N, K/32]."""
    return dequantize(packed, scale_codes, PLAIN_MXFP4)


def dequantize_mxfp8(codes: Tensor, scale_codes: Tensor) -> Tensor:
    """Return float32 [N, K] from float8_e4m3fn [N, K] and uint8 [N, K/32]."""
    return dequantize(codes, scale_codes, PLAIN_MXFP8)


def dequantize_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return float32 [N, K] from float8_e4m3fn [N, K] and a scale [1], [N], [N, 1] or one for each 128 x 128."""
    return dequantize(codes, scale, fp8_scheme(scale, len(codes)))


def expand_fp8_scale(scale: Tensor, N: int, K: int) -> Tensor:
    """Return the scale of each element, float32 [N, K]."""
    return expand_scales(scale, fp8_scheme(scale, N), N, K)


def fp8_scheme(scale: Tensor, N: int) -> Scheme:
    if scale.numel() == 1:
        return TENSOR_FP8
    return CHANNEL_FP8 if scale.numel() == N and (scale.dim() == 1 or scale.shape[1] == 1) else BLOCK_FP8
