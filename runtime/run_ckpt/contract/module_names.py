"""Module names that lie in numbered blocks: ``transformer_blocks.3.attn.to_q``."""

import re

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
