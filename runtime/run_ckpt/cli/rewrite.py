"""The commands of `run-ckpt` that write a converted checkpoint anew: dequantize, relayout and assemble."""

from pathlib import Path

import click

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.layouts import LAYOUTS
from run_ckpt.storage.units import format_nbytes

_FOLDER = click.Path(path_type=Path)
# A path, or what it is called on the Hub.
_NAME = click.Path()
_COMPLETE = "{folder} is complete already: the same, byte for byte."


@click.command()
@click.argument("output", type=_NAME)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "source"]),
    default="bfloat16",
    show_default=True,
    help="Dtype of the weights that were quantized; source: what each had there.",
)
def dequantize(output: str, folder: Path, dtype: str) -> None:
    """Write OUTPUT to DIR as a plain checkpoint that from_pretrained loads.

    Quantized weights become numbers again, under the source's names; all else stays bit for bit.

    \b
    Example:
      run-ckpt dequantize flux-mxfp4 flux-bf16
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.rewrite.dequantize import dequantize as write

    with show_progress() as progress:
        is_new = write(local_path(output), folder, dtype=dtype, progress=progress)
    click.echo(f"Dequantized {output} to {folder}: {_size(folder)}." if is_new else _COMPLETE.format(folder=folder))


@click.command()
@click.argument("output", type=_NAME)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option("--layout", type=click.Choice(LAYOUTS), required=True, help="Storage order of MXFP4 weights and scales.")
@click.option(
    "--dialect",
    type=click.Choice(DIALECTS),
    metavar="NAME",
    help=f"One of {', '.join(DIALECTS)}.  [default: mxfp4 for aiter, quark for plain]",
)
def relayout(output: str, folder: Path, layout: str, dialect: str | None) -> None:
    """Write OUTPUT to DIR with its MXFP4 layers in another layout.

    A pure permutation: no value changes, and going back gives the same files.

    \b
    Examples:
      run-ckpt relayout flux-mxfp4 flux-mxfp4-plain --layout plain
      run-ckpt relayout llama-mxfp4 llama-vllm --layout plain \\
        --dialect compressed-tensors
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.rewrite.relayout import relayout as write

    with show_progress() as progress:
        is_new = write(local_path(output), folder, layout=layout, dialect=dialect, progress=progress)
    done = f"Wrote {output} to {folder} in layout {layout}: {_size(folder)}."
    click.echo(done if is_new else _COMPLETE.format(folder=folder))


@click.command()
@click.argument("output", type=_NAME)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option("--model-path", required=True, help="The pipeline: a folder or a Hub repo, in diffusers' layout.")
def assemble(output: str, folder: Path, model_path: str) -> None:
    """Make DIR a whole pipeline of links: the transformers of OUTPUT, and all else of --model-path.

    For servers that take a pipeline's folder and no transformer by itself, such as vLLM-Omni.

    \b
    Example:
      run-ckpt assemble qwen-fp8 qwen-pipeline --model-path Qwen/Qwen-Image
    """
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.assemble import assemble as link

    link(local_path(output), folder, model_path)
    click.echo(f"Assembled {folder} of {output} and {model_path}.")


def _size(folder: Path) -> str:
    return format_nbytes(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))
