"""Layers whose codes are chosen by statistics, made apart from their file where a machine has time for them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from convert_ckpt.plan.plan import FilePlan, Plan, TensorPlan
from convert_ckpt.run.output_files import FileRecord
from run_ckpt.storage.header import build_header


@dataclass(frozen=True)
class MadeLayers:
    """``tensors`` maps each output tensor of some layers to its bytes, uint8; ``record`` is that of a file of them."""

    record: FileRecord
    tensors: dict[str, np.ndarray]


def set_apart(plan: Plan) -> tuple[list[Plan], Plan]:
    """Return what makes the layers with statistics of a plan's one file, and the rest of the plan.

    Layers of one input are one plan, as they share its factors; each makes a file of nothing but them, and needs the
    amax that schedule.list_scans finds. The rest reads their weights too, for the hash of the shard. Where all layers
    have the same input, nothing is set apart.
    """
    (file,) = plan.files
    by_input: dict[Path, list[TensorPlan]] = {}
    for tensor in plan.tensors:
        if tensor.statistics and tensor.layer and file.holds(tensor.layer):
            by_input.setdefault(tensor.statistics.path, []).append(tensor)
    if len(by_input) == 1:
        return [], plan
    apart = {tensor.spec.name for tensors in by_input.values() for tensor in tensors}
    left = tuple(tensor for tensor in plan.tensors if tensor.spec.name not in apart)
    unused = (*plan.unused, *(tensor for tensor in plan.tensors if tensor.spec.name in apart))
    rest = replace(plan, tensors=left, unused=tuple(replace(tensor, statistics=None) for tensor in unused))
    return [_alone(plan, tuple(tensors)) for tensors in by_input.values()], rest


def read_made(path: Path, file: FilePlan, record: FileRecord) -> MadeLayers:
    """Return the layers of a file that one of set_apart()'s plans made at ``path``."""
    data = np.fromfile(path, np.uint8)
    tensors = {stored.spec.name: data[stored.offset : stored.end] for stored in file.header.tensors}
    return MadeLayers(record, tensors)


def with_layers(record: FileRecord, made: Sequence[MadeLayers]) -> FileRecord:
    """Return the record of a file with what is known of layers that were made apart from it."""
    for part in made:
        layers, group_amax = {**record.layers, **part.record.layers}, {**record.group_amax, **part.record.group_amax}
        record = replace(record, layers=layers, group_amax=group_amax)
    return record


def _alone(plan: Plan, tensors: tuple[TensorPlan, ...]) -> Plan:
    layers = {tensor.layer.module: tensor.layer for tensor in tensors if tensor.layer}
    specs = [spec for layer in layers.values() for spec in layer.specs().values()]
    return replace(
        plan,
        tensors=tensors,
        files=(FilePlan(plan.files[0].name, build_header(specs), source_shards=()),),
        manifest=replace(plan.manifest, layers=layers, fused_scales={}),
        statistics={module: found for module, found in plan.statistics.items() if module in layers},
        unused=(),
    )
