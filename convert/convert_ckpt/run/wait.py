"""What the threads of a run wait for: a change of their shared state, or the first failure, which ends them all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Gate:
    """A lock around shared state; whoever waits is woken by each change."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.failure: BaseException | None = None

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Hold the lock, and wake whoever waits."""
        with self._condition:
            yield
            self._condition.notify_all()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on the shared state. Raises the failure where there is one."""
        with self._condition:
            self._condition.wait_for(lambda: self.failure is not None or condition())
            if self.failure:
                raise self.failure

    def fail(self, error: BaseException) -> None:
        """Let nobody wait any longer; the first error counts."""
        with self.changing():
            self.failure = self.failure or error
