"""Inspections and verify reports as rich tables; for the command line only."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console, JustifyMethod
from rich.table import Table

from run_ckpt.cli.names import DottedName, plain
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.summary import CheckpointSummary, Inspection

if TYPE_CHECKING:  # it imports torch
    from run_ckpt.backends.availability import Availability
    from run_ckpt.tools.bench import Bench
    from run_ckpt.tools.verify.component import ComponentReport

_PLAIN_WIDTH = 160
# What may be narrower than its text; all other columns stay whole.
_FOLDED = {"layer", "linear layer", "tensor", "reason", "not taken because", "why"}
_NUMERIC = {
    *("count", "layers", "N x K", "SQNR dB", "worst\nSQNR dB", "manifest", "largest\nerror"),
    *("M", "time\nms", "BF16\nms", "speed\nup", "TFLOP/s", "weights\nGB/s"),
}


def make_console() -> Console:
    """Return the console for results: the terminal's width, or wide enough for any name where there is none."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=_PLAIN_WIDTH, color_system=None)


def print_inspection(console: Console, inspection: Inspection) -> None:
    """Print the quantized layers, the linear layers that were kept, and a summary, which is read first."""
    layers = make_table("quantized", ("layer", "count", "format", "N x K", "scale", "worst\nSQNR dB", "largest\nerror"))
    for row in inspection.layers:
        measured = (_number(row.sqnr_db, ".2f"), _number(row.max_abs_error, ".4g"))
        layers.add_row(
            DottedName(row.module), str(row.count), row.format, f"{row.N} x {row.K}", plain(row.scale), *measured
        )
    console.print(layers)
    console.print()
    if inspection.kept_linears:
        kept = make_table("kept", ("linear layer", "count", "dtype", "N x K", "reason"))
        for linear in inspection.kept_linears:
            size = f"{linear.N} x {linear.K}"
            kept.add_row(DottedName(linear.module), str(linear.count), linear.dtype, size, plain(linear.reason))
        console.print(kept)
        console.print()
    console.print(_summary_table(inspection.summary))


def print_measured(console: Console, report: ComponentReport) -> None:
    """Print the errors that verify measured, layer by layer."""
    table = make_table(report.name or None, ("layer", "format", "N x K", "SQNR dB", "manifest", "largest\nerror"))
    for measured in report.measured:
        layer = measured.layer
        table.add_row(
            DottedName(layer.module),
            layer.format.name,
            f"{layer.N} x {layer.K}",
            _number(measured.sqnr_db, ".2f"),
            _number(layer.sqnr_db, ".2f"),
            f"{measured.max_abs_error:.4g}",
        )
    console.print(table)


def print_availability(console: Console, component: str, availability: Availability) -> None:
    """Print the backends in order of preference, with what each would run and why not the rest."""
    title = f"{component + ': ' if component else ''}backends on {availability.device}"
    table = make_table(title, ("backend", "layers", "activations, its own first", "not taken because"))
    for row in availability.rows:
        reasons = "\n".join(f"{reason} ({count} layers)" for reason, count in row.reasons.items())
        activations = "\n".join(f"{name}: {', '.join(taken)}" for name, taken in row.activations.items())
        table.add_row(row.name, str(row.n_layers), activations, plain(reasons))
    console.print(table)
    if availability.n_unsupported:
        console.print(f"{availability.n_unsupported} layers run on none of them unless it is asked for by name.")
    weights, load = (format_nbytes(n) for n in (availability.weights_nbytes, availability.load_nbytes))
    console.print(f"memory: {weights} of weights, about {load} while they are loaded")
    if not availability.is_here:
        console.print("Taken as installed there: AITER, Petit and Triton, as far as each serves that GPU.")


def print_bench(console: Console, component: str, bench: Bench) -> None:
    """Print the times of layers and of loading."""
    activations = " and ".join(sorted({row.activations for row in bench.layers}))
    title = f"{component + ': ' if component else ''}layers on {bench.device}, {activations} activations"
    columns = (
        "format",
        "N x K",
        "layers",
        "backend",
        "M",
        "time\nms",
        "BF16\nms",
        "speed\nup",
        "TFLOP/s",
        "weights\nGB/s",
    )
    table = make_table(title, columns)
    for row in bench.layers:
        times = (f"{row.seconds * 1e3:.3f}", f"{row.bf16_seconds * 1e3:.3f}", f"{row.ratio:.2f}")
        rates = (f"{row.tflops:.3f}", f"{row.gbytes_per_s:.2f}")
        shape = f"{row.N} x {row.K}"
        table.add_row(row.format, shape, str(row.count), row.backend, str(row.M), *times, *rates)
    console.print(table)
    if bench.load is None:
        console.print(f"load: not measured: {plain(str(bench.why_no_load))}")
        return
    load = bench.load
    console.print(
        f"load: {load.seconds:.2f} s, {load.ratio:.2f} times reading the files ({load.read_seconds:.2f} s);"
        f" model {format_nbytes(load.model_nbytes)}, peak memory {format_nbytes(load.peak_nbytes)}"
    )


def _summary_table(summary: CheckpointSummary) -> Table:
    table = Table(title=plain(summary.component) or None, show_header=False, box=None, title_justify="left")
    source = summary.source + (f" @ {summary.source_revision[:12]}" if summary.source_revision else "")
    saved = summary.source_nbytes / max(1, summary.output_nbytes)
    sqnr = f"mean {_number(summary.mean_sqnr_db, '.2f')} dB, worst {_number(summary.worst_sqnr_db, '.2f')} dB"
    rows = {
        "source": source,
        **({"it was": summary.source_quantization} if summary.source_quantization else {}),
        "made by": summary.tool,
        "format": f"{summary.format}, layout {summary.layout}, for {summary.target_arch} GPUs",
        "dialect": summary.dialect,
        "size": f"{format_nbytes(summary.source_nbytes)} -> {format_nbytes(summary.output_nbytes)}"
        f" ({saved:.2f} times smaller)",
        "quantized": f"{summary.n_layers} of {summary.n_tensors} tensors, {summary.share_of_parameters:.1%} of the"
        " parameters",
        **({"SQNR": f"{sqnr} ({summary.worst_layer})"} if summary.worst_layer else {}),
        **({"right for": _right_for(summary)} if summary.targets else {}),
        **{f"not for {name}": reason for name, reason in summary.targets.items() if reason},
    }
    for key, value in rows.items():
        table.add_row(key, plain(value))
    return table


def _right_for(summary: CheckpointSummary) -> str:
    return ", ".join(name for name, reason in summary.targets.items() if reason is None)


def make_table(title: str | None, columns: tuple[str, ...]) -> Table:
    """Return a table for 80 columns: only names and reasons are folded, and no lines take room."""
    table = Table(
        title=title and plain(title),
        title_justify="left",
        title_style="bold",
        header_style="bold",
        box=None,
        pad_edge=False,
    )
    for column in columns:
        justify: JustifyMethod = "right" if column in _NUMERIC else "left"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=column not in _FOLDED, vertical="top")
    return table


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)
