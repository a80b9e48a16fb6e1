"""Progress on standard error: a bar on a terminal, plain lines elsewhere, or nothing; of both commands."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from run_ckpt.cli.lines import fold_lines
from run_ckpt.contract.display import shown
from run_ckpt.progress import Progress, Silent

if TYPE_CHECKING:  # only the bar needs it, and a run without a terminal starts faster
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

_PLAIN_INTERVAL_SECONDS = 10.0


@contextmanager
def show_progress(*, quiet: bool = False) -> Iterator[Progress]:
    """Yield the progress that suits standard error; nothing is shown where ``quiet``."""
    if quiet:
        yield Silent()
    elif not sys.stderr.isatty():
        yield PlainLines()
    else:
        with _make_bars() as bars:
            yield Bar(bars)


class PlainLines:
    """The logged lines, and one about the step every ten seconds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.start("", 0)

    def start(self, label: str, nbytes: int) -> None:
        self._label, self._total, self._done = label, nbytes, 0
        self._total_fetched, self._fetched = 0, 0
        self._started = self._said = time.monotonic()

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            self._say_sometimes()

    def start_fetching(self, nbytes: int) -> None:
        self._total_fetched = nbytes

    def advance_fetching(self, nbytes: int) -> None:
        with self._lock:
            self._fetched += nbytes
            self._say_sometimes()

    def log(self, line: str) -> None:
        with contextlib.suppress(OSError):  # a full disk behind standard error stops no work
            sys.stderr.write(f"{shown(line, lines=True)}\n")  # in one piece, whatever other threads write
            sys.stderr.flush()

    def _say_sometimes(self) -> None:
        now = time.monotonic()
        if now - self._said < _PLAIN_INTERVAL_SECONDS:
            return
        self._said = now
        done, total = self._done, self._total
        fetched = ""
        if self._total_fetched:  # then fetching is what the rest waits for
            fetched = f"  fetched {self._fetched / self._total_fetched:4.0%}"
            done, total = self._fetched, self._total_fetched
        rate = done / (now - self._started)
        left = f"{(total - done) / rate:.0f} s left" if rate > 0 else "waiting"
        self.log(f"{self._label} {self._done / max(self._total, 1):4.0%}{fetched}  {rate / 1e9:.2f} GB/s  {left}")


class Bar:
    """The step at work, with GB/s and the time left, and what is fetched for it."""

    def __init__(self, bars: RichProgress):
        self._bars = bars
        self._step: TaskID | None = None
        self._fetch: TaskID | None = None

    def start(self, label: str, nbytes: int) -> None:
        from rich.markup import escape

        for task in self._bars.task_ids:
            self._bars.remove_task(task)
        self._step, self._fetch = self._bars.add_task(escape(shown(label)), total=nbytes), None

    def advance(self, nbytes: int) -> None:
        if self._step is not None:
            self._bars.advance(self._step, nbytes)

    def start_fetching(self, nbytes: int) -> None:
        if self._fetch is not None:  # of the component before
            self._bars.remove_task(self._fetch)
        self._fetch = self._bars.add_task("fetch", total=nbytes)

    def advance_fetching(self, nbytes: int) -> None:
        if self._fetch is not None:
            self._bars.advance(self._fetch, nbytes)

    def log(self, line: str) -> None:
        console = self._bars.console
        text = fold_lines(shown(line, lines=True), console.width)
        console.print(text, highlight=False, markup=False, soft_wrap=True)


def _make_bars() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as RichProgress

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    return RichProgress(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
