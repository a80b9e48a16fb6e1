"""`run-ckpt`: the group of its commands, which are in the modules beside this one."""

from collections.abc import Sequence

import click

from run_ckpt.cli.calibrate import calibrate
from run_ckpt.cli.check import inspect_output, verify
from run_ckpt.cli.command import EXIT_CODES, completion_option, run_command
from run_ckpt.cli.compare import compare
from run_ckpt.cli.explain import diff, explain
from run_ckpt.cli.publish import card, push, report
from run_ckpt.cli.rewrite import assemble, dequantize, relayout
from run_ckpt.cli.run import bench, generate
from run_ckpt.version import VERSION

_NAME = "run-ckpt"


@click.group(
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=EXIT_CODES,
)
@click.version_option(VERSION, prog_name=_NAME)
@completion_option
def run_ckpt() -> None:
    """Look at, check, rewrite and run what convert-ckpt made.

    OUTPUT is a converted checkpoint: the folder of a component, or that of a pipeline's components.

    \b
    Examples:
      run-ckpt inspect flux-mxfp4
      run-ckpt verify flux-mxfp4 --source flux
      run-ckpt explain flux-mxfp4 proj_out
      run-ckpt diff flux-mxfp4 flux-fp8
      run-ckpt dequantize flux-mxfp4 flux-bf16
      run-ckpt relayout flux-mxfp4 flux-mxfp4-plain --layout plain
      run-ckpt assemble flux-fp8 flux-pipeline --model-path FLUX
      run-ckpt report flux-mxfp4 --output report.html
      run-ckpt calibrate --model-path FLUX --output stats
      run-ckpt generate --model-path FLUX --transformer-path flux-mxfp4 \\
        --prompt "a cat" --output cat.png
      run-ckpt compare --model-path FLUX --transformer-path flux-mxfp4 \\
        --prompts prompts.txt
      run-ckpt push flux-mxfp4 me/flux-mxfp4
    """


# A line each, in the order of --help.
for _command in (
    inspect_output,
    verify,
    explain,
    diff,
    dequantize,
    relayout,
    assemble,
    calibrate,
    generate,
    compare,
    bench,
    card,
    report,
    push,
):
    run_ckpt.add_command(_command)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line ``args`` (default: the process's) and exit with its code."""
    run_command(run_ckpt, _NAME, args)
