"""Tensors of a converted checkpoint: what no scale or code may be, and how far the weights are from the source's."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from run_ckpt.contract.codec import fp8_scale, nvfp4_tensor_scale, quantize
from run_ckpt.contract.folds import TensorFold
from run_ckpt.contract.formats import E8M0, E8M0_NAN, F32_TINY, NVFP4_LARGEST
from run_ckpt.contract.manifest import (
    INVERSE_TENSOR_SCALE,
    TENSOR_SCALE,
    WEIGHT,
    WEIGHT_SCALE,
    FusedScale,
    Layer,
    Manifest,
    sqnr_db,
)
from run_ckpt.contract.source_formats import UNKNOWN_RULE
from run_ckpt.contract.tensors import DTYPE_BITS, TensorSpec
from run_ckpt.progress import Progress
from run_ckpt.storage.reader import TensorReader, cut_bytes
from run_ckpt.storage.rows import (
    STORED_DTYPES,
    TORCH_DTYPES,
    cut_rows,
    decode_rows,
    read_codes,
    read_padded_scales,
    read_scalar,
    read_scales,
    read_tensor_scale,
)
from run_ckpt.tools.verify.folded import fold_stored
from run_ckpt.tools.verify.original import Decoded, Original

# The manifest rounds to 0.01 dB; the order of the sums may turn the last digit.
_SQNR_TOLERANCE_DB = 0.011


@dataclass(frozen=True)
class Measured:
    """How far a layer's decoded weight is from the source's, measured here.

    ``amax`` is the source's, NaN where no scale has to follow from it. ``n_wrong_scales``: those that its blocks don't
    give; 0 where one scale follows from the whole weight.
    """

    layer: Layer
    sqnr_db: float | None
    max_abs_error: float
    amax: float
    n_wrong_scales: int


def scale_faults(reader: TensorReader, layer: Layer) -> list[str]:
    """Return a sentence for every kind of value in a layer's scales that no consumer may meet."""
    if layer.format.scale == E8M0:
        return _e8m0_faults(reader, layer)
    # The blocks of another tool may be zero by their scale.
    takes_zero = {WEIGHT_SCALE} if layer.scale_rule == UNKNOWN_RULE else set()
    faults = []
    for role in sorted(layer.tensors.keys() - {WEIGHT}):
        spec = layer.specs()[role]
        scale = reader.read_all(spec.name).view(STORED_DTYPES[spec.dtype]).reshape(spec.shape).float()
        bad = ~(torch.isfinite(scale) & ((scale >= 0) if role in takes_zero else (scale > 0)))
        if bad.any():
            where = [int(i) for i in bad.nonzero()[0]]
            value = scale[tuple(where)].item()
            faults.append(f"{_place(reader, layer, role)}{where} is {value}, not finite and above 0. Convert again.")
    return faults


def code_faults(reader: TensorReader, layer: Layer, progress: Progress) -> list[str]:
    """Return a sentence if a weight holds a NaN code, in a format that has one."""
    nan = layer.format.element.nan_magnitude
    if nan is None:
        return []
    n_nan, first = 0, None
    for start, stop in cut_rows(layer):
        is_nan = read_codes(reader, layer, start, stop).bitwise_and_(nan) == nan
        if is_nan.any():
            n_nan += int(is_nan.sum())
            row, col = is_nan.nonzero()[0].tolist()
            first = first or [start + row, col]
        progress.advance((stop - start) * layer.K)
    if not n_nan:
        return []
    return [f"{_place(reader, layer, WEIGHT)}: {n_nan} NaN codes, the first at {first}. Convert again."]


def group_faults(reader: TensorReader, manifest: Manifest) -> Iterator[str]:
    """Yield a sentence for every fused group whose members have different scales."""
    groups: dict[tuple[str, str], list[Layer]] = {}
    for layer in manifest.layers.values():
        for role in layer.tensors.keys() - {WEIGHT} - (set() if layer.scheme.is_per_tensor else {WEIGHT_SCALE}):
            if layer.fused_group:
                groups.setdefault((layer.fused_group, role), []).append(layer)
    for (group, role), layers in sorted(groups.items()):
        scales = {layer.module: read_scalar(reader, layer, role) for layer in layers}
        if len(set(scales.values())) > 1:
            yield f"fused group {group}: its members need one {role}, but have {scales}. Convert again."


def fused_scale_fault(reader: TensorReader, manifest: Manifest, fused: FusedScale) -> str | None:
    """Return a sentence if a fused scale does not repeat its members' scales."""
    parts = [reader.read_all(manifest.layers[member].tensors[fused.role]) for member in fused.members]
    if torch.equal(reader.read_all(fused.spec.name), torch.cat(parts)):
        return None
    name = f"{reader.shard_name(fused.spec.name)}: {fused.spec.name}"
    return f"{name}: does not repeat the {fused.role} of {', '.join(fused.members)}. Convert again."


def measure(reader: TensorReader, original: Original, layer: Layer, progress: Progress) -> Measured:
    """Decode a whole weight and compare it with the source's own values.

    Both in float32, the difference too; squares are summed in float64. Codes need not be the nearest ones, scales have
    to be those of the scale rule.
    """
    signals, errors, largest, amax, n_wrong = [], [], 0.0, 0.0, 0
    for start, stop in cut_rows(layer, original.row_multiple(layer)):
        weight = original.rows(layer, start, stop)
        amax = max(amax, *map(abs, (value.item() for value in torch.aminmax(weight))))
        if not layer.scheme.is_per_tensor and original.gives_scales(layer):
            scales = quantize(weight, layer.scheme, layer.scale_rule, read_tensor_scale(reader, layer))[1]
            n_wrong += int((scales.float() != read_scales(reader, layer, start, stop).float()).sum())
        difference = weight - decode_rows(reader, layer, start, stop)
        signals.append(_squared_sum(weight))
        errors.append(_squared_sum(difference))
        largest = max(largest, *map(abs, (value.item() for value in torch.aminmax(difference))))
        progress.advance(weight.numel() * DTYPE_BITS[layer.source_dtype] // 8)
    amax = amax if original.gives_scales(layer) else math.nan
    return Measured(layer, sqnr_db(math.fsum(signals), math.fsum(errors)), largest, amax, n_wrong)


def measured_faults(measured: Measured) -> list[str]:
    """Return a sentence for each number that is not the manifest's."""
    layer, faults = measured.layer, []
    if not agree_db(measured.sqnr_db, layer.sqnr_db):
        faults.append(f"{layer.module}: SQNR is {measured.sqnr_db} dB, the manifest says {layer.sqnr_db}.")
    if measured.max_abs_error != layer.max_abs_error:
        faults.append(
            f"{layer.module}: the largest error is {measured.max_abs_error}, the manifest says {layer.max_abs_error}."
        )
    if measured.n_wrong_scales:
        faults.append(f"{layer.module}: {measured.n_wrong_scales} scales are not those of rule {layer.scale_rule}.")
    return [fault + " Codes, scales, source or manifest were changed: convert again." for fault in faults]


def tensor_scale_faults(reader: TensorReader, measured: Iterable[Measured]) -> Iterator[str]:
    """Yield a sentence for each scale of a whole weight that its fused group's largest magnitude does not give."""
    largest: dict[str, float] = {}
    whole = [result for result in measured if result.layer.scheme.has_tensor_scale and not math.isnan(result.amax)]
    for result in whole:
        group = result.layer.fused_group or result.layer.module
        largest[group] = max(largest.get(group, 0.0), result.amax)
    for result in whole:
        layer = result.layer
        amax = torch.tensor([largest[layer.fused_group or layer.module]])
        roles = {WEIGHT_SCALE} if layer.scheme.is_per_tensor else {TENSOR_SCALE, INVERSE_TENSOR_SCALE}
        for role in roles & layer.tensors.keys():
            scale, right = read_scalar(reader, layer, role), _TENSOR_SCALES[role](amax).item()
            if scale != right:
                yield f"{layer.module}: its {role} is {scale}, rule {layer.scale_rule} gives {right}. Convert again."


def copy_fault(
    reader: TensorReader, source: TensorReader, name: str, fold: TensorFold | None, progress: Progress
) -> str | None:
    """Return a sentence if a copied tensor is not bit for bit the source's, as ``fold`` leaves it."""
    spec = source.spec(name)
    assert spec is not None
    row_nbytes = spec.nbytes // spec.shape[0] if fold else 1
    for start, count in cut_bytes(spec.nbytes, row_nbytes):
        data, original = reader.read(name, start, count), source.read(name, start, count)
        if fold:
            original = fold_stored(original, spec, fold, start // row_nbytes)
        if not torch.equal(data, original):
            byte = start + int((data != original).nonzero()[0])
            return f"{reader.shard_name(name)}: {name}: differs from the source from byte {byte} on. Convert again."
        progress.advance(count)
    return None


def decoded_fault(reader: TensorReader, spec: TensorSpec, decoded: Decoded, progress: Progress) -> str | None:
    """Return a sentence if a plain tensor is not what the source's codes stand for, rounded to its dtype."""
    dtype, stored = TORCH_DTYPES[spec.dtype], decoded.stored
    row_nbytes = stored.K * dtype.itemsize
    n_rows = spec.nbytes // row_nbytes
    for start, stop in cut_rows(stored):
        if start >= n_rows:
            break
        stop = min(stop, n_rows)
        data = reader.read(spec.name, start * row_nbytes, (stop - start) * row_nbytes).view(dtype)
        if not torch.equal(data, decoded.rows(start, stop).to(dtype).flatten()):
            return (
                f"{reader.shard_name(spec.name)}: {spec.name}: is not what the source's codes stand for. Convert again."
            )
        progress.advance(data.nbytes)
    return None


def _inverse_tensor_scale(amax: Tensor) -> Tensor:
    # A number divided by a tensor would be its reciprocal, rounded, times the number.
    largest = torch.tensor(NVFP4_LARGEST)
    return torch.where(amax / largest >= F32_TINY, largest / amax, torch.ones_like(amax))


# Of a whole weight, given its largest magnitude.
_TENSOR_SCALES = {
    WEIGHT_SCALE: fp8_scale,
    TENSOR_SCALE: nvfp4_tensor_scale,
    INVERSE_TENSOR_SCALE: _inverse_tensor_scale,
}


def _e8m0_faults(reader: TensorReader, layer: Layer) -> list[str]:
    n_rows, n_cols = layer.scheme.scale_grid(layer.N, layer.K)
    faults = set()
    for start, stop in _cut_scale_rows(layer):
        codes = read_padded_scales(reader, layer, slice(start, stop))
        n_inside = max(0, min(stop, n_rows) - start)
        if codes[n_inside:].any() or codes[:, n_cols:].any():
            faults.add("padding is not 0x00, which AITER's kernels multiply with")
        if (codes[:n_inside, :n_cols] == E8M0_NAN).any():
            faults.add("holds code 255 (NaN)")
    return [f"{_place(reader, layer, WEIGHT_SCALE)}: {fault}. Convert again." for fault in sorted(faults)]


def _cut_scale_rows(layer: Layer) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) over all stored rows of a scale, padding included, in whole tiles."""
    last = 0
    for start, last in cut_rows(layer):
        yield start, last
    if last < layer.scale_shape[0]:
        yield last, layer.scale_shape[0]


def _place(reader: TensorReader, layer: Layer, role: str) -> str:
    return f"{reader.shard_name(layer.tensors[role])}: {layer.tensors[role]}"


def _squared_sum(x: Tensor) -> float:
    flat = x.flatten().double()
    return float(torch.dot(flat, flat))


def agree_db(measured: float | None, stated: float | None) -> bool:
    """Return whether two SQNRs are the same but for the order of their sums."""
    if measured is None or stated is None:
        return measured is stated
    return abs(measured - stated) < _SQNR_TOLERANCE_DB
