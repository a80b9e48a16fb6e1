"""Which layers of a checkpoint one linear of a server's model holds, and which part of them a rank (pure)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from run_ckpt.contract.manifest import Layer
from run_ckpt.loading.tensor_parallel import Part, Range, concat_rows, slice_columns, slice_rows


@dataclass(frozen=True)
class Target:
    """A linear of the model and the layers it holds, in the order of its rows."""

    module: str
    layers: tuple[Layer, ...]

    @property
    def N(self) -> int:
        return sum(layer.N for layer in self.layers)

    @property
    def K(self) -> int:
        return self.layers[0].K


@dataclass(frozen=True)
class Share:
    """What one rank holds of a target: ranges of its rows or columns, None for all."""

    target: Target
    rows: tuple[Range, ...] | None = None
    columns: tuple[Range, ...] | None = None

    def layer(self) -> Layer:
        """Return the rank's layer. Raises SliceError where it can't be had exactly."""
        return self._cut([(layer, {}) for layer in self.target.layers])[0]

    def take(self, role: str, stored: Tensor) -> Tensor:
        """Return the rank's tensor of one role from those of all members, as on disk, one below the other."""
        sizes = [layer.specs()[role].shape[0] for layer in self.target.layers]
        members = zip(self.target.layers, torch.split(stored, sizes), strict=True)
        _, tensors = self._cut([(layer, {role: part}) for layer, part in members])
        return tensors[role]

    def _cut(self, parts: Sequence[Part]) -> Part:
        whole = concat_rows(parts)
        whole = slice_rows(whole, *self.rows) if self.rows else whole
        return slice_columns(whole, *self.columns) if self.columns else whole


def cut_evenly(
    sizes: Sequence[int], rank: int, n_ranks: int, n_copies: Sequence[int] | None = None
) -> tuple[Range, ...] | None:
    """Return the ranges that one of ``n_ranks`` holds of an axis made of segments, each cut evenly.

    n_copies: how many neighbouring ranks hold the same of each segment; without it, one.
    None where that is the whole axis.
    """
    if n_ranks == 1:
        return None
    ranges, offset = [], 0
    for size, n_holders in zip(sizes, n_copies or [1] * len(sizes), strict=True):
        part = size * n_holders // n_ranks
        start = offset + rank // n_holders * part
        ranges.append((start, start + part))
        offset += size
    return tuple(ranges)
