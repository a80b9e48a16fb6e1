"""One source with what is known of its class, and the dialect that its consumers read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from convert_ckpt.options import Options
from convert_ckpt.plan.preset import GENERIC, Preset
from convert_ckpt.plan.recipe import KEEP, Fate
from convert_ckpt.plan.sglang_names import overmatched, sglang_prefixes
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects import DIALECT_SCHEMES, STATIC_DIALECTS, TENSOR_FP8, default_dialect
from run_ckpt.contract.errors import UsageError
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


def choose_dialect(model: Model, fates: Mapping[str, Fate]) -> str:
    """Return --dialect, or the default for these formats. Raises UsageError where it can't say them."""
    options = model.options
    formats = sorted({fate.format for fate in fates.values()} - {KEEP}) or [options.format]
    mixed = len(formats) > 1
    schemes = [options.scheme(weight_format) for weight_format in formats]
    static = options.calibration is not None
    if static and schemes != [TENSOR_FP8]:
        raise UsageError("--calibration: static activations exist for --format fp8 --granularity tensor alone.")
    dialect = options.dialect or ("mxfp4" if mixed else default_dialect(schemes[0], model.naming, static=static))
    if static != (dialect in STATIC_DIALECTS):
        fix = "give --calibration FILE" if not static else f"leave --dialect out or say {STATIC_DIALECTS[0]}"
        raise UsageError(f"--dialect {dialect}: its activations are {'dynamic' if static else 'static'}; {fix}.")
    if mixed and dialect != "mxfp4":
        raise UsageError(
            f"--dialect {dialect}: can't say that some layers are mxfp4 and some fp8. Use --dialect mxfp4."
        )
    known = DIALECT_SCHEMES[dialect]
    for scheme in schemes:
        if scheme not in known:
            raise UsageError(f"--dialect {dialect}: can't say {scheme}. It can say: {'; '.join(map(str, known))}.")
    return dialect


def dialect_faults(model: Model, fates: Mapping[str, Fate], layers: Mapping[str, Layer], dialect: str) -> list[str]:
    """Return a sentence for everything that the dialect's consumer would load silently wrong."""
    kept = model.prefixes([module for module, fate in fates.items() if fate.format == KEEP])
    quantized = model.prefixes(layers)
    if dialect == "rowwise":
        return _rowwise_faults(model, quantized)
    faults = []
    if dialect in ("fp8", "modelopt") and not model.preset.sglang_ignores:
        faults += [_unignorable(model, fates, module) for module, prefix in kept.items() if prefix is not None]
    if dialect == "fp8" and model.options.granularity == "block" and model.naming == "diffusers":
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
    if manifest.dialect not in ("fp8", "modelopt"):
        return []
    quantized = model.prefixes(manifest.layers)
    warnings = overmatched(manifest.unquantized_linears, quantized, any_part=manifest.dialect == "fp8")
    if model.options.granularity == "block" and model.preset.name == GENERIC and model.naming == "diffusers":
        warnings.append(
            "no preset knows this class: where SGLang builds a linear of it as a plain one, it takes the FP8 codes"
            " without their block scales; scripts/check_sglang.py tells, --granularity tensor is safe"
        )
    return warnings


def _unignorable(model: Model, fates: Mapping[str, Fate], module: str) -> str:
    return (
        f"{module}: would stay {model.linears[module].dtype} ({fates[module].reason}), but SGLang gives the"
        f" linears of {model.source.class_name} no names, so it would cast this one to FP8 with scale 1.0"
        " and say nothing. Quantize it, or use --dialect mxfp4."
    )


def _rowwise_faults(model: Model, quantized: Mapping[str, str | None]) -> list[str]:
    renamed = [module for module, prefix in quantized.items() if prefix not in (module, None)]
    if model.preset.rowwise and not renamed:
        return []
    what = f"{renamed[0]} has" if renamed else f"layers of preset {model.preset.name} have"
    return [
        f"dialect rowwise: {what} another name in SGLang. Use --granularity tensor or block, or"
        " --dialect compressed-tensors."
    ]
