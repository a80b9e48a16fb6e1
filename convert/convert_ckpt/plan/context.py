"""One source with what is known of its class and of the target that it is converted for."""

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from convert_ckpt.options import Options
from convert_ckpt.plan.preset import Preset, Runtime
from convert_ckpt.plan.recipe import KEEP
from convert_ckpt.plan.runtime_names import runtime_names
from convert_ckpt.plan.shape_rules import linear_module
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.dialects.table import DIALECTS, choose_dialect, dialect_fault
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import FORMATS, GRANULARITIES, PLAIN_NVFP4, Scheme
from run_ckpt.contract.layouts import AITER
from run_ckpt.contract.module_names import has_experts
from run_ckpt.contract.reading import Target, model_kind
from run_ckpt.contract.targets import SGLANG_DIALECTS, TARGETS, USUAL_TARGETS
from run_ckpt.contract.tensors import TensorSpec


@dataclass(frozen=True)
class PlanContext:
    """What the planning steps share. ``linears`` maps a module to its weight [N, K].

    ``preset_from`` says what chose the preset. ``options`` say what the target reads where the user left that open.
    """

    source: Component
    options: Options
    preset: Preset
    preset_from: str
    linears: dict[str, TensorSpec]

    @cached_property
    def swapped(self) -> set[str]:
        """The linear modules whose rows are not in the order in which the source stores them."""
        return {module for view in self.source.views if view.pieces and (module := linear_module(view.spec))}

    @cached_property
    def schemes(self) -> dict[str, Scheme]:
        """How a layer of each format is stored."""
        return {name: self.options.scheme(name) for name in FORMATS}

    @property
    def naming(self) -> str:
        """ "diffusers" or "transformers"."""
        return self.source.naming if self.source.config else self.preset.naming

    @property
    def kind(self) -> str:
        """Its model_kind."""
        return model_kind(self.naming, self.preset.name, self.source.name)

    @property
    def target(self) -> Target:
        """What was asked for, or the usual one of the kind."""
        return TARGETS[self.options.target or USUAL_TARGETS[self.kind]]

    @property
    def runtime(self) -> Runtime:
        return self.preset.runtime(self.target.name)

    def names(self, modules: Iterable[str], target: Target | None = None) -> dict[str, str | None]:
        """Return each module's name in a target's runtime (default: its own), None where that does not quantize it."""
        runtime = self.preset.runtime(target.name) if target else self.runtime
        return runtime_names(sorted(modules), runtime, self.linears)


def make_context(
    source: Component, options: Options, preset: Preset, preset_from: str, linears: dict[str, TensorSpec]
) -> PlanContext:
    """Return the context; its options say layout and granularity, by what the target reads where the user did not.

    Raises UsageError where a target was asked for that reads nothing of the kind.
    """
    options = _as_read(options, preset)
    context = PlanContext(source, options, preset, preset_from, linears)
    if options.target:
        scheme = next((scheme for _, scheme in _ways(context)), None)
        if scheme is None:
            raise UsageError(_nothing_to_read(context))
    else:
        is_unsaid = options.granularity is None and context.naming == "transformers"
        granularity = "channel" if is_unsaid and has_experts(linears) else options.granularity
        scheme = replace(options, granularity=granularity).scheme(options.format)
    layout = options.layout or (scheme.layout if len(scheme.format.layouts) > 1 else AITER).name
    granularity = options.granularity or (scheme.granularity if len(scheme.format.blocks) > 1 else GRANULARITIES[0])
    return replace(context, options=replace(options, layout=layout, granularity=granularity))


def _as_read(options: Options, preset: Preset) -> Options:
    """Return the options with the only dialect that is read of a class, where there is one. Raises UsageError."""
    if preset.dialect is None:
        return options
    (wanted,) = DIALECTS[preset.dialect].schemes
    asked = (options.format, options.dialect or preset.dialect, options.layout or wanted.layout.name)
    if asked != (wanted.format.name, preset.dialect, wanted.layout.name):
        raise UsageError(
            f"{preset.name}: servers read {wanted} of this class (dialect {preset.dialect}) and nothing else. Use"
            f" --format {wanted.format.name} without --layout and --dialect."
        )
    return replace(options, dialect=preset.dialect, layout=wanted.layout.name)


def find_dialect(context: PlanContext, formats: Collection[str]) -> Dialect:
    """Return --dialect, or the one by which the target reads these formats. Raises UsageError where there is none."""
    options = context.options
    schemes = [options.scheme(weight_format) for weight_format in sorted({*formats} - {KEEP}) or [options.format]]
    dialect = _dialect_of_target(context, schemes) if options.target and not options.dialect else None
    if dialect is None:
        dialect = choose_dialect(
            schemes,
            context.naming,
            asked=options.dialect,
            static=options.has_static_scales,
            of_joint_experts=context.preset.dialect is not None,
        )
    if options.swap_weight_nibbles and not (dialect.name in SGLANG_DIALECTS and PLAIN_NVFP4 in schemes):
        raise UsageError("--swap-weight-nibbles: is for NVFP4 in a dialect that SGLang's diffusion runtime reads.")
    return dialect


def _dialect_of_target(context: PlanContext, schemes: Sequence[Scheme]) -> Dialect:
    for reading in context.target.of(context.kind, context.preset.name):
        for dialect in map(DIALECTS.__getitem__, reading.dialects):
            fault = dialect_fault(dialect, schemes, static=context.options.has_static_scales)
            if reading.says(schemes) and not fault:
                return dialect
    raise UsageError(_nothing_to_read(context))


def _ways(context: PlanContext) -> Iterator[tuple[str, Scheme]]:
    """Yield (dialect, scheme) in which the target reads the format that was asked for, the best first."""
    options, static = context.options, context.options.has_static_scales
    for reading in context.target.of(context.kind, context.preset.name):
        if reading.refusal(context.linears):
            continue
        for dialect in map(DIALECTS.__getitem__, reading.dialects):
            for scheme in filter(partial(_is_asked, options), dialect.schemes):
                if reading.says([scheme]) and not dialect_fault(dialect, [scheme], static=static):
                    yield dialect.name, scheme


def _is_asked(options: Options, scheme: Scheme) -> bool:
    chosen = scheme.format
    return (
        chosen.name == options.format
        and (len(chosen.layouts) == 1 or options.layout in (None, scheme.layout.name))
        and (len(chosen.blocks) == 1 or options.granularity in (None, scheme.granularity))
    )


def _nothing_to_read(context: PlanContext) -> str:
    target = context.target
    model = f"a {context.source.class_name}" if context.source.class_name else "this model"
    ways = [way for name in FORMATS for way in _ways(replace(context, options=Options(name, target=target.name)))]
    listed = "; ".join(dict.fromkeys(f"{scheme} (dialect {dialect})" for dialect, scheme in ways))
    if not ways:
        return f"--target {target.name}: {target.title} was not seen to load {model}."
    return f"--target {target.name}: {target.title} does not read that of {model}. It reads {listed}."
