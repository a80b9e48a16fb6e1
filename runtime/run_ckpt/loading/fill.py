"""The tensors of a checkpoint -> those of a model on the meta device: read to a GPU, mapped for the CPU."""

import math
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.progress import Progress
from run_ckpt.storage.reader import COPY_NBYTES, TensorReader, cut_bytes
from run_ckpt.storage.rows import STORED_DTYPES
from run_ckpt.storage.threads import map_threads

DTYPES = {
    "BOOL": torch.bool,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F64": torch.float64,
    **STORED_DTYPES,
}


@dataclass
class Slot:
    """A tensor that a model wants: every (module, attribute) that shares it, and its names there."""

    wanted: Tensor
    names: list[str] = field(default_factory=list)
    owners: list[tuple[nn.Module, str]] = field(default_factory=list)

    def put(self, tensor: Tensor) -> None:
        """Make ``tensor`` what all owners hold."""
        parameter = nn.Parameter(tensor, requires_grad=False) if isinstance(self.wanted, nn.Parameter) else None
        # Into the tables themselves: assigning an attribute would refuse a tensor in place of a parameter.
        for module, leaf in self.owners:
            if leaf in module._parameters:
                module._parameters[leaf] = parameter
            else:
                module._buffers[leaf] = tensor


def parameter_slots(model: nn.Module) -> list[Slot]:
    """Return the slot of every parameter and persistent buffer; tied ones are one slot with several names."""
    slots: dict[int, Slot] = {}
    for path, module in model.named_modules():
        prefix = f"{path}." if path else ""
        for leaf, tensor in {**module._parameters, **module._buffers}.items():
            if tensor is not None and leaf not in module._non_persistent_buffers_set:
                slot = slots.setdefault(id(tensor), Slot(tensor))
                slot.names.append(prefix + leaf)
                slot.owners.append((module, leaf))
    return list(slots.values())


def match_slots(
    slots: list[Slot], specs: Mapping[str, TensorSpec], coded: Collection[str]
) -> tuple[dict[str, Slot], list[str]]:
    """Return tensor name -> slot, and a sentence for each tensor that is missing, unused or of another shape.

    coded: the tensors of quantized layers, whose dtype must be as wanted too (a scale's may be any float).
    """
    matched: dict[str, Slot] = {}
    faults = []
    for slot in slots:
        stored = [name for name in slot.names if name in specs]
        if not stored:
            faults.append(f"{slot.names[0]}: the model wants it, the checkpoint lacks it. Fetch or convert again.")
        for name in stored:
            matched[name] = slot
            faults += _misfit(specs[name], slot.wanted, name in coded)
    unused = sorted(specs.keys() - matched.keys())
    faults += [f"{name}: in the checkpoint, but the model has no use for it. Is it the right class?" for name in unused]
    return matched, faults


def fill_slots(
    reader: TensorReader,
    matched: Mapping[str, Slot],
    device: torch.device,
    dtypes: Mapping[str, torch.dtype],
    progress: Progress,
) -> None:
    """Bring every matched tensor to ``device`` and put it in its slot.

    A GPU is filled a slab at a time through pinned memory. For the CPU the files are mapped: no copy is made.

    dtypes: what becomes of a tensor that is not left as it is stored. Raises CheckpointError where the
    two names of a tied tensor hold different numbers.
    """
    specs = [spec for name in matched if (spec := reader.spec(name)) is not None]
    if device.type == "cpu":
        tensors = {spec.name: map_tensor(reader, spec) for spec in specs}
    else:
        tensors = _read_tensors(reader, specs, device, progress)
    first: dict[int, str] = {}
    for name, slot in matched.items():
        twin = first.setdefault(id(slot), name)
        if twin != name and not torch.equal(
            tensors[name].reshape(-1).view(torch.uint8), tensors[twin].reshape(-1).view(torch.uint8)
        ):
            raise CheckpointError(f"{twin} and {name} are one tensor in the model, but differ in the checkpoint.")
    for name, slot in matched.items():
        tensor = tensors.pop(name)
        slot.put(tensor.to(dtypes.get(name, tensor.dtype)).reshape(slot.wanted.shape))


def map_tensor(reader: TensorReader, spec: TensorSpec) -> Tensor:
    """Return a stored tensor, mapped from its file. ``spec`` is the reader's: as stored, not as a layer wants it."""
    raw, dtype = reader.mapped(spec.name), DTYPES[spec.dtype]
    # Files of other tools may not be aligned.
    aligned = raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()
    return aligned.view(dtype).reshape(spec.shape)


def _read_tensors(
    reader: TensorReader, specs: Sequence[TensorSpec], device: torch.device, progress: Progress
) -> dict[str, Tensor]:
    tensors = {spec.name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=device) for spec in specs}
    slabs = [(spec.name, start, count) for spec in specs for start, count in cut_bytes(spec.nbytes)]
    buffers = threading.local()

    def fill(slab: tuple[str, int, int]) -> None:
        name, start, count = slab
        if not hasattr(buffers, "staging"):
            buffers.staging = torch.empty(COPY_NBYTES, dtype=torch.uint8, pin_memory=device.type == "cuda")
        staged = buffers.staging[:count]
        reader.read_into(name, start, staged)
        tensors[name].reshape(-1).view(torch.uint8)[start : start + count].copy_(staged)
        progress.advance(count)

    progress.start("load", sum(spec.nbytes for spec in specs))
    map_threads(fill, slabs)
    return tensors


def _misfit(spec: TensorSpec, wanted: Tensor, is_coded: bool) -> list[str]:
    dtype = DTYPES.get(spec.dtype)
    is_scale = is_coded and wanted.dtype == torch.float32
    fits = spec.shape == tuple(wanted.shape) or (is_scale and math.prod(spec.shape) == wanted.numel())
    if dtype is None:
        return [f"{spec.name}: is {spec.dtype}, which a plain tensor of a model can't be. Convert again."]
    if not fits or (is_coded and not is_scale and dtype != wanted.dtype):
        asked = f"{wanted.dtype} {list(wanted.shape)}"
        return [f"{spec.name}: is {spec.dtype} {list(spec.shape)}, the model wants {asked}. Is it the right config?"]
    return []
