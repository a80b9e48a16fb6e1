"""One source with what is known of its class, and the dialect that its consumers read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from convert_ckpt.options import Options
from convert_ckpt.plan.preset import GENERIC, Preset
from convert_ckpt.plan.recipe import KEEP, Decision
from convert_ckpt.plan.sglang_names import overmatched, sglang_prefixes
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.dialects.table import DIALECTS, choose_dialect
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import BLOCK_FP8, PLAIN_NVFP4, Scheme
from run_ckpt.contract.manifest import Layer, Manifest
from run_ckpt.contract.tensors import TensorSpec


@dataclass(frozen=True)
class PlanContext:
    """What the planning steps share. ``linears`` maps a module to its weight [N, K]."""

    source: Component
    options: Options
    preset: Preset
    linears: dict[str, TensorSpec]

    @property
    def naming(self) -> str:
        """ "diffusers" or "transformers"."""
        return self.source.naming if self.source.config else self.preset.naming

    def prefixes(self, modules: Iterable[str]) -> dict[str, str | None]:
        """Return each module's name in SGLang, None where it does not quantize it."""
        return sglang_prefixes(sorted(modules), self.preset, self.linears)


def find_dialect(context: PlanContext, decisions: Mapping[str, Decision]) -> Dialect:
    """Return --dialect, or the usual one for these formats. Raises UsageError where it can't say them."""
    options = context.options
    formats = sorted({decision.format for decision in decisions.values()} - {KEEP}) or [options.format]
    schemes = [options.scheme(weight_format) for weight_format in formats]
    dialect = choose_dialect(schemes, context.naming, asked=options.dialect, static=options.has_static_scales)
    if options.swap_weight_nibbles and not (dialect.sglang_matching and PLAIN_NVFP4 in schemes):
        raise UsageError("--swap-weight-nibbles: is for NVFP4 in a dialect that SGLang's diffusion runtime reads.")
    return dialect


def dialect_faults(
    context: PlanContext, decisions: Mapping[str, Decision], layers: Mapping[str, Layer], dialect: Dialect
) -> list[str]:
    """Return a sentence for everything that the dialect's consumer would load silently wrong."""
    kept = context.prefixes([module for module, decision in decisions.items() if decision.format == KEEP])
    quantized = context.prefixes(layers)
    if dialect.file_name:
        return _rowwise_faults(context, dialect, quantized)
    faults = []
    if dialect.sglang_matching and not context.preset.sglang_ignores:
        faults += [_unignorable(context, decisions, module) for module, prefix in kept.items() if prefix is not None]
    safe = _safe_instead(layers) if dialect.sglang_matching else None
    if safe and context.naming == "diffusers":
        plain = [module for module, prefix in quantized.items() if prefix is None]
        faults += [
            f"{module}: SGLang builds it as a plain linear and would take its codes without their block scales."
            f" Keep it with --ignore, or use {safe}."
            for module in plain
        ]
        faults += [
            f"{sentence}, and without the block scales. Quantize what is ignored, or use {safe}."
            for sentence in overmatched(kept, quantized, any_part=dialect.sglang_matching == "part")
        ]
    schemes = {layer.scheme for layer in layers.values()}
    unsound = [
        why for (scheme, naming), why in dialect.unsound.items() if scheme in schemes and naming == context.naming
    ]
    return faults + [f"dialect {dialect.name}: {why}" for why in unsound]


def dialect_warnings(context: PlanContext, manifest: Manifest) -> list[str]:
    """Return a sentence for everything that its consumer would load right, but not as asked."""
    matching = DIALECTS[manifest.dialect].sglang_matching
    if matching is None:
        return []
    quantized = context.prefixes(manifest.layers)
    warnings = overmatched(manifest.unquantized_linears, quantized, any_part=matching == "part")
    safe = _safe_instead(manifest.layers)
    if safe and context.preset.name == GENERIC and context.naming == "diffusers":
        warnings.append(
            "no preset knows this class: where SGLang builds a linear of it as a plain one, it takes the codes"
            f" without their block scales; scripts/check_sglang.py tells, {safe} is safe"
        )
    return warnings


def _safe_instead(layers: Mapping[str, Layer]) -> str | None:
    """Return what to use where SGLang would drop scales in a linear that it does not quantize; None if it does not."""
    options = {BLOCK_FP8: "--granularity tensor", PLAIN_NVFP4: "--format fp8"}
    return next((option for scheme, option in options.items() if _has(layers, scheme)), None)


def _has(layers: Mapping[str, Layer], scheme: Scheme) -> bool:
    return any(layer.scheme == scheme for layer in layers.values())


def _unignorable(context: PlanContext, decisions: Mapping[str, Decision], module: str) -> str:
    return (
        f"{module}: would stay {context.linears[module].dtype} ({decisions[module].reason}), but SGLang gives the"
        f" linears of {context.source.class_name} no names, so it would cast this one to FP8 with scale 1.0"
        " and say nothing. Quantize it, or use --dialect mxfp4."
    )


def _rowwise_faults(context: PlanContext, dialect: Dialect, quantized: Mapping[str, str | None]) -> list[str]:
    renamed = [module for module, prefix in quantized.items() if prefix not in (module, None)]
    if context.preset.rowwise and not renamed:
        return []
    what = f"{renamed[0]} has" if renamed else f"layers of preset {context.preset.name} have"
    return [
        f"dialect {dialect.name}: {what} another name in SGLang. Use --granularity tensor or block, or"
        " --dialect compressed-tensors."
    ]
