"""The commands of `run-ckpt` that show a converted checkpoint to others: card, report and push."""

from pathlib import Path
from typing import Any

import click

_FOLDER = click.Path(path_type=Path)
# A path, or what it is called on the Hub.
_NAME = click.Path()
_tool_url = click.option(
    "--tool-url", metavar="URL", help="Where the card says the tool is.  [default: $CONVERT_CKPT_URL, or the package's]"
)


@click.command()
@click.argument("output", type=_FOLDER)
@click.argument("repo_id", metavar="OWNER/NAME")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; made if missing.  [default: main]")
@click.option("--private", is_flag=True, help="Make a new repo private.")
@click.option("--commit-message", metavar="TEXT", help="Title of the last commit.")
@click.option("--overwrite", is_flag=True, help="Replace what the repo holds.")
@click.option("--base-model", metavar="OWNER/NAME", help="What OUTPUT was made from.  [default: by its manifest]")
@_tool_url
def push(output: Path, repo_id: str, base_model: str | None, **options: Any) -> None:
    """Upload OUTPUT to the Hugging Face Hub, with a model card.

    Every file is checked against the manifest first. Shards go up one by one; configuration, manifest
    and card follow in one last commit, so that a repo never looks complete when it is not. Pushed again,
    only what is missing is sent. Log in with hf auth login first.

    \b
    Example:
      run-ckpt push flux-mxfp4 me/flux-mxfp4 --private
    """
    from run_ckpt.cli.progress import show_progress
    from run_ckpt.tools.publish.push import push_result
    from run_ckpt.tools.publish.repository import Target

    target = Target(repo_id, **options)
    with show_progress() as progress:
        pushed = push_result(output, target, base_model=base_model, progress=progress)
    click.echo(str(pushed))


@click.command()
@click.argument("output", type=_NAME)
@click.option("--repo", "repo_id", metavar="OWNER/NAME", help="Where it will be found.  [default: OUTPUT's name]")
@click.option("--base-model", metavar="OWNER/NAME", help="What OUTPUT was made from.  [default: by its manifest]")
@_tool_url
def card(output: str, repo_id: str | None, base_model: str | None, tool_url: str | None) -> None:
    """Print the model card that run-ckpt push would upload with OUTPUT.

    Every number in it is from the manifest.
    """
    from run_ckpt.storage.snapshots import local_path, repo_or_name
    from run_ckpt.tools.publish.card import make_card
    from run_ckpt.tools.publish.rows import read_result
    from run_ckpt.tools.publish.tool_url import tool_url as find_url

    result = read_result(local_path(output, small=True))
    name, url = repo_id or repo_or_name(output), find_url(tool_url)
    click.echo(make_card(result, name, base_model=base_model, url=url), nl=False)


@click.command()
@click.argument("outputs", metavar="OUTPUT...", type=_NAME, nargs=-1, required=True)
@click.option(
    "--output", "file", type=click.Path(dir_okay=False, path_type=Path), default="report.html", show_default=True
)
def report(outputs: tuple[str, ...], file: Path) -> None:
    """Write one OUTPUT, or a comparison of several, as a page to look at.

    Sizes, a map of the error of every layer, and what was kept and why. The page is one file that
    needs no network.

    \b
    Example:
      run-ckpt report flux-mxfp4 flux-fp8 --output report.html
    """
    from run_ckpt.storage.atomic import check_file, write_durably
    from run_ckpt.storage.snapshots import local_path
    from run_ckpt.tools.publish.report import make_report
    from run_ckpt.tools.publish.rows import read_result

    check_file(file)
    results = {Path(output).resolve().name: read_result(local_path(output, small=True)) for output in outputs}
    write_durably(file, make_report(results).encode())
    click.echo(f"Wrote {file}.")
