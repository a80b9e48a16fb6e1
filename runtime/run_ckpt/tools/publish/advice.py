"""What the figures of a result mean and what to do next: whether they are usual, what is kept, what would change it."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean

from run_ckpt.contract.kept import kept_groups
from run_ckpt.contract.manifest import GPTQ, Layer
from run_ckpt.contract.tensors import DTYPE_BITS
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.publish.rows import ConvertedComponent

# (format, scale rule) -> SQNR in dB of weights that are N(0, 1), which a test measures again.
GAUSSIAN_SQNR_DB = {
    ("mxfp4", "even"): 19.0,
    ("mxfp4", "floor"): 18.8,
    ("mxfp4", "roundup"): 18.75,
    ("mxfp4", "mse"): 19.0,
    ("nvfp4", "amax_over_6"): 20.4,
    ("mxfp8", "roundup"): 31.5,
    ("mxfp8", "floor"): 30.7,
    ("fp8", "amax_over_448"): 31.5,
}
# Trained weights are near enough to normal that most layers lie within this.
_USUAL_WITHIN_DB = 1.0
# As many as a reader checks one by one.
_N_WEAKEST = 3
# Less than this, of the result's bytes or of its worst SQNR, is not worth an advice.
_LEAST_SHARE = 0.01
_LEAST_GAIN_DB = 0.1


@dataclass(frozen=True)
class Advice:
    """Something to do: ``what``, and ``recipe``, the text to copy for it, "" where it is an option."""

    what: str
    recipe: str = ""


def usual_lines(components: Sequence[ConvertedComponent]) -> Iterator[str]:
    """Yield for each format whether its SQNR is what weights of a normal distribution have."""
    by_kind: dict[tuple[str, str], list[Layer]] = {}
    for component in components:
        for layer in component.manifest.layers.values():
            if layer.sqnr_db is not None:
                by_kind.setdefault((layer.format.name, layer.scale_rule), []).append(layer)
    for kind, layers in sorted(by_kind.items()):
        if kind in GAUSSIAN_SQNR_DB:
            yield _usual_line(kind[0], GAUSSIAN_SQNR_DB[kind], layers)


def kept_lines(components: Sequence[ConvertedComponent]) -> Iterator[str]:
    """Yield for each reason what is kept, in how many bytes, and what would change it."""
    for component in components:
        for group in kept_groups(component.manifest):
            what = ("linear layer" if group.is_linear else "tensor") + ("s" if group.n_tensors > 1 else "")
            saved = f"; {group.remedy} saves {format_nbytes(group.saved_nbytes)}" if group.remedy else ""
            where = f"{component.name}: " if component.name else ""
            yield f"{where}{group.n_tensors} {what}, {format_nbytes(group.nbytes)}: {group.reason}{saved}"


def list_advice(components: Sequence[ConvertedComponent]) -> list[Advice]:
    """Return what would make the result better or smaller, with what each costs or saves."""
    found = [*_keep_weakest(components)]
    for component in components:
        where = f"{component.name}: " if component.name else ""
        found += [
            Advice(f"{where}{group.remedy} saves {format_nbytes(group.saved_nbytes)}: {group.reason}")
            for group in kept_groups(component.manifest)
            if group.saved_nbytes > _LEAST_SHARE * component.summary.output_nbytes
        ]
    return found


def _usual_line(name: str, usual_db: float, layers: list[Layer]) -> str:
    mean = fmean(layer.sqnr_db or 0.0 for layer in layers)
    figure = f"{name}: {mean:.2f} dB on average, where normally distributed weights have {usual_db:g}"
    n_gptq = sum(layer.method == GPTQ for layer in layers)
    if n_gptq:
        return f"{figure}: GPTQ moved {n_gptq} layers away from their weights for the sake of their outputs"
    weak = [layer for layer in layers if (layer.sqnr_db or 0.0) < usual_db - _USUAL_WITHIN_DB]
    if weak:
        return f"{figure}: {len(weak)} of {len(layers)} layers are over {_USUAL_WITHIN_DB:g} dB under it, by outliers"
    return f"{figure}: normal"


def _keep_weakest(components: Sequence[ConvertedComponent]) -> Iterator[Advice]:
    """Yield the advice to keep the weakest layers, those that are fused at load together."""
    groups: dict[tuple[str, str], list[Layer]] = {}
    for component in components:
        for layer in component.manifest.layers.values():
            if layer.sqnr_db is not None:
                groups.setdefault((component.name, layer.fused_group or layer.module), []).append(layer)
    ranked = sorted(groups.items(), key=lambda item: _worst(item[1]))
    weakest, rest = ranked[:_N_WEAKEST], ranked[_N_WEAKEST:]
    if not rest or _worst(rest[0][1]) < _worst(weakest[0][1]) + _LEAST_GAIN_DB:
        return
    layers = [layer for _, members in weakest for layer in members]
    cost = sum(_source_nbytes(layer) - sum(spec.nbytes for spec in layer.specs().values()) for layer in layers)
    rules = [f'[[rules]]\nmatch = {json.dumps(layer.module)}\nformat = "keep"' for layer in layers]
    what = f"these {len(layers)}" if len(layers) > 1 else "this one"
    worst = f"worst {_worst(weakest[0][1]):.2f} -> {_worst(rest[0][1]):.2f} dB"
    yield Advice(f"Keep {what}: +{format_nbytes(cost)}, {worst}", "\n".join(rules))


def _worst(layers: list[Layer]) -> float:
    return min(layer.sqnr_db or 0.0 for layer in layers)


def _source_nbytes(layer: Layer) -> int:
    return layer.N * layer.K * DTYPE_BITS[layer.source_dtype] // 8
