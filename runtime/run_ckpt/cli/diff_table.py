"""Two results side by side, as rich tables."""

from pathlib import Path
from typing import Any

from rich.console import Console

from run_ckpt.cli.names import DottedName, plain
from run_ckpt.cli.tables import make_table
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.diff import Difference, Outcome, ResultDiff


def print_diff(console: Console, found: ResultDiff, names: tuple[Path, Path]) -> None:
    """Print the options that differ, the tensors that differ, and the sums."""
    a, b = (str(name) for name in names)
    for key, (before, after) in found.options.items():
        console.print(plain(f"{key}: {_show(before)} -> {_show(after)}"))
    if found.differences:
        table = make_table(None, ("tensor", "count", "stored as", "size", "worst\nSQNR dB"))
        for row in found.differences:
            table.add_row(DottedName(row.name), str(row.count), *map(plain, _cells(row)))
        console.print(table)
    change = found.b_nbytes - found.a_nbytes
    console.print(
        plain(
            f"{a} -> {b}: {sum(row.count for row in found.differences)} tensors differ, {found.n_same} are alike;"
            f" {format_nbytes(found.a_nbytes)} -> {format_nbytes(found.b_nbytes)}"
            f" ({'-' if change < 0 else '+'}{format_nbytes(abs(change))})"
        )
    )


def _cells(row: Difference) -> tuple[str, str, str]:
    """Return format, size and SQNR of both; one word where both have the same."""
    pairs = [(_stored(row.a), _stored(row.b)), (_size(row.a), _size(row.b)), (_sqnr(row.a), _sqnr(row.b))]
    stored, size, sqnr = (a if a == b else f"{a} -> {b}" for a, b in pairs)
    return stored, size, sqnr


def _stored(outcome: Outcome | None) -> str:
    return outcome.stored_as if outcome else "absent"


def _size(outcome: Outcome | None) -> str:
    return format_nbytes(outcome.nbytes) if outcome else "-"


def _sqnr(outcome: Outcome | None) -> str:
    return "-" if outcome is None or outcome.sqnr_db is None else f"{outcome.sqnr_db:.2f}"


def _show(value: Any) -> str:
    """Return an option's value in words: rules are pairs of a pattern and a format."""
    if isinstance(value, (list, tuple)) and value:
        return ", ".join(" ".join(map(str, one)) if isinstance(one, (list, tuple)) else str(one) for one in value)
    return "none" if value in (None, [], ()) else str(value)
