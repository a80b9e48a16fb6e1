"""--calibration: what is known of the layers' inputs.

Either a folder of statistics (storage.layer_statistics), or a file of ranges: safetensors with ``<layer>.input_amax``
F32, or ModelOpt's backbone.pt (storage.modelopt).
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from convert_ckpt.plan.context import PlanContext
from convert_ckpt.plan.runtime_names import runtime_names
from convert_ckpt.source.component import Component
from run_ckpt.contract.errors import CheckpointError, MissingPackageError, UsageError
from run_ckpt.contract.file_names import SUFFIX
from run_ckpt.contract.folds import Fold
from run_ckpt.contract.formats import E4M3_MAX
from run_ckpt.contract.manifest import GPTQ, INPUT_SCALE, Layer
from run_ckpt.contract.module_names import has_experts
from run_ckpt.storage.files import open_to_read
from run_ckpt.storage.hashing import hash_parts, hash_path
from run_ckpt.storage.header import read_header
from run_ckpt.storage.layer_statistics import InputStatistics, find_statistics, read_statistics
from run_ckpt.storage.modelopt import AMAX, MODELOPT_SUFFIXES, read_modelopt_ranges
from run_ckpt.storage.read_part import as_stored

_SUFFIX = ".input_amax"
# Of the largest |input| that was seen. Room above costs a floating-point format next to nothing, clipping does not.
_HEADROOM = 1.5
_OF_SOURCE = "the source"
# What ComfyUI writes where it has none.
_NO_SCALE = 1.0


@dataclass(frozen=True)
class Calibration:
    """What was given, by module: ``ranges``, the largest |input| that a scale must reach, and ``statistics``.

    ``static`` asks for input scales, ``gptq`` for codes that the statistics choose. ``digest`` tells what was given
    from others: the plan's numbers don't, as codes are chosen in the run.
    """

    name: str = ""
    ranges: Mapping[str, float] = field(default_factory=dict)
    statistics: Mapping[str, InputStatistics] = field(default_factory=dict)
    static: bool = False
    gptq: bool = False
    digest: str = ""

    @property
    def hessians(self) -> Mapping[str, InputStatistics]:
        """The statistics by which codes are chosen."""
        return self.statistics if self.gptq else {}

    @property
    def facts(self) -> dict[str, Any]:
        """What a recipe in a manifest says of it: its hash, and the settings with which statistics were recorded."""
        found = next(iter(self.statistics.values()), None)
        settings = {"calibrated_with": dict(found.settings)} if found else {}
        return settings | ({"calibration_blake3": self.digest} if self.digest else {})

    def folded(self, folds: Iterable[Fold]) -> "Calibration":
        """Return it with the ranges that inputs have after these folds."""
        ranges = dict(self.ranges)
        for fold in folds:
            for module in (name.removesuffix(".weight") for name in fold.readers):
                if module in ranges:
                    amax = np.ldexp(self.statistics[module].read("amax"), -np.array(fold.exponents))
                    ranges[module] = float(np.float32(_HEADROOM * float(amax.max())))
        return replace(self, ranges=ranges)

    def input_scales(self, layers: Mapping[str, Layer]) -> dict[str, np.float32]:
        """Return module -> range / 448 in float32, one value within a fused group (its largest); {} if not static."""
        if not self.static:
            return {}
        largest: dict[str, float] = {}
        for module, layer in layers.items():
            group = layer.fused_group or module
            largest[group] = max(largest.get(group, 0.0), self.ranges[module])
        return {module: np.float32(largest[layer.fused_group or module] / E4M3_MAX) for module, layer in layers.items()}


def read_calibration(context: PlanContext) -> Calibration:
    """Return what --calibration holds for a component; nothing where it was not given. Raises UsageError."""
    options = context.options
    path = options.calibration
    if path is None:
        return Calibration(_OF_SOURCE, _source_ranges(context.source), static=True) if options.static else Calibration()
    try:
        if not options.has_statistics:
            read = _modelopt_ranges if path.suffix in MODELOPT_SUFFIXES else _read_ranges
            return Calibration(path.name, read(path, context), static=True, digest=calibration_digest(path))
        folder = find_statistics(path, context.source.name)
        statistics = read_statistics(folder)
    except MissingPackageError:
        raise
    except (OSError, CheckpointError) as error:
        raise UsageError(f"--calibration {path}: {error}") from error
    ranges = {module: float(np.float32(_HEADROOM * found.amax)) for module, found in statistics.items()}
    gptq = options.method == GPTQ or (options.method is None and all(found.block_size for found in statistics.values()))
    if not gptq and not options.static and not options.fold:
        raise UsageError(
            f"--calibration {path}: without --method {GPTQ}, which needs correlations, it decides nothing unless"
            " --static asks for activation scales, or --fold for smoothing."
        )
    return Calibration(path.name, ranges, statistics, options.static, gptq, calibration_digest(path))


def dropped_scales_note(calibration: Calibration, source: Component) -> tuple[str, ...]:
    """Return a note where a source has static activation scales that its result will not have."""
    names = [
        weight.parts[INPUT_SCALE][1].spec.name for weight in source.encoded.values() if INPUT_SCALE in weight.parts
    ]
    if calibration.static or not any(name.endswith(f".{INPUT_SCALE}") for name in names):
        return ()
    return ("the source's static activation scales are left out; --format fp8 --static carries them over",)


def calibration_faults(calibration: Calibration, source: Component, layers: Mapping[str, Layer]) -> list[str]:
    """Return a sentence for every quantized layer of which too little is known, or something of another layer."""
    faults: list[str] = []
    for module, layer in layers.items():
        if calibration.static and not calibration.statistics:
            faults += _range_faults(calibration, module)
        elif calibration.name:
            found = calibration.statistics.get(module)
            if found is None and has_experts([module]) and not calibration.static:
                continue
            advice = "Calibrate it or --ignore it."
            missing = f"{module}: {calibration.name} holds no statistics of it. {advice}"
            faults += _statistics_faults(calibration, source, layer, found) if found else [missing]
    return faults


def experts_note(calibration: Calibration, layers: Mapping[str, Layer]) -> tuple[str, ...]:
    """Return a note where experts have no statistics: transformers 5 runs them as no linear layers of their own."""
    missing = [module for module in layers if has_experts([module]) and module not in calibration.statistics]
    if not (calibration.gptq and missing):
        return ()
    return (f"{len(missing)} linear layers of experts have no statistics: their codes are rounded to nearest",)


def calibration_digest(path: Path) -> str:
    """Return a hash of a file of ranges, or of what tells a folder of statistics from others."""
    if path.is_file():
        return hash_path(path)
    return hash_parts(part for file in sorted(path.rglob("*" + SUFFIX)) for part in _telling_parts(file))


def _telling_parts(file: Path) -> Iterator[bytes]:
    """Yield the header and all but the correlations, as no others go with the same diagonals."""
    header = read_header(file)
    yield header.data
    with open(open_to_read(file), "rb") as opened:
        for tensor in header.tensors:
            if tensor.spec.dtype == "F32":
                opened.seek(tensor.offset)
                yield opened.read(tensor.spec.nbytes)


def _range_faults(calibration: Calibration, module: str) -> Iterator[str]:
    amax = calibration.ranges.get(module)
    if amax is None:
        suffix = AMAX if Path(calibration.name).suffix in MODELOPT_SUFFIXES else _SUFFIX
        suffix = f".{INPUT_SCALE}" if calibration.name == _OF_SOURCE else suffix
        yield f"{module}: {calibration.name} holds no {module}{suffix}. Calibrate it or --ignore it."
    elif not _is_scalable(amax):
        yield f"{module}: {calibration.name} says that its largest input is {amax}, not a positive number with a scale."


def _is_scalable(amax: float) -> bool:
    """True where amax / 448 is a float32 that GPUs don't take for zero."""
    return float(np.finfo(np.float32).tiny) * E4M3_MAX <= amax <= float(np.finfo(np.float32).max)


def _statistics_faults(
    calibration: Calibration, source: Component, layer: Layer, found: InputStatistics
) -> Iterator[str]:
    shape, model = [found.layers[layer.module].N, found.K], source.class_name
    if shape != [layer.N, layer.K] or model not in (None, found.model):
        yield (
            f"{layer.module}: the statistics are of {found.model}, {shape}, the weight is of {model or 'no class'},"
            f" {[layer.N, layer.K]}. Calibrate this model."
        )
    if calibration.gptq and not found.block_size:
        yield f"{layer.module}: {found.path.name} holds no correlations. Record them, or use --method rtn --static."
    if calibration.static and not _is_scalable(calibration.ranges[layer.module]):
        yield f"{layer.module}: the range of its input is {found.amax}. Use more samples, or --ignore it."


def _source_ranges(source: Component) -> dict[str, float]:
    """Return module -> largest input by the static scale that a source has beside its codes. Raises UsageError."""
    paths = {shard.name: shard.path for shard in source.folder.shards}
    ranges = {}
    for name, weight in source.encoded.items():
        if INPUT_SCALE in weight.parts:
            shard, stored = weight.parts[INPUT_SCALE]
            data = np.fromfile(paths[shard], np.uint8, stored.spec.nbytes, offset=stored.offset)
            scale = float(as_stored(data, stored.spec.dtype).flat[0])
            if scale != _NO_SCALE:
                ranges[name.removesuffix(".weight")] = scale * E4M3_MAX
    if not ranges:
        raise UsageError(
            "--static: needs --calibration DIR, the statistics that run-ckpt calibrate records, or a source with"
            " static scales of its own."
        )
    return ranges


def _modelopt_ranges(path: Path, context: PlanContext) -> dict[str, float]:
    """Return module -> largest input. The file names layers as the checkpoint does, or as the model's own code does.

    The latter's names are SGLang's, in which layers may be fused (double_blocks.0.img_attn_qkv of HunyuanVideo); all
    but the outermost module, and each container numbered from 0.
    """
    found = read_modelopt_ranges(path)
    ranges = {}
    runtime = replace(context.preset.runtime("sglang"), index_follows={})
    for module, prefix in runtime_names(context.linears, runtime, context.linears).items():
        names = (module, prefix or module, (prefix or "").partition(".")[2])
        name = next((name for name in names if name in found), None)
        if name is None:
            continue
        K = context.linears[module].shape[1]
        if found[name].K not in (K, None):
            raise UsageError(f"{name}: its weight has K = {found[name].K}, {module} has {K}. Calibrate this model.")
        ranges[module] = found[name].amax
    return ranges


def _read_ranges(path: Path, _context: PlanContext) -> dict[str, float]:
    header = read_header(path)
    ranges = {}
    with open(open_to_read(path), "rb") as file:
        for tensor in header.tensors:
            if not tensor.spec.name.endswith(_SUFFIX) or tensor.spec.dtype != "F32" or tensor.spec.nbytes != 4:
                raise UsageError(
                    f"{path.name}: {tensor.spec.name}: expected one F32 value named <layer>{_SUFFIX},"
                    f" found {tensor.spec.dtype} {list(tensor.spec.shape)}."
                )
            file.seek(tensor.offset)
            ranges[tensor.spec.name.removesuffix(_SUFFIX)] = float(np.frombuffer(file.read(4), "<f4")[0])
    return ranges
