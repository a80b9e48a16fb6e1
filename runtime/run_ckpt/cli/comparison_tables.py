"""What run-ckpt compare found, as rich tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from run_ckpt.cli.names import plain
from run_ckpt.tools.compare.figures import PipelineErrors, TextErrors

if TYPE_CHECKING:
    from run_ckpt.tools.compare.pipelines import PipelineComparison
    from run_ckpt.tools.compare.text import TextComparison

_STEP_COLUMNS = ("step", "SNR dB\nmedian", "SNR dB\nsummed", "cosine", "MAE", "RMSE", "largest")
# Figure -> its heading and how it is written.
_COLUMNS = {
    "snr": ("latent SNR\ndB median", ".2f"),
    "snr_summed": ("latent SNR\ndB summed", ".2f"),
    "psnr": ("PSNR dB\nmedian", ".2f"),
    "psnr_worst": ("PSNR dB\nworst", ".2f"),
    "ssim": ("SSIM\nmedian", ".4f"),
    "ssim_worst": ("SSIM\nworst", ".4f"),
    "lpips": ("LPIPS\nmedian", ".4f"),
    "perplexity": ("perplexity", ".4f"),
    "perplexity_ratio": ("times\nBASE's", ".4f"),
    "kl": ("KL\nnats/token", ".5f"),
    "kl_worst": ("KL worst\nwindow", ".5f"),
    "same_top": ("same top\ntoken", ".2%"),
}


def print_comparison(console: Console, found: PipelineComparison | TextComparison) -> None:
    """Print the latents of each result step by step where there are any, then a row for each result."""
    results: Sequence[PipelineErrors | TextErrors] = found.results
    for result in results:
        if isinstance(result, PipelineErrors):
            # Titles of their own lines: a table would fold them to its width.
            console.print(f"{plain(result.name)}: latents after each step", soft_wrap=True)
            console.print(_steps_table(result))
    shown = [figure for figure in _COLUMNS if figure in results[0].figures]
    console.print(plain(found.title), soft_wrap=True)
    table = _table(("result", *(_COLUMNS[figure][0] for figure in shown)))
    for result in results:
        table.add_row(plain(result.name), *(format(result.figures[figure], _COLUMNS[figure][1]) for figure in shown))
    console.print(table)


def _steps_table(result: PipelineErrors) -> Table:
    table = _table(_STEP_COLUMNS)
    for number, sums in enumerate(result.steps):
        snr = (f"{result.median_snr_db(number):.2f}", f"{sums.snr_db:.2f}")
        errors = (f"{value:.4g}" for value in (sums.mae, sums.rmse, sums.max_abs))
        table.add_row(str(number + 1), *snr, f"{sums.cosine:.6f}", *errors)
    return table


def _table(columns: Sequence[str]) -> Table:
    table = Table(header_style="bold")
    table.add_column(columns[0], overflow="fold")
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table
