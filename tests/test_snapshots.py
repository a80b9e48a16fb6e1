"""What each command shows on a terminal of 80 columns, as a person sees it: tests/snapshots/*.txt.

To write them anew after a change that is meant: ``python -m tests.test_snapshots``, then read the difference.
"""

import io
import os
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import pytest

from run_ckpt.cli.command import run_command
from run_ckpt.tools import bench
from run_ckpt.tools.bench import LoadTime
from run_ckpt.version import VERSION
from tests.checkpoints import FLUX_DIGITS
from tests.test_mistakes import COMMANDS

SNAPSHOTS = Path(__file__).parent / "snapshots"
COLUMNS = 80
# Name -> the commands, which run one after the other and in this order, each in the folder of what was made before.
SCRIPTS = {
    "convert": "convert-ckpt flux-digits mxfp4 --format mxfp4",
    "convert-again": "convert-ckpt flux-digits mxfp4 --format mxfp4",
    "convert-mixed": "convert-ckpt flux-digits mixed --format mxfp4 --recipe mixed.toml",
    "convert-dry-run": "convert-ckpt flux-digits --format fp8 --dry-run",
    "convert-refused": "convert-ckpt flux-digits mxfp4 --format fp8",
    "inspect": "run-ckpt inspect mxfp4",
    "inspect-device": "run-ckpt inspect mxfp4 --device gfx950",
    "verify": "run-ckpt verify mxfp4",
    "verify-source": "run-ckpt verify mxfp4 --source flux-digits --min-sqnr 19",
    "explain-quantized": "run-ckpt explain mxfp4 'single_transformer_blocks.*.attn.to_q'",
    "explain-kept": "run-ckpt explain mxfp4 transformer_blocks.0.ff.net.0.proj",
    "diff": "run-ckpt diff mxfp4 mixed",
    "dequantize": "run-ckpt dequantize mxfp4 bf16",
    "relayout": "run-ckpt relayout mxfp4 plain --layout plain",
    "report": "run-ckpt report mxfp4 mixed --output report.html",
    "card": "run-ckpt card mxfp4 --repo me/digits-mxfp4",
    "bench": "run-ckpt bench mxfp4 --rows 1 --device cpu",
}
RECIPE = """[[rules]]
match = "single_transformer_blocks.*"
format = "fp8"
"""
# Seconds of a layer, which no two runs agree on, and of loading.
LOAD = LoadTime(seconds=0.02, read_seconds=0.01, ratio=2.0, model_nbytes=7_340_000, peak_nbytes=300_000_000)


class Terminal(io.StringIO):
    """A terminal that can't move its cursor, so that nothing is drawn twice."""

    encoding = "utf-8"  # type: ignore[assignment]

    def isatty(self) -> bool:
        return True


def show(script: str) -> str:
    """Return what a terminal shows of a command line."""
    name, *args = shlex.split(script)
    terminal = Terminal()
    with pytest.MonkeyPatch.context() as patch:
        for variable in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"):
            patch.delenv(variable, raising=False)
        patch.setenv("COLUMNS", str(COLUMNS))
        patch.setenv("TERM", "dumb")
        patch.setattr(time, "monotonic", lambda: 0.0)  # what a run takes
        patch.setattr(bench, "_median_seconds", lambda work: (work(), 1e-5)[1])
        patch.setattr(bench, "_time_load", lambda *arguments: LOAD)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        with pytest.raises(SystemExit) as stop:
            run_command(COMMANDS[name], name, args)
    # A hash is another one after each change of what a manifest says.
    text = re.sub("[0-9a-f]{64}", "0123456789abcdef" * 4, terminal.getvalue().replace(VERSION, "VERSION"))
    lines = [f"$ {script}", *_sort_written(line.rstrip() for line in text.splitlines())]
    return "\n".join([*lines, f"[exit {stop.value.code or 0}]", ""])


def _sort_written(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines with those of finished shards in order: which one is finished first is chance."""
    for is_written, group in groupby(lines, lambda line: line.startswith("wrote ")):
        members = list(group)
        yield from sorted(members) if is_written else members


def set_up(folder: Path) -> None:
    (folder / "flux-digits").symlink_to(FLUX_DIGITS)
    (folder / "mixed.toml").write_text(RECIPE)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Name -> what was shown, of all scripts in their order."""
    folder = tmp_path_factory.mktemp("snapshots")
    set_up(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        yield {name: show(script) for name, script in SCRIPTS.items()}


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_terminal_shows_what_it_showed(name: str, shown: dict[str, str]) -> None:
    assert shown[name] == (SNAPSHOTS / f"{name}.txt").read_text(encoding="utf-8")


# A path or a command to copy stays in one piece, and a model card is Markdown.
@pytest.mark.parametrize("name", [name for name in SCRIPTS if name != "card"])
def test_no_line_is_wider_than_the_terminal(name: str, shown: dict[str, str]) -> None:
    wide = [line for line in shown[name].splitlines()[1:] if len(line) > COLUMNS]
    assert [line for line in wide if "run-ckpt " not in line] == []


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        set_up(Path(scratch))
        os.chdir(scratch)
        SNAPSHOTS.mkdir(exist_ok=True)
        for name, script in SCRIPTS.items():
            (SNAPSHOTS / f"{name}.txt").write_text(show(script), encoding="utf-8")


if __name__ == "__main__":
    main()
