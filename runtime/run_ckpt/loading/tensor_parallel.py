"""Exact parts of quantized weights, as tensor parallelism needs them: rows, columns, rows of several joined."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from run_ckpt.contract.dialects import AITER_MXFP4
from run_ckpt.contract.errors import SliceError
from run_ckpt.contract.formats import FP8_BLOCK_SIZE, MXFP4_BLOCK_SIZE
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT, TileLayout, round_up
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.manifest_checks import alignment

# From start up to, not including, stop.
Range = tuple[int, int]
# A layer with its tensors as on disk, by role. Roles may be left out: each is cut by itself.
Part = tuple[Layer, Mapping[str, Tensor]]

_TILES: dict[str, TileLayout] = {WEIGHT: AITER_WEIGHT, WEIGHT_SCALE: AITER_SCALE}
# How many values of a row one byte of an MXFP4 tensor belongs to.
_VALUES_PER_BYTE = {WEIGHT: 2, WEIGHT_SCALE: MXFP4_BLOCK_SIZE}


def slice_rows(part: Part, *ranges: Range) -> Part:
    """Return the rows ``ranges`` of [N, K], one after the other, as a layer of its own; no value changes.

    Layout ``aiter``: ranges of whole tiles (16 rows of the weight, 32 of its scale) are ranges of bytes,
    any other goes by way of the logical order. The result has layout ``aiter`` where its N is a multiple
    of 32, else ``plain``. Raises SliceError where a block of FP8 would be cut.
    """
    layer, tensors = part
    N = _count(ranges, layer.N, "rows", layer)
    if layer.format == "mxfp4":
        new = _resize(layer, N, layer.K)
        return new, {role: _mxfp4_rows(layer, new, role, tensor, ranges) for role, tensor in tensors.items()}
    scale_ranges = _fp8_scale_ranges(layer, ranges, "rows")
    cut = {WEIGHT: ranges, WEIGHT_SCALE: scale_ranges if layer.granularity != "tensor" else None}
    shape = layer.scale_shape if layer.granularity == "tensor" else (_length(scale_ranges), *layer.scale_shape[1:])
    new = replace(layer, N=N, scale_shape=shape)
    return new, {role: _take(tensor, cut.get(role), dim=0) for role, tensor in tensors.items()}


def slice_columns(part: Part, *ranges: Range) -> Part:
    """Return the columns ``ranges`` of [N, K], side by side, as a layer of its own; no value changes.

    Layout ``aiter``: ranges of whole tiles (K = 64 of the weight, 256 of its scale) are ranges of the
    rows of tiles, any other goes by way of the logical order. The result has layout ``aiter`` where its
    K is a multiple of 64, else ``plain``. Raises SliceError where a block would be cut: 32 values of
    MXFP4, 128 of block-wise FP8.
    """
    layer, tensors = part
    K = _count(ranges, layer.K, "columns", layer)
    if layer.format == "mxfp4":
        _refuse_cut_blocks(layer, (edge for pair in ranges for edge in pair), MXFP4_BLOCK_SIZE, "columns")
        new = _resize(layer, layer.N, K)
        return new, {role: _mxfp4_columns(layer, new, role, tensor, ranges) for role, tensor in tensors.items()}
    scale_ranges = _fp8_scale_ranges(layer, ranges, "columns") if layer.granularity == "block" else None
    cut = {WEIGHT: ranges, WEIGHT_SCALE: scale_ranges}
    shape = (layer.scale_shape[0], _length(scale_ranges)) if scale_ranges else layer.scale_shape
    new = replace(layer, K=K, scale_shape=shape)
    return new, {role: _take(tensor, cut.get(role), dim=1) for role, tensor in tensors.items()}


def concat_rows(parts: Sequence[Part]) -> Part:
    """Return the layer of all parts' rows, in their order; no value changes.

    The padding of each scale is cut off first. Layers with one FP8 scale each become one with a scale
    for each row. Raises SliceError where K, format or granularity differ, or a block of FP8 would be
    joined with rows of another part.
    """
    layers = [layer for layer, _ in parts]
    first = layers[0]
    if len(parts) == 1:
        return parts[0]
    kinds = {(layer.format, layer.granularity, layer.K) for layer in layers}
    names = ", ".join(layer.module for layer in layers)
    if len(kinds) > 1:
        raise SliceError(
            f"{names}: can't be one layer: their (format, granularity, K) are {sorted(kinds)}."
            " Convert them alike, with one recipe rule for all."
        )
    joined = replace(first, module="+".join(layer.module for layer in layers), N=sum(layer.N for layer in layers))
    if first.format == "mxfp4":
        layout = "aiter" if all(layer.layout == "aiter" for layer in layers) else "plain"
        new = _resize(replace(joined, layout=layout), joined.N, joined.K)
    else:
        for layer in layers[:-1] if first.granularity == "block" else []:
            _refuse_cut_blocks(layer, (layer.N,), FP8_BLOCK_SIZE, "rows")
        granularity = "block" if first.granularity == "block" else "channel"
        rows = sum(layer.scale_shape[0] for layer in layers) if granularity == "block" else joined.N
        new = replace(joined, granularity=granularity, scale_shape=(rows, *first.scale_shape[1:]))
    return new, {role: _join(new, role, parts) for role in parts[0][1]}


def _count(ranges: Sequence[Range], size: int, what: str, layer: Layer) -> int:
    if not ranges or any(not 0 <= start < stop <= size for start, stop in ranges):
        raise SliceError(f"{layer.module}: {what} {list(ranges)} are not ranges of its {size}.")
    return _length(ranges)


def _length(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _resize(layer: Layer, N: int, K: int) -> Layer:
    """Return an MXFP4 layer of another size, in layout ``aiter`` if it was and the new size allows."""
    rows, cols = alignment(AITER_MXFP4)
    tiled = layer.layout == "aiter" and N % rows == 0 and K % cols == 0
    shape = (N, K // MXFP4_BLOCK_SIZE)
    return replace(
        layer,
        N=N,
        K=K,
        layout="aiter" if tiled else "plain",
        scale_shape=AITER_SCALE.padded_shape(*shape) if tiled else shape,
    )


def _mxfp4_rows(layer: Layer, new: Layer, role: str, stored: Tensor, ranges: Sequence[Range]) -> Tensor:
    tiles = _TILES[role]
    whole_tiles = all(edge % tiles.tile[0] == 0 for pair in ranges for edge in pair)
    if layer.layout == new.layout == "aiter" and whole_tiles:
        return _pad(_take(stored, ranges, dim=0), tiles)
    return _store(new, role, _take(_logical(layer, role, stored), ranges, dim=0))


def _mxfp4_columns(layer: Layer, new: Layer, role: str, stored: Tensor, ranges: Sequence[Range]) -> Tensor:
    tiles, values = _TILES[role], _VALUES_PER_BYTE[role]
    tile_rows, tile_cols = tiles.tile
    in_bytes = [(start // values, stop // values) for start, stop in ranges]
    # The last columns bring their padding along.
    at_end = in_bytes[-1][1] == layer.K // values
    padded = [*in_bytes[:-1], (in_bytes[-1][0], round_up(in_bytes[-1][1], tile_cols))] if at_end else in_bytes
    if layer.layout == new.layout == "aiter" and all(edge % tile_cols == 0 for pair in padded for edge in pair):
        # [n_tile, k_tile * tile_rows * tile_cols]: a tile is contiguous
        rows = stored.reshape(len(stored) // tile_rows, -1)
        taken = _take(rows, [(start * tile_rows, stop * tile_rows) for start, stop in padded], dim=1)
        return taken.reshape(len(stored), -1)
    return _store(new, role, _take(_logical(layer, role, stored), in_bytes, dim=1))


def _join(new: Layer, role: str, parts: Sequence[Part]) -> Tensor:
    tensors = [tensors[role] for _, tensors in parts]
    if role == INPUT_SCALE:
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise SliceError(f"{new.module}: the members' input scales differ. Calibrate them as one fused group.")
        return tensors[0]
    if new.format == "mxfp4":
        if new.layout == "plain":
            return torch.cat([_logical(layer, role, tensors[role]) for layer, tensors in parts])
        return _pad(
            torch.cat([tensor[: layer.N] for (layer, _), tensor in zip(parts, tensors, strict=True)]), _TILES[role]
        )
    if role == WEIGHT_SCALE and parts[0][0].granularity == "tensor":
        tensors = [tensor.expand(layer.N) for (layer, _), tensor in zip(parts, tensors, strict=True)]
    return torch.cat(tensors)


def _logical(layer: Layer, role: str, stored: Tensor) -> Tensor:
    """Return an MXFP4 tensor in logical order without padding."""
    if layer.layout == "plain":
        return stored
    return _TILES[role].unshuffle(stored)[: layer.N, : layer.K // _VALUES_PER_BYTE[role]]


def _store(new: Layer, role: str, logical: Tensor) -> Tensor:
    if new.layout == "plain":
        return logical.contiguous()
    return _TILES[role].shuffle(_TILES[role].pad_to_tile(logical))


def _pad(stored: Tensor, tiles: TileLayout) -> Tensor:
    """Return stored rows padded with 0x00: behind the last tile they are in order too."""
    return stored if tiles.padded_shape(*stored.shape) == tuple(stored.shape) else tiles.pad_to_tile(stored)


def _take(tensor: Tensor, ranges: Sequence[Range] | None, dim: int) -> Tensor:
    """Return ranges of one axis side by side, a copy; without ranges the tensor itself."""
    if ranges is None:
        return tensor
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges], dim=dim)


def _fp8_scale_ranges(layer: Layer, ranges: Sequence[Range], what: str) -> list[Range]:
    """Return which scales belong to ranges of rows or columns. A block ends early only at the end of the last one."""
    if layer.granularity != "block":
        return list(ranges)
    starts = [start for start, _ in ranges]
    stops = [stop for _, stop in ranges[:-1]]
    _refuse_cut_blocks(layer, (*starts, *stops), FP8_BLOCK_SIZE, what)
    return [(start // FP8_BLOCK_SIZE, -(-stop // FP8_BLOCK_SIZE)) for start, stop in ranges]


def _refuse_cut_blocks(layer: Layer, edges: Iterable[int], block: int, what: str) -> None:
    cut = sorted({edge for edge in edges if edge % block})
    if cut:
        raise SliceError(
            f"{layer.module}: {what} can't be cut at {cut}: {block} share one scale. Use another number of ranks,"
            " or keep the layer unquantized (convert-ckpt --ignore)."
        )
