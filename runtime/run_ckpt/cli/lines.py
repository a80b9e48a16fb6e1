"""Lines of text for people: folded at words on a terminal, whole elsewhere."""

import shutil
import sys
import textwrap

import click

from run_ckpt.contract.display import shown


def say(text: str, *, err: bool = False) -> None:
    """Print ``text``; on a terminal a line that is too wide goes on in the next one, indented, at a word.

    What is one word, such as a path, stays in one piece.
    """
    stream, text = sys.stderr if err else sys.stdout, shown(text, lines=True)
    click.echo(fold_lines(text, shutil.get_terminal_size().columns) if stream.isatty() else text, err=err)


def fold_lines(text: str, width: int) -> str:
    """Return ``text`` with each of its lines folded at words to ``width``; what goes on is indented by two more."""
    return "\n".join(_fold(line, width) for line in text.splitlines())


def _fold(line: str, width: int) -> str:
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    return textwrap.fill(
        line, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False, drop_whitespace=True
    )
