"""What a long run shows on standard error, on a terminal and elsewhere."""

import io
import re
import sys
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.progress import Progress as RichProgress

from run_ckpt.cli.lines import fold_lines
from run_ckpt.cli.progress import Bar, PlainLines, show_progress
from run_ckpt.progress import Silent


def test_plain_lines_tell_share_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("run_ckpt.cli.progress._PLAIN_INTERVAL_SECONDS", 0)
    lines = PlainLines()
    lines.start("hash transformer", 400)
    lines.advance(100)
    assert re.fullmatch(r"hash transformer  25%  \d+\.\d\d GB/s  \d+ s left\n", capsys.readouterr().err)


def test_plain_lines_follow_the_fetching_where_there_is_one(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("run_ckpt.cli.progress._PLAIN_INTERVAL_SECONDS", 0)
    lines = PlainLines()
    lines.start("convert", 400)
    lines.start_fetching(200)
    lines.advance_fetching(100)
    assert re.fullmatch(r"convert   0%  fetched  50%  .* s left\n", capsys.readouterr().err)


def test_plain_lines_are_ten_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = PlainLines()
    lines.start("convert", 400)
    for _ in range(400):
        lines.advance(1)
    assert capsys.readouterr().err == ""


def test_a_logged_line_is_never_broken_by_another_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[str] = []
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "write", written.append)
    threads = [threading.Thread(target=PlainLines().log, args=(f"line {i}",)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(written) == [f"line {i}\n" for i in range(8)]


def test_the_bar_shows_one_step_at_a_time_and_what_is_fetched_for_it() -> None:
    bars = RichProgress(console=Console(file=io.StringIO()))
    bar = Bar(bars)
    bar.start("convert [transformer]", 400)
    bar.start_fetching(200)
    bar.advance(100)
    bar.advance_fetching(50)
    assert [(task.completed, task.total) for task in bars.tasks] == [(100, 400), (50, 200)]
    bar.start("convert transformer_2", 300)
    assert [(task.completed, task.total) for task in bars.tasks] == [(0, 300)]


def test_a_long_line_folds_at_words_on_a_terminal() -> None:
    file = io.StringIO()
    Bar(RichProgress(console=Console(file=file, width=40))).log(
        "  4 layers: kept, for a reason [that] is too long for it"
    )
    assert file.getvalue() == "  4 layers: kept, for a reason [that] is\n    too long for it\n"


@given(st.text(st.sampled_from("ab /"), min_size=1), st.integers(10, 40))
def test_folding_changes_nothing_but_white_space(text: str, width: int) -> None:
    folded = fold_lines(text, width)
    assert folded.split() == text.split()
    assert all(len(line) <= width or " " not in line.strip() for line in folded.splitlines())


def test_without_a_terminal_lines_are_plain_and_quiet_shows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with show_progress() as progress, show_progress(quiet=True) as nothing:
        assert isinstance(progress, PlainLines)
        assert isinstance(nothing, Silent)
