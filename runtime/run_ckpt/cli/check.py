"""The commands of `run-ckpt` that look at a converted checkpoint: inspect and verify."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path

import click

from run_ckpt.cli.lines import say
from run_ckpt.contract.file_names import join_names

_FOLDER = click.Path(path_type=Path)
# A path, or what it is called on the Hub.
_NAME = click.Path()


@click.command("inspect")
@click.argument("output", type=_NAME)
@click.option("--all", "every_layer", is_flag=True, help="A row for each layer; default: like blocks in one row.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every layer.")
@click.option(
    "--device",
    help="Show which backend would run the layers there, and why not the others: a torch device such as cuda, or"
    " any GPU's architecture, such as gfx950, gfx942, sm90 or sm120.",
)
def inspect_output(output: str, every_layer: bool, as_json: bool, device: str | None) -> None:
    """Show what OUTPUT is: sizes, layers, errors, and what was kept and why.

    Reads the manifest alone; run-ckpt verify checks that it is true.

    \b
    Examples:
      run-ckpt inspect flux-mxfp4
      run-ckpt inspect flux-mxfp4 --device gfx950
      run-ckpt inspect me/flux-mxfp4
    """
    from run_ckpt.storage.components import find_components
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.summary import inspect_component

    components = find_components(local_path(output, small=device is None))
    if device is not None:
        _show_availability(components, device, as_json)
        return
    inspections = [
        inspect_component(name, path, every_layer=every_layer or as_json) for name, path in components.items()
    ]
    if as_json:
        click.echo(json.dumps([inspection.to_json() for inspection in inspections], indent=1))
        return
    from run_ckpt.cli.tables import make_console, print_inspection

    for inspection in inspections:
        print_inspection(make_console(), inspection)


def _show_availability(components: Mapping[str, Path], device: str, as_json: bool) -> None:
    from run_ckpt.backends.availability import device_availability
    from run_ckpt.cli.tables import make_console, print_availability

    for name, path in components.items():
        availability = device_availability(path, device)
        if as_json:
            click.echo(json.dumps({"component": name, **availability.to_json()}, indent=1))
        else:
            print_availability(make_console(), name, availability)


@click.command()
@click.argument("output", type=_NAME)
@click.option("--source", type=_NAME, help="What OUTPUT was made from: decode every block and compare.")
@click.option("--calibration", type=_FOLDER, help="The statistics OUTPUT was converted with: measure output errors.")
@click.option("--min-sqnr", "min_sqnr_db", type=float, metavar="DB", help="A layer with less is a fault.")
@click.option("--expect", "expected", metavar="HASH", help="The result's hash, as convert-ckpt or its card states it.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def verify(
    output: str,
    source: str | None,
    calibration: Path | None,
    min_sqnr_db: float | None,
    expected: str | None,
    as_json: bool,
) -> None:
    """Check every file of OUTPUT against its manifest, and against its source if given.

    Without --source: sizes, hashes, headers, scales, padding, index, config. With it also: every
    weight's SQNR and largest error, every scale, and every copied tensor bit for bit. Lists all faults; exit 1
    if there is any. A SOURCE of another model is one fault, and no weight is compared. What is in OUTPUT
    says nothing of who made it; --expect ties it to the hash that its publisher states.

    \b
    Examples:
      run-ckpt verify flux-mxfp4
      run-ckpt verify flux-mxfp4 --source black-forest-labs/FLUX.1-dev
      run-ckpt verify flux-mxfp4 --source flux --min-sqnr 18 --json
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.cli.tables import make_console, print_measured
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.verify.component import verdict, verify_output

    path, source_path = local_path(output), source and local_path(source)
    with show_progress() as progress:
        reports = verify_output(
            path, source_path or None, progress, min_sqnr_db=min_sqnr_db, expected=expected, statistics=calibration
        )
    has_faults = any(report.faults for report in reports)
    if as_json:
        found = {"verdict": verdict(reports), "components": [report.to_json() for report in reports]}
        click.echo(json.dumps(found, indent=1))
        sys.exit(1 if has_faults else 0)
    for report in reports:
        if report.measured:
            print_measured(make_console(), report)
        for fault in report.faults:
            say(f"fault: {join_names(report.name, fault)}", err=True)
    say(verdict(reports))
    if has_faults:
        sys.exit(1)
