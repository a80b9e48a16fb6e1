"""Triton: x @ weight.T + bias with a quantized weight, and the decoded weight itself."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from run_ckpt.backends.triton.decode import TL_DTYPES, decode_tile, round_to

# Beyond so many rows the weight is decoded once for all of them and torch's own product does the rest:
# each row tile would decode it again. vLLM's AWQ kernel parts at the same number; not measured here.
FUSED_MAX_M = 256


@dataclass(frozen=True)
class Tiles:
    """How a product is cut: rows of x, of the weight, the K of one step; and Triton's two dials."""

    M: int
    N: int
    K: int
    num_warps: int
    num_stages: int


# Few rows: narrow tiles for more programs, long steps for wide reads. Many: square ones for reuse. The
# largest takes 48 of an MI200's 64 KiB of shared memory, in float32. Reasoned, not timed on a GPU.
_TILES = (
    Tiles(16, 32, 128, num_warps=4, num_stages=2),
    Tiles(32, 64, 64, num_warps=4, num_stages=2),
    Tiles(64, 64, 64, num_warps=4, num_stages=2),
    Tiles(128, 64, 64, num_warps=8, num_stages=2),
)
_DECODE_TILE = (32, 128)


def multiply(
    x: Tensor, weight: Tensor, scale: Tensor, second: Tensor | None, scales: str, bias: Tensor | None
) -> Tensor:
    """Return x @ W.T + bias, summed in float32, as [M, N] in x's dtype; W: codec.dequantize, rounded to x's dtype.

    x: bfloat16, float16 or float32 [M, K], contiguous. weight, scale: as reference.to_plain gives them.
    scales: what they are, see decode.decode_tile. second: the scale of the whole tensor, see codec.tensor_scale.
    """
    M, K = x.shape
    N = len(weight)
    if M > FUSED_MAX_M:
        decoded = dequantize(weight, scale, second, scales, K, x.dtype)
        return F.linear(x, decoded, None if bias is None else bias.to(x.dtype))
    out = x.new_empty(M, N)
    if not M:
        return out
    tiles = next((tiles for tiles in _TILES if tiles.M >= M), _TILES[-1])
    dtype = TL_DTYPES[x.dtype]
    with torch.cuda.device_of(x):
        multiply_kernel[(triton.cdiv(N, tiles.N), triton.cdiv(M, tiles.M))](
            x,
            weight.view(torch.uint8),
            _as_bytes(scale),
            second,
            bias,
            out,
            M,
            N,
            K,
            SCALES=scales,
            DTYPE=dtype,
            # Triton's interpreter, which alone runs on a CPU, multiplies the bit patterns of bfloat16.
            DOT_DTYPE=dtype if x.is_cuda else tl.float32,
            BLOCK_M=tiles.M,
            BLOCK_N=tiles.N,
            BLOCK_K=tiles.K,
            num_warps=tiles.num_warps,
            num_stages=tiles.num_stages,
        )
    return out


def dequantize(weight: Tensor, scale: Tensor, second: Tensor | None, scales: str, K: int, dtype: torch.dtype) -> Tensor:
    """Return codec.dequantize, rounded to dtype, bit for bit, as [N, K]."""
    N, (block_n, block_k) = len(weight), _DECODE_TILE
    out = torch.empty(N, K, dtype=dtype, device=weight.device)
    with torch.cuda.device_of(weight):
        dequantize_kernel[(triton.cdiv(N, block_n), triton.cdiv(K, block_k))](
            weight.view(torch.uint8),
            _as_bytes(scale),
            second,
            out,
            N,
            K,
            SCALES=scales,
            DTYPE=TL_DTYPES[dtype],
            BLOCK_N=block_n,
            BLOCK_K=block_k,
        )
    return out


def _as_bytes(scale: Tensor) -> Tensor:
    """Codes as bytes, whose float8 types Triton does not know on every GPU; float32 scales as they are."""
    return scale if scale.dtype == torch.float32 else scale.view(torch.uint8)


@triton.jit
def multiply_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    second_ptr,
    bias_ptr,
    out_ptr,
    M,
    N,
    K,
    SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    DOT_DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # 64 bits: M * N and N * K may pass 2^31.
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for first_k in range(0, K, BLOCK_K):
        k = first_k + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0.0)
        weight = decode_tile(weight_ptr, scale_ptr, second_ptr, n, first_k, N, K, SCALES, DTYPE, BLOCK_N, BLOCK_K)
        total = tl.dot(x.to(DOT_DTYPE), tl.trans(weight.to(DOT_DTYPE)), total, input_precision="ieee")
    if bias_ptr is not None:
        total += tl.load(bias_ptr + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    tl.store(
        out_ptr + m[:, None] * N + n[None, :], round_to(total, DTYPE, False), mask=(m < M)[:, None] & (n < N)[None, :]
    )


@triton.jit
def dequantize_kernel(
    weight_ptr,
    scale_ptr,
    second_ptr,
    out_ptr,
    N,
    K,
    SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    first_k = tl.program_id(1) * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)
    tile = decode_tile(weight_ptr, scale_ptr, second_ptr, n, first_k, N, K, SCALES, DTYPE, BLOCK_N, BLOCK_K)
    tl.store(out_ptr + n[:, None] * K + k[None, :], tile, mask=(n < N)[:, None] & (k < K)[None, :])
