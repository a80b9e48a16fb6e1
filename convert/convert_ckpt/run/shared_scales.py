"""Whether layers whose codes are passed through share the scale that a consumer takes for all of a fused group."""

from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import numpy as np

from convert_ckpt.plan.plan import Plan, TensorPlan
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE
from run_ckpt.storage.header import StoredTensor
from run_ckpt.storage.shards import TensorFolder

_ROLES = (TENSOR_SCALE, INVERSE_TENSOR_SCALE)
Read = Callable[[TensorPlan], bytes]


def check_shared_scales(plan: Plan, read: Read | None) -> None:
    """Raise FaultsError for each fused group in NVFP4 whose scales of the whole tensor differ.

    read: returns the scale of a layer whose codes are passed through; None where no scale can be read yet.

    vLLM 0.30 (quantization/modelopt.py) and SGLang 0.5.23 (srt/layers/quantization/modelopt_quant.py) multiply all of
    a group by the largest. Of FP8 in unequal scales they make codes in one scale, which loses no more than that.
    """
    groups: dict[str, list[TensorPlan]] = defaultdict(list)
    for tensor in plan.tensors:
        if tensor.layer and tensor.layer.format.is_two_level and tensor.layer.fused_group:
            groups[tensor.layer.fused_group].append(tensor)
    faults = []
    for group, tensors in sorted(groups.items()):
        passed = [tensor for tensor in tensors if tensor.is_passed_through]
        if 0 < len(passed) < len(tensors) or (read and len({read(tensor) for tensor in passed}) > 1):
            faults.append(
                f"{group}: its members have different scales of the whole tensor in the source, and consumers take one"
                " for all. Write it as numbers first: run-ckpt dequantize."
            )
    if faults:
        raise FaultsError("can't be converted", faults)


def in_source(source: TensorFolder) -> Read:
    """Return what reads scales of a source that is here."""
    paths = {shard.name: shard.path for shard in source.shards}

    def read(tensor: TensorPlan) -> bytes:
        assert tensor.encoded
        parts = tensor.encoded.parts
        shard, stored = next(parts[role] for role in _ROLES if role in parts)
        return _read(paths[shard], stored)

    return read


def in_result(plan: Plan, folder: Path) -> Read:
    """Return what reads scales of the finished files in ``folder``."""
    places = {stored.spec.name: (file.name, stored) for file in plan.files for stored in file.header.tensors}

    def read(tensor: TensorPlan) -> bytes:
        assert tensor.layer
        names = tensor.layer.tensors
        file, stored = places[next(names[role] for role in _ROLES if role in names)]
        return _read(folder / file, stored)

    return read


def _read(path: Path, stored: StoredTensor) -> bytes:
    return np.fromfile(path, np.uint8, stored.spec.nbytes, offset=stored.offset).tobytes()
