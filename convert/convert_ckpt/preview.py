"""The plan for people and for machines: what each tensor becomes and why, and exact sizes."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from convert_ckpt.curve import budget_json, budget_line, curve_lines
from convert_ckpt.plan.plan import ComponentPlan, TensorPlan
from convert_ckpt.plan.target_costs import TargetCost
from convert_ckpt.planning import Planned
from convert_ckpt.run.disk import source_nbytes_here
from convert_ckpt.run.memory import memory_lines
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.decided_by import BY_KIND
from run_ckpt.contract.kept import kept_groups
from run_ckpt.contract.module_names import block_pattern
from run_ckpt.storage.units import format_nbytes


@dataclass(frozen=True)
class _Line:
    """Tensors that differ in their block number alone."""

    name: str
    shape: str
    outcome: str
    reason: str


# Component -> target -> what a result for it would take.
Costs = Mapping[str, Mapping[str, TargetCost]]


def plan_json(opened: OpenedSource, checkpoint: Planned, costs: Costs) -> list[dict[str, Any]]:
    """Return one object per component: every tensor's outcome, every output file and its size, each target's cost.

    It says all that the terminal does: "kept" why tensors stay, in how many bytes and what would save them.

    With a budget: how it was met, instead of costs.
    """
    budget = {"budget": budget_json(checkpoint.budget)} if checkpoint.budget else {}
    return [
        {
            "component": planned.name,
            "source": {"name": planned.source.name, "revision": planned.source.revision},
            "class_name": planned.plan.manifest.recipe["class_name"],
            "preset": planned.plan.manifest.recipe["preset"],
            "preset_from": planned.plan.preset_from,
            "dialect": planned.plan.manifest.dialect,
            "source_nbytes": planned.plan.source_nbytes,
            "output_nbytes": planned.plan.output_nbytes,
            "files": [{"name": file.name, "nbytes": file.header.file_nbytes} for file in planned.plan.files],
            "tensors": [_tensor_json(tensor) for tensor in planned.plan.tensors],
            "kept": [asdict(group) for group in kept_groups(planned.plan.manifest)],
            "warnings": list(planned.plan.warnings),
            "notes": [*memory_lines([planned]), *_source_lines(opened, [planned])],
            "targets": planned.plan.manifest.targets,
            "target_costs": {name: asdict(cost) for name, cost in costs.get(planned.name, {}).items()},
            **budget,
        }
        for planned in checkpoint.components
    ]


def plan_lines(opened: OpenedSource, checkpoint: Planned, costs: Costs, *, tensors: bool) -> Iterator[str]:
    """Yield the lines of the whole plan; of a remote source also where it is and how much of it comes here.

    tensors: with a line for each tensor of unlike blocks.
    """
    plans = checkpoint.components
    for planned in plans:
        if tensors:
            yield from _tensor_lines(planned)
        yield from _component_lines(planned)
        yield from _cost_lines(costs.get(planned.name, {}))
    yield from memory_lines(plans)
    if checkpoint.budget:
        yield budget_line(checkpoint.budget)
        yield from curve_lines(checkpoint.budget)
    yield from _source_lines(opened, plans)


def _source_lines(opened: OpenedSource, plans: list[ComponentPlan]) -> Iterator[str]:
    if opened.store:
        here, to_fetch = source_nbytes_here(opened, plans), sum(planned.plan.source_nbytes for planned in plans)
        commit = f" at commit {opened.store.revision}" if opened.store.revision else ""
        stays = "all of it stays in the cache" if opened.keep_source else f"at most {format_nbytes(here)} of it at once"
        yield f"From {opened.reference}{commit}: {format_nbytes(to_fetch)} in shards, fetched one by one, {stays}"


def run_notes(opened: OpenedSource, checkpoint: Planned) -> Iterator[str]:
    """Yield what a run says before it begins."""
    for planned in checkpoint.components:
        yield from plan_notes(planned)
    yield from memory_lines(checkpoint.components)
    if checkpoint.budget:
        yield budget_line(checkpoint.budget)
    yield from _source_lines(opened, checkpoint.components)


def plan_notes(planned: ComponentPlan) -> Iterator[str]:
    """Yield the notes on a component: its preset and why, what is kept, why and at what cost, warnings."""
    plan, recipe = planned.plan, planned.plan.manifest.recipe
    class_name = recipe["class_name"] or "no class"
    name = planned.name or planned.source.name
    yield f"{name}: {class_name}, preset {recipe['preset']} ({plan.preset_from}), dialect {recipe['dialect']}"
    kept = plan.manifest.kept.values()
    yield f"kept as they are: {len(kept)} tensors, {format_nbytes(sum(tensor.spec.nbytes for tensor in kept))}"
    for group in kept_groups(plan.manifest):
        what = ("linear layer" if group.is_linear else "tensor") + ("s" if group.n_tensors > 1 else "")
        saved = f"; {group.remedy} saves {format_nbytes(group.saved_nbytes)}" if group.remedy else ""
        yield f"  {group.n_tensors} {what}, {format_nbytes(group.nbytes)}: {group.reason}{saved}"
    for warning in plan.warnings:
        yield f"note: {warning}"


def _tensor_lines(planned: ComponentPlan) -> Iterator[str]:
    """Yield a line for each tensor; blocks that are treated alike share it."""
    counts: dict[_Line, int] = {}
    for tensor in planned.plan.tensors:
        line = _line(tensor)
        counts[line] = counts.get(line, 0) + 1
    widths = [max(map(len, column)) for column in zip(*(_cells(line, n) for line, n in counts.items()), strict=True)]
    for line, n in counts.items():
        cells = [cell.ljust(width) for cell, width in zip(_cells(line, n), widths, strict=True)]
        yield "  ".join(cells).rstrip()


def _component_lines(planned: ComponentPlan) -> Iterator[str]:
    plan = planned.plan
    for file in plan.files:
        yield f"{file.name}  {file.header.file_nbytes:,} bytes"
    yield from plan_notes(planned)
    yield f"right for: {', '.join(name for name, reason in plan.manifest.targets.items() if reason is None)}"
    n_converted = len(plan.manifest.layers)
    formats = sorted({layer.format.name for layer in plan.manifest.layers.values()})
    yield (
        f"Would convert {n_converted} of {len(plan.tensors)} tensors to {' and '.join(formats)}:"
        f" {format_nbytes(plan.source_nbytes)} -> {format_nbytes(plan.output_nbytes)} ({plan.output_nbytes:,} bytes)"
    )


def _cost_lines(costs: Mapping[str, TargetCost]) -> Iterator[str]:
    for name, cost in costs.items():
        size = f"{format_nbytes(cost.output_nbytes)}, {cost.n_layers} layers quantized, dialect {cost.dialect}"
        yield f"--target {name}: {size}" if cost.reason is None else cost.reason


def _line(tensor: TensorPlan) -> _Line:
    name = block_pattern(tensor.spec.name)
    shape = f"{tensor.spec.dtype} {list(tensor.spec.shape)}"
    layer = tensor.layer
    if layer is None:
        return _Line(name, shape, "decoded" if tensor.encoded else "folded" if tensor.fold else "copied", tensor.reason)
    return _Line(name, shape, f"{layer.format} {layer.scheme.detail}", tensor.reason)


def _cells(line: _Line, n: int) -> tuple[str, str, str, str, str]:
    return f"{n} x" if n > 1 else "", line.name, line.shape, line.outcome, line.reason


def _tensor_json(tensor: TensorPlan) -> dict[str, Any]:
    layer = tensor.layer
    outputs = layer.specs().values() if layer else [tensor.spec]
    return {
        "name": tensor.spec.name,
        "shard": tensor.shard,
        "dtype": tensor.spec.dtype,
        "shape": list(tensor.spec.shape),
        "format": layer.format.name if layer else "decoded" if tensor.encoded else "copied",
        "reason": tensor.reason,
        "is_linear": tensor.decided_by != BY_KIND,
        "outputs": [{"name": s.name, "dtype": s.dtype, "shape": list(s.shape), "nbytes": s.nbytes} for s in outputs],
    }
