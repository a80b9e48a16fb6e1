"""Each step that changes a file, killed before and after, or failing: the same command then gives the same bytes."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from run_ckpt.progress import Silent
from run_ckpt.tools.rewrite.dequantize import dequantize
from run_ckpt.tools.rewrite.relayout import relayout
from tests.attack.injector import CRASHED, DONE, MODES, run_in_child
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint

SLOW = pytest.mark.slow
RARER = [mode for mode in MODES if mode not in ("kill after", "ENOSPC")]
Work = Callable[[Path, Path], object]


def to_mxfp4(source: Path, output: Path) -> None:
    convert(source, output, 1, format="mxfp4")


def to_fp8(source: Path, output: Path) -> None:
    convert(source, output, 1, format="fp8")


def to_plain(source: Path, output: Path) -> None:
    relayout(source, output, layout="plain", dialect=None, progress=Silent())


def to_bf16(source: Path, output: Path) -> None:
    dequantize(source, output, dtype="bfloat16", progress=Silent())


def make_source(folder: Path) -> Path:
    """Two shards over which a fused group of FP8 reaches, and a file beside them."""
    shards = [{f"model.layers.0.self_attn.{name}_proj.weight": random_weight(256, 256)} for name in "qk"]
    save_checkpoint(folder, shards, {"architectures": ["LlamaForCausalLM"]})
    (folder / "tokenizer.json").write_text("{}")
    return folder


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Return what tells whether anything but OUTPUT and OUTPUT.partial has changed."""
    ours = ("out", "out.partial")
    paths = [path for top in folder.iterdir() if top.name not in ours for path in (top, *top.rglob("*"))]
    return {str(path): (path.lstat().st_size, path.lstat().st_mtime_ns) for path in paths}


@pytest.mark.parametrize("mode", ["kill after", "ENOSPC", *(pytest.param(mode, marks=SLOW) for mode in RARER)])
@pytest.mark.parametrize("work", [to_mxfp4, to_plain, *(pytest.param(work, marks=SLOW) for work in (to_fp8, to_bf16))])
def test_the_same_command_goes_on_after_a_fault_at_any_step(tmp_path: Path, work: Work, mode: str) -> None:
    source = make_source(tmp_path / "in")
    if work in (to_plain, to_bf16):
        to_mxfp4(source, tmp_path / "converted")
        source = tmp_path / "converted"
    work(source, tmp_path / "whole")
    whole = folder_bytes(tmp_path / "whole")
    ended, n_steps = run_in_child(partial(work, source, tmp_path / "steps"))
    assert ended == DONE
    assert n_steps > 20
    for at in range(1, n_steps + 1):
        case = tmp_path / f"case{at}"
        (case / "deep").mkdir(parents=True)
        (case / "deep" / "mine").write_text("precious")
        before, output = snapshot(tmp_path), case / "deep" / "out"
        ended, _ = run_in_child(partial(work, source, output), mode, at)
        assert ended != CRASHED, at
        assert not output.exists() or folder_bytes(output) == whole, at
        assert ended != DONE or output.exists(), at
        was_complete, is_left = output.exists(), output.with_name("out.partial").exists()
        again, _ = run_in_child(partial(work, source, output))
        # Complete, and nothing is left that tells what of: the command was given twice.
        assert again == DONE or (work not in (to_plain, to_bf16) and was_complete and not is_left), at
        assert folder_bytes(output) == whole, at
        assert not output.with_name("out.partial").exists(), at
        after = {path: facts for path, facts in snapshot(tmp_path).items() if not path.startswith(str(output))}
        assert {path for path in after if path in before} == set(before), at
