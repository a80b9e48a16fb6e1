"""A conversion's result as it is published: its components, and one row for each tensor of the source."""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from run_ckpt.contract.errors import ProblemsError
from run_ckpt.contract.manifest import MANIFEST_NAME, KeptTensor, Layer, Manifest, read_manifest
from run_ckpt.contract.manifest_checks import manifest_faults
from run_ckpt.contract.tensors import DTYPE_BITS
from run_ckpt.storage.components import find_components
from run_ckpt.tools.summary import Summary, summarize

_BLOCK = re.compile(r"(?P<stack>.*?)\.?\b(?P<block>\d+)\.(?P<projection>.+)")
_WEIGHT_SUFFIX = ".weight"


@dataclass(frozen=True)
class Row:
    """One tensor of the source and what became of it.

    ``fate`` is the format of a quantized weight, or the dtype in which a tensor was kept, ``reason`` why.
    A name inside numbered blocks is cut in three: ``transformer_blocks``, 3, ``attn.to_q``; any other
    is all ``projection``, its ``block`` None.
    """

    component: str
    name: str
    stack: str
    block: int | None
    projection: str
    is_linear: bool
    fate: str
    reason: str
    shape: tuple[int, ...]
    source_nbytes: int
    output_nbytes: int
    sqnr_db: float | None = None
    max_abs_error: float | None = None

    @property
    def is_quantized(self) -> bool:
        return self.reason == ""

    @property
    def kind(self) -> str:
        """The name without its block number, which like layers of all blocks share."""
        if self.block is None:
            return self.projection
        return ".".join(filter(None, (self.stack, "*", self.projection)))


@dataclass(frozen=True)
class Component:
    """One converted component: ``name`` is its folder in the result, "" for the result itself."""

    name: str
    path: Path
    manifest: Manifest
    summary: Summary
    rows: tuple[Row, ...]


def read_result(output: Path) -> tuple[Component, ...]:
    """Return the components of a conversion's result, from their manifests alone.

    Raises ManifestError where there is no readable manifest, ProblemsError where one contradicts itself.
    """
    components = []
    for name, path in find_components(output).items():
        manifest = read_manifest(path)
        problems = manifest_faults(manifest)
        if problems:
            raise ProblemsError(f"{path / MANIFEST_NAME}: contradicts itself", problems)
        rows = tuple(list_rows(name, manifest))
        components.append(Component(name, path, manifest, summarize(name, manifest), rows))
    return tuple(components)


def list_rows(component: str, manifest: Manifest) -> list[Row]:
    """Return a row for every tensor of the source, by name with numbers in their order."""
    rows = [_layer_row(component, layer) for layer in manifest.layers.values()]
    rows += [_kept_row(component, kept, manifest) for kept in manifest.kept.values()]
    return sorted(rows, key=lambda row: _natural_order(row.name))


def split_name(module: str) -> tuple[str, int | None, str]:
    """Return (stack, block, projection) of a dotted name; the first number in it is the block's."""
    match = _BLOCK.fullmatch(module)
    if match is None:
        return "", None, module
    return match["stack"], int(match["block"]), match["projection"]


def _layer_row(component: str, layer: Layer) -> Row:
    source_nbytes = layer.N * layer.K * DTYPE_BITS[layer.source_dtype] // 8
    return Row(
        component,
        layer.module,
        *split_name(layer.module),
        is_linear=True,
        fate=layer.format,
        reason="",
        shape=(layer.N, layer.K),
        source_nbytes=source_nbytes,
        output_nbytes=sum(spec.nbytes for spec in layer.specs().values()),
        sqnr_db=layer.sqnr_db,
        max_abs_error=layer.max_abs_error,
    )


def _kept_row(component: str, kept: KeptTensor, manifest: Manifest) -> Row:
    spec = kept.spec
    module = spec.name.removesuffix(_WEIGHT_SUFFIX)
    is_linear = spec.name.endswith(_WEIGHT_SUFFIX) and module in manifest.unquantized_linears
    name = module if is_linear else spec.name
    return Row(
        component,
        name,
        *split_name(name),
        is_linear=is_linear,
        fate=spec.dtype,
        reason=kept.reason,
        shape=spec.shape,
        source_nbytes=spec.nbytes,
        output_nbytes=spec.nbytes,
    )


def mean(values: list[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _natural_order(name: str) -> list[tuple[int, str]]:
    """Return a sorting key that puts block 2 before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
