"""What each command shows on a terminal of 80 columns, as a person sees it: tests/snapshots/*.txt.

To write them anew after a change that is meant: ``python -m tests.test_snapshots``, then read the difference.
"""

import io
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from itertools import groupby
from pathlib import Path

import pytest
from diffusers import DiffusionPipeline
from tqdm.std import tqdm

from run_ckpt.cli.command import run_command
from run_ckpt.tools import bench, generate
from run_ckpt.tools.bench import LoadTime
from run_ckpt.tools.compare import pipelines
from run_ckpt.tools.compare.metrics import ErrorSums
from run_ckpt.version import VERSION
from tests.checkpoints import FLUX_DIGITS, convert
from tests.hub_upload_server import TOKEN, serve_hub
from tests.pipelines import make_pipeline
from tests.test_mistakes import COMMANDS

SNAPSHOTS = Path(__file__).parent / "snapshots"
COLUMNS = 80
HUB = "https://huggingface.co"
_DRAW = "--prompts prompts.txt --height 32 --width 32 --steps 2 --dtype float32"
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
    "push": "run-ckpt push mxfp4 me/digits-mxfp4 --tool-url https://example.org/it",
    "push-again": "run-ckpt push mxfp4 me/digits-mxfp4 --tool-url https://example.org/it",
    "push-refused": "run-ckpt push mixed me/digits-mxfp4 --tool-url https://example.org/it",
    "calibrate": f"run-ckpt calibrate --model-path flux --output statistics --samples 4 {_DRAW} --device cpu",
    "generate": (
        "run-ckpt generate --model-path flux --transformer-path flux-mxfp4/transformer --prompt cat --output cat.png"
        " --height 32 --width 32 --steps 2 --dtype float32 --device cpu"
    ),
    "compare": (
        f"run-ckpt compare --model-path flux --transformer-path flux-mxfp4 --output compared {_DRAW} --device cpu"
        " --fail-under psnr=40"
    ),
}
RECIPE = """[[rules]]
match = "single_transformer_blocks.*"
format = "fp8"
"""
# What no two machines agree on: seconds and memory of loading, and how far two products are from each other.
PEAK_NBYTES = 300_000_000
LOAD = LoadTime(seconds=0.02, read_seconds=0.01, ratio=2.0, model_nbytes=7_340_000, peak_nbytes=PEAK_NBYTES)
ERRORS = ErrorSums(100, 100.0, 101.0, 100.0, 1.0, 8.0, 0.5)


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
        for clock in ("monotonic", "perf_counter"):  # what a run takes
            patch.setattr(time, clock, lambda: 0.0)
        patch.setattr(bench, "_median_seconds", lambda work: (work(), 1e-5)[1])
        patch.setattr(bench, "_time_load", lambda *arguments: LOAD)
        patch.setattr(generate, "peak_nbytes", lambda device: PEAK_NBYTES)
        for name_of, figure in (("sum_errors", ERRORS), ("psnr_db", 32.0), ("ssim", 0.97)):
            patch.setattr(pipelines, name_of, lambda *tensors, figure=figure: figure)
        # Bars of other libraries, drawn by the clock.
        patch.setattr(tqdm, "__init__", partialmethod(tqdm.__init__, disable=True))
        patch.setattr(DiffusionPipeline, "_progress_bar_config", {"disable": True}, raising=False)
        patch.setattr(sys, "stdout", terminal)
        patch.setattr(sys, "stderr", terminal)
        with pytest.raises(SystemExit) as stop:
            run_command(COMMANDS[name], name, args)
    # A hash is another one after each change of what a manifest says.
    text = re.sub("[0-9a-f]{64}", "0123456789abcdef" * 4, terminal.getvalue().replace(VERSION, "VERSION"))
    text = re.sub(r"http://127\.0\.0\.1:\d+", HUB, text)
    lines = [f"$ {script}", *_sort_written(line.rstrip() for line in text.splitlines())]
    return "\n".join([*lines, f"[exit {stop.value.code or 0}]", ""])


def _sort_written(lines: Iterable[str]) -> Iterator[str]:
    """Yield the lines with those of finished shards in order: which one is finished first is chance."""
    for is_written, group in groupby(lines, lambda line: line.startswith("wrote ")):
        members = list(group)
        yield from sorted(members) if is_written else members


@contextmanager
def workplace(folder: Path) -> Iterator[None]:
    """Work in ``folder``, with what the commands are given and a Hub to push to."""
    from huggingface_hub import constants

    (folder / "flux-digits").symlink_to(FLUX_DIGITS)
    (folder / "mixed.toml").write_text(RECIPE)
    (folder / "prompts.txt").write_text("a cat\na dog\n")
    convert(make_pipeline(folder / "flux"), folder / "flux-mxfp4", format="mxfp4")
    with pytest.MonkeyPatch.context() as patch, serve_hub() as hub:
        patch.chdir(folder)
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_TOKEN", TOKEN)
        yield


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Name -> what was shown, of all scripts in their order."""
    with workplace(tmp_path_factory.mktemp("snapshots")):
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
    SNAPSHOTS.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, workplace(Path(scratch)):
        for name, script in SCRIPTS.items():
            (SNAPSHOTS / f"{name}.txt").write_text(show(script), encoding="utf-8")


if __name__ == "__main__":
    main()
