"""Progress reporting for long operations: what they call, whatever shows it."""

from typing import Protocol


class Progress(Protocol):
    """What a long operation reports to. Every method may be called from any thread."""

    def start(self, label: str, nbytes: int) -> None:
        """Begin a step of ``nbytes``; it ends where the next begins."""

    def advance(self, nbytes: int) -> None:
        """Note that ``nbytes`` of the step are done."""

    def start_fetching(self, nbytes: int) -> None:
        """Say how much of a remote source comes during this step."""

    def advance_fetching(self, nbytes: int) -> None:
        """Note that ``nbytes`` of it came; negative where they have to come again."""

    def log(self, line: str) -> None:
        """Show a line, such as a finished file."""


class Silent:
    """Shows nothing: the default where a progress is optional."""

    def start(self, label: str, nbytes: int) -> None:
        pass

    def advance(self, nbytes: int) -> None:
        pass

    def start_fetching(self, nbytes: int) -> None:
        pass

    def advance_fetching(self, nbytes: int) -> None:
        pass

    def log(self, line: str) -> None:
        pass
