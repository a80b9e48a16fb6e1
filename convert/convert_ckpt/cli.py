"""``convert-ckpt``: options -> one call of the Python API -> a line that says the result."""

import gc
import json
import os
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from convert_ckpt.options import Options
from convert_ckpt.plan.preset import preset_names
from convert_ckpt.run.cluster import ENGINES, LOCAL
from run_ckpt.cli.command import EXIT_CODES, completion_option, run_command
from run_ckpt.cli.lines import say
from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.display import shown
from run_ckpt.contract.formats import FORMATS, GRANULARITIES, SCALE_RULES
from run_ckpt.contract.layouts import LAYOUTS
from run_ckpt.contract.manifest import METHODS
from run_ckpt.contract.targets import TARGETS
from run_ckpt.version import VERSION

if TYPE_CHECKING:
    from convert_ckpt.pipeline import Preview

_EPILOG = f"""\b
Examples:
  convert-ckpt FLUX.1-dev/transformer OUT --format mxfp4
  convert-ckpt FLUX.1-dev OUT --format mxfp4 --dry-run
  convert-ckpt Z-Image-Turbo/transformer OUT --format fp8
  convert-ckpt FLUX.2-dev/transformer OUT --format nvfp4
  convert-ckpt Qwen-Image OUT --format fp8 --target vllm-omni
  convert-ckpt Qwen3-8B OUT --format mxfp4 --target vllm
  convert-ckpt black-forest-labs/FLUX.2-dev@main OUT --format mxfp4
  convert-ckpt hf://Qwen/Qwen-Image OUT --format fp8 --component transformer
  convert-ckpt s3://bucket/FLUX.1-dev/transformer OUT --format mxfp4
  convert-ckpt FLUX.1-dev OUT --format mxfp4 --push-to-hub me/flux --private

A run that was stopped is continued by the same command. Look at the result with
run-ckpt inspect OUT, check it with run-ckpt verify OUT --source SOURCE.

{EXIT_CODES}"""
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100, "show_default": True}


class _NewFolder(click.Path):
    """A path that "" is none of; a URL stays text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("it is empty. Give a folder; . is the current one.", param, ctx)
        return value if "://" in str(value) else super().convert(value, param, ctx)


@click.command(epilog=_EPILOG, context_settings=_CONTEXT)
@click.argument("source", type=click.Path())
@click.argument("output", type=_NewFolder(path_type=Path), required=False)
@click.option(
    "--format", type=click.Choice(FORMATS, case_sensitive=False), required=True, help="Format of linear weights."
)
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    metavar="NAME",
    help=f"Who will run it: {', '.join(TARGETS)}.  [default: SGLang, or vLLM and SGLang for an LLM]",
)
@click.option("--layout", type=click.Choice(LAYOUTS), help="MXFP4 byte order.  [default: by target, else aiter]")
@click.option(
    "--granularity", type=click.Choice(GRANULARITIES), help="Reach of an FP8 scale.  [default: by target, else tensor]"
)
@click.option("--scale-rule", type=click.Choice(SCALE_RULES), help="How MXFP4 picks a scale.  [default: even]")
@click.option(
    "--dialect",
    type=click.Choice(DIALECTS),
    metavar="NAME",
    help=f"Consumer's vocabulary: {', '.join(DIALECTS)}.  [default: by target, format and model]",
)
@click.option(
    "--preset",
    type=click.Choice(preset_names()),
    metavar="NAME",
    help=f"Model facts: {', '.join(preset_names())}.  [default: by the class in config.json]",
)
@click.option("--recipe", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="TOML file of rules.")
@click.option("--ignore", multiple=True, metavar="PATTERN", help="Keep matching modules as they are. Repeatable.")
@click.option(
    "--calibration",
    type=click.Path(exists=True, path_type=Path),
    help="Statistics of run-ckpt calibrate; or ranges: ModelOpt's backbone.pt, or <layer>.input_amax in safetensors.",
)
@click.option(
    "--method", type=click.Choice(METHODS), help="How codes are chosen.  [default: gptq if there are statistics]"
)
@click.option(
    "--static",
    is_flag=True,
    help="FP8 with static activation scales: by --calibration, or those of a quantized SOURCE.",
)
@click.option("--fold", is_flag=True, help="Smooth inputs, where folding that into the layer before is exact.")
@click.option("--max-size", metavar="SIZE", help="Raise layers to FP8 or BF16 as far as 4GB, say, has room for it.")
@click.option("--min-sqnr", type=float, metavar="DB", help="Raise layers until the predicted SQNR is that high.")
@click.option(
    "--sensitivities",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="TOML or JSON file of what was measured to choose by.  [default: predict it]",
)
@click.option("--keep-first", type=click.IntRange(0), default=Options.keep_first, help="Blocks at the start to keep.")
@click.option("--keep-last", type=click.IntRange(0), default=Options.keep_last, help="Blocks at the end to keep.")
@click.option("--allow-unaligned-k", is_flag=True, help="Take K that are multiples of 64 but not of 256.")
@click.option("--shard-size", metavar="SIZE", help="Most bytes in a file, such as 5GB.  [default: as SOURCE]")
@click.option("--swap-weight-nibbles", is_flag=True, help="NVFP4: let SGLang swap the codes of a byte at load.")
@click.option(
    "--component",
    multiple=True,
    metavar="NAME",
    help="Take this transformer* or text_encoder* of a pipeline. Repeatable.",
)
@click.option("--whole-pipeline", is_flag=True, help="Link all else of a pipeline into OUTPUT: it loads whole.")
@click.option("--keep-source", is_flag=True, help="Keep what is fetched, in the Hub's own cache.")
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@click.option("--restart", is_flag=True, help="Throw away what a stopped run left in OUTPUT.partial.")
@click.option("--workers", type=click.IntRange(1, 64), help="Threads.  [default: cores + 1, at most 8]")
@click.option("--max-memory", metavar="SIZE", help="For layers done by GPTQ, such as 8GB.  [default: half of it]")
@click.option("--part", metavar="I/N", help="Make the I-th of N shares; the last run to end publishes.")
@click.option("--finalize", is_flag=True, help="Publish what runs with --part made, and make nothing.")
@click.option("--engine", type=click.Choice(ENGINES), default=LOCAL, help="What makes the shards.")
@click.option("--ray-address", metavar="ADDRESS", help="Of a Ray cluster; auto for this machine's.")
@click.option("--ray-workers", type=click.IntRange(min=1), help="Tasks at once.  [default: as many as fit]")
@click.option("--push-to-hub", metavar="OWNER/NAME", help="Upload the result, each shard as soon as it is finished.")
@click.option("--push-at-end", is_flag=True, help="Upload all shards at the end instead.")
@click.option("--revision", metavar="BRANCH", help="Branch to push to; made if missing.  [default: main]")
@click.option("--private", is_flag=True, help="Make a new repo private.")
@click.option("--commit-message", metavar="TEXT", help="Title of the last commit.")
@click.option("--overwrite", is_flag=True, help="Replace what the repo holds.")
@click.option(
    "--base-model", metavar="OWNER/NAME", help="What the card names as base.  [default: SOURCE, if on the Hub]"
)
@click.option("--tool-url", metavar="URL", help="Where the card says the tool is.  [default: $CONVERT_CKPT_URL]")
@click.option("--quiet", is_flag=True, help="Print errors alone.")
@click.option("--json", "as_json", is_flag=True, help="Print the result (or the plan) as JSON on standard output.")
@completion_option
@click.version_option(VERSION, prog_name="convert-ckpt")
def cli(**arguments: Any) -> None:
    """Convert the checkpoint SOURCE to MXFP4, NVFP4, MXFP8 or FP8 and write it to the folder OUTPUT.

    SOURCE is a folder with config.json and safetensors shards, a pipeline folder (each transformer* in
    it is converted), or one .safetensors file. It is never changed. OUTPUT appears complete or not at all.

    SOURCE may lie elsewhere: owner/name[@revision] or hf://owner/name[@revision][/folder] on the Hugging
    Face Hub, s3://, gs://, az:// and whatever else fsspec opens. It is fetched shard by shard while it is
    converted, and takes the disk of OUTPUT and two shards. For a gated repo log in with hf auth login.

    OUTPUT may be s3://, gs:// or az:// too: it is built in NAME.upload here and uploaded, its manifest last.
    """
    dry_run, quiet, as_json = (arguments.pop(name) for name in ("dry_run", "quiet", "as_json"))
    if dry_run:
        _show_plan(arguments, as_json=as_json)
    elif arguments["output"] is None:
        raise click.UsageError("Missing argument 'OUTPUT' (only --dry-run goes without).")
    else:
        _convert(arguments, quiet=quiet, as_json=as_json)


def _show_plan(arguments: dict[str, Any], *, as_json: bool) -> None:
    from convert_ckpt.api import plan_conversion
    from run_ckpt.cli.progress import PlainLines

    others = {name: arguments[name] for name in ("output", "component", "keep_source")}
    options = Options(**{field.name: arguments[field.name] for field in fields(Options)})
    preview = plan_conversion(arguments["source"], options, progress=PlainLines(), **others)
    if as_json:
        click.echo(json.dumps(preview.components, indent=1))
    elif not sys.stdout.isatty():
        click.echo(shown(preview, lines=True))
    else:
        _show_on_terminal(preview)


def _show_on_terminal(preview: "Preview") -> None:
    from run_ckpt.cli.plan_table import print_plan
    from run_ckpt.cli.tables import make_console

    for component in preview.components:
        linears = [tensor for tensor in component["tensors"] if tensor["is_linear"]]
        print_plan(make_console(), component, linears)
    say("\n".join(preview.summary))


def _convert(arguments: dict[str, Any], *, quiet: bool, as_json: bool) -> None:
    from convert_ckpt.api import convert
    from run_ckpt.cli.progress import show_progress

    with show_progress(quiet=quiet or as_json) as progress:
        summary = convert(**arguments, progress=progress)
    if as_json:
        click.echo(json.dumps(summary.to_json()))
    elif not quiet:
        say(str(summary))


def main() -> None:
    """Run the command line of the process and exit with its code."""
    # numpy's BLAS, which is not used here, would start a thread for each core as numpy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # A plan is very many records without cycles, which each collection looks through in vain.
    gc.set_threshold(50_000, 20, 100)
    run_command(cli, "convert-ckpt", stopped="stopped; the same command goes on from here.")
