"""Which format each linear layer gets: rules, shapes and fused groups; and the layers that follow from it."""

from collections.abc import Mapping
from dataclasses import replace

from convert_ckpt.options import Options
from convert_ckpt.plan.context import PlanContext, make_context
from convert_ckpt.plan.effect import check_effect
from convert_ckpt.plan.preset import GENERIC, find_preset, load_preset, tell_classes
from convert_ckpt.plan.recipe import (
    KEEP,
    NOTHING_CHOSEN,
    Decision,
    FusedGroup,
    Rule,
    close_over_groups,
    decide,
    edge_rules,
    find_fused_groups,
    ignore_rules,
    keep_rules,
    read_recipe,
    unmatched_rules,
)
from convert_ckpt.plan.shape_rules import linear_module
from convert_ckpt.source.component import Component
from run_ckpt.contract.decided_by import BOTH, RECIPE, SHAPE, TARGET, UNKNOWN_CLASS, DecidedBy
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.contract.foreign import is_stored_alike
from run_ckpt.contract.manifest import Layer
from run_ckpt.contract.module_names import split_name
from run_ckpt.contract.shape_limits import reason_to_keep


def choose_rules(source: Component, options: Options) -> tuple[PlanContext, list[Rule]]:
    """Return what is known of a source, and the rules for its layers, the first that matches wins.

    Raises UsageError for a recipe that can't be read, and where a pattern of the user matches nothing.
    """
    base, recipe_rules = read_recipe(options.recipe) if options.recipe else (None, [])
    check_effect(options, (rule.format for rule in recipe_rules if rule.format != KEEP))
    name = options.preset or base
    preset = load_preset(name) if name else find_preset(source.class_name)
    if preset.name == GENERIC and name is None:
        raise UsageError(_ask_for_preset(source))
    preset_from = "by --preset" if options.preset else "by the recipe" if base else "by its class"
    linears = {module: view.spec for view in source.views if (module := linear_module(view.spec))}
    edges = edge_rules(linears, options.keep_first, options.keep_last)
    rules = [*ignore_rules(options.ignore), *edges, *recipe_rules]
    missing = unmatched_rules(linears, rules)
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: matches no linear layer of {source.name}. A pattern is matched against"
            " the whole module name (tensor name without .weight), * standing for any characters;"
            " --dry-run lists the names."
        )
    context = make_context(source, options, preset, preset_from, linears)
    return context, [*rules, *_standing_rules(context)]


def decide_formats(
    context: PlanContext, rules: list[Rule], default_format: str, chosen: Mapping[str, Decision] = NOTHING_CHOSEN
) -> tuple[dict[str, Decision], tuple[FusedGroup, ...]]:
    """Return module -> decision, and the fused groups that are quantized.

    Layers that no rule names get what is ``chosen`` for them, else the default format. Raises UsageError for a recipe
    that splits a fused group.
    """
    decisions = decide(context.linears, rules, default_format, chosen)
    decisions = {module: _guarded(context, module, decision) for module, decision in decisions.items()}
    groups = find_fused_groups(context.linears, context.preset)
    decisions = close_over_groups(decisions, groups)
    return decisions, tuple(group for group in groups if decisions[group.members[0]].format != KEEP)


def make_layers(
    context: PlanContext, decisions: Mapping[str, Decision], groups: tuple[FusedGroup, ...], dialect: Dialect
) -> dict[str, Layer]:
    """Return module -> layer of all that are quantized."""
    group_of = {member: group.name for group in groups for member in group.members}
    layers = {}
    for module, decision in sorted(decisions.items()):
        if decision.format == KEEP:
            continue
        spec = context.linears[module]
        scheme = context.schemes[decision.format]
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
            n_stacked=context.source.n_stacked.get(spec.name),
        )
        encoded = context.source.encoded.get(spec.name)
        if encoded and is_stored_alike(encoded.layer, layers[module]):
            # Its scales are what they are. Only where a consumer takes one for all of a group do they have to be equal.
            group = group_of.get(module) if scheme.format.is_two_level else None
            layers[module] = replace(layers[module], scale_rule=encoded.layer.scale_rule, fused_group=group)
    return layers


def _standing_rules(context: PlanContext) -> list[Rule]:
    """Return what holds where the user says nothing: what the target can't run quantized, and what is sensitive."""
    reason = f"{context.target.title} builds it as a plain linear"
    plain = [module for module, name in context.names(context.linears).items() if name is None]
    sensitive = keep_rules(context.preset.keep, in_block=context.preset.name == GENERIC)
    kept_anyway = {module for rule in sensitive for module in rule.matching(plain)}
    return [
        *keep_rules(context.runtime.keep, TARGET),
        *(Rule(module, KEEP, reason, BOTH if module in kept_anyway else TARGET) for module in plain),
        *sensitive,
    ]


def _ask_for_preset(source: Component) -> str:
    unknown = f"no preset knows {source.class_name}" if source.class_name else f"no {CONFIG_NAME} says what class it is"
    told = {} if source.class_name else tell_classes([view.spec.name for view in source.views])
    if told:
        presets = set(told.values())
        is_one = len(presets) == 1
        classes = " or ".join(told if is_one else (f"{kind} (--preset {preset})" for kind, preset in told.items()))
        return (
            f"{source.name}: {unknown}. Its tensors are named as those of {classes}. Give a folder that holds its"
            f" {CONFIG_NAME} too, or add {f'--preset {presets.pop()}' if is_one else 'the preset of yours'}."
        )
    return (
        f"{source.name}: {unknown}, so nothing says which layers its runtime takes quantized. Add --preset {GENERIC}"
        " to quantize the linear layers of its numbered blocks, told by their names; try the result where it is served."
    )


def _guarded(context: PlanContext, module: str, decision: Decision) -> Decision:
    if decision.format == KEEP:
        return decision
    is_asked_for = decision.decided_by.by == RECIPE
    if context.preset.name == GENERIC and split_name(module)[1] is None and not is_asked_for:
        reason = "outside the numbered blocks, and no preset knows this class"
        return Decision(KEEP, reason, DecidedBy(UNKNOWN_CLASS))
    if module in context.swapped:
        return Decision(KEEP, "its halves change places, which only a copy can do", DecidedBy(SHAPE))
    if context.preset.dialect and context.linears[module].name not in context.source.n_stacked:
        reason = f"the {context.preset.dialect} dialect is that of experts alone"
        return Decision(KEEP, reason, DecidedBy(SHAPE))
    unfit = reason_to_keep(
        context.linears[module],
        context.schemes[decision.format],
        context.naming,
        allow_unaligned_k=context.options.allow_unaligned_k,
    )
    return Decision(KEEP, unfit, DecidedBy(SHAPE)) if unfit else decision
