"""What both commands share: completion, errors in one line, exit codes."""

import errno
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from run_ckpt.cli.lines import say
from run_ckpt.cli.signals import ending_signals
from run_ckpt.cli.streams import usable_streams
from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.extras import naming_extras

EXIT_CODES = (
    "Exit code: 0 done, 1 it can't be done or a fault was found, 2 wrong usage, 130 stopped by Ctrl-C, 143 by SIGTERM,"
    " 129 by SIGHUP."
)

# What the operating system says, and what to do about it.
_REMEDIES = {
    errno.EACCES: "Let this user read and write there, or choose another place.",
    errno.EPERM: "Let this user read and write there, or choose another place.",
    errno.EROFS: "Choose a place that can be written to.",
    errno.ENOSPC: "Make room, then give the same command again.",
    errno.EDQUOT: "Make room, then give the same command again.",
    errno.EIO: "The disk has failed. Check it, then give the same command again.",
    errno.EMFILE: "Raise the limit of open files (ulimit -n).",
    errno.ENFILE: "Raise the limit of open files of the machine.",
    errno.ENAMETOOLONG: "Choose shorter names.",
    errno.ELOOP: "Remove the links that lead to each other.",
    errno.EFBIG: "Use a smaller --shard-size, or raise the limit of file sizes (ulimit -f).",
    errno.ENOENT: "It was taken away meanwhile. Put it back if it was yours, then give the same command again.",
    errno.ESTALE: "It was taken away meanwhile. Put it back if it was yours, then give the same command again.",
}
_NO_MEMORY = "out of memory. Raise the limit (ulimit -v), or use a larger machine."


def run_command(
    command: click.Command, name: str, args: Sequence[str] | None = None, stopped: str = "stopped."
) -> NoReturn:
    """Run ``args`` (default: the process's). An error is one message on stderr and ends the process by EXIT_CODES."""
    args = sys.argv[1:] if args is None else list(args)
    os.umask(os.umask(0o077) & 0o077)  # or a run could not go on in the folder that one before it made
    subcommand = [arg for arg in args[:1] if arg in getattr(command, "commands", ())]
    with usable_streams(), ending_signals() as ending:
        try:
            with naming_extras(" ".join([name, *subcommand])):
                sys.exit(command.main(args, prog_name=name, standalone_mode=False))
        except click.ClickException as error:
            error.show()
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            click.echo(stopped, err=True)
            sys.exit(ending.exit_code)
        except CheckpointError as error:
            _fail(error, 2 if isinstance(error, UsageError) else 1)
        except OSError as error:
            remedy = _REMEDIES.get(error.errno or 0)
            _fail(f"{error}. {remedy}" if remedy else error)
        except MemoryError:
            _fail(_NO_MEMORY)
        except ImportError as error:
            if "failed to map segment" not in str(error):  # what the loader says of a library as large as torch's
                raise
            _fail(_NO_MEMORY)
        except RuntimeError as error:
            if "allocate memory" in str(error):  # torch's, which is no MemoryError
                _fail(_NO_MEMORY)
            if "new thread" not in str(error):
                raise
            _fail(f"{error}. Raise the limits (ulimit -u, -v), or use fewer --workers.")


def _fail(error: object, code: int = 1) -> NoReturn:
    say(f"error: {error}", err=True)
    sys.exit(code)


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
