"""--fold: smoothing, folded into the norm or the modulation before a layer where the model's graph allows it exactly.

d_k = sqrt(max |x_k| / max |W_nk|), the square root of SmoothQuant's ratio (alpha 0.5, Xiao et al., arXiv 2211.10438),
as a power of two.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from convert_ckpt.plan.calibration import Calibration
from convert_ckpt.plan.context import PlanContext
from convert_ckpt.plan.preset import FoldPattern
from run_ckpt.contract.folds import Fold, FoldedRows
from run_ckpt.contract.manifest import Layer
from run_ckpt.contract.module_names import fill_pattern, pattern_regex
from run_ckpt.contract.tensors import TensorSpec

# Of these dtypes a power of two takes nothing away, down to a range that no weight reaches.
_DTYPES = ("BF16", "F32")
# Against a channel that was next to zero in every sample.
_SMALLEST_EXPONENT = -16


@dataclass(frozen=True)
class FoundFolds:
    """``folds`` to carry out, and a sentence for each that the table allows, but not this checkpoint."""

    folds: tuple[Fold, ...] = ()
    refused: tuple[str, ...] = ()

    @property
    def notes(self) -> tuple[str, ...]:
        """What the plan says of them."""
        if not self.folds:
            return ()
        lora = "a LoRA that was trained on the source does not fit them"
        return (f"{len(self.folds)} inputs are smoothed by folds; {lora}", *self.refused)


def find_folds(context: PlanContext, layers: Mapping[str, Layer], calibration: Calibration) -> FoundFolds:
    """Return the folds of all layers that are quantized; none without --fold."""
    folds, refused = [], []
    specs = {view.spec.name: view.spec for view in context.source.views}
    for pattern in context.preset.folds if context.options.fold else ():
        if pattern.classes and context.source.class_name not in pattern.classes:
            continue
        for match in filter(None, map(pattern_regex(pattern.layers[0]).fullmatch, sorted(context.linears))):
            readers = tuple(fill_pattern(layer, match.groups()) for layer in pattern.layers)
            writer = fill_pattern(pattern.writer, match.groups())
            if not layers.keys() & set(readers):
                continue
            faults = list(_faults(pattern, readers, writer, specs, layers, calibration))
            if faults:
                refused.append(f"not folded into {writer}: {faults[0]}")
            else:
                exponents = _exponents(readers, calibration)
                writers = _writers(pattern, writer, len(exponents), specs)
                folds.append(Fold(exponents, writers, tuple(f"{name}.weight" for name in readers)))
    return FoundFolds(tuple(folds), tuple(refused))


def fold_faults(context: PlanContext, found: FoundFolds) -> list[str]:
    """Return a sentence if --fold was asked for and there is nothing to fold."""
    if not context.options.fold:
        return []
    if context.source.encoded:
        return ["--fold: the source is quantized already. Write it as numbers first: run-ckpt dequantize."]
    if found.folds:
        return []
    known = f"preset {context.preset.name} names none that is exact in {context.source.class_name or 'this model'}"
    return [f"--fold: nothing to fold: {found.refused[0] if found.refused else known}. Leave --fold out."]


def _faults(
    pattern: FoldPattern,
    readers: tuple[str, ...],
    writer: str,
    specs: Mapping[str, TensorSpec],
    layers: Mapping[str, Layer],
    calibration: Calibration,
) -> Iterator[str]:
    """Yield what stands against a fold."""
    tensors = [f"{name}.weight" for name in (*readers, writer)] + ([f"{writer}.bias"] if pattern.is_modulation else [])
    missing = [name for name in tensors if name not in specs]
    if missing:
        yield f"the checkpoint has no {missing[0]}"
        return
    if writer in layers:
        yield "it is quantized itself"
    K = specs[tensors[0]].shape[1]
    sizes = {specs[f"{name}.weight"].shape[1] for name in readers} | {specs[f"{writer}.weight"].shape[0]}
    if sizes != {K, K * pattern.n_chunks}:
        yield f"its rows and the columns of {', '.join(readers)} do not fit"
    if {specs[name].dtype for name in tensors} - {*_DTYPES}:
        yield f"only {' and '.join(_DTYPES)} can be folded exactly"
    for name in readers:
        statistics = calibration.statistics.get(name)
        others = statistics.layers.keys() - set(readers) if statistics else ()
        if statistics is None or not statistics.read("weight_amax").any():
            yield f"{calibration.name} holds no statistics of {name}, or none of its weight"
        elif others:
            yield f"{', '.join(sorted(others))} read what it writes, too"


def _exponents(readers: tuple[str, ...], calibration: Calibration) -> tuple[int, ...]:
    """Return e_k, none above 0. A channel that is always zero, or that no weight reads, gets the median."""
    inputs = {found.path: found for found in (calibration.statistics[name] for name in readers)}.values()
    amax, weight_amax = (np.max([found.read(name) for found in inputs], axis=0) for name in ("amax", "weight_amax"))
    alive = (amax > 0) & (weight_amax > 0)
    ratios = np.divide(amax, weight_amax, out=np.ones_like(amax), where=alive)
    # log2 of the square root, rounded: exact on every machine. frexp's exponent of 1 is 1.
    exponents = np.frexp(ratios)[1] // 2
    if alive.any():
        exponents[~alive] = int(np.median(exponents[alive]))
    return tuple(np.maximum(exponents - exponents.max(), _SMALLEST_EXPONENT).tolist())


def _writers(pattern: FoldPattern, writer: str, K: int, specs: Mapping[str, TensorSpec]) -> tuple[FoldedRows, ...]:
    tensors = [name for name in (f"{writer}.weight", f"{writer}.bias") if name in specs]
    return tuple(
        FoldedRows(name, chunk * K, plus_one=chunk == pattern.scale and name.endswith(".bias"))
        for name in tensors
        for chunk in pattern.chunks
    )
