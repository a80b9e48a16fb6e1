"""``convert-ckpt``: options -> one call -> a line that says the result."""

import json
import os
import tempfile
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import click

from convert_ckpt.options import Options
from convert_ckpt.plan.preset import preset_names
from run_ckpt.cli.command import EXIT_CODES, completion_option, run_command
from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.formats import FORMATS, GRANULARITIES, SCALE_RULES
from run_ckpt.contract.layouts import LAYOUTS
from run_ckpt.version import VERSION

_EPILOG = f"""\b
Examples:
  convert-ckpt FLUX.1-dev/transformer OUT --format mxfp4
  convert-ckpt FLUX.1-dev OUT --format mxfp4 --dry-run
  convert-ckpt Z-Image-Turbo/transformer OUT --format fp8
  convert-ckpt Qwen3-8B OUT --format mxfp4 --layout plain --ignore "*.down_proj"
  convert-ckpt black-forest-labs/FLUX.2-dev@main OUT --format mxfp4
  convert-ckpt hf://Qwen/Qwen-Image OUT --format fp8 --component transformer
  convert-ckpt s3://bucket/FLUX.1-dev/transformer OUT --format mxfp4
  convert-ckpt FLUX.1-dev OUT --format mxfp4 --push-to-hub me/flux-mxfp4 --private

A run that was stopped is continued by the same command. Look at the result with
run-ckpt inspect OUT, check it with run-ckpt verify OUT --source SOURCE.

{EXIT_CODES}"""


def _default_workers() -> int:
    return min(8, (os.cpu_count() or 1) + 1)


@click.command(epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.argument("source")
@click.argument("output", type=click.Path(path_type=Path), required=False)
@click.option(
    "--format",
    "format_",
    type=click.Choice(FORMATS, case_sensitive=False),
    required=True,
    help="Format of linear weights.",
)
@click.option("--layout", type=click.Choice(LAYOUTS), default="aiter", show_default=True, help="MXFP4 byte order.")
@click.option(
    "--granularity",
    type=click.Choice(GRANULARITIES),
    default="tensor",
    show_default=True,
    help="Reach of an FP8 scale.",
)
@click.option(
    "--scale-rule", type=click.Choice(SCALE_RULES), default="even", show_default=True, help="How MXFP4 picks a scale."
)
@click.option("--dialect", type=click.Choice(DIALECTS), help="Consumer's vocabulary.  [default: by format and model]")
@click.option(
    "--preset", type=click.Choice(preset_names()), help="Model facts.  [default: by the class in config.json]"
)
@click.option("--recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML file of rules.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Keep matching modules as they are. Repeatable.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Activation ranges for static FP8: safetensors with <layer>.input_amax.",
)
@click.option("--allow-unaligned-k", is_flag=True, help="Take K that are multiples of 64 but not of 256.")
@click.option("--component", multiple=True, metavar="NAME", help="Take this transformer* of a pipeline. Repeatable.")
@click.option("--keep-source", is_flag=True, help="Keep what is fetched, in the Hub's own cache.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--restart", is_flag=True, help="Throw away what a stopped run left in OUTPUT.partial.")
@click.option("--workers", type=click.IntRange(1, 64), default=_default_workers, help="Threads.  [default: cores + 1]")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload the result, each shard as soon as it is finished.")
@click.option("--push-at-end", is_flag=True, help="Upload all shards at the end instead.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; made if missing.  [default: main]")
@click.option("--private", is_flag=True, help="Make a new repo private.")
@click.option("--commit-message", metavar="TEXT", help="Title of the last commit.")
@click.option("--overwrite", is_flag=True, help="Replace what the repo holds.")
@click.option(
    "--base-model", metavar="OWNER/NAME", help="What the card names as base.  [default: SOURCE, if on the Hub]"
)
@click.option("--quiet", is_flag=True, help="Print errors alone.")
@click.option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON on standard output.")
@completion_option
@click.version_option(VERSION, prog_name="convert-ckpt")
def cli(**arguments: Any) -> None:
    """Convert the checkpoint SOURCE to MXFP4 or FP8 and write it to the folder OUTPUT.

    SOURCE is a folder with config.json and safetensors shards, a pipeline folder (each transformer* in
    it is converted), or one .safetensors file. It is never changed. OUTPUT appears complete or not at all.

    SOURCE may lie elsewhere: owner/name[@revision] or hf://owner/name[@revision][/folder] on the Hugging
    Face Hub, s3://, gs://, az:// and whatever else fsspec opens. It is fetched shard by shard while it is
    converted, and takes the disk of OUTPUT and two shards. For a gated repo log in with hf auth login.
    """
    options = Options(
        format=arguments["format_"],
        **{name: arguments[name] for name in _OPTION_NAMES},
    )
    output = arguments["output"]
    unused = [name for name in _PUSH_OPTIONS if arguments[name] and not arguments["push_to_hub"]]
    if unused:
        raise click.UsageError(f"--{unused[0].replace('_', '-')} goes with --push-to-hub OWNER/NAME.")
    if arguments["dry_run"]:
        _show_plan(output, options, arguments)
    elif output is None:
        raise click.UsageError("Missing argument 'OUTPUT' (only --dry-run goes without).")
    else:
        _convert(output, options, arguments)


_TARGET_OPTIONS = ("revision", "private", "commit_message", "overwrite")
_PUSH_OPTIONS = ("push_at_end", "base_model", *_TARGET_OPTIONS)
_OPTION_NAMES = (
    "layout",
    "granularity",
    "scale_rule",
    "dialect",
    "preset",
    "recipe",
    "ignore",
    "calibration",
    "allow_unaligned_k",
)


def _show_plan(output: Path | None, options: Options, arguments: dict[str, Any]) -> None:
    from convert_ckpt.pipeline import check_output, plan_checkpoint
    from convert_ckpt.preview import plan_json, plan_lines
    from convert_ckpt.run.disk import check_disk
    from convert_ckpt.run.partial_output import Staging
    from convert_ckpt.source.opened import Selection, open_source
    from convert_ckpt.source.reference import parse_reference
    from run_ckpt.cli.progress import PlainLines

    reference = parse_reference(arguments["source"])
    if output is not None:
        check_output(reference, output)
    selection = Selection(arguments["component"], arguments["keep_source"])
    with (
        tempfile.TemporaryDirectory(prefix="convert-ckpt-") as scratch,
        open_source(reference, selection, PlainLines().log, Path(scratch) / "skeleton") as opened,
    ):
        jobs = plan_checkpoint(opened, options)
        if output is not None:
            check_disk(opened, jobs, Staging(output))
        if arguments["as_json"]:
            click.echo(json.dumps(plan_json(jobs), indent=1))
        else:
            click.echo("\n".join(plan_lines(opened, jobs)))


def _convert(output: Path, options: Options, arguments: dict[str, Any]) -> None:
    from convert_ckpt.pipeline import convert_checkpoint
    from convert_ckpt.source.opened import Selection
    from convert_ckpt.source.reference import parse_reference
    from run_ckpt.cli.progress import show_progress

    quiet, as_json = arguments["quiet"], arguments["as_json"]
    with show_progress(quiet=quiet or as_json) as progress:
        convert = partial(
            convert_checkpoint,
            parse_reference(arguments["source"]),
            output,
            options,
            n_workers=arguments["workers"],
            restart=arguments["restart"],
            progress=progress,
            selection=Selection(arguments["component"], arguments["keep_source"]),
        )
        if arguments["push_to_hub"]:
            from convert_ckpt.push import convert_and_push

            target = {name: arguments[name] for name in _TARGET_OPTIONS}
            summary, pushed = convert_and_push(
                convert,
                output,
                {"repo_id": arguments["push_to_hub"], **target},
                base_model=arguments["base_model"],
                at_end=arguments["push_at_end"],
                progress=progress,
            )
        else:
            summary, pushed = convert(), None
    if as_json:
        click.echo(json.dumps({**asdict(summary), **({"pushed_to": pushed.url} if pushed else {})}))
    elif not quiet:
        click.echo("\n".join(str(line) for line in (summary, pushed) if line))


def main() -> None:
    """Run the command line of the process and exit with its code."""
    # numpy's BLAS, which is not used here, would start a thread for each core as numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    run_command(cli, "convert-ckpt", stopped="stopped; the same command goes on from here.")
