"""The commands of `run-ckpt` that say why a result is as it is: explain, and diff for two of them."""

import json
from pathlib import Path

import click

_FOLDER = click.Path(path_type=Path)
# A path, or what it is called on the Hub.
_NAME = click.Path()


@click.command()
@click.argument("a", type=_NAME)
@click.argument("b", type=_NAME)
@click.option("--all", "every_layer", is_flag=True, help="A row for each layer; default: like blocks in one row.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, with every layer.")
def diff(a: str, b: str, every_layer: bool, as_json: bool) -> None:
    """Show what result B did differently from result A: options, formats, bytes, errors.

    Reads the manifests alone.

    \b
    Example:
      run-ckpt diff flux-mxfp4 flux-mixed
    """
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.diff import diff_results
    from run_ckpt.tools.publish.rows import read_result

    results = [read_result(local_path(name, small=True)) for name in (a, b)]
    found = diff_results(*results, every_layer=every_layer or as_json)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1))
        return
    from run_ckpt.cli.diff_table import print_diff
    from run_ckpt.cli.tables import make_console

    print_diff(make_console(), found, (Path(a), Path(b)))


@click.command()
@click.argument("output", type=_NAME)
@click.argument("layer")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def explain(output: str, layer: str, as_json: bool) -> None:
    """Say what became of LAYER in OUTPUT, who decided it, and what would change it.

    LAYER is a layer or tensor as run-ckpt inspect names it, * standing for the number of a block.
    Reads the manifest alone.

    \b
    Examples:
      run-ckpt explain flux-mxfp4 proj_out
      run-ckpt explain flux-mxfp4 "transformer_blocks.*.attn.to_q"
    """
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.explain import explain as find
    from run_ckpt.tools.publish.rows import read_result

    found = find(read_result(local_path(output, small=True)), layer)
    if as_json:
        click.echo(json.dumps([explanation.to_json() for explanation in found], indent=1))
        return
    from run_ckpt.cli.explain_table import print_explanation
    from run_ckpt.cli.tables import make_console

    for explanation in found:
        print_explanation(make_console(), explanation)
