"""`run-ckpt calibrate`: statistics of what goes into the layers of a model, for convert-ckpt."""

import shlex
from pathlib import Path
from typing import Any

import click

from run_ckpt.cli.model_options import device_options, pipeline_arguments, pipeline_options, placement
from run_ckpt.contract.errors import UsageError
from run_ckpt.storage.units import parse_nbytes

_FOLDER = click.Path(path_type=Path)
_FILE = click.Path(exists=True, dir_okay=False, path_type=Path)


@click.command()
@click.option("--model-path", required=True, help="BASE: the pipeline or language model, folder or Hub repo.")
@click.option("--output", type=_FOLDER, required=True, help="Folder for the statistics.")
@click.option("--prompts", type=_FILE, help="A text file with one prompt in each line.  [default: 32 of our own]")
@click.option("--text", type=_FILE, help="For a language model: a text such as it will read.")
@click.option("--samples", type=click.IntRange(2), default=32, show_default=True, help="How many to run.")
@click.option("--seed", type=int, default=1000, show_default=True, help="Of the first sample; each next has the next.")
@pipeline_options
@click.option("--size", "sizes", multiple=True, metavar="WxH", help="Sizes that samples have by turns. Repeatable.")
@click.option(
    "--context", type=click.IntRange(2), default=2048, show_default=True, help="Tokens in a window of the text."
)
@click.option(
    "--hessian",
    default="auto",
    show_default=True,
    help="Correlations to record: full, block=N, none; auto: full for K <= 6144, else blocks of 1024.",
)
@click.option(
    "--fisher", is_flag=True, help="Record by gradients what an error in each output channel does, for budgets."
)
@click.option(
    "--memory", metavar="SIZE", help="For the sums, such as 8GB; runs as often as needed.  [default: no limit]"
)
@device_options
def calibrate(
    model_path: str, output: Path, prompts: Path | None, text: Path | None, samples: int, seed: int, **options: Any
) -> None:
    """Run BASE and record what goes into its linear layers, for convert-ckpt --calibration.

    Every fourth prompt (or window of the text) is held out: it measures what the others chose. A run that was
    stopped, or did not fit into --memory, goes on with the layers that OUTPUT lacks.

    \b
    Examples:
      run-ckpt calibrate --model-path Tongyi-MAI/Z-Image-Turbo \\
        --steps 9 --guidance-scale 0 --output stats
      run-ckpt calibrate --model-path LLAMA --text wiki.txt --output stats \\
        --memory 16GB
    """
    from run_ckpt.storage.pipelines import check_base
    from run_ckpt.tools.calibrate import DEFAULT_PROMPTS, Recording, calibrate_pipeline, calibrate_text

    if prompts and text:
        raise UsageError("give either --prompts FILE, for a pipeline, or --text FILE, for a language model.")
    memory = parse_nbytes(options["memory"]) if options["memory"] else None
    check_base(model_path, is_pipeline=not text)
    recording = Recording(output, options["hessian"], options["fisher"], memory)
    if text:
        from run_ckpt.storage.files import read_small

        written = read_small(text).decode(errors="replace")
        calibrate_text(model_path, written, samples, options["context"], recording, placement(options), click.echo)
    else:
        from run_ckpt.tools.compare.trajectory import read_samples

        drawn = read_samples(prompts or DEFAULT_PROMPTS, samples, seed)
        arguments, sizes = pipeline_arguments(options), [_parse_size(size) for size in options["sizes"]]
        if sizes and (options["width"] or options["height"]):
            raise UsageError("give either --width and --height, for all samples, or --size, by turns.")
        calibrate_pipeline(model_path, drawn, arguments, recording, placement(options), click.echo, sizes)
    command = ["convert-ckpt", model_path, "OUTPUT", "--format", "mxfp4", "--calibration", str(output)]
    click.echo(f"Use them: {shlex.join(command)}")


def _parse_size(text: str) -> tuple[int, int]:
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise UsageError(f"--size {text}: no size. Write width x height in pixels, such as 1024x768.")
    return int(width), int(height)
