"""What both commands share: completion, errors in one line, exit codes."""

import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.extras import naming_extras

EXIT_CODES = "Exit code: 0 done, 1 it can't be done or a fault was found, 2 wrong usage, 130 stopped by Ctrl-C."


def run_command(
    command: click.Command, name: str, args: Sequence[str] | None = None, stopped: str = "stopped."
) -> NoReturn:
    """Run ``args`` (default: the process's). An error is one message on stderr and ends the process by EXIT_CODES."""
    args = sys.argv[1:] if args is None else list(args)
    subcommand = [arg for arg in args[:1] if arg in getattr(command, "commands", ())]
    try:
        with naming_extras(" ".join([name, *subcommand])):
            sys.exit(command.main(args, prog_name=name, standalone_mode=False))
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (CheckpointError, OSError) as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2 if isinstance(error, UsageError) else 1)
    except (click.Abort, KeyboardInterrupt):
        click.echo(stopped, err=True)
        sys.exit(130)


def _print_completion(context: click.Context, _: click.Parameter, shell: str | None) -> None:
    if shell:
        from click.shell_completion import get_completion_class

        name = str(context.info_name)
        completion = get_completion_class(shell)
        assert completion is not None
        variable = f"_{name.replace('-', '_').upper()}_COMPLETE"
        click.echo(completion(context.command, {}, name, variable).source())
        context.exit()


completion_option = click.option(
    "--completion",
    type=click.Choice(["bash", "zsh", "fish"]),
    is_eager=True,
    expose_value=False,
    callback=_print_completion,
    help="Print the shell's completion script.",
)
