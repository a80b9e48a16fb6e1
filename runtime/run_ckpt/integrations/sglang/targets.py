"""Which linear of a runtime's model holds which layers of a checkpoint, and which part of them a rank (pure)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.manifest import Layer, Manifest
from run_ckpt.loading.tensor_parallel import Part, Range, concat_rows, slice_columns, slice_rows

# A checkpoint's tensor name -> the model's, its place among the tensors fused there, how many these are.
# The name "" stands for a tensor that is left out. This is the form of SGLang's own map.
Place = tuple[str, int | None, int | None]
Rename = Callable[[str], Place]

_WEIGHT = ".weight"


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


def find_targets(manifest: Manifest, rename: Rename) -> dict[str, Target]:
    """Return module of the model -> target, for every quantized layer.

    rename: where the model has a tensor of that name, as SGLang maps it. Raises FaultsError for
    layers that are to be fused with others that are missing, unquantized or quantized differently.
    """
    places = {module: rename(module + _WEIGHT) for module in manifest.layers}
    members: dict[str, dict[int, Layer]] = {}
    counts: dict[str, int] = {}
    for module, (name, index, count) in places.items():
        members.setdefault(name, {})[index or 0] = manifest.layers[module]
        counts[name] = max(count or 1, counts.get(name, 1))
    faults = [fault for name in members for fault in _faults(name, members[name], counts[name])]
    if faults:
        raise FaultsError("SGLang can't hold the quantized layers of this checkpoint", faults)
    targets = {}
    for name, layers in members.items():
        module = name.removesuffix(_WEIGHT)
        targets[module] = Target(module, tuple(layers[index] for index in sorted(layers)))
    return targets


def rename_tensors(manifest: Manifest, targets: Mapping[str, Target], rename: Rename) -> Rename:
    """Return ``rename`` extended by every tensor of the quantized layers.

    SGLang's own rules know the weights alone. Scales that repeat those of fused members under the
    fused name are left out: they come with the members.
    """
    places: dict[str, Place] = dict.fromkeys(manifest.fused_scales, ("", None, None))
    for target in targets.values():
        is_fused = len(target.layers) > 1
        for index, layer in enumerate(target.layers):
            fused = (index, len(target.layers)) if is_fused else (None, None)
            places.update({name: (f"{target.module}.{role}", *fused) for role, name in layer.tensors.items()})
    return lambda name: places[name] if name in places else rename(name)


def cut_evenly(sizes: Sequence[int], rank: int, n_ranks: int) -> tuple[Range, ...] | None:
    """Return the ranges that one of ``n_ranks`` holds of an axis made of segments, each cut evenly.

    None where that is the whole axis.
    """
    if n_ranks == 1:
        return None
    ranges, offset = [], 0
    for size in sizes:
        part = size // n_ranks
        ranges.append((offset + rank * part, offset + (rank + 1) * part))
        offset += size
    return tuple(ranges)


def _faults(name: str, members: Mapping[int, Layer], count: int) -> list[str]:
    modules = ", ".join(members[index].module for index in sorted(members))
    if set(members) != set(range(count)):
        return [
            f"{modules}: fused with others into {name} ({count} tensors), but only these are quantized."
            " Convert again with a rule that treats them alike."
        ]
    schemes = [(layer.scheme, layer.K) for layer in members.values()]
    kinds = sorted({(scheme.format.name, scheme.layout.name, scheme.granularity, K) for scheme, K in schemes})
    if len(kinds) > 1:
        return [
            f"{modules}: fused into {name}, but their (format, layout, granularity, K) are {kinds}."
            " Convert again with a rule that treats them alike."
        ]
    return []
