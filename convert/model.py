"""One source with what is known of its class, and the dialect that its consumers read."""

from collections.abc import Mapping
from dataclasses import dataclass

from convert.options import Options
from convert.preset import Preset
from convert.recipe import KEEP, Fate
from convert.sglang_names import sglang_prefix
from convert.source import Source
from runtime.contract.dialects import DIALECT_SCHEMES, STATIC_DIALECTS, TENSOR_FP8, default_dialect
from runtime.contract.errors import UsageError
from runtime.contract.header import TensorSpec
from runtime.contract.manifest import Layer


@dataclass(frozen=True)
class Model:
    """What the planning steps share. ``linears`` maps a module to its weight [N, K]."""

    source: Source
    options: Options
    preset: Preset
    linears: dict[str, TensorSpec]

    @property
    def naming(self) -> str:
        """ "diffusers" or "transformers"."""
        return self.source.naming if self.source.config else self.preset.naming

    def prefixes(self, modules: Mapping[str, object]) -> dict[str, str | None]:
        """Return each module's name in SGLang, None where it does not quantize it."""
        return {module: sglang_prefix(module, self.preset, self.linears) for module in sorted(modules)}


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
    faults = []
    if dialect in ("fp8", "modelopt") and not model.preset.sglang_ignores:
        kept = {module: fate for module, fate in fates.items() if fate.format == KEEP}
        for module, prefix in model.prefixes(kept).items():
            if prefix is not None:
                faults.append(
                    f"{module}: would stay {model.linears[module].dtype} ({fates[module].reason}), but SGLang gives the"
                    f" linears of {model.source.class_name} no names, so it would cast this one to FP8 with scale 1.0"
                    " and say nothing. Quantize it, or use --dialect mxfp4."
                )
    if dialect == "rowwise":
        renamed = [module for module, prefix in model.prefixes(layers).items() if prefix not in (module, None)]
        if not model.preset.rowwise or renamed:
            what = (
                f"{renamed[0]} has another name there"
                if renamed
                else f"preset {model.preset.name} has other names there"
            )
            faults.append(
                f"dialect rowwise: SGLang can't match it ({what}). Use --granularity tensor or block,"
                " or --dialect compressed-tensors."
            )
    return faults
