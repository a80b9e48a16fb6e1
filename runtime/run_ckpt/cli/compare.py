"""`run-ckpt compare`: what quantizing costs in pictures and text."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from run_ckpt.cli.lines import say
from run_ckpt.cli.model_options import pipeline_arguments, pipeline_options, placement, placement_options
from run_ckpt.contract.errors import UsageError

if TYPE_CHECKING:  # they import torch
    from run_ckpt.tools.compare.pipelines import PipelineComparison
    from run_ckpt.tools.compare.text import TextComparison

_FOLDER = click.Path(path_type=Path)
# A path, or what it is called on the Hub.
_NAME = click.Path()
_FIGURES, _PICTURE = "comparison.json", "comparison.png"
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option(
    "--model-path", required=True, help="BASE: the unconverted pipeline or language model, folder or Hub repo."
)
@click.option(
    "--transformer-path", "outputs", type=_NAME, multiple=True, required=True, help="Converted folder, or several."
)
@click.argument("more_outputs", metavar="[OUT2 ...]", type=_NAME, nargs=-1)
@click.option("--prompts", type=_FILE, help="A text file with one prompt in each line.")
@click.option("--text", type=_FILE, help="For a language model: the text to predict.")
@click.option("--samples", type=click.IntRange(1), help="How many to draw, the prompts in turn.  [default: one each]")
@click.option("--seed", type=int, default=0, show_default=True, help="Of the first sample; each next has the next one.")
@pipeline_options
@click.option("--lpips", is_flag=True, help="Measure LPIPS too; needs torchvision, which fetches AlexNet once.")
@click.option(
    "--context", type=click.IntRange(2), default=512, show_default=True, help="Tokens in a window of the text."
)
@click.option("--output", type=_FOLDER, help="Write comparison.json and the picture comparison.png to this folder.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--fail-under", metavar="FIGURE=VALUE", multiple=True, help="Exit 1 if a result has less, such as psnr=30."
)
@click.option("--fail-over", metavar="FIGURE=VALUE", multiple=True, help="Exit 1 if a result has more, such as kl=0.1.")
@placement_options
def compare(
    outputs: tuple[str, ...],
    more_outputs: tuple[str, ...],
    output: Path | None,
    as_json: bool,
    fail_under: tuple[str, ...],
    fail_over: tuple[str, ...],
    **options: Any,
) -> None:
    """Compare what BASE and converted models make of the same prompts and seeds, or of a text.

    \b
    Pipelines: latents after every step, frames, a picture of what differs.
    Language models: perplexity and KL divergence.

    \b
    Examples:
      run-ckpt compare --model-path FLUX --transformer-path flux-mxfp4 flux-fp8 \\
        --prompts prompts.txt --output cmp
      run-ckpt compare --model-path FLUX --transformer-path flux-mxfp4 \\
        --prompts prompts.txt --fail-under psnr=30
      run-ckpt compare --model-path LLAMA --transformer-path llama-mxfp4 \\
        --text wiki.txt --fail-over kl=0.05
    """
    if bool(options["prompts"]) == bool(options["text"]):
        raise UsageError("give either --prompts FILE, for a pipeline, or --text FILE, for a language model.")
    from run_ckpt.storage.pipelines import check_base
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.compare.figures import faults, measured_figures, parse_limits

    figures = measured_figures(of_text=bool(options["text"]), with_lpips=options["lpips"])
    limits = parse_limits(figures, fail_under, fail_over)
    check_base(options["model_path"], is_pipeline=not options["text"])
    if output:
        from run_ckpt.storage.atomic import check_file

        output.mkdir(parents=True, exist_ok=True)
        for name in (_FIGURES, _PICTURE):
            check_file(output / name)
    results = tuple(map(local_path, (*outputs, *more_outputs)))
    found = _compare(options.pop("model_path"), results, options)
    if output:
        _write(found, output)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
    else:
        from run_ckpt.cli.comparison_tables import print_comparison
        from run_ckpt.cli.tables import make_console

        print_comparison(make_console(), found)
    beyond = faults(found.results, limits)
    for fault in beyond:
        say(f"fault: {fault}", err=True)
    if beyond:
        sys.exit(1)


def _compare(base: str, outputs: tuple[Path, ...], options: Mapping[str, Any]) -> PipelineComparison | TextComparison:
    from run_ckpt.cli.progress import show_progress

    place = placement(options)
    with show_progress() as progress:
        if options["text"]:
            from run_ckpt.storage.files import read_small
            from run_ckpt.tools.compare.text import compare_texts

            text = read_small(options["text"]).decode(errors="replace")
            return compare_texts(base, outputs, text, options["context"], place, progress=progress, say=progress.log)
        from run_ckpt.tools.compare.pipelines import Request, compare_pipelines
        from run_ckpt.tools.compare.trajectory import read_samples

        samples = read_samples(options["prompts"], options["samples"], options["seed"])
        request = Request(samples, pipeline_arguments(options), options["lpips"])
        return compare_pipelines(base, outputs, request, place, progress=progress, say=progress.log)


def _write(found: PipelineComparison | TextComparison, folder: Path) -> None:
    from run_ckpt.storage.atomic import write_durably
    from run_ckpt.tools.compare.pipelines import PipelineComparison

    write_durably(folder / _FIGURES, json.dumps(found.to_json(), indent=1).encode())
    if isinstance(found, PipelineComparison):
        from run_ckpt.tools.compare.picture import draw_comparison

        picture = BytesIO()
        draw_comparison(found).save(picture, "png")
        write_durably(folder / _PICTURE, picture.getvalue())
    _note(f"wrote {folder}")


def _note(line: str) -> None:
    click.echo(line, err=True)
