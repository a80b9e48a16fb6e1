"""A conversion's result as it is published: its components, and one row for each tensor of the source."""

import re
from dataclasses import dataclass
from pathlib import Path

from run_ckpt.contract.file_names import TEXT_ENCODER, join_names
from run_ckpt.contract.manifest import MANIFEST_NAME, KeptTensor, Layer, Manifest
from run_ckpt.contract.module_names import block_pattern, split_name
from run_ckpt.contract.tensors import DTYPE_BITS
from run_ckpt.storage.components import find_components
from run_ckpt.storage.hashing import hash_path
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.tools.summary import CheckpointSummary, summarize

_WEIGHT_SUFFIX = ".weight"


@dataclass(frozen=True)
class TensorRow:
    """One tensor of the source and what became of it.

    ``stored_as`` is the format of a quantized weight, or the dtype in which a tensor was kept and ``reason`` why.
    ``method`` and ``output_sqnr_db`` say, where statistics were given, how codes were chosen and what SQNR the output
    of the layer then has on held out samples.
    ``stack``, ``block`` and ``projection`` are the parts of its name, see module_names.split_name.
    """

    component: str
    name: str
    stack: str
    block: int | None
    projection: str
    is_linear: bool
    is_quantized: bool
    stored_as: str
    reason: str
    shape: tuple[int, ...]
    source_nbytes: int
    output_nbytes: int
    sqnr_db: float | None = None
    max_abs_error: float | None = None
    method: str | None = None
    output_sqnr_db: float | None = None

    @property
    def path(self) -> str:
        """Component and name."""
        return join_names(self.component, self.name)

    @property
    def kind(self) -> str:
        """Component and name without its block number."""
        return join_names(self.component, block_pattern(self.name))


@dataclass(frozen=True)
class ConvertedComponent:
    """One converted component: ``name`` is its folder in the result, "" for the result itself."""

    name: str
    path: Path
    manifest: Manifest
    summary: CheckpointSummary
    rows: tuple[TensorRow, ...]
    manifest_blake3: str


def read_result(output: Path) -> tuple[ConvertedComponent, ...]:
    """Return the components of a conversion's result, from their manifests alone; text encoders come last.

    Raises ManifestError where there is no readable manifest, FaultsError where one contradicts itself.
    """
    components = []
    for name, path in sorted(find_components(output).items(), key=lambda item: item[0].startswith(TEXT_ENCODER)):
        manifest = read_checked_manifest(path)
        rows = tuple(list_rows(name, manifest))
        components.append(
            ConvertedComponent(name, path, manifest, summarize(name, manifest), rows, hash_path(path / MANIFEST_NAME))
        )
    return tuple(components)


def list_rows(component: str, manifest: Manifest) -> list[TensorRow]:
    """Return a row for every tensor of the source, by name with numbers in their order."""
    rows = [_layer_row(component, layer) for layer in manifest.layers.values()]
    rows += [_kept_row(component, kept, manifest) for kept in manifest.kept.values()]
    return sorted(rows, key=lambda row: _natural_order(row.name))


def _layer_row(component: str, layer: Layer) -> TensorRow:
    source_nbytes = layer.N * layer.K * DTYPE_BITS[layer.source_dtype] // 8
    return TensorRow(
        component,
        layer.module,
        *split_name(layer.module),
        is_linear=True,
        is_quantized=True,
        stored_as=layer.format.name,
        reason="",
        shape=(layer.N, layer.K),
        source_nbytes=source_nbytes,
        output_nbytes=sum(spec.nbytes for spec in layer.specs().values()),
        sqnr_db=layer.sqnr_db,
        max_abs_error=layer.max_abs_error,
        method=layer.method,
        output_sqnr_db=layer.output_sqnr_db[layer.method] if layer.method and layer.output_sqnr_db else None,
    )


def _kept_row(component: str, kept: KeptTensor, manifest: Manifest) -> TensorRow:
    spec = kept.spec
    module = spec.name.removesuffix(_WEIGHT_SUFFIX)
    is_linear = spec.name.endswith(_WEIGHT_SUFFIX) and module in manifest.unquantized_linears
    name = module if is_linear else spec.name
    return TensorRow(
        component,
        name,
        *split_name(name),
        is_linear=is_linear,
        is_quantized=False,
        stored_as=spec.dtype,
        reason=kept.reason,
        shape=spec.shape,
        source_nbytes=spec.nbytes,
        output_nbytes=spec.nbytes,
    )


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sorting key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
