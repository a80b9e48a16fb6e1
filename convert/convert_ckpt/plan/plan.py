"""The checkpoint without its bytes: every output tensor, its place and its reason, before any read."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from convert_ckpt.options import Options
from convert_ckpt.plan.calibration import calibration_faults, input_scales, read_calibration
from convert_ckpt.plan.context import Model, dialect_faults, dialect_warnings, find_dialect
from convert_ckpt.plan.preset import GENERIC, Preset, find_preset, load_preset
from convert_ckpt.plan.recipe import (
    KEEP,
    Fate,
    FusedGroup,
    Rule,
    choose_fates,
    close_over_groups,
    find_fused_groups,
    ignore_rules,
    preset_rules,
    read_recipe,
    unmatched_rules,
)
from convert_ckpt.plan.shape_rules import in_numbered_block, linear_module, reason_not_linear, reason_to_keep
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.dialects.table import DIALECTS, header_metadata
from run_ckpt.contract.errors import ProblemsError, UsageError
from run_ckpt.contract.formats import BLOCK_FP8, TENSOR_FP8
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT_SCALE, FusedScale, KeptTensor, Layer, Manifest
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.header import Header, StoredTensor, build_header
from run_ckpt.version import VERSION

TOOL_NAME = "convert-ckpt"


@dataclass(frozen=True)
class TensorPlan:
    """One source tensor: where it lies and what it becomes. ``layer`` is None where it is copied."""

    shard: str
    stored: StoredTensor
    layer: Layer | None
    reason: str

    @property
    def spec(self) -> TensorSpec:
        return self.stored.spec

    @cached_property
    def output_nbytes(self) -> int:
        """Bytes of what it becomes."""
        return sum(spec.nbytes for spec in self.layer.specs().values()) if self.layer else self.spec.nbytes


@dataclass(frozen=True)
class FilePlan:
    """One output shard: its header, and the source shards its tensors come from."""

    name: str
    header: Header
    source_shards: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All decisions for one component. ``tensors`` keep the source's order: by shard, by offset.

    ``manifest`` is complete but for the measured errors and the files. ``input_scales`` maps a
    module to its static activation scale.
    """

    tensors: tuple[TensorPlan, ...]
    files: tuple[FilePlan, ...]
    manifest: Manifest
    input_scales: dict[str, np.float32]
    warnings: tuple[str, ...]

    def file_of_tensors(self) -> dict[str, str]:
        """Return output tensor -> name of its file."""
        return {stored.spec.name: file.name for file in self.files for stored in file.header.tensors}

    @property
    def source_nbytes(self) -> int:
        return sum(tensor.spec.nbytes for tensor in self.tensors)

    @property
    def output_nbytes(self) -> int:
        return sum(file.header.file_nbytes for file in self.files)


@dataclass(frozen=True)
class Job:
    """One component to convert: ``name`` is its folder in OUTPUT, "" for OUTPUT itself."""

    name: str
    source: Component
    plan: Plan


def make_plan(source: Component, options: Options) -> Plan:
    """Return the plan for one component.

    Raises UsageError for options that contradict each other or match nothing, ProblemsError with
    every other fault.
    """
    preset, rules = _choose_rules(source, options)
    specs = [tensor.spec for _, tensor in source.folder.tensors()]
    linears = {module: spec for spec in specs if (module := linear_module(spec))}
    model = Model(source, options, preset, linears)
    fates, groups = _choose_fates(model, rules)
    dialect = find_dialect(model, fates)
    layers = _make_layers(model, fates, groups, dialect)
    problems = dialect_faults(model, fates, layers, dialect)
    scales: dict[str, np.float32] = {}
    if options.calibration:
        calibration = read_calibration(options.calibration)
        faults = calibration_faults(calibration, layers)
        problems += faults
        if not faults:
            scales = input_scales(calibration, layers)
            layers = {module: _with_input_scale(layer) for module, layer in layers.items()}
    if not layers:
        problems.append(_nothing_to_convert(fates))
    tensors = _make_tensors(source, layers, fates)
    manifest = _make_manifest(model, rules, dialect.name, layers, tensors, groups)
    if problems:
        raise ProblemsError(f"{source.name}: can't be converted as asked", problems)
    files = _make_files(tensors, manifest)
    warnings = (*source.notes, *dialect_warnings(model, manifest))
    return Plan(tensors, files, manifest, scales, warnings)


def _nothing_to_convert(fates: Mapping[str, Fate]) -> str:
    if not fates:
        return "nothing to convert: it holds no 2-D weight of a linear layer."
    reasons = Counter(fate.reason for fate in fates.values())
    listed = "; ".join(f"{count} for: {reason}" for reason, count in sorted(reasons.items()))
    return (
        f"nothing to convert: all {len(fates)} linear layers are kept. {listed}. Write a --recipe that says otherwise."
    )


def _choose_rules(source: Component, options: Options) -> tuple[Preset, list[Rule]]:
    base, recipe_rules = read_recipe(options.recipe) if options.recipe else (None, [])
    name = options.preset or base
    preset = load_preset(name) if name else find_preset(source.class_name)
    return preset, [*ignore_rules(options.ignore), *recipe_rules, *preset_rules(preset)]


def _choose_fates(model: Model, rules: list[Rule]) -> tuple[dict[str, Fate], tuple[FusedGroup, ...]]:
    missing = unmatched_rules(model.linears, rules)
    if missing:
        raise UsageError(
            f"{', '.join(missing)}: matches no linear layer of {model.source.name}. A pattern is matched against"
            " the whole module name (tensor name without .weight), * standing for any characters;"
            " --dry-run lists the names."
        )
    fates = choose_fates(model.linears, rules, model.options.format)
    fates = {module: _guarded(model, module, fate) for module, fate in fates.items()}
    groups = find_fused_groups(model.linears, model.preset)
    fates = close_over_groups(fates, groups)
    return fates, tuple(group for group in groups if fates[group.members[0]].format != KEEP)


def _guarded(model: Model, module: str, fate: Fate) -> Fate:
    if fate.format == KEEP:
        return fate
    if model.preset.name == GENERIC and not in_numbered_block(module):
        return Fate(KEEP, "outside the numbered blocks, and no preset knows this class")
    reason = reason_to_keep(
        model.linears[module],
        model.options.scheme(fate.format),
        model.naming,
        allow_unaligned_k=model.options.allow_unaligned_k,
    )
    return Fate(KEEP, reason) if reason else fate


def _make_layers(
    model: Model, fates: Mapping[str, Fate], groups: tuple[FusedGroup, ...], dialect: Dialect
) -> dict[str, Layer]:
    group_of = {member: group.name for group in groups for member in group.members}
    layers = {}
    for module, fate in sorted(fates.items()):
        if fate.format == KEEP:
            continue
        spec = model.linears[module]
        scheme = model.options.scheme(fate.format)
        N, K = spec.shape
        layers[module] = Layer(
            module=module,
            scheme=scheme,
            N=N,
            K=K,
            source_tensor=spec.name,
            source_dtype=spec.dtype,
            scale_rule=scheme.format.scale_rule(model.options.scale_rule),
            tensors=dialect.tensor_names(module, scheme, model.naming),
            scale_shape=dialect.scale_shape(N, K, scheme),
            fused_group=group_of.get(module),
        )
    return layers


def _with_input_scale(layer: Layer) -> Layer:
    return replace(layer, tensors={**layer.tensors, INPUT_SCALE: f"{layer.module}.{INPUT_SCALE}"})


def _make_tensors(source: Component, layers: Mapping[str, Layer], fates: Mapping[str, Fate]) -> tuple[TensorPlan, ...]:
    tensors = []
    for shard, stored in source.folder.tensors():
        module = linear_module(stored.spec)
        reason = fates[module].reason if module else reason_not_linear(stored.spec)
        tensors.append(TensorPlan(shard.name, stored, layers.get(module) if module else None, reason))
    return tuple(tensors)


def _make_manifest(
    model: Model,
    rules: list[Rule],
    dialect: str,
    layers: dict[str, Layer],
    tensors: tuple[TensorPlan, ...],
    groups: tuple[FusedGroup, ...],
) -> Manifest:
    recipe = {
        **model.options.to_json(),
        "dialect": dialect,
        "preset": model.preset.name,
        "class_name": model.source.class_name,
        "naming": model.naming,
        "rules": [[rule.pattern, rule.format] for rule in rules if rule.by_user],
    }
    kept = {tensor.spec.name: tensor for tensor in tensors if tensor.layer is None}
    unquantized = {
        module: spec
        for module, spec in model.linears.items()
        if module not in layers and not model.preset.is_embedding(module)
    }
    return Manifest(
        tool={"name": TOOL_NAME, "version": VERSION},
        source={"name": model.source.name, "revision": model.source.revision, **_card(model.source)},
        recipe=recipe,
        layers=layers,
        kept={name: KeptTensor(tensor.spec, tensor.reason) for name, tensor in kept.items()},
        fused_scales=_fused_scales(layers, groups),
        unquantized_linears=model.prefixes(unquantized),
    )


def _card(source: Component) -> dict[str, Any]:
    return {"card": source.card} if source.card else {}


def _fused_scales(layers: Mapping[str, Layer], groups: tuple[FusedGroup, ...]) -> dict[str, FusedScale]:
    """The scales that must also be on disk under the fused module's name (Z-Image)."""
    fused = {}
    for group in groups:
        members = [layers[name] for name in group.members]
        scheme = members[0].scheme
        is_repeated = scheme == TENSOR_FP8 or (scheme == BLOCK_FP8 and group.pattern.block_scale)
        if not group.pattern.scale_name or not is_repeated:
            continue
        for role in members[0].tensors.keys() & {WEIGHT_SCALE, INPUT_SCALE}:
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
