"""What the threads of a run wait for: a change of their shared state, or the first failure, which ends them all."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Signal:
    """The lock of the shared state; each change wakes the threads that wait for one."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self.failure: BaseException | None = None

    @contextmanager
    def notify(self) -> Iterator[None]:
        """Hold the lock, then wake the threads that wait."""
        with self._condition:
            yield
            self._condition.notify_all()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait for a condition on the shared state. Raises the failure if there is one."""
        with self._condition:
            self._condition.wait_for(lambda: self.failure is not None or condition())
            if self.failure:
                raise self.failure

    def fail(self, error: BaseException) -> None:
        """End every wait. Only the first error is kept."""
        with self.notify():
            self.failure = self.failure or error
