"""Exact parts of quantized weights, as tensor parallelism needs them: rows, columns, rows of several joined."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from run_ckpt.contract.errors import SliceError
from run_ckpt.contract.layouts import PLAIN, TileLayout, round_up
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer

# From start up to, not including, stop.
Range = tuple[int, int]
# A layer with its tensors as on disk, by role. Roles may be left out: each is cut by itself.
Part = tuple[Layer, Mapping[str, Tensor]]


def slice_rows(part: Part, *ranges: Range) -> Part:
    """Return the rows ``ranges`` of [N, K], one after the other, as a layer of its own; no value changes.

    Layout ``aiter``: ranges of whole tiles (16 rows of the weight, 32 of its scale) are ranges of bytes,
    any other goes by way of the logical order. The result has layout ``aiter`` where its N is a multiple
    of 32, else ``plain``. Raises SliceError where rows that share a scale would be cut.
    """
    layer, tensors = part
    new = _resize(layer, _count(ranges, layer.N, "rows", layer), layer.K)
    taken = {WEIGHT: ranges, WEIGHT_SCALE: _scale_ranges(layer, ranges, axis=0)}
    return new, {role: _rows(layer, new, role, tensor, taken.get(role)) for role, tensor in tensors.items()}


def slice_columns(part: Part, *ranges: Range) -> Part:
    """Return the columns ``ranges`` of [N, K], side by side, as a layer of its own; no value changes.

    Layout ``aiter``: ranges of whole tiles (K = 64 of the weight, 256 of its scale) are ranges of the
    rows of tiles, any other goes by way of the logical order. The result has layout ``aiter`` where its
    K is a multiple of 64, else ``plain``. Raises SliceError where columns that share a scale would be cut:
    32 values of MXFP4, 128 of block-wise FP8.
    """
    layer, tensors = part
    per_byte = layer.format.element.per_byte
    new = _resize(layer, layer.N, _count(ranges, layer.K, "columns", layer))
    taken = {WEIGHT_SCALE: _scale_ranges(layer, ranges, axis=1)}
    taken[WEIGHT] = [(start // per_byte, stop // per_byte) for start, stop in ranges]
    return new, {role: _columns(layer, new, role, tensor, taken.get(role)) for role, tensor in tensors.items()}


def concat_rows(parts: Sequence[Part]) -> Part:
    """Return the layer of all parts' rows, in their order; no value changes.

    The padding of each scale is cut off first. Layers with one scale each become one with a scale
    for each row. Raises SliceError where K, format or granularity differ, or rows that share a scale would be
    joined with those of another part.
    """
    layers = [layer for layer, _ in parts]
    first = layers[0]
    if len(parts) == 1:
        return parts[0]
    kinds = {(layer.format.name, layer.scheme.granularity, layer.K) for layer in layers}
    names = ", ".join(layer.module for layer in layers)
    if len(kinds) > 1:
        raise SliceError(
            f"{names}: can't be one layer: their (format, granularity, K) are {sorted(kinds)}."
            " Convert them alike, with one recipe rule for all."
        )
    for layer in layers[:-1]:
        _refuse_cut_blocks(layer, [layer.N], layer.scheme.block[0] or 1, "rows")
    layout = first.scheme.layout if len({layer.scheme.layout for layer in layers}) == 1 else PLAIN
    granularity = "channel" if first.scheme.is_per_tensor else first.scheme.granularity
    scheme = replace(first.scheme, layout=layout, granularity=granularity)
    joined = replace(first, module="+".join(layer.module for layer in layers), scheme=scheme)
    new = _resize(joined, sum(layer.N for layer in layers), first.K)
    return new, {role: _join(new, role, parts) for role in parts[0][1]}


def _count(ranges: Sequence[Range], size: int, what: str, layer: Layer) -> int:
    if not ranges or any(not 0 <= start < stop <= size for start, stop in ranges):
        raise SliceError(f"{layer.module}: {what} {list(ranges)} are not ranges of its {size}.")
    return sum(stop - start for start, stop in ranges)


def _resize(layer: Layer, N: int, K: int) -> Layer:
    """Return the layer in another size; in the layout that it has if the new size allows, else row-major."""
    rows, cols = layer.scheme.alignment
    scheme = layer.scheme if N % rows == K % cols == 0 else replace(layer.scheme, layout=PLAIN)
    if scheme.is_per_tensor:
        return replace(layer, N=N, K=K)
    # A scale for each row is [N] or [N, 1].
    shape = scheme.layout.scale.padded_shape(*scheme.scale_grid(N, K))[: len(layer.scale_shape)]
    return replace(layer, N=N, K=K, scheme=scheme, scale_shape=shape)


def _scale_ranges(layer: Layer, ranges: Sequence[Range], axis: int) -> list[Range] | None:
    """Return which scales belong to ranges of rows (axis 0) or columns (1), None where all share one."""
    block = layer.scheme.block[axis]
    if block is None:
        return None
    edges = [edge for pair in ranges for edge in pair]
    # Where blocks may end early, the last one may.
    whole = edges if axis and layer.format.K_granule > 1 else edges[:-1]
    _refuse_cut_blocks(layer, whole, block, ("rows", "columns")[axis])
    return [(start // block, -(-stop // block)) for start, stop in ranges]


def _refuse_cut_blocks(layer: Layer, edges: Sequence[int], block: int, what: str) -> None:
    cut = sorted({edge for edge in edges if edge % block})
    if cut:
        raise SliceError(
            f"{layer.module}: {what} can't be cut at {cut}: {block} share one scale. Use another number of ranks,"
            " or keep the layer unquantized (convert-ckpt --ignore)."
        )


def _rows(layer: Layer, new: Layer, role: str, stored: Tensor, ranges: Sequence[Range] | None) -> Tensor:
    if ranges is None:
        return stored
    tiles = _order(layer, role)
    if _order(new, role) == tiles and all(edge % tiles.tile[0] == 0 for pair in ranges for edge in pair):
        return _pad(_take(stored, ranges, dim=0), tiles)
    return _store(new, role, _take(_logical(layer, role, stored), ranges, dim=0))


def _columns(layer: Layer, new: Layer, role: str, stored: Tensor, ranges: Sequence[Range] | None) -> Tensor:
    if ranges is None:
        return stored
    tiles = _order(layer, role)
    tile_rows, tile_cols = tiles.tile
    # The last columns bring their padding along.
    at_end = ranges[-1][1] == _logical_shape(layer, role)[1]
    padded = [*ranges[:-1], (ranges[-1][0], round_up(ranges[-1][1], tile_cols))] if at_end else ranges
    if _order(new, role) == tiles and all(edge % tile_cols == 0 for pair in padded for edge in pair):
        # [n_tile, k_tile * tile_rows * tile_cols]: a tile is contiguous
        rows = stored.reshape(len(stored) // tile_rows, -1)
        taken = _take(rows, [(start * tile_rows, stop * tile_rows) for start, stop in padded], dim=1)
        return taken.reshape(len(stored), -1)
    return _store(new, role, _take(_logical(layer, role, stored), ranges, dim=1))


def _join(new: Layer, role: str, parts: Sequence[Part]) -> Tensor:
    tensors = [tensors[role] for _, tensors in parts]
    if role not in (WEIGHT, WEIGHT_SCALE):
        if any(not torch.equal(tensor, tensors[0]) for tensor in tensors):
            raise SliceError(f"{new.module}: the members' {role} differ. Calibrate or convert them as one fused group.")
        return tensors[0]
    if role == WEIGHT_SCALE and parts[0][0].scheme.is_per_tensor:
        return torch.cat([tensor.expand(layer.N) for (layer, _), tensor in zip(parts, tensors, strict=True)])
    members = [(layer, tensor) for (layer, _), tensor in zip(parts, tensors, strict=True)]
    if new.scheme.layout == PLAIN:
        return torch.cat([_logical(layer, role, tensor) for layer, tensor in members])
    rows = [tensor[: _logical_shape(layer, role)[0]] for layer, tensor in members]
    return _pad(torch.cat(rows), _order(new, role))


def _order(layer: Layer, role: str) -> TileLayout:
    return layer.scheme.layout.weight if role == WEIGHT else layer.scheme.layout.scale


def _logical_shape(layer: Layer, role: str) -> tuple[int, int]:
    """Return the shape of a weight in bytes, or of its scales, without padding."""
    if role == WEIGHT:
        return layer.N, layer.K // layer.format.element.per_byte
    return layer.scheme.scale_grid(layer.N, layer.K)


def _logical(layer: Layer, role: str, stored: Tensor) -> Tensor:
    """Return a tensor in logical order without padding."""
    if layer.scheme.layout == PLAIN:
        return stored
    rows, cols = _logical_shape(layer, role)
    return _order(layer, role).unshuffle(stored)[:rows, :cols]


def _store(new: Layer, role: str, logical: Tensor) -> Tensor:
    order = _order(new, role)
    return order.shuffle(order.pad_to_tile(logical)).contiguous()


def _pad(stored: Tensor, tiles: TileLayout) -> Tensor:
    """Return stored rows padded with 0x00: behind the last tile they are in order too."""
    if tiles.pad_to == (1, 1) or tiles.padded_shape(*stored.shape) == tuple(stored.shape):
        return stored
    return tiles.pad_to_tile(stored)


def _take(tensor: Tensor, ranges: Sequence[Range], dim: int) -> Tensor:
    """Return ranges of one axis side by side, a copy."""
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges], dim=dim)
