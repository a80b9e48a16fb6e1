"""Names with dots in a cell of a table: where it is narrow they fold at a dot, not inside a word."""

import re
from collections.abc import Iterator

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.text import Text

from run_ckpt.contract.display import shown

# As wide as most parts between two dots.
_LEAST_WIDTH = 20


class DottedName:
    """A module's or tensor's name, for a cell of a table."""

    def __init__(self, name: str):
        self._name = shown(name)

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(min(len(self._name), _LEAST_WIDTH), len(self._name)).clamp(0, options.max_width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield Text("\n".join(fold_name(self._name, options.max_width)), overflow="fold")


def plain(text: object) -> str:
    """Return markup for rich that shows ``text`` as it is."""
    return escape(shown(text))


def fold_name(name: str, width: int) -> Iterator[str]:
    """Yield lines of at most ``width``: folded at dots and slashes, and at underscores where one part is longer."""
    line = ""
    for part in _parts(name):
        for piece in [part] if len(part) <= width else _pieces(part):
            if line and len(line) + len(piece) > width:
                yield line
                line = ""
            line += piece
    yield line


def _parts(name: str) -> list[str]:
    """ "transformer/blocks.0.to_q" -> "transformer/", "blocks", ".0", ".to_q"."""
    return re.findall(r"\.?[^./]+/?|[./]+", name)


def _pieces(part: str) -> list[str]:
    """ "single_blocks" -> "single_", "blocks"."""
    return re.findall(r"[^_]*_+|[^_]+", part)
