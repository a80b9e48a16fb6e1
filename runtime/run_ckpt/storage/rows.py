"""Rows of quantized weights in logical order: their codes and scales as stored, and decoded to float32."""

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from run_ckpt.contract.codec import dequantize, tensor_scale
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.tensors import DTYPE_BITS
from run_ckpt.storage.decoders import DECODERS
from run_ckpt.storage.read_part import as_stored
from run_ckpt.storage.reader import TensorReader

# A slab of a weight is 1 MiB in float32: it stays in cache, and torch's cost per call is small beside it
# (measured from 2**16 to 2**20, this was the fastest).
SLAB_ELEMENTS = 2**18

# Of the tensors of a quantized layer.
STORED_DTYPES = {"U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn, "F32": torch.float32}
# Of the scales of other tools. E8M0 is a byte here, whatever the file calls it.
_SCALE_DTYPES = {**STORED_DTYPES, "F8_E8M0": torch.uint8, "BF16": torch.bfloat16, "F16": torch.float16}
_SECOND = {TENSOR_SCALE, INVERSE_TENSOR_SCALE}
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def cut_rows(layer: Layer, multiple: int | None = None) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the slabs of rows of a layer.

    multiple: start is a multiple of it; default: the rows that share scales or a tile.
    """
    multiple = multiple or layer.scheme.row_multiple
    step = max(1, SLAB_ELEMENTS // (layer.K * multiple)) * multiple
    for start in range(0, layer.N, step):
        yield start, min(start + step, layer.N)


def read_codes(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return the codes of rows start..stop as bytes, uint8 [n, K / elements a byte], in logical order.

    start and stop are multiples of the scheme's rows (a tile of rows is contiguous), or the end.
    """
    width = layer.K // layer.format.element.per_byte
    stored = reader.read(layer.tensors[WEIGHT], start * width, (stop - start) * width).reshape(-1, width)
    return layer.scheme.layout.weight.unshuffle(stored)


def read_scales(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return the scales of rows start..stop, in logical order without padding: [blocks of rows, blocks of columns].

    In their dtype on disk: uint8 codes (E8M0), float8 or float32; 1 where nothing is stored. start: as in read_codes.
    """
    if WEIGHT_SCALE not in layer.tensors:
        return torch.ones(1, 1)
    n_rows, n_cols = layer.scheme.scale_grid(layer.N, layer.K)
    return read_padded_scales(reader, layer, layer.scheme.scale_rows(start, stop))[:n_rows, :n_cols]


def read_padded_scales(reader: TensorReader, layer: Layer, rows: slice) -> Tensor:
    """Return rows of the stored scale tensor in logical order, padding included.

    rows: multiples of the layout's scale tile. The scales are the grid's rows and columns; all else is padding.
    """
    spec = reader.stored_spec(layer.tensors[WEIGHT_SCALE])
    row_nbytes = spec.nbytes // layer.scale_shape[0]
    raw = reader.read(spec.name, rows.start * row_nbytes, (rows.stop - rows.start) * row_nbytes)
    return layer.scheme.layout.scale.unshuffle(raw.view(_SCALE_DTYPES[spec.dtype]).reshape(rows.stop - rows.start, -1))


def read_scalar(reader: TensorReader, layer: Layer, role: str) -> float:
    """Return a scale that the whole layer shares, float32."""
    return float(reader.read_all(layer.tensors[role]).view(torch.float32).item())


def decode_rows(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return rows start..stop of a quantized weight as float32 [n, K]."""
    if decoder := DECODERS.get(layer.format.name):

        def read(role: str, first: int, count: int, n_rows: int | None = None) -> np.ndarray:
            spec = reader.stored_spec(layer.tensors[role])
            row_nbytes = spec.nbytes // (n_rows or (spec.shape[0] if spec.shape else 1))
            data = reader.read(spec.name, first * row_nbytes, count * row_nbytes).numpy()
            return as_stored(data, spec.dtype).reshape(count, -1)

        row_nbytes = reader.stored_spec(layer.tensors[WEIGHT]).nbytes // layer.N
        codes = reader.read(layer.tensors[WEIGHT], start * row_nbytes, (stop - start) * row_nbytes).numpy()
        return torch.from_numpy(decoder(layer, start, codes.reshape(stop - start, -1), read))
    scales = read_scales(reader, layer, start, stop)
    second = read_tensor_scale(reader, layer)
    return dequantize(read_codes(reader, layer, start, stop), scales, layer.scheme, second)


def decode_rows_as(reader: TensorReader, layer: Layer, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    """Return rows of a quantized weight as decode_rows, in ``dtype``, contiguous."""
    largest = torch.finfo(dtype).max
    # A scale rule may round the largest weights up, in F16 past the largest number.
    return decode_rows(reader, layer, start, stop).clamp_(-largest, largest).to(dtype).contiguous()


def read_tensor_scale(reader: TensorReader, layer: Layer) -> Tensor | None:
    """Return what the scales of blocks are multiplied by, float32 [1]; None where a format has one level of scales."""
    second = {
        role: reader.read_all(name).view(_SCALE_DTYPES[reader.stored_spec(name).dtype]).float()
        for role, name in layer.tensors.items()
        if role in _SECOND
    }
    return tensor_scale(second)


def read_source_rows(reader: TensorReader, layer: Layer, start: int, stop: int) -> Tensor:
    """Return rows start..stop of the weight a layer was made from, in its own dtype [n, K]."""
    row_nbytes = layer.K * DTYPE_BITS[layer.source_dtype] // 8
    raw = reader.read(layer.source_tensor, start * row_nbytes, (stop - start) * row_nbytes)
    return raw.view(TORCH_DTYPES[layer.source_dtype]).reshape(-1, layer.K)
