"""What SGLang's runtime calls each linear, and which of its ignore lists reach too far."""

from collections.abc import Collection, Iterable, Mapping

from convert_ckpt.plan.preset import Preset, fill_pattern, pattern_regex


def sglang_prefixes(modules: Iterable[str], preset: Preset, linears: Collection[str]) -> dict[str, str | None]:
    """Return the name under which SGLang looks each module up, None where it does not quantize it.

    linears: all linear modules of the checkpoint, which tell variants apart and number the blocks.
    """
    names = dict(preset.sglang)
    for condition, others in preset.sglang_if.items():
        if any(pattern_regex(condition).fullmatch(linear) for linear in linears):
            names.update(others)
    offsets = {container: _count_blocks(follows, linears) for container, follows in preset.index_follows.items()}
    return {module: _prefix(module, names, offsets) for module in modules}


def overmatched(ignored: Mapping[str, str | None], quantized: Mapping[str, str | None], *, any_part: bool) -> list[str]:
    """Return a sentence for each ignore entry that also matches a quantized linear.

    Both map module -> SGLang prefix. any_part: as SGLang's ``fp8`` does, which matches an entry against
    any run of dotted parts (srt/layers/quantization/utils.py:49-125), not the whole name as ``modelopt``.
    Such a layer is dequantized at load: right numbers, no saving; but with block scales SGLang drops
    the scale (loader/fsdp_load.py, _maybe_dequantize_fp8), and the numbers are wrong.
    """
    targets = [(name, module) for module, prefix in quantized.items() for name in (module, prefix) if name]
    sentences = []
    for entry in sorted({name for pair in ignored.items() if pair[1] for name in pair if name}):
        hit = sorted({module for name, module in targets if _matches(entry, name, any_part)})
        if hit:
            sentences.append(f"SGLang will also load {hit[0]}{_and_more(hit)} in BF16: its ignore list says {entry}")
    return sentences


def _matches(entry: str, name: str, any_part: bool) -> bool:
    return f".{entry}." in f".{name}." if any_part else entry == name


def _prefix(module: str, names: Mapping[str, str], offsets: Mapping[str, int]) -> str | None:
    for pattern, runtime in names.items():
        match = pattern_regex(pattern).fullmatch(module)
        if match:
            captured = match.groups()
            offset = offsets.get(pattern.split(".")[0])
            if offset is not None:
                captured = (str(int(captured[0]) + offset), *captured[1:])
            return fill_pattern(runtime, captured)
    return None


def _count_blocks(container: str, linears: Collection[str]) -> int:
    parts = (linear.split(".") for linear in linears)
    return len({part[1] for part in parts if part[0] == container and len(part) > 1})


def _and_more(names: list[str]) -> str:
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
