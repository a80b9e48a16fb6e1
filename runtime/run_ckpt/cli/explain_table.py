"""An explanation of a tensor, as a rich table."""

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from run_ckpt.cli.names import DottedName, plain
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.explain import Explanation


def print_explanation(console: Console, explanation: Explanation) -> None:
    """Print the name, and what is known of it, a line each."""
    console.print(DottedName(explanation.name))
    table = Table(show_header=False, box=None, pad_edge=False, padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, text in _lines(explanation):
        table.add_row(f"  {what}", plain(text))
    console.print(table)


def _lines(explanation: Explanation) -> Iterator[tuple[str, str]]:
    each = f", {explanation.count} alike" if explanation.count > 1 else ""
    size = " x ".join(map(str, explanation.shape))
    yield "was", f"{explanation.source} {size}{each}, {format_nbytes(explanation.source_nbytes)}"
    is_kept = explanation.stored == explanation.source
    yield "is", "kept as it was" if is_kept else f"{explanation.stored}, {format_nbytes(explanation.nbytes)}"
    yield "decided by", explanation.decided_by
    if explanation.sqnr_db is not None:
        worst = "worst " if explanation.count > 1 else ""
        yield "error", f"{worst}SQNR {explanation.sqnr_db:.2f} dB, largest {explanation.max_abs_error:.4g}"
    if explanation.fused_with:
        yield "fused with", ", ".join(explanation.fused_with)
    for number, change in enumerate(explanation.changes):
        yield "" if number else "to change it", change
