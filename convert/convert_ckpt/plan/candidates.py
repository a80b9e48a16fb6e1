"""What a budget may choose from: groups of layers that are stored alike, and the damage that each format does."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from convert_ckpt.options import Options
from convert_ckpt.plan.context import PlanContext, find_dialect
from convert_ckpt.plan.decisions import choose_rules, decide_formats, make_layers
from convert_ckpt.plan.policy import Choice
from convert_ckpt.plan.recipe import KEEP, find_fused_groups
from convert_ckpt.source.component import Component
from run_ckpt.contract.decided_by import BY_FORMAT
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import FORMATS
from run_ckpt.contract.manifest import Layer


@dataclass(frozen=True)
class Group:
    """Layers of a component that get one format. ``layers`` maps a format to what the members would be then.

    They may also stay as they are, ``source_nbytes`` all together, where ``can_stay``.
    """

    component: str
    members: tuple[str, ...]
    layers: Mapping[str, tuple[Layer, ...]]
    source_nbytes: int
    can_stay: bool = True

    @property
    def formats(self) -> tuple[str, ...]:
        """All that it may become."""
        return (*self.layers, KEEP) if self.can_stay else tuple(self.layers)

    def nbytes(self, format_name: str) -> int:
        """Return the size of all tensors of the group in a format."""
        if format_name == KEEP:
            return self.source_nbytes
        return sum(spec.nbytes for layer in self.layers[format_name] for spec in layer.specs().values())

    @property
    def smallest(self) -> str:
        """The format of the fewest bytes."""
        return min(self.formats, key=self.nbytes)


@dataclass(frozen=True)
class Damage:
    """What a layer loses in a format: a squared error, beside the squared signal."""

    error: float
    signal: float


@dataclass(frozen=True)
class Prediction:
    """The damage of each group in each of its formats, in one unit: 1 is as much noise as signal.

    ``by`` says what predicted it, ``of_what`` whose SQNR a sum of damages gives.
    """

    by: str
    of_what: str
    damages: Sequence[Mapping[str, float]]


def list_groups(name: str, source: Component, options: Options) -> list[Group]:
    """Return the groups of a component for which no rule decides. Raises UsageError, as a plan does."""
    context, rules = choose_rules(source, options)
    formats = _candidate_formats(context)
    dialect = find_dialect(context, formats)
    decisions, layers = {}, {}
    for candidate in formats:
        decisions[candidate], fused = decide_formats(context, rules, candidate)
        layers[candidate] = make_layers(context, decisions[candidate], fused, dialect)
    cast = _cast_at_load(context, dialect, formats)
    units = [group.members for group in find_fused_groups(context.linears, context.preset)]
    in_units = {member for members in units for member in members}
    units += [(module,) for module in context.linears if module not in in_units]
    groups = []
    for members in units:
        able = {
            candidate: tuple(layers[candidate][member] for member in members)
            for candidate in formats
            if all(decisions[candidate][member].decided_by == BY_FORMAT for member in members)
        }
        nbytes = sum(context.linears[member].nbytes for member in members)
        group = Group(name, members, able, nbytes, can_stay=cast.isdisjoint(members))
        if able and len(group.formats) > 1:
            groups.append(group)
    return groups


# What predicts damages, and of what sums of them are the noise. Errors of weights count relative to the weights, as
# norms take the scale of a layer out of what it does to the model's output: absolute ones order layers worse.
WEIGHTS = ("relative error of the weights", "the weights, mean of the layers")
OUTPUTS = ("output error of the layers on held out samples", "the layers' outputs, all together")
FISHER = (
    "errors of layers' weights and activations on held out samples times Fisher information",
    "the model's output, activations rounded as weights are",
)


def predict(
    proxy: tuple[str, str], groups: Sequence[Group], measured: Mapping[str, Mapping[str, Mapping[str, Damage]]]
) -> Prediction:
    """Return damages of groups from those of their layers.

    measured: component -> layer -> format -> damage: of its weights, its output, or by it of the model's output.
    """
    found = [[measured[group.component][member] for member in group.members] for group in groups]
    layers = [layer for members in found for layer in members]
    total = math.fsum(next(iter(layer.values())).signal for layer in layers)

    def part(damage: Damage) -> float:
        if proxy == WEIGHTS:
            return damage.error / damage.signal / len(layers) if damage.signal else 0.0
        return damage.error if proxy == FISHER else damage.error / total

    damages = [
        {name: math.fsum(part(layer[name]) for layer in members) for name in group.layers}
        for group, members in zip(groups, found, strict=True)
    ]
    return Prediction(*proxy, damages)


def list_choices(groups: Sequence[Group], prediction: Prediction) -> list[list[Choice]]:
    """Return what the optimiser chooses from."""
    return [
        [
            Choice(candidate, group.nbytes(candidate), 0.0 if candidate == KEEP else damage[candidate])
            for candidate in group.formats
        ]
        for group, damage in zip(groups, prediction.damages, strict=True)
    ]


def _candidate_formats(context: PlanContext) -> tuple[str, ...]:
    """Return the format that was asked for, and those that it may be raised to in a result of both."""
    asked = context.options.format
    return (asked, *(name for name in FORMATS[asked].raised_to if _can_be_mixed(context, (asked, name))))


def _cast_at_load(context: PlanContext, dialect: Dialect, formats: Sequence[str]) -> set[str]:
    """Return the modules that the target would cast without scales if they stayed, as no ignore list reaches them."""
    schemes = {context.options.scheme(name) for name in formats}
    class_name = context.source.class_name or ""
    reading = context.target.find_reading(context.kind, context.preset.name, class_name, dialect.name, schemes)
    if isinstance(reading, str) or not reading.matching or context.runtime.ignores:
        return set()
    return {module for module, name in context.names(context.linears).items() if name is not None}


def _can_be_mixed(context: PlanContext, formats: tuple[str, ...]) -> bool:
    try:
        find_dialect(context, formats)
    except UsageError:
        return False
    return True
