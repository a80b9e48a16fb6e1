"""The linear layers of a plan, as a rich table."""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from rich.console import Console

from run_ckpt.cli.names import DottedName, plain
from run_ckpt.cli.tables import make_table
from run_ckpt.contract.module_names import block_pattern

_SUFFIX = ".weight"


def print_plan(console: Console, component: Mapping[str, Any], linears: Iterable[Mapping[str, Any]]) -> None:
    """Print what becomes of the linear layers, like blocks in one row. Both as plan_conversion gives them."""
    rows = Counter(
        (
            block_pattern(tensor["name"].removesuffix(_SUFFIX)),
            " x ".join(map(str, tensor["shape"])),
            tensor["format"],
            tensor["reason"],
        )
        for tensor in linears
    )
    table = make_table(component["component"] or None, ("layer", "count", "N x K", "becomes", "why"))
    for (name, shape, outcome, reason), count in rows.items():
        table.add_row(DottedName(name), str(count), shape, outcome, plain(reason))
    console.print(table)
    console.print()
