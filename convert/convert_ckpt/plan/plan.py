"""The records of a plan: the checkpoint without its bytes, every output tensor with its place and its reason."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from convert_ckpt.source.component import Component
from convert_ckpt.source.quantized import EncodedWeight
from run_ckpt.contract.decided_by import DecidedBy
from run_ckpt.contract.folds import TensorFold
from run_ckpt.contract.foreign import is_stored_alike
from run_ckpt.contract.manifest import WEIGHT, Layer, Manifest
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.header import Header
from run_ckpt.storage.layer_statistics import InputStatistics
from run_ckpt.storage.views import View


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """One source tensor: where it lies and what it becomes.

    ``layer`` is None where it is copied; ``statistics``, of the layer's input, are there where they choose its codes;
    ``fold`` is what changes its values before. ``encoded`` is the weight whose codes it holds in a source that is
    quantized already.
    """

    view: View
    layer: Layer | None
    reason: str
    decided_by: DecidedBy
    statistics: InputStatistics | None = None
    fold: TensorFold | None = None
    encoded: EncodedWeight | None = None

    @property
    def spec(self) -> TensorSpec:
        return self.view.spec

    @property
    def shard(self) -> str:
        return self.view.shard

    @property
    def output_nbytes(self) -> int:
        """Bytes of what it becomes."""
        return sum(spec.nbytes for spec in self.layer.specs().values()) if self.layer else self.spec.nbytes

    @property
    def is_copy(self) -> bool:
        """True where its bytes lie in the shard as they will in the output."""
        return not (self.layer or self.encoded or self.fold or self.view.rows)

    @property
    def is_passed_through(self) -> bool:
        """True where its codes are in the layer's format already and stay what they are."""
        return bool(self.layer and self.encoded and is_stored_alike(self.encoded.layer, self.layer))


@dataclass(frozen=True)
class FilePlan:
    """One output shard: its header, and the source shards its tensors come from."""

    name: str
    header: Header
    source_shards: tuple[str, ...]

    @cached_property
    def tensor_names(self) -> frozenset[str]:
        return frozenset(tensor.spec.name for tensor in self.header.tensors)

    def holds(self, layer: Layer) -> bool:
        """True where the weight of a layer is in it."""
        return layer.tensors[WEIGHT] in self.tensor_names


@dataclass(frozen=True)
class Plan:
    """All decisions for one component. ``tensors`` keep the source's order: by shard, by offset.

    ``manifest`` is complete but for the measured errors and the files; ``preset_from`` says what chose its preset.
    ``input_scales`` maps a module to its static activation scale, ``statistics`` to those of its input that were given.
    ``unused`` are the tensors that the output has no place for; they are read for the hash of their shards.
    """

    tensors: tuple[TensorPlan, ...]
    files: tuple[FilePlan, ...]
    manifest: Manifest
    input_scales: dict[str, np.float32]
    warnings: tuple[str, ...]
    preset_from: str
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict)
    unused: tuple[TensorPlan, ...] = ()

    def file_of_tensors(self) -> dict[str, str]:
        """Return output tensor -> name of its file."""
        return {stored.spec.name: file.name for file in self.files for stored in file.header.tensors}

    def quantized_by_file(self) -> dict[str, list[TensorPlan]]:
        """Return name of each file -> the tensors that are quantized into it."""
        weights = {tensor.layer.tensors[WEIGHT]: tensor for tensor in self.tensors if tensor.layer}
        return {
            file.name: [weights[t.spec.name] for t in file.header.tensors if t.spec.name in weights]
            for file in self.files
        }

    @property
    def source_nbytes(self) -> int:
        return sum(tensor.view.nbytes for tensor in (*self.tensors, *self.unused))

    @property
    def output_nbytes(self) -> int:
        return sum(file.header.file_nbytes for file in self.files)


@dataclass(frozen=True)
class ComponentPlan:
    """One component to convert: ``name`` is its folder in OUTPUT, "" for OUTPUT itself."""

    name: str
    source: Component
    plan: Plan
