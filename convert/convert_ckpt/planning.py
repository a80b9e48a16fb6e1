"""The plans of all components, and formats chosen layer by layer within a budget (--max-size, --min-sqnr)."""

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from convert_ckpt.options import Options
from convert_ckpt.plan.candidates import Group, Prediction, list_choices, list_groups
from convert_ckpt.plan.make_plan import Chosen, make_plan
from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.plan.policy import Assignment, Choice, curve, least_damage, least_size
from convert_ckpt.plan.recipe import Decision
from convert_ckpt.plan.sensitivities import read_sensitivities
from convert_ckpt.run.identity import check_identity
from convert_ckpt.run.shared_scales import check_shared_scales, in_source
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.decided_by import BUDGET, DecidedBy
from run_ckpt.contract.errors import FaultsError, UsageError
from run_ckpt.storage.units import format_nbytes

Predict = Callable[[Sequence[ComponentPlan], Sequence[Group]], Prediction]


@dataclass(frozen=True)
class CurvePoint:
    """One way to choose: the size of all shards, the SQNR predicted (infinite without any damage), layers by format."""

    nbytes: int
    sqnr_db: float
    n_layers: Mapping[str, int]


@dataclass(frozen=True)
class Budget:
    """How the formats were chosen: what was asked for, what predicted the damage (``by``, ``of_what``), and what else
    could be had.

    ``gap`` bounds how much better the best choice of all may be, as a part of what was to be least: 0 is none.
    """

    asked: str
    by: str
    of_what: str
    chosen: CurvePoint
    gap: float
    curve: tuple[CurvePoint, ...]


@dataclass(frozen=True)
class Planned:
    """A plan for every component; ``budget`` where there is one."""

    components: list[ComponentPlan]
    budget: Budget | None = None


def plan_checkpoint(opened: OpenedSource, options: Options, predict: Predict) -> Planned:
    """Return a plan for every component. Raises with all faults of all of them together.

    predict: measures damages; called only where a budget is to be met.
    """
    if opened.store and options.static and not options.calibration:
        raise UsageError(
            f"--static: the scales of {opened.reference} are read where it lies on a disk. Fetch it first, or give"
            " --calibration DIR."
        )
    components: list[ComponentPlan] = []
    faults: list[str] = []
    usage_errors: list[UsageError] = []
    for name in opened.components:
        try:
            source = opened.open_component(name)
            plan = make_plan(source, options)
            if not opened.store:
                check_identity(plan, source.folder)
            check_shared_scales(plan, None if opened.store else in_source(source.folder))
            components.append(ComponentPlan(name, source, plan))
        except FaultsError as error:
            faults += error.faults
        except UsageError as error:
            usage_errors.append(error)
    if usage_errors:
        raise usage_errors[0]
    if faults:
        raise FaultsError(f"{opened.reference}: can't be converted", faults)
    return _within_budget(components, options, predict) if options.has_budget else Planned(components)


def _within_budget(components: list[ComponentPlan], options: Options, predict: Predict) -> Planned:
    if any(planned.source.quantization for planned in components):
        raise UsageError(
            f"{options.budget}: the source is quantized already, and a budget weighs what its weights lose. Write it as"
            " numbers first: run-ckpt dequantize."
        )
    groups = [group for planned in components for group in list_groups(planned.name, planned.source, options)]
    if not groups:
        raise UsageError(f"{options.budget}: rules decide for every layer, and nothing is left to choose.")
    smallest = _replan(components, options, groups, [group.smallest for group in groups])
    _check_possible(smallest, options)
    if options.sensitivities:
        prediction = read_sensitivities(options.sensitivities, groups)
    else:
        prediction = predict(components, groups)
    choices = list_choices(groups, prediction)
    # Headers, and what is no choice's: they differ by a few bytes from choice to choice.
    others = _total_nbytes(smallest) - sum(group.nbytes(group.smallest) for group in groups)
    found = _choose(choices, others, options, lambda formats: _replan(components, options, groups, formats))
    value, bound = (found.nbytes if options.max_nbytes is None else found.damage), found.lower_bound
    gap = max(0.0, 1 - bound / value) if value else 0.0

    def point(assignment: Assignment) -> CurvePoint:
        n_layers = Counter[str]()
        for group, choice in zip(groups, assignment.choices, strict=True):
            n_layers[choice.format] += len(group.members)
        sqnr_db = -10 * math.log10(assignment.damage) if assignment.damage > 0 else math.inf
        return CurvePoint(int(assignment.nbytes) + others, sqnr_db, n_layers)

    chosen = point(found)
    predicted = round(chosen.sqnr_db, 2) if math.isfinite(chosen.sqnr_db) else None
    facts = {"by": prediction.by, "of_what": prediction.of_what, "predicted_sqnr_db": predicted}
    final = _replan(components, options, groups, [choice.format for choice in found.choices], {"budget": facts})
    chosen = replace(chosen, nbytes=_total_nbytes(final))
    points = tuple(map(point, curve(choices)))
    return Planned(final, Budget(options.budget, prediction.by, prediction.of_what, chosen, gap, points))


def _replan(
    components: Sequence[ComponentPlan],
    options: Options,
    groups: Sequence[Group],
    formats: Sequence[str],
    facts: Mapping[str, Any] = MappingProxyType({}),
) -> list[ComponentPlan]:
    """Return the plans in which each group has its format."""
    decisions: dict[str, dict[str, Decision]] = {planned.name: {} for planned in components}
    for group, chosen in zip(groups, formats, strict=True):
        decision = Decision(chosen, options.budget, DecidedBy(BUDGET, options.budget))
        decisions[group.component] |= dict.fromkeys(group.members, decision)
    return [
        replace(planned, plan=make_plan(planned.source, options, Chosen(decisions[planned.name], facts)))
        for planned in components
    ]


def _check_possible(smallest: list[ComponentPlan], options: Options) -> None:
    """Raise UsageError where not even the smallest choices fit, or where the source does as it is."""
    if options.max_nbytes is None:
        return
    source_nbytes = sum(shard.header.file_nbytes for planned in smallest for shard in planned.source.folder.shards)
    if source_nbytes <= options.max_nbytes:
        raise UsageError(f"{options.budget}: the source takes {format_nbytes(source_nbytes)} and fits as it is.")
    nbytes = _total_nbytes(smallest)
    if nbytes > options.max_nbytes:
        raise UsageError(
            f"{options.budget}: {format_nbytes(nbytes)} ({nbytes:,} bytes) is the smallest size possible, with every"
            f" layer in {options.format} that may be. Allow that, or keep fewer layers."
        )


def _choose(
    choices: list[list[Choice]], others: int, options: Options, plan: Callable[[list[str]], list[ComponentPlan]]
) -> Assignment:
    """Return the best assignment whose plan meets the budget. The smallest is known to fit.

    others: bytes of the smallest plan that belong to no choice.
    """
    if options.max_nbytes is None:
        assert options.min_sqnr is not None
        try:
            return least_size(choices, 10 ** (-options.min_sqnr / 10))
        except ValueError:
            least = math.fsum(min(choice.damage for choice in group) for group in choices)
            best = -10 * math.log10(least)
            raise UsageError(f"{options.budget}: {best:.1f} dB is the highest SQNR possible. Ask for less.") from None
    room = options.max_nbytes - others
    smallest = sum(min(choice.nbytes for choice in group) for group in choices)
    while True:
        found = least_damage(choices, max(room, smallest))
        excess = _total_nbytes(plan([choice.format for choice in found.choices])) - options.max_nbytes
        if excess <= 0 or room <= smallest:
            return found
        room -= excess


def _total_nbytes(components: Sequence[ComponentPlan]) -> int:
    return sum(planned.plan.output_nbytes for planned in components)
