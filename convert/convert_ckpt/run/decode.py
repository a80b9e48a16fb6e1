"""Rows of a weight that is in codes already: as float32, or the same codes and scales stored in another way.

Twin of run_ckpt.contract.codec.dequantize, without torch.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from convert_ckpt.run.slab import TensorWrite
from convert_ckpt.source.quantized import EncodedWeight
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.formats import Scheme
from run_ckpt.contract.layouts import TileLayout
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.storage.code_values import E2M1_PAIRS, E4M3_VALUES, E5M2_VALUES, E8M0_VALUES
from run_ckpt.storage.decoders import DECODERS
from run_ckpt.storage.read_part import as_stored

# Reads bytes of a shard: name, offset, count.
Read = Callable[[str, int, int], np.ndarray]


@dataclass(frozen=True)
class EncodedRows:
    """Rows ``row``.. of a weight in logical order without padding, or its ``values`` in a format that is only read.

    codes: uint8 [n, K / elements a byte]. scales: of these rows, [block rows, block columns], bytes or float32 as
    stored. second: role and value, float32 [1], of the scale of the whole tensor; None in a format of one level.
    """

    scheme: Scheme
    row: int
    codes: np.ndarray
    scales: np.ndarray
    second: tuple[str, np.ndarray] | None
    values: np.ndarray | None = None


def read_rows(weight: EncodedWeight, row: int, offset: int, raw: np.ndarray, read: Read) -> EncodedRows:
    """Return the rows whose codes are ``raw``, ``offset`` in their shard; their scales are read by ``read``.

    row: the first one in the tensor that the plan has, which may be a part of the stored one.
    """
    layer, scheme, first = weight.layer, weight.layer.scheme, weight.stored_row(offset)
    if decoder := DECODERS.get(layer.format.name):

        def read_part(role: str, start: int, count: int, n_rows: int | None = None) -> np.ndarray:
            shard, stored = weight.parts[role]
            row_nbytes = stored.spec.nbytes // (n_rows or (stored.spec.shape[0] if stored.spec.shape else 1))
            data = read(shard, stored.offset + start * row_nbytes, count * row_nbytes)
            return as_stored(data, stored.spec.dtype).reshape(count, -1)

        codes = raw.reshape(weight.n_rows(len(raw)), -1)
        return EncodedRows(scheme, row, codes, codes, None, decoder(layer, first, codes, read_part))
    width = layer.K // scheme.format.element.per_byte
    codes = _unshuffle(scheme.layout.weight, raw.reshape(-1, width))
    if WEIGHT_SCALE not in weight.parts:
        return EncodedRows(scheme, row, codes, np.ones((1, 1), np.float32), None)
    n_rows, n_cols = scheme.scale_grid(layer.N, layer.K)
    rows = scheme.scale_rows(first, first + len(codes))
    shard, stored = weight.parts[WEIGHT_SCALE]
    row_nbytes = stored.spec.nbytes // layer.scale_shape[0]
    data = read(shard, stored.offset + rows.start * row_nbytes, (rows.stop - rows.start) * row_nbytes)
    scales = _unshuffle(scheme.layout.scale, as_stored(data, stored.spec.dtype).reshape(rows.stop - rows.start, -1))
    return EncodedRows(scheme, row, codes, scales[:n_rows, :n_cols], _second(weight, read))


def decode(rows: EncodedRows) -> np.ndarray:
    """Return float32 [n, K]: element * scale, where the scale is first multiplied by the tensor's. NaN stays NaN."""
    if rows.values is not None:
        return rows.values
    scheme, codes = rows.scheme, rows.codes
    values: np.ndarray = _VALUES[scheme.format.element.name][codes].view(np.float32).reshape(len(codes), -1)
    scales = _SCALES[scheme.format.scale.name](rows.scales)
    if rows.second:
        role, value = rows.second
        scales = scales * _respell(value, role, TENSOR_SCALE)
    (block_rows, block_cols), (n, K) = scheme.block, values.shape
    if block_rows and block_rows > 1:
        scales = np.repeat(scales, block_rows, axis=0)[:n]
    if block_cols and K % block_cols:
        values *= np.repeat(scales, block_cols, axis=1)[:, :K]
    else:
        blocks = values.reshape(n, -1, block_cols or K)
        blocks *= scales[..., None]
    return values


def has_nan(rows: EncodedRows) -> bool:
    """True where a code or a scale is no number."""
    nan = rows.scheme.format.element.nan_magnitude
    is_nan = nan is not None and bool((rows.codes & nan == nan).any())
    return is_nan or not np.isfinite(_SCALES[rows.scheme.format.scale.name](rows.scales)).all()


def store_rows(rows: EncodedRows, layer: Layer) -> list[TensorWrite]:
    """Return the same codes and scales as ``layer`` stores them.

    Raises CheckpointError for scales that run-ckpt verify rejects: negative ones, and one of a tensor that is 0, too.
    """
    second = rows.second[1] if rows.second else np.ones(1, np.float32)
    is_sound = (_SCALES[rows.scheme.format.scale.name](rows.scales) >= 0).all() and (0 < second[0] < np.inf)
    if not is_sound:
        raise CheckpointError(f"{layer.module}: a scale of its codes is not above 0. Keep it: --ignore {layer.module}")
    layout = layer.scheme.layout
    codes = _shuffle(layout.weight, rows.codes)
    dtype = _DTYPES[layer.specs()[WEIGHT_SCALE].dtype]
    scales = rows.scales.view(dtype) if rows.scales.itemsize == np.dtype(dtype).itemsize else rows.scales.astype(dtype)
    pitch = layer.scale_shape[1] if len(layer.scale_shape) > 1 else 1
    padded = np.zeros((len(scales), pitch), dtype)
    padded[:, : scales.shape[1]] = scales
    first = layer.scheme.scale_rows(rows.row, rows.row + len(codes)).start
    writes = [
        TensorWrite(WEIGHT, rows.row * codes.shape[1], codes),
        TensorWrite(WEIGHT_SCALE, first * padded[0].nbytes, _shuffle(layout.scale, padded)),
    ]
    if rows.row == 0 and rows.second:
        role = next(role for role in (TENSOR_SCALE, INVERSE_TENSOR_SCALE) if role in layer.tensors)
        writes.append(TensorWrite(role, 0, _respell(rows.second[1], rows.second[0], role)))
    return writes


def to_plain_bytes(values: np.ndarray, dtype: str) -> np.ndarray:
    """Return float32 values rounded to nearest even in BF16, F16 (both clamped to their range) or F32, as bytes."""
    if dtype == "F32":
        return values.view(np.uint8)
    if dtype == "F16":
        clipped: np.ndarray = np.clip(values, -65504, 65504).astype(np.float16)
        return clipped.view(np.uint8)
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    # What would round to infinity becomes the largest number.
    finite: np.ndarray = np.where((rounded & 0x7FFF) == 0x7F80, rounded - 1, rounded).astype(np.uint16)
    return finite.view(np.uint8)


def _second(weight: EncodedWeight, read: Read) -> tuple[str, np.ndarray] | None:
    for role in (TENSOR_SCALE, INVERSE_TENSOR_SCALE):
        if role in weight.parts:
            shard, stored = weight.parts[role]
            return role, as_stored(read(shard, stored.offset, stored.spec.nbytes), stored.spec.dtype).reshape(1)
    return None


def _respell(value: np.ndarray, role: str, wanted: str) -> np.ndarray:
    """Return the scale of a tensor as another role has it: the inverse, rounded, where that is another one."""
    return value if role == wanted else np.float32(1) / value


def _shuffle(layout: TileLayout, logical: np.ndarray) -> np.ndarray:
    axes = layout.axes(*logical.shape)
    return np.ascontiguousarray(logical.reshape(axes).transpose(layout.order)).reshape(logical.shape)


def _unshuffle(layout: TileLayout, stored: np.ndarray) -> np.ndarray:
    axes = layout.axes(*stored.shape)
    return stored.reshape([axes[axis] for axis in layout.order]).transpose(layout.inverse).reshape(stored.shape)


# What a byte of codes stands for; of a pair, both.
_VALUES = {"e2m1": E2M1_PAIRS, "e4m3fn": E4M3_VALUES, "e5m2": E5M2_VALUES}
_SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "e8m0": lambda codes: E8M0_VALUES[codes],
    "e4m3fn": lambda codes: E4M3_VALUES[codes],
    "f32": lambda scales: scales,
}
_DTYPES = {"U8": np.uint8, "F8_E4M3": np.uint8, "F32": np.float32}
