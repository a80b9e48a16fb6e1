"""Rows of Nunchaku's weights and biases as numbers: tiles of its kernels put in order, codes and branch put together.

The kernels multiply (x + shift) / smooth by the codes, and x by the low-rank branch; shift is 0 but for what follows a
GELU in INT4. So a weight is codes * scales / smooth + up @ down, and its bias takes up what the shift adds. All is
summed in float64, where sums of the branch are exact but for terms 2^20 times smaller than the largest, and rounded to
float32 once. Source: as contract/nunchaku.py; nunchaku 3a3cc3d, src/kernels/zgemm/gemm_w4a4*.cuh and awq/gemv_awq.cu.
"""

import numpy as np

from run_ckpt.contract.formats import NVFP4_BLOCK_SIZE
from run_ckpt.contract.manifest import WEIGHT, Layer
from run_ckpt.contract.nunchaku import (
    ALPHA,
    CHANNELS,
    DOWN,
    FIRST,
    GROUP,
    SCALES,
    SHIFTED,
    SMOOTH,
    SVDQUANT_NVFP4,
    TILE_COLUMNS,
    TILE_ROWS,
    UP,
    ZEROS,
)
from run_ckpt.storage.code_values import E2M1_PAIRS, E4M3_VALUES
from run_ckpt.storage.read_part import ReadPart

# What is added to the input of INT4 codes behind a GELU, whose lowest value is about -0.17 (gemm_w4a4_launch_impl.cuh).
_SHIFT = 0.171875
# float32 [256, 2] as uint64 [256]: both nibbles of a byte as integers from -8 to 7, the low one first.
_INT4 = np.array([*range(8), *range(-8, 0)], np.float32)
_INT4_PAIRS = np.stack([np.tile(_INT4, 16), np.repeat(_INT4, 16)], axis=1).view(np.uint64)[:, 0]


def decode_svdquant(layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """Return rows of a weight, float32 [n, K]; row and n: multiples of 128. Its columns may be those of two weights."""
    parts = [_decode_part(layer, "", row, codes, read)]
    if FIRST + WEIGHT in layer.tensors:
        first = read(FIRST + WEIGHT, row, len(codes)).view(np.uint8)
        parts.insert(0, _decode_part(layer, FIRST, row, first, read))
    values: np.ndarray = np.concatenate(parts, axis=1).astype(np.float32)
    return values


def decode_svdquant_bias(layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """Return rows of a bias, float32 [n, 1], for inputs that are not shifted; row and n: multiples of 128."""
    n_tiles = layer.N // TILE_ROWS
    values = np.zeros(len(codes))
    for role in {WEIGHT, FIRST + WEIGHT} & layer.tensors.keys():
        values += _in_order(read(role, row // TILE_ROWS, len(codes) // TILE_ROWS, n_tiles))
    if SHIFTED + WEIGHT in layer.tensors:
        for start in range(0, len(codes), TILE_ROWS):
            shifted = read(SHIFTED + WEIGHT, row + start, TILE_ROWS).view(np.uint8)
            residual = _decode_residual(layer, SHIFTED, row + start, shifted, read)
            values[start : start + TILE_ROWS] += _SHIFT * residual.sum(axis=1)
    return values.astype(np.float32).reshape(-1, 1)


def decode_modulation(n_vectors: int, layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """Return rows of a modulation's weight, float32 [n, K]: code * scale + zero, vector after vector.

    On disk element i of all vectors comes before element i + 1 of any. ``codes`` are other rows than these.
    """
    size, values = layer.N // n_vectors, np.empty((len(codes), layer.K), np.float32)
    for vector in range(n_vectors):
        first, last = max(row, vector * size), min(row + len(codes), (vector + 1) * size)
        if first < last:
            stored = slice((first - vector * size) * n_vectors + vector, (last - vector * size) * n_vectors, n_vectors)
            values[first - row : last - row] = _decode_awq(layer, stored, read)
    return values


def decode_modulation_bias(n_vectors: int, layer: Layer, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """Return rows of a modulation's bias, float32 [n, 1]: without the 1 that is added to both scales (or the one)."""
    values = read(WEIGHT, 0, 1, 1).reshape(-1, n_vectors).T.copy()
    for vector in {1, n_vectors - 2}:
        values[vector] -= 1
    return values.reshape(-1, 1)[row : row + len(codes)]


def _decode_part(layer: Layer, prefix: str, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """Return rows of a weight, float64 [n, K]."""
    values = _decode_residual(layer, prefix, row, codes, read)
    if prefix + UP in layer.tensors:
        n, K = values.shape
        # [rows / 16, rank / 16, 8 rows, 4 ranks, 2 rows, 2 ranks, 2 ranks]; for down ranks are rows and columns ranks.
        up = read(prefix + UP, row, n)
        rank = up.size // n
        up = up.reshape(-1, rank // 16, 8, 4, 2, 2, 2).transpose(0, 4, 2, 1, 5, 3, 6).reshape(n, rank)
        down = read(prefix + DOWN, 0, K).reshape(-1, rank // 16, 8, 4, 2, 2, 2)
        down = down.transpose(1, 4, 2, 0, 5, 3, 6).reshape(rank, K)
        values += up.astype(np.float64) @ down.astype(np.float64)
    return values


def _decode_residual(layer: Layer, prefix: str, row: int, codes: np.ndarray, read: ReadPart) -> np.ndarray:
    """Return rows of codes * scales / smooth, float64 [n, K]. codes: uint8 [n, K / 2]."""
    n, K = len(codes), codes.shape[1] * 2
    tiles, is_nvfp4 = (row // TILE_ROWS, n // TILE_ROWS, layer.N // TILE_ROWS), layer.format == SVDQUANT_NVFP4
    pairs: np.ndarray = (E2M1_PAIRS if is_nvfp4 else _INT4_PAIRS)[codes]
    # [row tile, column tile, 8 rows, 8 rows, 4 columns, 2 rows, 2 columns, 8 columns] -> rows, columns, each in order
    values = pairs.view(np.float32).reshape(-1, K // TILE_COLUMNS, 8, 8, 4, 2, 2, 8).transpose(0, 2, 5, 3, 1, 6, 4, 7)
    group = NVFP4_BLOCK_SIZE if is_nvfp4 else GROUP
    grouped = values.reshape(n, K // group, group).astype(np.float64)
    scales = read(prefix + SCALES, *tiles)
    if is_nvfp4:
        # [row tile, column tile, 8 rows, 4 rows, 4 rows, 4 scales]
        scales = E4M3_VALUES[scales].reshape(tiles[1], -1, 8, 4, 4, 4).transpose(0, 4, 3, 2, 1, 5).reshape(n, -1, 1)
        scales = scales.astype(np.float64)
        if prefix + ALPHA in layer.tensors:
            scales *= read(prefix + ALPHA, 0, 1, 1).reshape(1, 1, 1)
        if prefix + CHANNELS in layer.tensors:
            scales *= _in_order(read(prefix + CHANNELS, *tiles))[:, None, None]
    else:
        # [row tile, scale, 8 rows, 4 rows, 2 rows, 2 rows]
        scales = scales.reshape(tiles[1], -1, 8, 4, 2, 2).transpose(0, 2, 4, 3, 5, 1).reshape(n, -1, 1)
    grouped *= scales
    whole = grouped.reshape(n, K)
    whole /= _in_order(read(prefix + SMOOTH, 0, 1, 1))
    return whole


def _in_order(stored: np.ndarray) -> np.ndarray:
    """Return a vector that is stored in tiles of 128: [8, 4 times 2, 2, 2] there, [8, 2, 4 times 2] in order."""
    return stored.reshape(-1, 8, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1)


def _decode_awq(layer: Layer, rows: slice, read: ReadPart) -> np.ndarray:
    """Return some rows on disk of a weight in 4 bits, float32 [n, K], of which each 4 lie in one another."""
    first, last, K = rows.start // 4, -(-rows.stop // 4), layer.K
    # int16 [4 rows, 64 columns, row, 32 columns, 8 columns]: a nibble for each 8 of these 32
    words = read(WEIGHT, first, last - first).view(np.uint16).reshape(-1, K // 64, 4, 2, 8)
    words = words.transpose(0, 2, 1, 3, 4).reshape(-1, K // 64, 2, 1, 8)[rows.start - 4 * first :: rows.step]
    words = words[: len(range(rows.start, rows.stop, rows.step))]
    codes = words >> np.arange(0, 16, 4, dtype=np.uint16)[:, None] & 15
    values = codes.reshape(len(words), K // GROUP, GROUP).astype(np.float32)
    for role, combine in ((SCALES, np.multiply), (ZEROS, np.add)):
        combine(values, read(role, 0, K // GROUP)[:, rows].T[..., None], out=values)
    return values.reshape(len(words), K)
