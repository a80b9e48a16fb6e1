"""What each candidate format would cost each layer: one pass over a component's weights, a layer at a time."""

import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from convert_ckpt.plan.candidates import Damage, Group
from convert_ckpt.run.buffers import Buffers
from convert_ckpt.run.slab import is_finite, largest_magnitude, quantize, tensor_scale, weight_bits
from convert_ckpt.source.component import Component
from convert_ckpt.source.shards import FetchStep, ShardProvider
from run_ckpt.contract.errors import NonFiniteError
from run_ckpt.contract.manifest import Layer
from run_ckpt.progress import Progress
from run_ckpt.storage.reader import read_fully
from run_ckpt.storage.views import View

# All layers in work together, as far as one alone does not take more.
_IN_FLIGHT_NBYTES = 384 * 2**20


@dataclass(frozen=True)
class _Weight:
    """A weight, where it lies, and what it would be in each format."""

    module: str
    view: View
    layers: Mapping[str, Layer]


def measure_damages(
    source: Component, groups: Iterable[Group], provider: ShardProvider, n_workers: int, progress: Progress
) -> dict[str, dict[str, Damage]]:
    """Return layer -> format -> what its weights lose. Raises NonFiniteError for one that holds NaN or infinity."""
    weights = _list_weights(source, groups)
    largest = max((weight.view.spec.nbytes for weight in weights), default=1)
    shards = list(dict.fromkeys(weight.view.shard for weight in weights))
    progress.start("measure damage", sum(weight.view.spec.nbytes for weight in weights))
    # As in a conversion, one shard comes while the one before it is worked on.
    provider.start([FetchStep(shard, frozenset(shards[: max(0, i - 1)])) for i, shard in enumerate(shards)])
    found: dict[str, dict[str, Damage]] = {}
    try:
        with ThreadPoolExecutor(max(1, min(n_workers, _IN_FLIGHT_NBYTES // largest))) as pool:
            for shard in shards:
                fd = os.open(provider.wait(shard), os.O_RDONLY)
                try:
                    inside = [weight for weight in weights if weight.view.shard == shard]
                    measured = pool.map(_measure, inside, [fd] * len(inside), [progress] * len(inside))
                    found |= {weight.module: damages for weight, damages in zip(inside, measured, strict=True)}
                finally:
                    os.close(fd)
                provider.release(shard)
    finally:
        provider.stop()
    return found


def _list_weights(source: Component, groups: Iterable[Group]) -> list[_Weight]:
    """Return the weights of all groups, by shard and offset."""
    candidates: dict[str, dict[str, Layer]] = {}
    for group in groups:
        for name, layers in group.layers.items():
            for layer in layers:
                candidates.setdefault(layer.source_tensor, {})[name] = layer
    weights = []
    for view in source.views:
        if view.spec.name in candidates:
            possible = candidates[view.spec.name]
            weights.append(_Weight(next(iter(possible.values())).module, view, possible))
    return weights


def _measure(weight: _Weight, fd: int, progress: Progress) -> dict[str, Damage]:
    spec = weight.view.spec
    raw = np.empty(spec.nbytes, np.uint8)
    read_fully(fd, raw.data, weight.view.offset, weight.view.shard)
    bits = weight_bits(raw, spec.dtype, spec.shape[1])
    largest = largest_magnitude(bits)
    if not is_finite(largest):
        raise NonFiniteError(
            f"{weight.view.shard}: {spec.name} holds NaN or infinity, for which no code stands. Repair the source, or"
            " keep this layer with --ignore."
        )
    buffers, damages = Buffers(), {}
    for name, layer in weight.layers.items():
        # Of the layer alone: that a group shares a larger one costs a floating format next to nothing.
        scale = tensor_scale(largest, layer) if layer.scheme.has_tensor_scale else None
        _, errors, _ = quantize(bits, layer, 0, buffers, scale)
        damages[name] = Damage(errors.squared_error, errors.squared_signal)
    progress.advance(spec.nbytes)
    return damages
