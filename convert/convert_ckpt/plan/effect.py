"""Options that change nothing: what a user asked for must not be dropped without a word."""

from collections.abc import Iterable, Iterator, Mapping

from convert_ckpt.options import Options
from convert_ckpt.plan.preset import GENERIC, Preset, find_preset
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import FORMATS, QuantFormat
from run_ckpt.contract.manifest import Layer


def check_effect(options: Options, recipe_formats: Iterable[str]) -> None:
    """Raise UsageError for an option that no format knows which is asked for, by --format, a recipe or a budget."""
    names = FORMATS if options.has_budget else dict.fromkeys([options.format, *recipe_formats])
    asked = [FORMATS[name] for name in names]
    values = {"layout": options.layout, "granularity": options.granularity, "scale_rule": options.scale_rule}
    for option, value in values.items():
        if value is not None and not any(value in quant_format.choices.get(option, ()) for quant_format in asked):
            raise UsageError(f"--{option.replace('_', '-')} {value}: {_advice(asked, option, value)}")


def idle_notes(options: Options, layers: Mapping[str, Layer], preset: Preset, class_name: str | None) -> Iterator[str]:
    """Yield a sentence for what was asked for and changes nothing, or fits another model."""
    if options.allow_unaligned_k and not any(layer.scheme.layout.tuned_K > 1 for layer in layers.values()):
        yield "--allow-unaligned-k has no effect: only shuffled MXFP4 wants K in multiples of 256"
    own = find_preset(class_name)
    if preset.name not in (own.name, GENERIC) and class_name:
        instead = f"{own.name} does" if own.name != GENERIC else "no preset does"
        yield f"preset {preset.name} does not speak of {class_name}; {instead}"


def _advice(asked: list[QuantFormat], option: str, value: str) -> str:
    known = [
        f"{quant_format} knows {', '.join(names)}"
        for quant_format in asked
        if (names := quant_format.choices.get(option))
    ]
    if known:
        return f"{'; '.join(known)}. Choose one of them."
    able = ", ".join(name for name, quant_format in FORMATS.items() if value in quant_format.choices.get(option, ()))
    return f"has no effect on {' and '.join(map(str, asked))}, only on {able}. Leave it out."
