"""`run-ckpt inspect`: what a converted checkpoint is, from its manifest alone (no torch)."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from run_ckpt.contract.manifest import MANIFEST_NAME, KeptTensor, Layer, Manifest
from run_ckpt.contract.module_names import block_pattern
from run_ckpt.contract.tensors import DTYPE_BITS
from run_ckpt.storage.foreign import read_foreign_manifest
from run_ckpt.storage.manifest_file import read_checked_manifest


@dataclass(frozen=True)
class CheckpointSummary:
    """One component at a glance. Sizes are sums of files; SQNR is over layers, unweighted, in dB.

    ``targets`` maps each target to the reason why the result is not for it, None where it is.
    """

    component: str
    source: str
    source_revision: str | None
    tool: str
    format: str
    dialect: str
    layout: str
    target_arch: str
    source_nbytes: int
    output_nbytes: int
    n_layers: int
    n_tensors: int
    share_of_parameters: float
    mean_sqnr_db: float | None
    worst_sqnr_db: float | None
    worst_layer: str | None
    targets: dict[str, str | None]
    source_quantization: str | None = None


@dataclass(frozen=True)
class LayerRow:
    """One quantized layer, or ``count`` like ones whose names differ in block numbers only ("*").

    ``sqnr_db`` is the worst and ``max_abs_error`` the largest of them.
    """

    module: str
    count: int
    format: str
    N: int
    K: int
    scale: str
    sqnr_db: float | None
    max_abs_error: float | None


@dataclass(frozen=True)
class KeptRow:
    """A linear layer left as it was (or ``count`` like ones), and why."""

    module: str
    count: int
    dtype: str
    N: int
    K: int
    reason: str


Row = TypeVar("Row", LayerRow, KeptRow)


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` shows of one component."""

    summary: CheckpointSummary
    layers: tuple[LayerRow, ...]
    kept_linears: tuple[KeptRow, ...]

    def to_json(self) -> dict[str, Any]:
        return {
            "summary": asdict(self.summary),
            "layers": [asdict(row) for row in self.layers],
            "kept_linears": [asdict(row) for row in self.kept_linears],
        }


def inspect_component(name: str, path: Path, *, every_layer: bool) -> Inspection:
    """Return what the manifest in ``path`` says, or what another tool's config and headers do.

    every_layer: one row for each, nothing collapsed. Raises ManifestError where a manifest can't be read, FaultsError
    where it, or headers and config, contradict themselves.
    """
    manifest = read_checked_manifest(path) if (path / MANIFEST_NAME).exists() else read_foreign_manifest(path)
    layers = [_layer_row(layer) for layer in manifest.layers.values()]
    kept = [
        _kept_row(module, manifest.kept[f"{module}.weight"])
        for module in manifest.unquantized_linears
        if f"{module}.weight" in manifest.kept
    ]
    if not every_layer:
        layers, kept = _collapse_layers(layers), _collapse_kept(kept)
    return Inspection(summarize(name, manifest), tuple(layers), tuple(kept))


def summarize(name: str, manifest: Manifest) -> CheckpointSummary:
    """Return one component at a glance."""
    layers = list(manifest.layers.values())
    measured = {layer.module: layer.sqnr_db for layer in layers if layer.sqnr_db is not None}
    worst = min(measured, key=measured.__getitem__, default=None)
    quantized = sum(layer.N * layer.K for layer in layers)
    kept = sum(math.prod(kept.spec.shape) for kept in manifest.kept.values())
    return CheckpointSummary(
        component=name,
        source=str(manifest.source.get("name")),
        source_revision=manifest.source.get("revision"),
        tool=" ".join(manifest.tool[key] for key in ("name", "version") if key in manifest.tool),
        format=_list(layer.format.name for layer in layers),
        dialect=manifest.dialect,
        layout=_list(layer.scheme.layout.name for layer in layers),
        target_arch=_list(layer.scheme.layout.target_arch for layer in layers),
        source_nbytes=_total_nbytes(manifest.source["files"]) or _plain_nbytes(manifest),
        output_nbytes=_total_nbytes(manifest.files),
        n_layers=len(layers),
        n_tensors=len(layers) + len(manifest.kept),
        share_of_parameters=quantized / max(1, quantized + kept),
        mean_sqnr_db=round(fmean(measured.values()), 2) if measured else None,
        worst_sqnr_db=measured[worst] if worst else None,
        worst_layer=worst,
        targets=manifest.targets,
        source_quantization=manifest.source_quantization,
    )


def _layer_row(layer: Layer) -> LayerRow:
    scale = layer.scale_rule if len(layer.format.scale_rules) > 1 else f"per {layer.scheme.granularity}"
    return LayerRow(layer.module, 1, layer.format.name, layer.N, layer.K, scale, layer.sqnr_db, layer.max_abs_error)


def _kept_row(module: str, kept: KeptTensor) -> KeptRow:
    N, K = (*kept.spec.shape, 1, 1)[:2]
    return KeptRow(module, 1, kept.spec.dtype, N, K, kept.reason)


def _collapse_layers(rows: list[LayerRow]) -> list[LayerRow]:
    return [
        replace(
            group[0],
            module=module,
            count=len(group),
            sqnr_db=min((row.sqnr_db for row in group if row.sqnr_db is not None), default=None),
            max_abs_error=max((row.max_abs_error for row in group if row.max_abs_error is not None), default=None),
        )
        for module, group in _group(rows, lambda row: replace(row, sqnr_db=None, max_abs_error=None))
    ]


def _collapse_kept(rows: list[KeptRow]) -> list[KeptRow]:
    return [replace(group[0], module=module, count=len(group)) for module, group in _group(rows, lambda row: row)]


def _group(rows: list[Row], alike: Callable[[Row], Row]) -> list[tuple[str, list[Row]]]:
    """Return (name, rows) for those that ``alike`` makes equal but for their block number."""
    groups: dict[Row, list[Row]] = {}
    for row in rows:
        groups.setdefault(replace(alike(row), module=block_pattern(row.module)), []).append(row)
    return [(key.module if len(group) > 1 else group[0].module, group) for key, group in groups.items()]


def _total_nbytes(files: Mapping[str, Mapping[str, Any]]) -> int:
    return sum(entry["nbytes"] for entry in files.values())


def _plain_nbytes(manifest: Manifest) -> int:
    """Return the bytes of the tensors before they were quantized."""
    layers = manifest.layers.values()
    quantized = sum(layer.N * layer.K * DTYPE_BITS[layer.source_dtype] // 8 for layer in layers)
    return quantized + sum(kept.spec.nbytes for kept in manifest.kept.values())


def _list(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))
