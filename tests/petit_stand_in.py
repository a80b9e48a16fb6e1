"""STAND-IN for petit_kernel 0.0.3, which needs a CDNA GPU: its orders of words, undone and multiplied in float64.

Of the real layout it leaves out the permutation of the bits within a word.
"""

import torch
from torch import Tensor

from tests.codec import dequantize_mxfp4


class Refused(Exception):
    """The real call would fail, or give wrong numbers."""


# Axes of a weight word (n / 32, n % 32 / 16, n % 16, k / 64, k % 64 / 16, k % 16 / 8) in Petit's order.
_WEIGHT_ORDER = (3, 0, 4, 2, 1, 5)
# Axes of a scale byte (n / 32, n % 32 / 16, n % 16 / 2, n % 2, s / 2, s % 2) in Petit's order.
_SCALE_ORDER = (4, 0, 5, 2, 3, 1)


def repack_mxfp4(qw: Tensor, size_n: int, size_k: int) -> Tensor:
    _require(qw.dtype == torch.int32 and qw.shape == (size_n, size_k // 8), "the weight is not int32 [N, K/8]")
    _require(size_n % 32 == 0 and size_k % 256 == 0, "N % 32 or K % 256")
    words = qw.reshape(size_n // 32, 2, 16, size_k // 64, 4, 2)
    return words.permute(_WEIGHT_ORDER).reshape(size_n // 16, 2 * size_k)


def process_mxfp4_scales(scales: Tensor, size_n: int, size_k: int) -> Tensor:
    _require(scales.dtype == torch.uint8 and scales.shape == (size_n, size_k // 32), "the scale is not U8 [N, K/32]")
    _require(int(scales.min()) >= 16 and int(scales.max()) <= 247, "the kernel's exponent would wrap")
    codes = scales.reshape(size_n // 32, 2, 8, 2, size_k // 64, 2)
    return codes.permute(_SCALE_ORDER).reshape(size_n // 32, size_k)


def mul_mxfp4_a16(
    a: Tensor, b: Tensor, s: Tensor, global_scale: Tensor, size_m: int, size_n: int, size_k: int, solution_id: int = -1
) -> Tensor:
    _require(a.dtype == torch.bfloat16 and a.shape == (size_m, size_k) and a.is_contiguous(), "a is not BF16 [M, K]")
    _require(global_scale.tolist() == [1.0] and global_scale.dtype == torch.float32, "the global scale is not 1")
    _require(solution_id == -1, "an unknown solution")
    words = b.reshape([(size_n // 32, 2, 16, size_k // 64, 4, 2)[axis] for axis in _WEIGHT_ORDER])
    codes = s.reshape([(size_n // 32, 2, 8, 2, size_k // 64, 2)[axis] for axis in _SCALE_ORDER])
    packed = words.permute(_inverse(_WEIGHT_ORDER)).reshape(size_n, -1).view(torch.uint8)
    weight = dequantize_mxfp4(packed, codes.permute(_inverse(_SCALE_ORDER)).reshape(size_n, -1))
    return (a.double() @ weight.double().T).float().bfloat16()


def _inverse(order: tuple[int, ...]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise Refused(otherwise)
