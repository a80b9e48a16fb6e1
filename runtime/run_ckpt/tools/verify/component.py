"""Re-open a converted checkpoint and compare it with its manifest, and with the source if that is given."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from run_ckpt.contract.errors import CheckpointError, FaultsError, UsageError
from run_ckpt.contract.folds import folds_by_tensor
from run_ckpt.contract.foreign import ForeignTensors
from run_ckpt.contract.manifest import MANIFEST_NAME, Layer
from run_ckpt.contract.tensors import DTYPE_BITS
from run_ckpt.progress import Progress
from run_ckpt.storage.checks import config_faults, header_faults, index_faults, text_faults, unlisted_faults
from run_ckpt.storage.components import Checkpoint, find_components
from run_ckpt.storage.files import similar_path
from run_ckpt.storage.foreign import find_quantized
from run_ckpt.storage.json_files import read_config
from run_ckpt.storage.layer_statistics import find_statistics, read_statistics
from run_ckpt.storage.manifest_file import read_checked_manifest, result_hash
from run_ckpt.storage.reader import TensorReader
from run_ckpt.storage.shards import TensorFolder, read_folder
from run_ckpt.storage.threads import map_threads
from run_ckpt.storage.views import all_rows, recorded_views, whole_views
from run_ckpt.tools.verify.files import file_faults, other_bytes, other_model, source_faults
from run_ckpt.tools.verify.original import Decoded, Original
from run_ckpt.tools.verify.outputs import output_faults
from run_ckpt.tools.verify.tensors import (
    Measured,
    code_faults,
    copy_fault,
    decoded_fault,
    fused_scale_fault,
    group_faults,
    measure,
    measured_faults,
    scale_faults,
    tensor_scale_faults,
)

Read = TypeVar("Read")


@dataclass(frozen=True)
class ComponentReport:
    """What was found in one component; ``measured`` is empty where no source was given.

    ``sqnr_db`` maps each layer to what was measured, or to what the manifest states where nothing was.
    """

    name: str
    n_files: int
    n_layers: int
    n_kept: int
    nbytes: int
    measured: tuple[Measured, ...]
    faults: tuple[str, ...]
    sqnr_db: Mapping[str, float | None] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values; what was measured of each layer is beside what the manifest states."""
        facts = {name: getattr(self, name) for name in ("name", "n_files", "n_layers", "n_kept", "nbytes")}
        layers = [
            {
                "module": measured.layer.module,
                "format": measured.layer.format.name,
                "sqnr_db": measured.sqnr_db,
                "stated_sqnr_db": measured.layer.sqnr_db,
                "max_abs_error": measured.max_abs_error,
            }
            for measured in self.measured
        ]
        return {**facts, "layers": layers, "faults": list(self.faults)}


def verify_output(
    output: Path,
    source: Path | None,
    progress: Progress,
    *,
    min_sqnr_db: float | None = None,
    expected: str | None = None,
    statistics: Path | None = None,
) -> list[ComponentReport]:
    """Return a report for every component of a conversion's result.

    source: folder, single file, or the pipeline folder of all components. It is only read.
    min_sqnr_db: a layer below it is a fault. expected: the result's hash as its publisher states it.
    statistics: what it was converted with, to measure output errors by; it needs ``source``.
    Raises CheckpointError only where there is nothing to look at, or another result than expected; all other faults
    are in the reports.
    """
    if statistics and not source:
        raise UsageError("--calibration DIR: goes with --source, as it takes the weights to measure what they lost.")
    for path in filter(None, (output, source, statistics)):
        if not path.exists():
            raise CheckpointError(f"{path}: no such file or folder{similar_path(path)}.")
    components = find_components(output)
    if source and not _is_result(output) and _is_result(source):
        raise UsageError(
            f"{source} is the result, and {output} none: write run-ckpt verify {source} --source {output}."
        )
    if expected is not None and result_hash(components) != expected.strip().lower():
        raise CheckpointError(
            f"{output}: its hash is {result_hash(components)}, expected is {expected}: it is another result, or was"
            " changed. Fetch it again from its publisher."
        )
    reports = []
    for name, path in components.items():
        part = source / name if source and name else source
        report = verify_component(name, path, part, progress, statistics)
        reports.append(replace(report, faults=(*report.faults, *_weak_layers(report, min_sqnr_db))))
    return reports


def _is_result(path: Path) -> bool:
    return any((part / MANIFEST_NAME).is_file() for part in find_components(path).values())


def _weak_layers(report: ComponentReport, min_sqnr_db: float | None) -> Iterator[str]:
    for module, sqnr_db in report.sqnr_db.items():
        if min_sqnr_db is not None and sqnr_db is not None and sqnr_db < min_sqnr_db:
            yield (
                f"{module}: SQNR is {sqnr_db:.2f} dB, under --min-sqnr {min_sqnr_db:g}. Convert with --calibration, or"
                " keep it by --ignore."
            )


def verdict(reports: list[ComponentReport]) -> str:
    """Return the result in one sentence."""
    n_faults = sum(len(report.faults) for report in reports)
    if n_faults:
        return f"{n_faults} fault{'s' if n_faults > 1 else ''} found: do not use this checkpoint."
    n_layers, n_kept, n_files = (sum(getattr(r, name) for r in reports) for name in ("n_layers", "n_kept", "n_files"))
    against = "source" if any(report.measured for report in reports) else "manifest"
    what = f"{n_layers} quantized and {n_kept} copied tensors in {n_files} files"
    return f"Verified {what} against the {against}: no fault."


def verify_component(
    name: str, path: Path, source_path: Path | None, progress: Progress, statistics: Path | None = None
) -> ComponentReport:
    """Return the report of one converted component."""
    faults: list[str] = []
    measured: list[Measured] = []
    manifest = _collect(faults, lambda: read_checked_manifest(path))
    if manifest is None:
        return ComponentReport(name, 0, 0, 0, 0, (), tuple(faults))
    nbytes = sum(entry["nbytes"] for entry in manifest.files.values())
    progress.start(_label("hash", name), nbytes)
    faults += file_faults(path, manifest.files, "the manifest", progress)
    faults += unlisted_faults(path, manifest)
    faults += config_faults(path, manifest)
    folder = _collect(faults, lambda: read_folder(path))
    if folder is not None:
        faults += header_faults(manifest, folder)
        faults += text_faults(folder)
        faults += index_faults(manifest, folder)
        with TensorReader(folder) as reader:
            checkpoint = Checkpoint(path, manifest, folder, reader)
            faults += _tensor_faults(name, checkpoint, progress)
            if source_path is not None:
                measured = _compare_source(name, checkpoint, source_path, statistics, faults, progress)
    sqnr_db = {layer.module: layer.sqnr_db for layer in manifest.layers.values()}
    sqnr_db |= {result.layer.module: result.sqnr_db for result in measured}
    counts = (len(manifest.files), len(manifest.layers), len(manifest.kept), nbytes)
    return ComponentReport(name, *counts, tuple(measured), tuple(faults), sqnr_db)


def _tensor_faults(name: str, checkpoint: Checkpoint, progress: Progress) -> Iterator[str]:
    """Yield the faults that tensors show without a source. Layers with wrong headers are passed over."""
    manifest, reader = checkpoint.manifest, checkpoint.reader
    layers = [layer for layer in manifest.layers.values() if _is_stored(reader, layer)]
    progress.start(
        _label("check", name), sum(layer.N * layer.K for layer in layers if layer.format.element.nan_magnitude)
    )
    for faults in map_threads(lambda layer: scale_faults(reader, layer) + code_faults(reader, layer, progress), layers):
        yield from faults
    if len(layers) == len(manifest.layers):
        yield from group_faults(reader, manifest)
        for fused in manifest.fused_scales.values():
            fault = fused_scale_fault(reader, manifest, fused) if reader.spec(fused.spec.name) == fused.spec else None
            if fault:
                yield fault


def _compare_source(
    name: str,
    checkpoint: Checkpoint,
    source_path: Path,
    statistics: Path | None,
    faults: list[str],
    progress: Progress,
) -> list[Measured]:
    """Append every difference from the source to ``faults``; return what was measured."""
    manifest, reader = checkpoint.manifest, checkpoint.reader
    source_folder = _collect(faults, lambda: read_folder(source_path), f"source {source_path.name}: ")
    if source_folder is None:
        return []
    progress.start(_label("hash source", name), sum(entry["nbytes"] for entry in manifest.source["files"].values()))
    quantized = _collect(faults, lambda: _read_quantized(source_path, source_folder), f"source {source_path.name}: ")
    if quantized is None:
        return []
    weights = {layer.source_tensor: layer for layer in quantized.layers.values()}
    stored = whole_views(source_folder)
    plain = quantized.plain_specs({view.spec.name: view.spec for view in stored})
    numbers = [replace(view, spec=plain[view.spec.name]) for view in stored if view.spec.name in plain]
    views = recorded_views(numbers, manifest.source.get("tensors"))
    parts = {view.spec.name: view.rows or (all_rows(view),) for view in views}
    encoded = {name: weights[rows[0].tensor] for name, rows in parts.items() if rows[0].tensor in weights}
    if another := other_model(manifest, source_path, views):
        faults.append(another)
        return []
    of_files = file_faults(source_folder.root, manifest.source["files"], "the manifest", progress)
    if len(of_files) == len(manifest.source["files"]):
        faults.append(other_bytes(manifest, source_path))
        return []
    faults += [f"source {fault}" for fault in of_files]
    faults += source_faults(manifest, checkpoint.folder, source_path, source_folder, views)
    copied_views = [view for view in views if view.spec.name not in encoded]
    with TensorReader(source_folder, copied_views) as source, TensorReader(source_folder) as codes:
        layers = [
            layer
            for layer in manifest.layers.values()
            if _is_stored(reader, layer) and (layer.source_tensor in encoded or _is_source(source, layer))
        ]
        kept = [kept.spec for kept in manifest.kept.values() if _both_hold(reader, source, kept.spec.name)]
        nbytes = sum(layer.N * layer.K * DTYPE_BITS[layer.source_dtype] // 8 for layer in layers)
        progress.start(_label("compare", name), nbytes + sum(spec.nbytes for spec in kept))
        fold_of = folds_by_tensor(manifest.folds)

        decoded = {name: Decoded(codes, layer, parts[name]) for name, layer in encoded.items()}

        def original(layer: Layer) -> Original:
            return Original(source, decoded.get(layer.source_tensor), fold_of.get(layer.source_tensor))

        measured = map_threads(lambda layer: measure(reader, original(layer), layer, progress), layers)
        if statistics:
            known = _collect(faults, lambda: read_statistics(find_statistics(statistics, name)))
            decided = layers if known is not None else []
            for found in map_threads(lambda layer: output_faults(reader, original(layer), layer, known or {}), decided):
                faults += found
        for result in measured:
            faults += measured_faults(result)
        if len(layers) == len(manifest.layers):
            faults += tensor_scale_faults(reader, measured)
        copied = map_threads(lambda spec: copy_fault(reader, source, spec.name, fold_of.get(spec.name), progress), kept)
        faults += [fault for fault in copied if fault]
        plain_now = [kept.spec for kept in manifest.kept.values() if reader.spec(kept.spec.name) == kept.spec]
        differing = map_threads(
            lambda spec: decoded_fault(reader, spec, decoded[spec.name], progress),
            [spec for spec in plain_now if spec.name in decoded],
        )
        faults += [fault for fault in differing if fault]
    return measured


def _read_quantized(path: Path, folder: TensorFolder) -> ForeignTensors:
    """Return what the tensors of a source are that may be quantized already."""
    config = (read_config(path) if path.is_dir() else None) or {}
    found = find_quantized(path, config, folder)
    return found[1] if found else ForeignTensors({})


def _collect(faults: list[str], read: Callable[[], Read], where: str = "") -> Read | None:
    """Return what ``read`` returns, or None with its faults, which are of ``where``, appended."""
    try:
        return read()
    except FaultsError as error:
        faults += [f"{where}{fault}" for fault in error.faults]
    except CheckpointError as error:
        faults.append(f"{where}{error}")
    return None


def _is_stored(reader: TensorReader, layer: Layer) -> bool:
    return all(reader.spec(spec.name) == spec for spec in layer.specs().values())


def _is_source(source: TensorReader, layer: Layer) -> bool:
    spec = source.spec(layer.source_tensor)
    return spec is not None and (spec.dtype, spec.shape) == (layer.source_dtype, (layer.N, layer.K))


def _both_hold(reader: TensorReader, source: TensorReader, name: str) -> bool:
    return source.spec(name) is not None and reader.spec(name) == source.spec(name)


def _label(step: str, name: str) -> str:
    return f"{step} {name}" if name else step
