"""SIGTERM and SIGHUP end a command as Ctrl-C does: what it had begun is cleared up, and the exit code tells which."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_ENDING = (signal.SIGTERM, signal.SIGHUP)


class Ending:
    """The signal that is ending the process; Ctrl-C's until another came."""

    number = signal.SIGINT

    @property
    def exit_code(self) -> int:
        """The code that a shell gives to a process that a signal ended."""
        return 128 + self.number


@contextmanager
def ending_signals() -> Iterator[Ending]:
    """Raise KeyboardInterrupt for signals that ask the process to end, but those that it was started to ignore."""
    ending = Ending()

    def end(number: int, _: object) -> None:
        ending.number = signal.Signals(number)
        raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    caught = [number for number in _ENDING if is_main and signal.getsignal(number) is signal.SIG_DFL]
    for number in caught:
        signal.signal(number, end)
    try:
        yield ending
    finally:
        for number in caught:
            signal.signal(number, signal.SIG_DFL)
