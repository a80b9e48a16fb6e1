"""One source with what is known of its class, and the dialect that its consumers read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from convert_ckpt.options import Options
from convert_ckpt.plan.preset import GENERIC, Preset
from convert_ckpt.plan.recipe import KEEP, Fate
from convert_ckpt.plan.sglang_names import overmatched, sglang_prefixes
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.dialects.table import DIALECTS, choose_dialect
from run_ckpt.contract.formats import BLOCK_FP8
from run_ckpt.contract.manifest import Layer, Manifest
from run_ckpt.contract.tensors import TensorSpec


@dataclass(frozen=True)
class Model:
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


def find_dialect(model: Model, fates: Mapping[str, Fate]) -> Dialect:
    """Return --dialect, or the usual one for these formats. Raises UsageError where it can't say them."""
    options = model.options
    formats = sorted({fate.format for fate in fates.values()} - {KEEP}) or [options.format]
    schemes = [options.scheme(weight_format) for weight_format in formats]
    return choose_dialect(schemes, model.naming, asked=options.dialect, static=options.calibration is not None)


def dialect_faults(model: Model, fates: Mapping[str, Fate], layers: Mapping[str, Layer], dialect: Dialect) -> list[str]:
    """Return a sentence for everything that the dialect's consumer would load silently wrong."""
    kept = model.prefixes([module for module, fate in fates.items() if fate.format == KEEP])
    quantized = model.prefixes(layers)
    if dialect.file_name:
        return _rowwise_faults(model, dialect, quantized)
    faults = []
    if dialect.sglang_ignores and not model.preset.sglang_ignores:
        faults += [_unignorable(model, fates, module) for module, prefix in kept.items() if prefix is not None]
    if _has_block_scales(layers) and model.naming == "diffusers":
        plain = [module for module, prefix in quantized.items() if prefix is None]
        faults += [
            f"{module}: SGLang builds it as a plain linear and would take its FP8 codes without their block scales."
            " Keep it with --ignore, or use --granularity tensor."
            for module in plain
        ]
        faults += [
            f"{sentence}, and without the block scales. Quantize what is ignored, or use --granularity tensor."
            for sentence in overmatched(kept, quantized, any_part=True)
        ]
    return faults


def dialect_warnings(model: Model, manifest: Manifest) -> list[str]:
    """Return a sentence for everything that its consumer would load right, but not as asked."""
    matching = DIALECTS[manifest.dialect].sglang_ignores
    if matching is None:
        return []
    quantized = model.prefixes(manifest.layers)
    warnings = overmatched(manifest.unquantized_linears, quantized, any_part=matching == "part")
    if _has_block_scales(manifest.layers) and model.preset.name == GENERIC and model.naming == "diffusers":
        warnings.append(
            "no preset knows this class: where SGLang builds a linear of it as a plain one, it takes the FP8 codes"
            " without their block scales; scripts/check_sglang.py tells, --granularity tensor is safe"
        )
    return warnings


def _has_block_scales(layers: Mapping[str, Layer]) -> bool:
    return any(layer.scheme == BLOCK_FP8 for layer in layers.values())


def _unignorable(model: Model, fates: Mapping[str, Fate], module: str) -> str:
    return (
        f"{module}: would stay {model.linears[module].dtype} ({fates[module].reason}), but SGLang gives the"
        f" linears of {model.source.class_name} no names, so it would cast this one to FP8 with scale 1.0"
        " and say nothing. Quantize it, or use --dialect mxfp4."
    )


def _rowwise_faults(model: Model, dialect: Dialect, quantized: Mapping[str, str | None]) -> list[str]:
    renamed = [module for module, prefix in quantized.items() if prefix not in (module, None)]
    if model.preset.rowwise and not renamed:
        return []
    what = f"{renamed[0]} has" if renamed else f"layers of preset {model.preset.name} have"
    return [
        f"dialect {dialect.name}: {what} another name in SGLang. Use --granularity tensor or block, or"
        " --dialect compressed-tensors."
    ]
