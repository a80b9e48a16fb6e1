"""`run-ckpt`: look at, check and rewrite converted checkpoints; run.py, compare.py and publish.py have the rest."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from run_ckpt.cli import publish
from run_ckpt.cli.compare import compare
from run_ckpt.cli.run import bench, generate
from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.contract.layouts import LAYOUTS
from run_ckpt.version import VERSION

_NAME = "run-ckpt"
_FOLDER = click.Path(path_type=Path)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line; exit 0 done, 1 a fault was found or met, 2 wrong usage."""
    try:
        run_ckpt(args, prog_name=_NAME)
    except (CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, UsageError) else 1)


@click.group(
    name=_NAME,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit code: 0 done, 1 a fault was found or met, 2 wrong usage.",
)
@click.version_option(VERSION, prog_name=_NAME)
def run_ckpt() -> None:
    """Look at, check, rewrite and run what convert-ckpt made.

    OUTPUT is a converted checkpoint: the folder of a component, or that of a pipeline's components.

    \b
    Examples:
      run-ckpt inspect flux-mxfp4
      run-ckpt verify flux-mxfp4 --source flux
      run-ckpt dequantize flux-mxfp4 flux-bf16
      run-ckpt relayout flux-mxfp4 flux-mxfp4-plain --layout plain
      run-ckpt report flux-mxfp4 --output report.html
      run-ckpt generate --model-path FLUX --transformer-path flux-mxfp4 --prompt "a cat" --output cat.png
      run-ckpt compare --model-path FLUX --transformer-path flux-mxfp4 --prompts prompts.txt
      run-ckpt push flux-mxfp4 me/flux-mxfp4
    """


for command in (generate, compare, bench, *publish.COMMANDS):
    run_ckpt.add_command(command)


@run_ckpt.command()
@click.argument("output", type=_FOLDER)
@click.option("--all", "every_layer", is_flag=True, help="A row for each layer; default: like blocks in one row.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every layer.")
@click.option("--device", help="Show which backend would run the layers on this torch device, and why not the others.")
def inspect(output: Path, every_layer: bool, as_json: bool, device: str | None) -> None:
    """Show what OUTPUT is: sizes, layers, errors, and what was kept and why.

    Reads the manifest alone; run-ckpt verify checks that it is true.

    \b
    Examples:
      run-ckpt inspect flux-mxfp4
      run-ckpt inspect flux-mxfp4 --device cuda
    """
    from run_ckpt.storage.components import find_components
    from run_ckpt.tools.summary import inspect_component

    inspections = [
        inspect_component(name, path, every_layer=every_layer or as_json)
        for name, path in find_components(output).items()
    ]
    if device is not None:
        _inspect_backends(output, device, as_json)
        return
    if as_json:
        click.echo(json.dumps([inspection.to_json() for inspection in inspections], indent=1))
        return
    from run_ckpt.cli.tables import make_console, print_inspection

    for inspection in inspections:
        print_inspection(make_console(), inspection)


def _inspect_backends(output: Path, device: str, as_json: bool) -> None:
    from run_ckpt.backends.availability import device_availability
    from run_ckpt.cli.tables import make_console, print_availability
    from run_ckpt.storage.components import find_components

    for name, path in find_components(output).items():
        availability = device_availability(path, device)
        if as_json:
            click.echo(json.dumps({"component": name, **availability.to_json()}, indent=1))
        else:
            print_availability(make_console(), name, availability)


@run_ckpt.command()
@click.argument("output", type=_FOLDER)
@click.option("--source", type=_FOLDER, help="What OUTPUT was made from: decode every block and compare.")
def verify(output: Path, source: Path | None) -> None:
    """Check every file of OUTPUT against its manifest, and against its source if given.

    Without --source: sizes, hashes, headers, scales, padding, index, config. With it also: every
    weight's SQNR and largest error, and every copied tensor bit for bit. Lists all faults; exit 1
    if there is any.

    \b
    Examples:
      run-ckpt verify flux-mxfp4
      run-ckpt verify flux-mxfp4 --source flux
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.cli.tables import make_console, print_measured
    from run_ckpt.tools.verify.component import verdict, verify_output

    with show_progress() as progress:
        reports = verify_output(output, source, progress)
    for report in reports:
        if report.measured:
            print_measured(make_console(), report)
        for fault in report.faults:
            click.echo(f"fault: {report.name + '/' if report.name else ''}{fault}", err=True)
    click.echo(verdict(reports))
    if any(report.faults for report in reports):
        sys.exit(1)


@run_ckpt.command()
@click.argument("output", type=_FOLDER)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "source"]),
    default="bfloat16",
    show_default=True,
    help="Dtype of the weights that were quantized; source: what each had there.",
)
def dequantize(output: Path, folder: Path, dtype: str) -> None:
    """Write OUTPUT to DIR as a plain checkpoint that from_pretrained loads.

    Quantized weights become numbers again, under the source's names; all else stays bit for bit.

    \b
    Example:
      run-ckpt dequantize flux-mxfp4 flux-bf16
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.tools.rewrite.dequantize import dequantize as write

    with show_progress() as progress:
        write(output, folder, dtype=dtype, progress=progress)
    click.echo(f"Dequantized {output} to {folder}.")


@run_ckpt.command()
@click.argument("output", type=_FOLDER)
@click.argument("folder", metavar="DIR", type=_FOLDER)
@click.option("--layout", type=click.Choice(LAYOUTS), required=True, help="Storage order of MXFP4 weights and scales.")
@click.option("--dialect", type=click.Choice(DIALECTS), help="Default: mxfp4 for aiter, quark for plain.")
def relayout(output: Path, folder: Path, layout: str, dialect: str | None) -> None:
    """Write OUTPUT to DIR with its MXFP4 layers in another layout.

    A pure permutation: no value changes, and going back gives the same files.

    \b
    Examples:
      run-ckpt relayout flux-mxfp4 flux-mxfp4-plain --layout plain
      run-ckpt relayout llama-mxfp4 llama-vllm --layout plain --dialect compressed-tensors
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.tools.rewrite.relayout import relayout as write

    with show_progress() as progress:
        write(output, folder, layout=layout, dialect=dialect, progress=progress)
    click.echo(f"Wrote {output} to {folder} in layout {layout}.")
