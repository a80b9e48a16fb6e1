"""`run-ckpt explain`: what became of a tensor, who decided it, and what would change it; from the manifest alone."""

import difflib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from run_ckpt.contract import decided_by as words
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.kept import remedies
from run_ckpt.contract.manifest import GPTQ, KeptTensor, Layer, Manifest
from run_ckpt.contract.module_names import block_pattern
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.publish.rows import ConvertedComponent, TensorRow

_N_NEAREST = 3


@dataclass(frozen=True)
class Explanation:
    """One tensor, or ``count`` of like blocks ("*") of which the others come out alike.

    ``changes``: what would make it come out otherwise. ``sqnr_db`` is the worst, None where it is not quantized.
    """

    name: str
    count: int
    shape: tuple[int, ...]
    source: str
    stored: str
    source_nbytes: int
    nbytes: int
    decided_by: str
    changes: tuple[str, ...]
    fused_with: tuple[str, ...]
    sqnr_db: float | None
    max_abs_error: float | None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def explain(components: Sequence[ConvertedComponent], name: str) -> list[Explanation]:
    """Return what became of the layer or tensor ``name``; of all blocks where it has * for their number.

    Raises UsageError where there is none, with the nearest names.
    """
    found: dict[tuple[object, ...], list[Explanation]] = {}
    for component in components:
        for row in component.rows:
            if name in (row.name, row.path, row.kind, f"{row.name}.weight", f"{row.path}.weight"):
                one = _explain(component.manifest, row)
                found.setdefault((row.kind, one.stored, block_pattern(one.decided_by)), []).append(one)
    if not found:
        raise UsageError(
            f"{name}: no such layer or tensor.{_nearest(components, name)} run-ckpt inspect lists them all."
        )
    return [_merge(members) for members in found.values()]


def _explain(manifest: Manifest, row: TensorRow) -> Explanation:
    stored = manifest.layers[row.name] if row.is_quantized else manifest.kept[_tensor_name(row)]
    layer = stored if isinstance(stored, Layer) else None
    return Explanation(
        name=row.path,
        count=1,
        shape=row.shape,
        source=layer.source_dtype if layer else row.stored_as,
        stored=_how_stored(layer) if layer else row.stored_as,
        source_nbytes=row.source_nbytes,
        nbytes=row.output_nbytes,
        decided_by=_decider(manifest, stored),
        changes=tuple(_changes(manifest, row, stored)),
        fused_with=tuple(_fused_with(manifest, layer)) if layer else (),
        sqnr_db=row.sqnr_db,
        max_abs_error=row.max_abs_error,
    )


def _fused_with(manifest: Manifest, layer: Layer) -> Iterator[str]:
    for other in manifest.layers.values():
        if layer.fused_group and other.fused_group == layer.fused_group and other.module != layer.module:
            yield other.module


def _tensor_name(row: TensorRow) -> str:
    return f"{row.name}.weight" if row.is_linear else row.name


def _how_stored(layer: Layer) -> str:
    choices = {
        "layout": (layer.scheme.layout, layer.format.layouts),
        "granularity": (layer.scheme.granularity, layer.format.blocks),
        "scale rule": (layer.scale_rule, layer.format.scale_rules),
    }
    chosen = [f"{what} {value}" for what, (value, possible) in choices.items() if len(possible) > 1]
    return ", ".join([layer.format.name, *chosen, *(["codes by GPTQ"] if layer.method == GPTQ else [])])


def _decider(manifest: Manifest, stored: Layer | KeptTensor) -> str:
    """Return the sentence about who decided it."""
    recipe, decided = manifest.recipe, stored.decided_by
    reason = stored.reason if isinstance(stored, KeptTensor) else ""
    return {
        words.FORMAT: f"--format {recipe['format']}, as no rule says otherwise",
        words.IGNORE: f"--ignore {decided.rule}",
        words.RECIPE: f"the rule {decided.rule} of {recipe['recipe']}" + (f": {reason}" if reason else ""),
        words.PRESET: f"the rule {decided.rule} of preset {recipe['preset']}: {reason}",
        words.TARGET: reason,
        words.BOTH: f"the rule {decided.rule} of preset {recipe['preset']}, and the target: {reason}",
        words.SHAPE: f"its shape: {reason}",
        words.UNKNOWN_CLASS: reason,
        words.FUSED: reason,
        words.EDGE: f"{reason}: {decided.rule}",
        words.BUDGET: f"{decided.rule}, by {recipe.get('budget', {}).get('by')}",
        words.NOT_LINEAR: "it is no 2-D weight of a linear layer",
    }[decided.by]


def _changes(manifest: Manifest, row: TensorRow, stored: Layer | KeptTensor) -> Iterator[str]:
    if isinstance(stored, Layer):
        if stored.n_stacked:  # all of the model are read in this format, or as numbers
            yield f"nothing does: a {manifest.recipe.get('class_name')} is read with all experts in this format alone"
            return
        yield f"--ignore {shlex.quote(row.name)} keeps it"
        yield "a rule in a --recipe gives it another format"
        return
    for remedy in remedies(stored, manifest.recipe):
        yield f"{remedy.what} saves {format_nbytes(remedy.saved_nbytes)}"


def _merge(members: list[Explanation]) -> Explanation:
    """Return one for all: the sums of the bytes, the worst of the errors."""
    if len(members) == 1:
        return members[0]
    first = members[0]
    return replace(
        first,
        name=block_pattern(first.name),
        count=len(members),
        source_nbytes=sum(one.source_nbytes for one in members),
        nbytes=sum(one.nbytes for one in members),
        fused_with=tuple(map(block_pattern, first.fused_with)),
        changes=tuple(map(block_pattern, first.changes)),
        sqnr_db=min((one.sqnr_db for one in members if one.sqnr_db is not None), default=None),
        max_abs_error=max((one.max_abs_error for one in members if one.max_abs_error is not None), default=None),
    )


def _nearest(components: Sequence[ConvertedComponent], name: str) -> str:
    names = [row.path for component in components for row in component.rows]
    near = difflib.get_close_matches(name, names, _N_NEAREST)
    return f" Nearest: {', '.join(near)}." if near else ""
