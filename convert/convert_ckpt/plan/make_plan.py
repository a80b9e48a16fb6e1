"""The steps from a source and options to its plan: pure, before any byte of a tensor is read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from convert_ckpt.options import Options
from convert_ckpt.plan.calibration import (
    Calibration,
    calibration_faults,
    dropped_scales_note,
    experts_note,
    read_calibration,
)
from convert_ckpt.plan.context import PlanContext, find_dialect
from convert_ckpt.plan.decisions import choose_rules, decide_formats, make_layers
from convert_ckpt.plan.effect import idle_notes
from convert_ckpt.plan.files import make_files
from convert_ckpt.plan.folds import find_folds, fold_faults
from convert_ckpt.plan.plan import Plan, TensorPlan
from convert_ckpt.plan.recipe import KEEP, Decision, FusedGroup, Rule
from convert_ckpt.plan.shape_rules import WEIGHT_SUFFIX, linear_module, reason_not_linear
from convert_ckpt.plan.target_checks import judge_targets, target_faults, target_notes
from convert_ckpt.source.component import Component
from convert_ckpt.source.quantized import EncodedWeight
from run_ckpt.contract.decided_by import BUDGET, BY_KIND, EDGE, IGNORE
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.folds import Fold, folds_by_tensor
from run_ckpt.contract.foreign import is_stored_alike
from run_ckpt.contract.formats import BLOCK_FP8, PLAIN_NVFP4, TENSOR_FP8
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, FusedScale, KeptTensor, Layer, Manifest
from run_ckpt.contract.manifest_checks import repeated_names
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.version import VERSION

TOOL_NAME = "convert-ckpt"


# Who kept all layers -> what to do about it.
_TO_KEEP_LESS = {BUDGET: "Ask for less.", EDGE: "Keep fewer blocks.", IGNORE: "Ignore fewer layers."}
_RECIPE_INSTEAD = "Write a --recipe that says otherwise."


@dataclass(frozen=True)
class Chosen:
    """What a budget chose: module -> decision, and ``facts`` of the choice for the manifest."""

    decisions: Mapping[str, Decision] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)


def make_plan(source: Component, options: Options, chosen: Chosen = Chosen()) -> Plan:
    """Return the plan for one component.

    Raises UsageError for options that contradict each other or match nothing, FaultsError with
    every other fault.
    """
    context, rules = choose_rules(source, options)
    decisions, groups = decide_formats(context, rules, options.format, chosen.decisions)
    dialect = find_dialect(context, {decision.format for decision in decisions.values()})
    layers = make_layers(context, decisions, groups, dialect)
    calibration = read_calibration(context)
    faults = calibration_faults(calibration, source, layers)
    if calibration.static:
        layers = {module: _with_input_scale(layer) for module, layer in layers.items()}
    found = find_folds(context, layers, calibration)
    faults += fold_faults(context, found)
    scales = calibration.folded(found.folds).input_scales(layers) if not faults else {}
    tensors = _make_tensors(source, layers, decisions, calibration, found.folds)
    manifest = _make_manifest(context, rules, dialect.name, layers, tensors, {**chosen.facts, **calibration.facts})
    manifest = replace(manifest, folds=found.folds)
    repeated = _fused_scales(layers, groups)
    if _takes_fused_scales(context, manifest):
        manifest = replace(manifest, fused_scales=repeated)
    verdicts = judge_targets(context, manifest, has_fused_scales=bool(repeated))
    faults = [*target_faults(context, verdicts), *faults] if layers else [*faults, _nothing_to_convert(decisions)]
    faults += [
        f"{module}: is kept ({decisions[module].reason}), but all experts of such a model must be in MXFP4 to be read."
        for module in (name.removesuffix(WEIGHT_SUFFIX) for name in source.n_stacked)
        if module not in layers
    ]
    faults += [
        f"{name}: a tensor of the source has the name that a scale would get. Rename it, or keep its layer by --ignore."
        for name in repeated_names(manifest)
    ]
    if faults:
        raise FaultsError(f"{source.name}: can't be converted as asked", faults)
    manifest = replace(manifest, targets={name: verdict.reason for name, verdict in verdicts.items()})
    files = make_files(source, tensors, manifest, options.max_shard_nbytes)
    idle = idle_notes(options, layers, context.preset, source.class_name)
    dropped = (*dropped_scales_note(calibration, source), *experts_note(calibration, layers))
    warnings = (
        *source.notes,
        *_quantized_note(manifest),
        *dropped,
        *idle,
        *found.notes,
        *target_notes(context, verdicts),
    )
    statistics, unused = calibration.statistics, _unused(source)
    return Plan(tensors, files, manifest, scales, warnings, context.preset_from, statistics, unused)


def _nothing_to_convert(decisions: Mapping[str, Decision]) -> str:
    if not decisions:
        return "nothing to convert: it holds no 2-D weight of a linear layer."
    reasons = Counter(decision.reason for decision in decisions.values())
    listed = "; ".join(f"{count} for: {reason}" for reason, count in sorted(reasons.items()))
    deciders = {decision.decided_by.by for decision in decisions.values()}
    way = _TO_KEEP_LESS.get(deciders.pop(), _RECIPE_INSTEAD) if len(deciders) == 1 else _RECIPE_INSTEAD
    return f"nothing to convert: all {len(decisions)} linear layers are kept. {listed}. {way}"


def _takes_fused_scales(context: PlanContext, manifest: Manifest) -> bool:
    schemes = {layer.scheme for layer in manifest.layers.values()}
    reading = context.target.find_reading(
        context.kind, context.preset.name, context.source.class_name or "", manifest.dialect, schemes
    )
    return isinstance(reading, str) or reading.fused_scales is not False


def _with_input_scale(layer: Layer) -> Layer:
    return replace(layer, tensors={**layer.tensors, INPUT_SCALE: f"{layer.module}.{INPUT_SCALE}"})


def _make_tensors(
    source: Component,
    layers: Mapping[str, Layer],
    decisions: Mapping[str, Decision],
    calibration: Calibration,
    folds: tuple[Fold, ...],
) -> tuple[TensorPlan, ...]:
    tensors = []
    fold_of = folds_by_tensor(folds)
    for view in source.views:
        module = linear_module(view.spec)
        decision = decisions[module] if module else Decision(KEEP, reason_not_linear(view.spec), BY_KIND)
        layer = layers.get(module) if module else None
        encoded = source.encoded.get(view.spec.name)
        reason = _describe_codes(decision.reason, encoded, layer)
        fold = fold_of.get(view.spec.name)
        tensor = TensorPlan(view, layer, reason, decision.decided_by, None, fold, encoded)
        statistics = calibration.hessians.get(layer.module) if layer else None
        if statistics and not tensor.is_passed_through:
            tensor = replace(tensor, statistics=statistics)
        tensors.append(tensor)
    return tuple(tensors)


def _describe_codes(reason: str, encoded: EncodedWeight | None, layer: Layer | None) -> str:
    """Return the reason with what becomes of codes that are there already."""
    if encoded is None:
        return reason
    if layer and is_stored_alike(encoded.layer, layer):
        return f"{reason}; its {encoded.layer.format} codes stay as they are"
    return f"{reason}; decoded from {encoded.layer.format}"


def _make_manifest(
    context: PlanContext,
    rules: list[Rule],
    dialect: str,
    layers: dict[str, Layer],
    tensors: tuple[TensorPlan, ...],
    facts: Mapping[str, Any],
) -> Manifest:
    recipe = {
        **context.options.to_json(),
        "dialect": dialect,
        "preset": context.preset.name,
        "class_name": context.source.class_name,
        "naming": context.naming,
        "rules": [[rule.pattern, rule.format] for rule in rules if rule.by_user],
        **facts,
    }
    kept = {tensor.spec.name: tensor for tensor in tensors if tensor.layer is None}
    unquantized = {
        module: spec
        for module, spec in context.linears.items()
        if module not in layers and not context.preset.is_embedding(module)
    }
    return Manifest(
        tool={"name": TOOL_NAME, "version": VERSION},
        source={
            "name": context.source.name,
            "revision": context.source.revision,
            **_source_facts(context.source, tensors),
        },
        recipe=recipe,
        layers=layers,
        kept={name: KeptTensor(tensor.spec, tensor.reason, tensor.decided_by) for name, tensor in kept.items()},
        fused_scales={},
        unquantized_linears=context.names(unquantized),
    )


def _source_facts(source: Component, tensors: tuple[TensorPlan, ...]) -> dict[str, Any]:
    facts: dict[str, Any] = {"card": source.card} if source.card else {}
    facts |= {"tensors": source.translation.to_json()} if source.translation else {}
    if source.quantization:
        facts["quantized"] = {"by": source.quantization.by, "weights": _count_fates(tensors)}
    return facts


def _quantized_note(manifest: Manifest) -> tuple[str, ...]:
    """Say that a source is quantized already, what becomes of it, and what errors then are."""
    found = manifest.source.get("quantized")
    if not found:
        return ()
    fates = ", ".join(f"{fate}: {count}" for fate, count in found["weights"].items())
    is_new = any("requantized" in fate for fate in found["weights"])
    errors = "; errors are against what its codes stand for" if is_new else ""
    return (f"the source is quantized already ({found['by']}); weights {fates}{errors}",)


def _count_fates(tensors: tuple[TensorPlan, ...]) -> dict[str, int]:
    """Return how many weights of a source that is quantized already became what."""
    counts: Counter[str] = Counter()
    for tensor in tensors:
        if tensor.encoded:
            became = "passed through" if tensor.is_passed_through else "requantized" if tensor.layer else "decoded"
            counts[f"{tensor.encoded.layer.format} {became}"] += 1
    return dict(sorted(counts.items()))


def _unused(source: Component) -> tuple[TensorPlan, ...]:
    reasons = {f"no tensor of {source.class_name}": source.translation, "no part of a weight": source.quantization}
    return tuple(
        TensorPlan(view, None, reason, BY_KIND) for reason, seen in reasons.items() if seen for view in seen.unused
    )


def _fused_scales(layers: Mapping[str, Layer], groups: tuple[FusedGroup, ...]) -> dict[str, FusedScale]:
    """The scales that must also be on disk under the fused module's name (Z-Image)."""
    fused = {}
    for group in groups:
        members = [layers[name] for name in group.members]
        scheme = members[0].scheme
        is_repeated = scheme in (TENSOR_FP8, PLAIN_NVFP4) or (scheme == BLOCK_FP8 and group.pattern.block_scale)
        if not group.pattern.scale_name or not is_repeated:
            continue
        for role in members[0].tensors.keys() - {WEIGHT}:
            specs = [layer.specs()[role] for layer in members]
            suffix = specs[0].name.removeprefix(members[0].module)
            shape = (sum(spec.shape[0] for spec in specs), *specs[0].shape[1:])
            spec = TensorSpec(group.name + suffix, specs[0].dtype, shape)
            fused[spec.name] = FusedScale(spec, role, group.members)
    return fused
