"""What convert-ckpt and run-ckpt have in common on the command line."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import pytest

import convert_ckpt.cli
import run_ckpt.cli.main
from run_ckpt.cli.command import EXIT_CODES, run_command
from run_ckpt.contract.errors import CheckpointError, UsageError
from tests.converted import FLUX_DIGITS

COMMANDS = {"convert-ckpt": convert_ckpt.cli.cli, "run-ckpt": run_ckpt.cli.main.run_ckpt}


def exit_code(command: click.Command, name: str, *args: str) -> int:
    with pytest.raises(SystemExit) as stop:
        run_command(command, name, args)
    return int(stop.value.code or 0)


def failing(error: BaseException | None) -> click.Command:
    """Return a command that raises."""

    def run() -> None:
        if error:
            raise error

    return click.Command("test", callback=run)


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (None, 0, ""),
        (CheckpointError("bad file. Fetch it again."), 1, "error: bad file. Fetch it again.\n"),
        (NotADirectoryError(20, "No such folder", "x"), 1, "error: [Errno 20] No such folder: 'x'\n"),
        (UsageError("no such thing."), 2, "error: no such thing.\n"),
        (KeyboardInterrupt(), 130, "stopped.\n"),
    ],
    ids=["done", "checkpoint", "system", "usage", "ctrl-c"],
)
def test_the_exit_code_says_how_it_ended(
    error: BaseException | None, code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(failing(error), "test") == code
    # After Ctrl-C click ends the line that the terminal shows ^C in.
    assert capsys.readouterr().err.removeprefix("\n") == line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_that_ends_a_command_lets_it_clear_up(
    number: signal.Signals, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def run() -> None:
        with TemporaryDirectory(dir=tmp_path):
            os.kill(os.getpid(), number)

    assert exit_code(click.Command("test", callback=run), "test") == 128 + number
    assert capsys.readouterr().err.removeprefix("\n") == "stopped.\n"
    assert not [*tmp_path.iterdir()]
    assert signal.getsignal(number) is signal.SIG_DFL


def test_nohup_is_heeded() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert exit_code(click.Command("test", callback=lambda: os.kill(os.getpid(), signal.SIGHUP)), "test") == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_terminal_that_is_gone_stops_nothing() -> None:
    ours, theirs = os.openpty()
    code = (
        "import sys; from convert_ckpt.cli import main; sys.stdin.readline();"
        f" sys.argv = ['convert-ckpt', {str(FLUX_DIGITS)!r}, '--dry-run', '--format', 'fp8']; main()"
    )
    run = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=theirs, stderr=theirs)
    os.close(theirs)
    os.close(ours)
    run.communicate(b"\n")
    assert run.returncode == 0


def test_a_fault_of_our_own_is_not_hidden() -> None:
    with pytest.raises(ModuleNotFoundError, match="no_such_module"):
        run_command(failing(ModuleNotFoundError("no_such_module", name="no_such_module")), "test", [])


@pytest.mark.parametrize("name", COMMANDS)
def test_help_documents_the_exit_codes(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(COMMANDS[name], name, "--help") == 0
    assert EXIT_CODES in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    "words",
    [["convert-ckpt"], ["run-ckpt"], *(["run-ckpt", name] for name in run_ckpt.cli.main.run_ckpt.commands)],
    ids=" ".join,
)
def test_help_fits_a_terminal_of_80_columns(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(COMMANDS[words[0]], *words, "--help") == 0
    assert [line for line in capsys.readouterr().out.splitlines() if len(line) > 80] == []


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_completion_script_is_for_this_command(name: str, shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_code(COMMANDS[name], name, "--completion", shell) == 0
    script = capsys.readouterr().out
    # The variable by which click knows that it is asked for completions.
    assert f"_{name.upper().replace('-', '_')}_COMPLETE={shell}_complete" in script
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=script, text=True, check=True)


@pytest.mark.parametrize(
    ("module", "name", "words", "answer"),
    [
        ("run_ckpt.cli.main", "run-ckpt", "deq", "dequantize"),
        ("convert_ckpt.cli", "convert-ckpt", "--form", "--format"),
    ],
    ids=COMMANDS,
)
def test_bash_gets_the_words_that_may_follow(module: str, name: str, words: str, answer: str) -> None:
    variable = f"_{name.upper().replace('-', '_')}_COMPLETE"
    asking = {variable: "bash_complete", "COMP_WORDS": f"{name} {words}", "COMP_CWORD": "1"}
    code = f"import os; os.environ |= {asking}; from {module} import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == [f"plain,{answer}"]


def test_formats_may_be_written_in_capitals(capsys: pytest.CaptureFixture[str]) -> None:
    args = (str(FLUX_DIGITS), "--dry-run", "--format", "MXFP4")
    assert exit_code(convert_ckpt.cli.cli, "convert-ckpt", *args) == 0
    assert "23 of 90 tensors to mxfp4" in capsys.readouterr().out
