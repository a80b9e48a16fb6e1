"""Whether statistics are of the weights that are converted: the first row of each weight tells."""

import hashlib
import os

import numpy as np

from convert_ckpt.plan.plan import Plan, TensorPlan
from convert_ckpt.run.folded import round_to_bf16
from convert_ckpt.run.slab import to_float, weight_bits
from run_ckpt.contract.errors import FaultsError
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.reader import read_fully
from run_ckpt.storage.shards import TensorFolder


def check_identity(plan: Plan, source: TensorFolder) -> None:
    """Raise FaultsError with every layer whose statistics are of another weight. ``source`` is here."""
    shards = {shard.name: shard.path for shard in source.shards}
    faults = []
    for tensor in plan.tensors:
        if tensor.layer and not tensor.encoded and tensor.layer.module in plan.statistics:
            row = np.empty(tensor.spec.nbytes // tensor.layer.N, np.uint8)
            fd = open_to_read(shards[tensor.shard])
            try:
                read_fully(fd, row.data, tensor.view.offset, tensor.shard)
            finally:
                os.close(fd)
            faults.append(identity_fault(plan, tensor, to_float(weight_bits(row, tensor.spec.dtype, tensor.layer.K))))
    if any(faults):
        raise FaultsError("nothing was written", [fault for fault in faults if fault])


def identity_fault(plan: Plan, tensor: TensorPlan, row: np.ndarray) -> str | None:
    """Return a sentence if a layer's statistics are of another weight. row: the first one of its weight, float32."""
    layer = tensor.layer
    assert layer is not None
    statistics = plan.statistics.get(layer.module)
    expected = statistics.layers[layer.module].first_row_sha256 if statistics else None
    if statistics is None or expected is None:
        return None
    if hashlib.sha256(round_to_bf16(row).tobytes()).hexdigest() == expected:
        return None
    return (
        f"{layer.module}: {statistics.path.name} is of a model with other weights (its first row differs)."
        " Calibrate this one."
    )
