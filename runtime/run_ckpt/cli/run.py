"""The commands of `run-ckpt` that run a converted checkpoint: generate and bench."""

import json
from pathlib import Path
from typing import Any

import click

from run_ckpt.cli.model_options import (
    DTYPES,
    activations_option,
    default_device,
    device_option,
    pipeline_arguments,
    pipeline_options,
    placement,
    placement_options,
)
from run_ckpt.extras import naming_extras

_FOLDER = click.Path(path_type=Path)
# A path, or what it is called on the Hub.
_NAME = click.Path()
_SMALL_M = "1,16,256,4096"


def _parse_rows(_context: click.Context, _parameter: click.Parameter, text: str) -> tuple[int, ...]:
    try:
        rows = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} is no list of numbers such as {_SMALL_M}.") from error
    if min(rows) < 1:
        raise click.BadParameter("each M must be at least 1.")
    return rows


@click.command()
@click.option("--model-path", required=True, help="The pipeline: a folder or a Hub repo, in diffusers' layout.")
@click.option("--transformer-path", type=_NAME, required=True, help="Converted folder for its transformer.")
@click.option("--transformer-2-path", type=_NAME, help="Converted folder for its transformer_2 (Wan 2.2).")
@click.option("--prompt", required=True, help="What to generate.")
@click.option("--output", type=_FOLDER, required=True, help="The image (.png, .jpg, .webp) or video (.mp4, .gif).")
@pipeline_options
@click.option("--seed", type=int, default=0, show_default=True)
@placement_options
@naming_extras("run-ckpt generate", "diffusers")
def generate(
    model_path: str,
    transformer_path: str,
    transformer_2_path: str | None,
    prompt: str,
    output: Path,
    seed: int,
    **options: Any,
) -> None:
    """Generate an image or a video with a diffusers pipeline and a converted transformer.

    \b
    Examples:
      run-ckpt generate --model-path Tongyi-MAI/Z-Image-Turbo \\
        --transformer-path OUT/transformer --prompt "a lighthouse at dusk" \\
        --steps 9 --guidance-scale 0 --output image.png
      run-ckpt generate --model-path Wan-AI/Wan2.2-T2V-A14B-Diffusers \\
        --transformer-path OUT/transformer --prompt "a cat walks" \\
        --transformer-2-path OUT/transformer_2 --output video.mp4
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.storage.pipelines import check_base
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.generate import Request, check_output, load_pipeline, load_transformers
    from run_ckpt.tools.generate import generate as run

    check_output(output)
    check_base(model_path, is_pipeline=True)
    paths = {"transformer": transformer_path, "transformer_2": transformer_2_path}
    given = {name: local_path(path) for name, path in paths.items() if path}
    place = placement(options)
    with show_progress() as progress:
        loaded = load_transformers(given, place, progress, progress.log)
        pipeline = load_pipeline(model_path, loaded, place, progress.log)
    run(pipeline, Request(prompt, output, seed, pipeline_arguments(options)), place.device, click.echo)


@click.command()
@click.argument("output", type=_NAME)
@device_option
@click.option("--backend", help="Measure this one.  [default: the first that can run]")
@activations_option
@click.option(
    "--rows", default=_SMALL_M, show_default=True, callback=_parse_rows, help="The values of M, tokens in a batch."
)
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True, help="Of activations.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def bench(
    output: str,
    device: str | None,
    backend: str | None,
    activations: str | None,
    rows: tuple[int, ...],
    dtype: str,
    as_json: bool,
) -> None:
    """Time the layers of OUTPUT against BF16, and loading it against reading its files.

    \b
    Examples:
      run-ckpt bench flux-mxfp4
      run-ckpt bench flux-mxfp4 --device cuda --backend triton --rows 1,4096
    """
    import torch

    from run_ckpt.cli.tables import make_console, print_bench
    from run_ckpt.storage.components import find_components
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.bench import bench_component

    for name, path in find_components(local_path(output)).items():
        result = bench_component(
            path,
            device=device or default_device(),
            backend=backend,
            activations=activations,
            rows=rows,
            dtype=getattr(torch, dtype),
            say=lambda text: click.echo(f"bench: {text}", err=True),
        )
        if as_json:
            click.echo(json.dumps({"component": name, **result.to_json()}, indent=1))
        else:
            print_bench(make_console(), name, result)
