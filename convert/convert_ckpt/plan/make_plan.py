"""The steps from a source and options to its plan: pure, before any byte of a tensor is read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from convert_ckpt.options import Options
from convert_ckpt.plan.calibration import Calibration, calibration_faults, read_calibration
from convert_ckpt.plan.context import PlanContext, find_dialect, make_context
from convert_ckpt.plan.plan import FilePlan, Plan, TensorPlan
from convert_ckpt.plan.preset import GENERIC, Preset, find_preset, load_preset
from convert_ckpt.plan.recipe import (
    KEEP,
    Decision,
    FusedGroup,
    Rule,
    close_over_groups,
    decide,
    find_fused_groups,
    ignore_rules,
    keep_rules,
    read_recipe,
    unmatched_rules,
)
from convert_ckpt.plan.shape_rules import linear_module, reason_not_linear
from convert_ckpt.plan.target_checks import judge_targets, target_faults, target_notes
from convert_ckpt.source.component import Component
from run_ckpt.contract.decided_by import BY_KIND, RECIPE, SHAPE, UNKNOWN_CLASS, DecidedBy
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.dialects.table import DIALECTS, header_metadata
from run_ckpt.contract.errors import FaultsError, UsageError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.contract.formats import BLOCK_FP8, PLAIN_NVFP4, TENSOR_FP8
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, FusedScale, KeptTensor, Layer, Manifest
from run_ckpt.contract.module_names import split_name
from run_ckpt.contract.shape_limits import reason_to_keep
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.header import build_header
from run_ckpt.version import VERSION

TOOL_NAME = "convert-ckpt"


def make_plan(source: Component, options: Options) -> Plan:
    """Return the plan for one component.

    Raises UsageError for options that contradict each other or match nothing, FaultsError with
    every other fault.
    """
    preset, rules = _choose_rules(source, options)
    specs = [tensor.spec for _, tensor in source.folder.tensors()]
    linears = {module: spec for spec in specs if (module := linear_module(spec))}
    context = make_context(source, options, preset, linears)
    decisions, groups = _decide(context, rules)
    dialect = find_dialect(context, decisions)
    layers = _make_layers(context, decisions, groups, dialect)
    calibration = read_calibration(context)
    faults = calibration_faults(calibration, source, layers)
    if calibration.static:
        layers = {module: _with_input_scale(layer) for module, layer in layers.items()}
    scales = calibration.input_scales(layers) if not faults else {}
    tensors = _make_tensors(source, layers, decisions, calibration)
    manifest = _make_manifest(context, rules, dialect.name, layers, tensors, groups)
    repeated = _fused_scales(layers, groups)
    if _takes_fused_scales(context, manifest):
        manifest = replace(manifest, fused_scales=repeated)
    verdicts = judge_targets(context, manifest, has_fused_scales=bool(repeated))
    faults = [*target_faults(context, verdicts), *faults] if layers else [*faults, _nothing_to_convert(decisions)]
    if faults:
        raise FaultsError(f"{source.name}: can't be converted as asked", faults)
    manifest = replace(manifest, targets={name: verdict.reason for name, verdict in verdicts.items()})
    files = _make_files(tensors, manifest)
    warnings = (*source.notes, *target_notes(context, verdicts))
    return Plan(tensors, files, manifest, scales, warnings)


def _nothing_to_convert(decisions: Mapping[str, Decision]) -> str:
    if not decisions:
        return "nothing to convert: it holds no 2-D weight of a linear layer."
    reasons = Counter(decision.reason for decision in decisions.values())
    listed = "; ".join(f"{count} for: {reason}" for reason, count in sorted(reasons.items()))
    kept = f"all {len(decisions)} linear layers are kept. {listed}"
    return f"nothing to convert: {kept}. Write a --recipe that says otherwise."


def _choose_rules(source: Component, options: Options) -> tuple[Preset, list[Rule]]:
    base, recipe_rules = read_recipe(options.recipe) if options.recipe else (None, [])
    name = options.preset or base
    preset = load_preset(name) if name else find_preset(source.class_name)
    if preset.name == GENERIC and name is None:
        raise UsageError(_ask_for_preset(source))
    return preset, [*ignore_rules(options.ignore), *recipe_rules]


def _ask_for_preset(source: Component) -> str:
    unknown = f"no preset knows {source.class_name}" if source.class_name else f"no {CONFIG_NAME} says what class it is"
    return (
        f"{source.name}: {unknown}, so nothing says which layers its runtime takes quantized. Add --preset {GENERIC}"
        " to quantize the linear layers of its numbered blocks, told by their names; try the result where it is served."
    )


def _decide(context: PlanContext, rules: list[Rule]) -> tuple[dict[str, Decision], tuple[FusedGroup, ...]]:
    missing = unmatched_rules(context.linears, rules)
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: matches no linear layer of {context.source.name}. A pattern is matched against"
            " the whole module name (tensor name without .weight), * standing for any characters;"
            " --dry-run lists the names."
        )
    decisions = decide(context.linears, [*rules, *_standing_rules(context)], context.options.format)
    decisions = {module: _guarded(context, module, decision) for module, decision in decisions.items()}
    groups = find_fused_groups(context.linears, context.preset)
    decisions = close_over_groups(decisions, groups)
    return decisions, tuple(group for group in groups if decisions[group.members[0]].format != KEEP)


def _standing_rules(context: PlanContext) -> list[Rule]:
    """Return what holds where the user says nothing: what the target can't run quantized, and what is sensitive."""
    reason = f"{context.target.title} builds it as a plain linear"
    plain = [module for module, name in context.names(context.linears).items() if name is None]
    return [
        *keep_rules(context.runtime.keep),
        *keep_rules(dict.fromkeys(plain, reason)),
        *keep_rules(context.preset.keep),
    ]


def _takes_fused_scales(context: PlanContext, manifest: Manifest) -> bool:
    schemes = {layer.scheme for layer in manifest.layers.values()}
    reading = context.target.find_reading(
        context.naming, context.preset.name, context.source.class_name or "", manifest.dialect, schemes
    )
    return isinstance(reading, str) or reading.fused_scales is not False


def _guarded(context: PlanContext, module: str, decision: Decision) -> Decision:
    if decision.format == KEEP:
        return decision
    is_asked_for = decision.decided_by.by == RECIPE
    if context.preset.name == GENERIC and split_name(module)[1] is None and not is_asked_for:
        reason = "outside the numbered blocks, and no preset knows this class"
        return Decision(KEEP, reason, DecidedBy(UNKNOWN_CLASS))
    unfit = reason_to_keep(
        context.linears[module],
        context.options.scheme(decision.format),
        context.naming,
        allow_unaligned_k=context.options.allow_unaligned_k,
    )
    return Decision(KEEP, unfit, DecidedBy(SHAPE)) if unfit else decision


def _make_layers(
    context: PlanContext, decisions: Mapping[str, Decision], groups: tuple[FusedGroup, ...], dialect: Dialect
) -> dict[str, Layer]:
    group_of = {member: group.name for group in groups for member in group.members}
    layers = {}
    for module, decision in sorted(decisions.items()):
        if decision.format == KEEP:
            continue
        spec = context.linears[module]
        scheme = context.options.scheme(decision.format)
        N, K = spec.shape
        layers[module] = Layer(
            module=module,
            scheme=scheme,
            N=N,
            K=K,
            source_tensor=spec.name,
            source_dtype=spec.dtype,
            scale_rule=scheme.format.scale_rule(context.options.scale_rule),
            tensors=dialect.tensor_names(module, scheme, context.naming),
            scale_shape=dialect.scale_shape(N, K, scheme),
            fused_group=group_of.get(module),
            decided_by=decision.decided_by,
        )
    return layers


def _with_input_scale(layer: Layer) -> Layer:
    return replace(layer, tensors={**layer.tensors, INPUT_SCALE: f"{layer.module}.{INPUT_SCALE}"})


def _make_tensors(
    source: Component, layers: Mapping[str, Layer], decisions: Mapping[str, Decision], calibration: Calibration
) -> tuple[TensorPlan, ...]:
    tensors = []
    for shard, stored in source.folder.tensors():
        module = linear_module(stored.spec)
        decision = decisions[module] if module else Decision(KEEP, reason_not_linear(stored.spec), BY_KIND)
        layer = layers.get(module) if module else None
        statistics = calibration.hessians.get(layer.module) if layer else None
        tensors.append(TensorPlan(shard.name, stored, layer, decision.reason, decision.decided_by, statistics))
    return tuple(tensors)


def _make_manifest(
    context: PlanContext,
    rules: list[Rule],
    dialect: str,
    layers: dict[str, Layer],
    tensors: tuple[TensorPlan, ...],
    groups: tuple[FusedGroup, ...],
) -> Manifest:
    recipe = {
        **context.options.to_json(),
        "dialect": dialect,
        "preset": context.preset.name,
        "class_name": context.source.class_name,
        "naming": context.naming,
        "rules": [[rule.pattern, rule.format] for rule in rules if rule.by_user],
    }
    kept = {tensor.spec.name: tensor for tensor in tensors if tensor.layer is None}
    unquantized = {
        module: spec
        for module, spec in context.linears.items()
        if module not in layers and not context.preset.is_embedding(module)
    }
    return Manifest(
        tool={"name": TOOL_NAME, "version": VERSION},
        source={"name": context.source.name, "revision": context.source.revision, **_card(context.source)},
        recipe=recipe,
        layers=layers,
        kept={name: KeptTensor(tensor.spec, tensor.reason, tensor.decided_by) for name, tensor in kept.items()},
        fused_scales={},
        unquantized_linears=context.names(unquantized),
    )


def _card(source: Component) -> dict[str, Any]:
    return {"card": source.card} if source.card else {}


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


def _make_files(tensors: tuple[TensorPlan, ...], manifest: Manifest) -> tuple[FilePlan, ...]:
    """One output shard per source shard, or a single file where the dialect wants one."""
    outputs: dict[str, list[TensorSpec]] = {}
    shard_of: dict[str, str] = {}
    for tensor in tensors:
        specs = outputs.setdefault(tensor.shard, [])
        specs += tensor.layer.specs().values() if tensor.layer else [tensor.spec]
        if tensor.layer:
            shard_of[tensor.layer.module] = tensor.shard
    for fused in manifest.fused_scales.values():
        outputs[shard_of[fused.members[0]]].append(fused.spec)
    metadata = header_metadata(manifest)
    file_name = DIALECTS[manifest.dialect].file_name
    if file_name:
        merged = [spec for specs in outputs.values() for spec in specs]
        return (FilePlan(file_name, build_header(merged, metadata), tuple(outputs)),)
    return tuple(FilePlan(name, build_header(specs, metadata), (name,)) for name, specs in outputs.items())
