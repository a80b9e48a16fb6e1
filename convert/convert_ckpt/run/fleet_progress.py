"""One progress for all tasks of a cluster: they report to an actor, which the driver reads."""

import time
from typing import Any

from run_ckpt.progress import Progress

LOOK_SECONDS = 0.5


class Tally:
    """An actor: what all tasks report of their progress, by name, so that one that runs again begins anew."""

    def __init__(self) -> None:
        self._done: dict[str, tuple[int, int]] = {}
        self._lines: list[str] = []

    def begin(self, name: str) -> None:
        if name in self._done:
            self._lines.append(f"{name}: the task was lost, and runs again")
        self._done[name] = 0, 0

    def report(self, name: str, nbytes: int, fetched: int, lines: list[str]) -> None:
        self._done[name] = nbytes, fetched
        self._lines += lines

    def read(self, *, forget: bool = False) -> tuple[int, int, list[str]]:
        """Return the bytes that are done, the bytes that were fetched, and the lines since the last time."""
        lines, self._lines = self._lines, []
        nbytes, fetched = (sum(values) for values in zip(*self._done.values(), strict=True)) if self._done else (0, 0)
        if forget:
            self._done = {}
        return nbytes, fetched, lines


class Report:
    """The progress of a task, as a progress.Progress: sent to the tally now and then."""

    def __init__(self, tally: Any, name: str):
        self._tally, self._name = tally, name
        self._nbytes = self._fetched = 0
        self._lines: list[str] = []
        self._sent = time.monotonic()
        tally.begin.remote(name)

    def start(self, label: str, nbytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        self._nbytes += nbytes  # a lost update between threads costs nothing but a bar that is a little behind
        self._send_sometimes()

    def start_fetching(self, nbytes: int) -> None:
        pass

    def advance_fetching(self, nbytes: int) -> None:
        self._fetched += nbytes
        self._send_sometimes()

    def log(self, line: str) -> None:
        self._lines.append(line)

    def send(self) -> None:
        lines, self._lines = self._lines, []
        self._tally.report.remote(self._name, self._nbytes, self._fetched, lines)

    def _send_sometimes(self) -> None:
        if time.monotonic() - self._sent > LOOK_SECONDS:
            self._sent = time.monotonic()
            self.send()


class Shown:
    """What of the tally the user's progress has been told."""

    def __init__(self, progress: Progress):
        self._progress = progress
        self._nbytes = self._fetched = 0

    def update(self, nbytes: int, fetched: int, lines: list[str]) -> None:
        self._progress.advance(nbytes - self._nbytes)
        self._progress.advance_fetching(fetched - self._fetched)
        self._nbytes, self._fetched = nbytes, fetched
        for line in lines:
            self._progress.log(line)
