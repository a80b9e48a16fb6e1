"""Codes -> float32 for one slab of rows, by tables made with the contract's codec."""

from functools import cache

import torch
from torch import Tensor

from run_ckpt.contract.codec import expand_fp8_scale
from run_ckpt.contract.elements import decode_e2m1, decode_e8m0, unpack_nibbles
from run_ckpt.contract.formats import MXFP4_BLOCK_SIZE
from run_ckpt.contract.manifest import Layer
from run_ckpt.storage.rows import TensorReader, read_fp8_codes, read_packed, read_scale_codes, scale_rows


def decode_rows(reader: TensorReader, layer: Layer, scale: Tensor | None, start: int, stop: int) -> Tensor:
    """Return rows start..stop of a quantized weight as float32 [n, K].

    scale: the layer's whole scale tensor if it is FP8 (checkpoint.read_fp8_scale), else None.
    """
    if scale is not None:
        codes = read_fp8_codes(reader, layer, start, stop)
        return decode_fp8(codes, scale_rows(layer, scale, start, stop))
    scale_codes = read_scale_codes(reader, layer, start, stop)[:, : layer.K // MXFP4_BLOCK_SIZE]
    return decode_mxfp4(read_packed(reader, layer, start, stop), scale_codes)


def decode_mxfp4(packed: Tensor, scale_codes: Tensor) -> Tensor:
    """Return codec.dequantize_mxfp4(packed, scale_codes): one table look-up for each byte."""
    pairs = _e2m1_pairs(packed.device).index_select(0, packed.flatten().long()).view(torch.float32)
    blocks = pairs.reshape(*scale_codes.shape, MXFP4_BLOCK_SIZE)
    return blocks.mul_(decode_e8m0(scale_codes).unsqueeze(-1)).reshape(len(packed), -1)


def decode_fp8(codes: Tensor, scale: Tensor) -> Tensor:
    """Return codec.dequantize_fp8 for codes as uint8 [n, K]: torch's own cast is four times slower."""
    values = _e4m3_values(codes.device).index_select(0, codes.flatten().long()).reshape(codes.shape)
    return values.mul_(expand_fp8_scale(scale, *codes.shape))


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """The two float32 of each byte side by side, as one int64: [256]."""
    return decode_e2m1(unpack_nibbles(torch.arange(256, dtype=torch.uint8, device=device))).view(torch.int64)


@cache
def _e4m3_values(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
