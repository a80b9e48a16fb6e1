"""Triton: a tile of a quantized weight -> float32, rounded as contract/codec.py and torch's casts round it."""

import torch
import triton
import triton.language as tl

TL_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@triton.jit
def decode_tile(
    weight_ptr,
    scale_ptr,
    second_ptr,
    n,
    first_k,
    N,
    K,
    SCALES: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Return columns first_k.. of rows n as DTYPE [BLOCK_N, BLOCK_K], zero outside of [N, K].

    n: int64 [BLOCK_N]. BLOCK_K: a multiple of 32 that divides 128, first_k a multiple of it.
    SCALES: "mxfp4" (uint8 weight [N, K/2], scale [N, K/32]), "mxfp8" (weight as uint8 [N, K], scale as there),
    "nvfp4" (uint8 weight [N, K/2], scale as uint8 [N, K/16], second float32 [1]), "tensor", "channel" or "block"
    (FP8: weight as uint8 [N, K], scale float32).
    """
    if SCALES == "mxfp4" or SCALES == "mxfp8":
        tile = _decode_blocks(weight_ptr, scale_ptr, None, n, first_k // 32, N, K // 32, SCALES, BLOCK_N, BLOCK_K, 32)
    elif SCALES == "nvfp4":
        second = tl.load(second_ptr)
        tile = _decode_blocks(weight_ptr, scale_ptr, second, n, first_k // 16, N, K // 16, SCALES, BLOCK_N, BLOCK_K, 16)
    else:
        tile = _decode_fp8(weight_ptr, scale_ptr, n, first_k, N, K, SCALES, BLOCK_K)
    # An MXFP4 value has two significant bits and a power of two that bfloat16 holds too.
    return round_to(tile, DTYPE, SCALES == "mxfp4")


@triton.jit
def round_to(x, DTYPE: tl.constexpr, IS_BFLOAT16: tl.constexpr):
    """Return float32 x as DTYPE: the nearest value, ties to even. IS_BFLOAT16: each x is a bfloat16 already."""
    if DTYPE == tl.bfloat16:
        # In integers: the hardware's cast would do on a GPU, but Triton's interpreter truncates.
        bits = x.to(tl.int32, bitcast=True)
        if not IS_BFLOAT16:
            # Adding to a NaN could carry into its sign.
            bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)
        y = (bits >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _decode_blocks(
    weight_ptr,
    scale_ptr,
    second,
    n,
    first_block,
    N,
    n_blocks,
    SCALES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SIZE: tl.constexpr,
):
    block = first_block + tl.arange(0, BLOCK_K // SIZE)
    is_inside = (n < N)[:, None] & (block < n_blocks)[None, :]
    place = n[:, None] * n_blocks + block[None, :]
    scale_codes = tl.load(scale_ptr + place, mask=is_inside, other=0)
    if SCALES == "nvfp4":
        scale = (_decode_e4m3(scale_codes.to(tl.int32)) * second)[:, :, None]
    else:
        scale = _decode_e8m0(scale_codes)[:, :, None]
    NBYTES: tl.constexpr = SIZE if SCALES == "mxfp8" else SIZE // 2
    byte = place[:, :, None] * NBYTES + tl.arange(0, NBYTES)[None, None, :]
    codes = tl.load(weight_ptr + byte, mask=is_inside[:, :, None], other=0).to(tl.int32)
    if SCALES != "mxfp8":
        # [BLOCK_N, blocks, NBYTES, 2]: the low nibble is the even k
        values = tl.join(_decode_e2m1(codes & 0xF) * scale, _decode_e2m1(codes >> 4) * scale)
    else:
        values = _decode_e4m3(codes) * scale
    return values.reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _decode_fp8(weight_ptr, scale_ptr, n, first_k, N, K, SCALES: tl.constexpr, BLOCK_K: tl.constexpr):
    k = first_k + tl.arange(0, BLOCK_K)
    is_inside = (n < N)[:, None] & (k < K)[None, :]
    codes = tl.load(weight_ptr + n[:, None] * K + k[None, :], mask=is_inside, other=0).to(tl.int32)
    if SCALES == "tensor":
        scale = tl.load(scale_ptr)
    elif SCALES == "channel":
        scale = tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    else:
        place = (n // 128) * ((K + 127) // 128) + first_k // 128
        scale = tl.load(scale_ptr + place, mask=n < N, other=0.0)[:, None]
    return _decode_e4m3(codes) * scale


@triton.jit
def _decode_e2m1(code):
    # Exponent and mantissa at their places in a float16 stand for 2^-14 of the value, with E2M1's
    # subnormal 0.5 as float16's own; every GPU handles those.
    bits = ((code & 7) << 9) | ((code & 8) << 12)
    return (bits.to(tl.int16).to(tl.float16, bitcast=True) * 16384.0).to(tl.float32)


@triton.jit
def _decode_e4m3(code):
    # As above: 2^-8 of the value. E4M3's NaN would be 480.
    bits = ((code & 0x7F) << 7) | ((code & 0x80) << 8)
    value = (bits.to(tl.int16).to(tl.float16, bitcast=True) * 256.0).to(tl.float32)
    return tl.where((code & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def _decode_e8m0(code):
    # The code is a float32's exponent field, but for 0 (2^-127, a subnormal) and 255 (NaN).
    exponent = code.to(tl.int32)
    bits = tl.where(exponent == 0, 0x00400000, exponent << 23)
    return tl.where(exponent == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
