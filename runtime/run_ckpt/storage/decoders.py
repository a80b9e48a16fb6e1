"""How rows of a weight become numbers in formats that are only read (contract/source_formats.py)."""

import json
import math
from collections.abc import Callable
from functools import partial

import numpy as np

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.formats import MX_BLOCK_SIZE, NVFP4_BLOCK_SIZE
from run_ckpt.contract.ggml import GGML_FORMATS
from run_ckpt.contract.manifest import TENSOR_SCALE, WEIGHT_SCALE, Layer
from run_ckpt.contract.nunchaku import MODULATION_BIASES, MODULATIONS, SVDQUANT_BIAS, SVDQUANT_INT4, SVDQUANT_NVFP4
from run_ckpt.contract.source_formats import (
    BLOCKED_MXFP8,
    BLOCKED_NVFP4,
    BLOCKED_TILE,
    COMFY_MARK,
    INT8,
    WEIGHT_OFFSET,
)
from run_ckpt.extras import naming_extras
from run_ckpt.storage.code_values import E2M1_PAIRS, E4M3_VALUES, E8M0_VALUES
from run_ckpt.storage.read_part import ReadPart
from run_ckpt.storage.svdquant import (
    decode_modulation,
    decode_modulation_bias,
    decode_svdquant,
    decode_svdquant_bias,
)

# Returns float32 [n, K]: the rows from ``row`` on, whose codes are uint8 [n, bytes of a row].
Decoder = Callable[[Layer, int, np.ndarray, ReadPart], np.ndarray]


@naming_extras("reading GGUF")
def _decode_ggml(name: str, layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    values: np.ndarray = dequantize(codes, GGMLQuantizationType[name])
    return values.reshape(len(codes), layer.K)


def _decode_int8(layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """code * scale, one for each row or for all. Raises CheckpointError for zero points that are none."""
    rows = (0, 1) if math.prod(layer.scale_shape) == 1 else (row, len(codes))
    if WEIGHT_OFFSET in layer.tensors and read(WEIGHT_OFFSET, *rows).any():
        raise CheckpointError(
            f"{layer.tensors[WEIGHT_OFFSET]}: zero points that are not zero, which are not read here."
        )
    values: np.ndarray = codes.view(np.int8).astype(np.float32)
    if COMFY_MARK in layer.tensors and (size := _rotated_columns(layer, read)) > 1:
        values = _rotate_back(values, size)
    values *= read(WEIGHT_SCALE, *rows).reshape(-1, 1)
    return values


def _rotated_columns(layer: Layer, read: ReadPart) -> int:
    """Return how many columns next to each other ComfyUI's mark says were rotated together, 1 where none were.

    Raises CheckpointError for a mark of another format than INT8. Source: comfy-kitchen 0.2.40, tensor/int8.py.
    """
    name = layer.tensors[COMFY_MARK]
    try:
        mark = json.loads(read(COMFY_MARK, 0, 1, n_rows=1).tobytes())
        kind, size = mark["format"], int(mark.get("convrot_groupsize", 256)) if mark.get("convrot") else 1
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{name}: no mark of ComfyUI's ({error!r}). Fetch the checkpoint again.") from error
    if kind != "int8_tensorwise":
        raise CheckpointError(f"{name}: {kind!r}, I8 codes that are not read here. Convert the original checkpoint.")
    if size not in _ROTATIONS or layer.K % size:
        raise CheckpointError(f"{name}: {layer.K} columns rotated {size} at a time, which no matrix here does.")
    return size


def _rotate_back(values: np.ndarray, size: int) -> np.ndarray:
    """Return each ``size`` columns times ComfyUI's Hadamard matrix, a Kronecker power of _H4 / 2, its own inverse.

    values: float32 [n, K], integers of 8 bits: every step is exact.
    """
    for stride in (4**i for i in range(_ROTATIONS[size])):
        values = np.einsum("naib,ij->najb", values.reshape(len(values), -1, 4, stride), _H4 / 2)
    return values.reshape(len(values), -1)


_H4 = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)
# Columns that are rotated together -> its power.
_ROTATIONS = {1: 0, 4: 1, 16: 2, 64: 3, 256: 4, 1024: 5}


def _decode_nvfp4(layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """e2m1 * (e4m3 * scale of the tensor), the even k in the upper nibble."""
    swapped = codes << 4 | codes >> 4
    values: np.ndarray = E2M1_PAIRS[swapped].view(np.float32).reshape(len(codes), -1, NVFP4_BLOCK_SIZE)
    scales = E4M3_VALUES[_blocked_scales(row, len(codes), layer.K // NVFP4_BLOCK_SIZE, read)]
    values *= (scales * read(TENSOR_SCALE, 0, 1).reshape(1, 1))[..., None]
    return values.reshape(len(codes), -1)


def _decode_mxfp8(layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    values: np.ndarray = E4M3_VALUES[codes].reshape(len(codes), -1, MX_BLOCK_SIZE)
    values *= E8M0_VALUES[_blocked_scales(row, len(codes), layer.K // MX_BLOCK_SIZE, read)][..., None]
    return values.reshape(len(codes), -1)


def _blocked_scales(row: int, n_rows: int, n_cols: int, read: ReadPart) -> np.ndarray:
    """Return uint8 [n_rows, n_cols] of scales in tiles of [128, 4], whose rows 32 i + j lie at [j, i].

    row: a multiple of 128. Source: cuBLAS, "1D Block Scaling Factors Layout"; comfy-kitchen 0.2.40, float_utils.py.
    """
    rows, cols = BLOCKED_TILE
    stored = read(WEIGHT_SCALE, row, -(-n_rows // rows) * rows)
    tiles = stored.reshape(-1, stored.shape[1] // cols, 32, rows // 32, cols)
    # [row tile, column tile, j, i, column] -> [row tile, i, j, column tile, column]
    return tiles.transpose(0, 3, 2, 1, 4).reshape(stored.shape)[:n_rows, :n_cols]


# Name of a format -> what decodes it.
DECODERS: dict[str, Decoder] = {
    **{quant_format.name: partial(_decode_ggml, name) for quant_format, name in GGML_FORMATS.items()},
    INT8.name: _decode_int8,
    BLOCKED_NVFP4.name: _decode_nvfp4,
    BLOCKED_MXFP8.name: _decode_mxfp8,
    SVDQUANT_INT4.name: decode_svdquant,
    SVDQUANT_NVFP4.name: decode_svdquant,
    SVDQUANT_BIAS.name: decode_svdquant_bias,
    **{quant_format.name: partial(decode_modulation, n) for n, quant_format in MODULATIONS.items()},
    **{quant_format.name: partial(decode_modulation_bias, n) for n, quant_format in MODULATION_BIASES.items()},
}
