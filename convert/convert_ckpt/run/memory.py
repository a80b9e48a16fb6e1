"""How much memory layers take whose codes are chosen by statistics, and how many may be in work at once."""

import os
from collections.abc import Iterator, Sequence

from convert_ckpt.methods.grid import ROWS_AT_ONCE
from convert_ckpt.plan.plan import ComponentPlan, Plan, TensorPlan
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.manifest import WEIGHT
from run_ckpt.storage.layer_statistics import block_ranges
from run_ckpt.storage.units import format_nbytes

_F32_NBYTES = 4
# Of float32: arrays [rows at once, K], and matrices [K, K] or of one block after the other, at the same time.
_N_ROW_ARRAYS, _N_MATRICES = 10, 3


def default_max_memory() -> int:
    """Return half of this machine's memory, in bytes."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def n_workers_within(max_memory: int, plan: Plan, n_workers: int) -> int:
    """Return how many workers may each have a layer with statistics at the same time."""
    largest = largest_layer(plan)
    return max(1, min(n_workers, max_memory // largest)) if largest else n_workers


def largest_layer(plan: Plan) -> int:
    """Return the bytes that the largest layer with statistics takes in work, 0 without any."""
    return max((nbytes for _, nbytes in _layers(plan)), default=0)


def memory_lines(plans: list[ComponentPlan]) -> Iterator[str]:
    """Yield a sentence about the layers with statistics of each component that has some."""
    for planned in plans:
        sizes = dict(_layers(planned.plan))
        if sizes:
            largest = format_nbytes(max(sizes.values()))
            yield f"GPTQ chooses the codes of {len(sizes)} layers; one in work takes up to {largest} of memory"


def check_memory(plans: Sequence[ComponentPlan], max_memory: int) -> None:
    """Raise FaultsError with every layer that does not fit."""
    faults = [
        f"{module}: takes {format_nbytes(nbytes)} of memory, allowed are {format_nbytes(max_memory)}. Raise"
        " --max-memory, or record its correlations in smaller blocks."
        for planned in plans
        for module, nbytes in _layers(planned.plan)
        if nbytes > max_memory
    ]
    if faults:
        raise FaultsError("nothing was written", faults)


def _layers(plan: Plan) -> Iterator[tuple[str, int]]:
    for tensor in plan.tensors:
        if tensor.layer and tensor.statistics:
            yield tensor.layer.module, _working_nbytes(tensor)


def _working_nbytes(tensor: TensorPlan) -> int:
    layer, statistics = tensor.layer, tensor.statistics
    assert layer is not None
    assert statistics is not None
    blocks = sum((stop - start) ** 2 for start, stop in block_ranges(layer.K, statistics.block_size))
    floats = _N_ROW_ARRAYS * ROWS_AT_ONCE * layer.K + _N_MATRICES * blocks
    return tensor.spec.nbytes + 2 * layer.specs()[WEIGHT].nbytes + _F32_NBYTES * floats
