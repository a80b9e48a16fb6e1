"""What a run shows while it works: a bar on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import sys
import threading
import time
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as RichBar
    from rich.progress import TaskID

_PLAIN_INTERVAL_SECONDS = 10.0


class Silent(AbstractContextManager["Silent"]):
    """Shows nothing."""

    def __exit__(self, *_: object) -> None:
        pass

    def start(self, component: str, nbytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def start_fetching(self, nbytes: int) -> None:
        """Say how much of a remote source will come; it comes while the rest is converted."""

    def advance_fetching(self, nbytes: int) -> None:
        pass

    def log(self, line: str) -> None:
        pass


class PlainLines(Silent):
    """One line per finished file, and one every ten seconds in between, on standard error."""

    def start(self, component: str, nbytes: int) -> None:
        self._total, self._done = nbytes, 0
        self._total_fetched, self._fetched = 0, 0
        self._started = self._said = time.monotonic()
        self._lock = threading.Lock()
        if component:
            self.log(f"converting {component}")

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
        self.log(f"{self._done / max(self._total, 1):4.0%}{fetched}  {rate / 1e9:.2f} GB/s  {left}")

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
        self._fetch_task: TaskID | None = None
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def start(self, component: str, nbytes: int) -> None:
        for task in (self._task, self._fetch_task):
            if task is not None:
                self._bar.remove_task(task)
        self._fetch_task = None
        self._task = self._bar.add_task(component or "converting", total=nbytes)

    def advance(self, nbytes: int) -> None:
        if self._task is not None:
            self._bar.advance(self._task, nbytes)

    def start_fetching(self, nbytes: int) -> None:
        if nbytes:
            self._fetch_task = self._bar.add_task("fetching", total=nbytes)

    def advance_fetching(self, nbytes: int) -> None:
        if self._fetch_task is not None:
            self._bar.advance(self._fetch_task, nbytes)

    def log(self, line: str) -> None:
        self._bar.console.print(line, highlight=False, markup=False, soft_wrap=True)


def choose_progress(*, quiet: bool) -> Silent:
    """Return the display that suits standard error."""
    if quiet:
        return Silent()
    return Bar() if sys.stderr.isatty() else PlainLines()
