"""What a run shows while it works: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID

_PLAIN_INTERVAL_SECONDS = 10.0
_SLOW_START_SECONDS = 2.0


class Silent(AbstractContextManager["Silent"]):
    """Shows nothing."""

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, component: str, nbytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def log(self, line: str) -> None:
        pass


class PlainLines(Silent):
    """One line per finished file, and one every ten seconds in between, on standard error."""

    def start(self, component: str, nbytes: int) -> None:
        self._total, self._done = nbytes, 0
        self._started = self._said = time.monotonic()
        self._lock = threading.Lock()
        if component:
            self.log(f"converting {component}")

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self._done += nbytes
            now = time.monotonic()
            if now - self._said >= _PLAIN_INTERVAL_SECONDS:
                self._said = now
                rate = self._done / (now - self._started)
                eta = (self._total - self._done) / rate
                self.log(f"{self._done / self._total:4.0%}  {rate / 1e9:.2f} GB/s  {eta:.0f} s left")

    def log(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Bar(Silent):
    """A bar with GB/s and the time left, on standard error."""

    def __enter__(self) -> Bar:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar: RichBar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task: TaskID | None = None
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, component: str, nbytes: int) -> None:
        if self._task is not None:
            self._bar.remove_task(self._task)
        self._task = self._bar.add_task(component or "converting", total=nbytes)

    def advance(self, nbytes: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, nbytes)

    def log(self, line: str) -> None:
        self._bar.console.print(line, highlight=False)


class SlowStartNote:
    """Says so if the first use takes long: numba compiles a kernel once for each processor."""

    def __init__(self, log: Callable[[str], None]):
        self._timer = threading.Timer(
            _SLOW_START_SECONDS, log, ["compiling the kernels for this processor, once; this takes some seconds"]
        )
        self._timer.daemon = True
        self._lock = threading.Lock()
        self._used = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._used:
                self._used = True
                self._timer.start()

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def choose_progress(*, quiet: bool) -> Silent:
    """Return the display that suits standard error."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else PlainLines()
