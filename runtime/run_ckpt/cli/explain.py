"""The command of `run-ckpt` that sets two results side by side: diff."""

import json
from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)


@click.command()
@click.argument("a", type=_FOLDER)
@click.argument("b", type=_FOLDER)
@click.option("--all", "every_layer", is_flag=True, help="A row for each layer; default: like blocks in one row.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every layer.")
def diff(a: Path, b: Path, every_layer: bool, as_json: bool) -> None:
    """Show what result B did differently from result A: options, formats, bytes, errors.

    Reads the manifests alone.

    \b
    Example:
      run-ckpt diff flux-mxfp4 flux-mixed
    """
    from run_ckpt.tools.diff import diff_results
    from run_ckpt.tools.publish.rows import read_result

    found = diff_results(read_result(a), read_result(b), every_layer=every_layer or as_json)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    from run_ckpt.cli.diff_table import print_diff
    from run_ckpt.cli.tables import make_console

    print_diff(make_console(), found, (a, b))
