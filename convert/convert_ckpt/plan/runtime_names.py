"""What a target's runtime calls each linear, and which entries of an ignore list reach which name there."""

from collections.abc import Collection, Iterable, Mapping, Set, Sized

from convert_ckpt.plan.preset import PLAIN_RUNTIME, Runtime
from run_ckpt.contract.module_names import fill_pattern, pattern_regex
from run_ckpt.contract.reading import PART, TEXT


def runtime_names(modules: Iterable[str], runtime: Runtime, linears: Collection[str]) -> dict[str, str | None]:
    """Return the name under which the runtime looks each module up, None where it does not quantize it.

    linears: all linear modules of the checkpoint, which tell variants apart and number the blocks.
    """
    if runtime == PLAIN_RUNTIME:
        return {module: module for module in modules}
    names = dict(runtime.names)
    for condition, others in runtime.names_if.items():
        if any(pattern_regex(condition).fullmatch(linear) for linear in linears):
            names.update(others)
    offsets = {container: _count_blocks(follows, linears) for container, follows in runtime.index_follows.items()}
    return {module: _name(module, names, offsets) for module in modules}


def overmatched(
    ignored: Mapping[str, str | None], quantized: Mapping[str, str | None], matching: str, title: str = "SGLang"
) -> list[str]:
    """Return a sentence for each ignore entry that also matches a quantized linear.

    Both map module -> name in the runtime, and both spellings count. Where such a layer is dequantized at load its
    numbers are right and nothing is saved; otherwise they are wrong.
    """
    entries = ignore_entries(ignored)
    hit: dict[str, set[str]] = {}
    for module, runtime in quantized.items():
        for name in {module, runtime or module}:
            for entry in find_entries(entries, name, matching):
                hit.setdefault(entry, set()).add(module)
    return [
        f"{title} will also load {min(modules)}{and_more(modules)} in BF16: its ignore list says {entry}"
        for entry, modules in sorted(hit.items())
    ]


def ignore_entries(ignored: Mapping[str, str | None]) -> set[str]:
    """Return both spellings of the linears that the runtime would quantize: module -> its name there, "" for none."""
    return {name for pair in ignored.items() if pair[1] for name in pair if name}


def find_entries(entries: Set[str], name: str, matching: str) -> set[str]:
    """Return which entries of an ignore list reach a name, as SGLang's or vLLM's own code compares them.

    PART: any run of dotted parts, as SGLang's ``fp8`` (srt/layers/quantization/utils.py:49-125). TEXT: any part of the
    text, as vLLM's ``modelopt``. NAME: all of it.
    """
    if matching == TEXT:
        return {entry for entry in entries if entry in name}
    parts = name.split(".") if matching == PART else [name]
    runs = {".".join(parts[i:j]) for i in range(len(parts)) for j in range(i + 1, len(parts) + 1)}
    return runs & entries


def _name(module: str, names: Mapping[str, str], offsets: Mapping[str, int]) -> str | None:
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


def and_more(names: Sized) -> str:
    """Return what follows the first of these names in a sentence."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
