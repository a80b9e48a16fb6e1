"""What each candidate format would cost each layer: one pass over a component's weights, a layer at a time."""

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from convert_ckpt.plan.candidates import Damage, Group
from convert_ckpt.plan.plan import TensorPlan
from convert_ckpt.run.buffers import Buffers
from convert_ckpt.run.calibrated import CalibratedQuantizer
from convert_ckpt.run.folded import fold_bits
from convert_ckpt.run.slab import is_finite, largest_magnitude, quantize, tensor_scale, weight_bits
from convert_ckpt.source.shards import FetchStep, ShardProvider
from run_ckpt.contract.errors import NonFiniteError
from run_ckpt.contract.manifest import Layer
from run_ckpt.progress import Progress
from run_ckpt.storage.layer_statistics import InputStatistics
from run_ckpt.storage.reader import read_fully

# All layers in work together, as far as one alone does not take more.
_IN_FLIGHT_NBYTES = 384 * 2**20


@dataclass(frozen=True)
class _Weight:
    """A weight as it is planned, with its statistics where they count, and what it would be in each format."""

    tensor: TensorPlan
    layers: Mapping[str, Layer]


def measure_damages(
    tensors: Iterable[TensorPlan],
    groups: Iterable[Group],
    statistics: Mapping[str, InputStatistics],
    provider: ShardProvider,
    n_workers: int,
    progress: Progress,
) -> dict[str, dict[str, Damage]]:
    """Return layer -> format -> what its weights lose, or with statistics of all of them what its output loses.

    Raises NonFiniteError for a weight that holds NaN or infinity, CheckpointError for statistics of another weight.
    """
    calibrated = CalibratedQuantizer() if statistics else None
    measure = partial(_measure, calibrated, progress)
    weights = list(_list_weights(tensors, groups, statistics))
    largest = max((weight.tensor.spec.nbytes for weight in weights), default=1)
    shards = list(dict.fromkeys(weight.tensor.view.shard for weight in weights))
    progress.start("measure damage", sum(weight.tensor.spec.nbytes for weight in weights))
    # As in a conversion, one shard comes while the one before it is worked on.
    provider.start([FetchStep(shard, frozenset(shards[: max(0, i - 1)])) for i, shard in enumerate(shards)])
    found: dict[str, dict[str, Damage]] = {}
    try:
        n_workers = n_workers if statistics else max(1, min(n_workers, _IN_FLIGHT_NBYTES // largest))
        with calibrated or nullcontext(), ThreadPoolExecutor(n_workers) as pool:
            for shard in shards:
                fd = os.open(provider.wait(shard), os.O_RDONLY)
                try:
                    inside = [weight for weight in weights if weight.tensor.view.shard == shard]
                    measured = pool.map(partial(measure, fd), inside)
                    found |= {
                        next(iter(weight.layers.values())).module: damages
                        for weight, damages in zip(inside, measured, strict=True)
                    }
                finally:
                    os.close(fd)
                provider.release(shard)
    finally:
        provider.stop()
    return found


def _list_weights(
    tensors: Iterable[TensorPlan], groups: Iterable[Group], statistics: Mapping[str, InputStatistics]
) -> Iterator[_Weight]:
    """Yield the weights of all groups, in the order of the tensors."""
    candidates: dict[str, dict[str, Layer]] = {}
    for group in groups:
        for name, layers in group.layers.items():
            for layer in layers:
                candidates.setdefault(layer.source_tensor, {})[name] = layer
    for tensor in tensors:
        if tensor.spec.name in candidates:
            layers_by_format = candidates[tensor.spec.name]
            module = next(iter(layers_by_format.values())).module
            yield _Weight(replace(tensor, statistics=statistics.get(module)), layers_by_format)


def _measure(calibrated: CalibratedQuantizer | None, progress: Progress, fd: int, weight: _Weight) -> dict[str, Damage]:
    view, spec = weight.tensor.view, weight.tensor.spec
    raw = np.empty(spec.nbytes, np.uint8)
    read_fully(fd, raw.data, view.offset, view.shard)
    bits = fold_bits(weight_bits(raw, spec.dtype, spec.shape[1]), weight.tensor.fold, 0)
    largest = largest_magnitude(bits)
    if not is_finite(largest):
        raise NonFiniteError(
            f"{view.shard}: {spec.name} holds NaN or infinity, for which no code stands. Repair the source, or"
            " keep this layer with --ignore."
        )
    buffers, damages = Buffers(), {}
    for name, layer in weight.layers.items():
        # Of the layer alone: that a group shares a larger one costs a floating format next to nothing.
        scale = tensor_scale(largest, layer) if layer.scheme.has_tensor_scale else None
        if calibrated:
            damages[name] = calibrated.measure(bits, replace(weight.tensor, layer=layer), buffers, scale)
        else:
            _, errors, _ = quantize(bits, layer, 0, buffers, scale)
            damages[name] = Damage(errors.squared_error, errors.squared_signal)
    progress.advance(spec.nbytes)
    return damages
