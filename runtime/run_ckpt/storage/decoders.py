"""How rows of a weight become numbers in formats that are only read (contract/source_formats.py)."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.formats import MX_BLOCK_SIZE, NVFP4_BLOCK_SIZE
from run_ckpt.contract.ggml import GGML_FORMATS
from run_ckpt.contract.manifest import TENSOR_SCALE, WEIGHT_SCALE, Layer
from run_ckpt.contract.source_formats import BLOCKED_MXFP8, BLOCKED_NVFP4, BLOCKED_TILE, INT8, WEIGHT_OFFSET
from run_ckpt.extras import naming_extras
from run_ckpt.storage.code_values import E2M1_PAIRS, E4M3_VALUES, E8M0_VALUES

# Reads rows of the tensor that plays a role: role, first row, count. Returns [count, ...] as as_stored() does.
ReadPart = Callable[[str, int, int], np.ndarray]
# Returns float32 [n, K]: the rows from ``row`` on, whose codes are uint8 [n, bytes of a row].
Decoder = Callable[[Layer, int, np.ndarray, ReadPart], np.ndarray]


def as_stored(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return scales, uint8 as they lie in a file, as bytes where they are codes, else as float32."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return data.view(np.float16).astype(np.float32)
    return data.view(np.float32) if dtype == "F32" else data


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
    values *= read(WEIGHT_SCALE, *rows).reshape(-1, 1)
    return values


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
}
