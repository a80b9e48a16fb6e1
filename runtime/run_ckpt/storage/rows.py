"""Rows of quantized weights in logical order: their codes and scales as stored, and decoded to float32."""

from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor

from run_ckpt.contract.codec import expand_fp8_scale
from run_ckpt.contract.elements import decode_e2m1, decode_e8m0, unpack_nibbles
from run_ckpt.contract.formats import E8M0_NAN, FP8_BLOCK_SIZE, MXFP4_BLOCK_SIZE
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.tensors import DTYPE_BITS
from run_ckpt.storage.reader import TensorReader

# A slab of a weight is 1 MiB in float32: it stays in cache, and torch's cost per call is small beside it
# (measured from 2**16 to 2**20, this was the fastest).
SLAB_ELEMENTS = 2**18

TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def cut_rows(layer: Layer, multiple: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the slabs of rows of a layer.

    multiple: start is a multiple of it; default: the rows that share scales or a tile.
    """
    multiple = multiple or _row_multiple(layer)
    step = max(1, SLAB_ELEMENTS // (layer.K * multiple)) * multiple
    for start in range(0, layer.N, step):
        yield start, min(start + step, layer.N)


def read_packed(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return the E2M1 codes of rows start..stop of an MXFP4 layer, uint8 [n, K/2], in logical order.

    Layout ``aiter``: start and stop are multiples of 16 (a tile of rows is contiguous).
    """
    width = layer.K // 2
    stored = reader.read(layer.tensors[WEIGHT], start * width, (stop - start) * width).reshape(-1, width)
    return AITER_WEIGHT.unshuffle(stored) if layer.layout == "aiter" else stored


def read_scale_codes(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return rows start..stop of the E8M0 codes of an MXFP4 layer, padding included, in logical order.

    uint8 [n, scale_shape[1]]. Layout ``aiter``: start and stop are multiples of 32. The scales are
    columns ..K/32 of rows ..N; all else is padding.
    """
    width = layer.scale_shape[1]
    stored = reader.read(layer.tensors[WEIGHT_SCALE], start * width, (stop - start) * width).reshape(-1, width)
    return AITER_SCALE.unshuffle(stored) if layer.layout == "aiter" else stored


def read_fp8_scale(reader: TensorReader, layer: Layer, role: str = WEIGHT_SCALE) -> Tensor:
    """Return a scale tensor of an FP8 layer, float32, in its shape on disk."""
    return reader.read_all(layer.tensors[role]).view(torch.float32).reshape(layer.specs()[role].shape)


def read_fp8_codes(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return the E4M3 codes of rows start..stop of an FP8 layer, uint8 [n, K]."""
    return reader.read(layer.tensors[WEIGHT], start * layer.K, (stop - start) * layer.K).reshape(-1, layer.K)


def read_source_rows(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return rows start..stop of the weight a layer was made from, in its own dtype [n, K]."""
    row_nbytes = layer.K * DTYPE_BITS[layer.source_dtype] // 8
    raw = reader.read(layer.source_tensor, start * row_nbytes, (stop - start) * row_nbytes)
    return raw.view(TORCH_DTYPES[layer.source_dtype]).reshape(-1, layer.K)


def scale_rows(layer: Layer, scale: Tensor, start: int, stop: int) -> Tensor:
    """Return the part of an FP8 scale that belongs to rows start..stop, for codec.expand_fp8_scale."""
    if layer.granularity == "tensor":
        return scale
    if layer.granularity == "block":
        return scale[start // FP8_BLOCK_SIZE : -(-stop // FP8_BLOCK_SIZE)]
    return scale[start:stop]


def holds_nan_code(scale_codes: Tensor) -> bool:
    return bool((scale_codes == E8M0_NAN).any())


def decode_rows(reader: TensorReader, layer: Layer, scale: Tensor | None, start: int, stop: int) -> Tensor:
    """Return rows start..stop of a quantized weight as float32 [n, K].

    scale: the layer's whole scale tensor if it is FP8 (read_fp8_scale), else None.
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


def _row_multiple(layer: Layer) -> int:
    if layer.format == "mxfp4":
        return MXFP4_BLOCK_SIZE
    return FP8_BLOCK_SIZE if layer.granularity == "block" else 1


@cache
def _e2m1_pairs(device: torch.device) -> Tensor:
    """The two float32 of each byte side by side, as one int64: [256]."""
    return decode_e2m1(unpack_nibbles(torch.arange(256, dtype=torch.uint8, device=device))).view(torch.int64)


@cache
def _e4m3_values(device: torch.device) -> Tensor:
    return torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
