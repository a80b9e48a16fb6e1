"""What SGLang's runtime calls each linear, and which of its ignore lists reach too far."""

from collections.abc import Collection, Mapping

from convert.preset import Preset, fill_pattern, pattern_regex


def sglang_prefix(module: str, preset: Preset, modules: Collection[str]) -> str | None:
    """Return the name under which SGLang looks ``module`` up, None where it does not quantize it.

    modules: all linear modules of the checkpoint, to count blocks (preset.index_follows).
    """
    for pattern, runtime in preset.sglang.items():
        match = pattern_regex(pattern).fullmatch(module)
        if match:
            captured = match.groups()
            follows = preset.index_follows.get(pattern.split(".")[0])
            if follows:
                captured = (str(int(captured[0]) + _count_blocks(follows, modules)), *captured[1:])
            return fill_pattern(runtime, captured)
    return None


def overmatched(ignored: Mapping[str, str | None], quantized: Mapping[str, str | None]) -> list[str]:
    """Return a sentence for each ignore entry that also matches a quantized linear.

    Both map module -> SGLang prefix. SGLang's ``fp8`` matches an entry against any run of dotted
    parts (srt/layers/quantization/utils.py:49-125); such a layer is dequantized at load: right
    numbers, no saving.
    """
    targets = {name: module for module, prefix in quantized.items() for name in (module, prefix) if name}
    sentences = []
    for entry in sorted({name for pair in ignored.items() if pair[1] for name in pair if name}):
        hit = sorted({module for name, module in targets.items() if f".{entry}." in f".{name}."})
        if hit:
            sentences.append(f"SGLang will also load {hit[0]}{_and_more(hit)} in BF16: its ignore list says {entry}")
    return sentences


def _count_blocks(container: str, modules: Collection[str]) -> int:
    parts = (module.split(".") for module in modules)
    return len({part[1] for part in parts if part[0] == container and len(part) > 1})


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
