"""Whether layers whose codes are passed through share the scale that a consumer takes for all of a fused group."""

from collections import defaultdict

import numpy as np

from convert_ckpt.plan.plan import Plan, TensorPlan
from convert_ckpt.source.quantized import EncodedWeight
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE
from run_ckpt.storage.shards import TensorFolder


def check_shared_scales(plan: Plan, source: TensorFolder) -> None:
    """Raise FaultsError for each fused group in NVFP4 whose scales of the whole tensor differ. ``source`` is here.

    vLLM 0.30 (quantization/modelopt.py) and SGLang 0.5.23 (srt/layers/quantization/modelopt_quant.py) multiply all of
    a group by the largest. Of FP8 in unequal scales they make codes in one scale, which loses no more than that.
    """
    groups: dict[str, list[TensorPlan]] = defaultdict(list)
    for tensor in plan.tensors:
        if tensor.layer and tensor.layer.format.is_two_level and tensor.layer.fused_group:
            groups[tensor.layer.fused_group].append(tensor)
    faults = []
    for group, tensors in sorted(groups.items()):
        passed = [tensor.encoded for tensor in tensors if tensor.is_passed_through and tensor.encoded]
        scales = {_read_scale(weight, source) for weight in passed}
        if len(scales) > 1 or 0 < len(passed) < len(tensors):
            faults.append(
                f"{group}: its members have different scales of the whole tensor in the source, and consumers take one"
                " for all. Write it as numbers first: run-ckpt dequantize."
            )
    if faults:
        raise FaultsError("nothing was written", faults)


def _read_scale(weight: EncodedWeight, source: TensorFolder) -> bytes:
    shard, stored = next(weight.parts[role] for role in (TENSOR_SCALE, INVERSE_TENSOR_SCALE) if role in weight.parts)
    path = next(found.path for found in source.shards if found.name == shard)
    return np.fromfile(path, np.uint8, stored.spec.nbytes, offset=stored.offset).tobytes()
