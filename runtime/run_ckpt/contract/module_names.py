"""Names of modules and tensors: their numbered block (``transformer_blocks.3.attn.to_q``), and patterns on them."""

import re
from collections.abc import Callable, Collection, Iterable
from functools import cache, lru_cache

_IN_BLOCK = re.compile(r"(?:(?P<stack>.*?)\.)?(?P<block>\d+)\.(?P<projection>.+)")


def split_name(name: str) -> tuple[str, int | None, str]:
    """Return (stack, block, projection); the first number with a name behind it is the block's.

    ``transformer_blocks``, 3, ``attn.to_q``. A name outside of blocks is all projection, its block None.
    """
    match = _IN_BLOCK.fullmatch(name)
    return (match["stack"] or "", int(match["block"]), match["projection"]) if match else ("", None, name)


def block_pattern(name: str) -> str:
    """Return the name with its block number as ``*``, which like modules of all blocks share."""
    stack, block, projection = split_name(name)
    return name if block is None else ".".join(filter(None, (stack, "*", projection)))


def has_experts(linears: Iterable[str]) -> bool:
    """Return whether these are linears of a mixture of experts, one for each expert."""
    return any(".experts." in linear for linear in linears)


@cache
def pattern_regex(pattern: str) -> re.Pattern[str]:
    """Return the regex of a pattern in which ``*`` captures any run of characters."""
    return re.compile("(.*)".join(re.escape(part) for part in pattern.split("*")))


def matching_names(pattern: str, names: Collection[str], end_of: Callable[[str], str] | None = None) -> list[str]:
    """Return those of many names that match a pattern.

    end_of: returns the end of a name that is compared; default: all of it.
    """
    first, inner, last = _pattern_parts(pattern)
    if last is None and end_of is None:
        return [pattern] if pattern in names else []
    # Every name that matches holds it, and most do not.
    text = max((first, *inner, last or ""), key=len)
    found = [name for name in names if text in name]
    return [name for name in found if matches_pattern(pattern, end_of(name) if end_of else name)]


def matches_pattern(pattern: str, name: str) -> bool:
    """True where ``pattern``, in which ``*`` stands for any characters, is ``name``; in linear time."""
    first, inner, last = _pattern_parts(pattern)
    if last is None:
        return name == pattern
    if not (name.startswith(first) and name.endswith(last)):
        return False
    at = len(first)
    for part in inner:
        at = name.find(part, at)
        if at < 0:
            return False
        at += len(part)
    return at + len(last) <= len(name)


@lru_cache(4096)  # a rule may be the name of one module
def _pattern_parts(pattern: str) -> tuple[str, tuple[str, ...], str | None]:
    """Return the text before the first ``*``, those between two, and the one after the last; None without a ``*``."""
    first, *others = pattern.split("*")
    return first, tuple(others[:-1]), others[-1] if others else None


def fill_pattern(pattern: str, captured: tuple[str, ...]) -> str:
    """Return ``pattern`` with its ``*`` replaced by the captured texts, in order."""
    first, *rest = pattern.split("*")
    return first + "".join(text + part for text, part in zip(captured, rest, strict=False))
