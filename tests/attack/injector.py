"""One fault at one step that changes a file: each call of the operating system that does is a step.

A run is a child process, forked when everything is imported and the kernels are compiled: it takes some 50 ms.
"""

import errno
import os
import signal
import threading
import traceback
from collections.abc import Callable
from typing import Any

from run_ckpt.contract.errors import CheckpointError

# The calls by which our code changes files. Of open only those that may make one.
CALLS = (
    "open",
    "mkdir",
    "rename",
    "replace",
    "unlink",
    "rmdir",
    "link",
    "ftruncate",
    "pwrite",
    "write",
    "fsync",
    "fdatasync",
)
MODES = ("kill before", "kill after", "ENOSPC", "EIO", "short")
DONE, REFUSED, CRASHED, KILLED = 0, 1, 3, -signal.SIGKILL


class Injector:
    """Counts the steps of a process, and at step ``at`` does what ``mode`` says."""

    def __init__(self, mode: str, at: int, may_count: Callable[[str, tuple[Any, ...]], bool]):
        self._mode, self._at = mode, at
        self._may_count = may_count
        self._lock = threading.Lock()
        self.n_steps = 0

    def install(self) -> None:
        """Put a fault before each call; there is no way back, so do it in a child."""
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **keywords: Any) -> Any:
            if not self._may_count(name, args):
                return call(*args, **keywords)
            with self._lock:
                self.n_steps += 1
                is_it = self.n_steps == self._at
            if not is_it:
                return call(*args, **keywords)
            if self._mode in ("ENOSPC", "EIO"):
                number = getattr(errno, self._mode)
                raise OSError(number, os.strerror(number))
            if self._mode == "short" and name in ("pwrite", "write"):
                fd, data, *rest = args
                return call(fd, memoryview(data)[: max(1, len(data) // 2)], *rest, **keywords)
            if self._mode == "kill before":
                os.kill(os.getpid(), signal.SIGKILL)
            result = call(*args, **keywords)
            if self._mode == "kill after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return step


def changes_a_file(name: str, args: tuple[Any, ...]) -> bool:
    """True for a call that is a step."""
    if name == "open":
        return len(args) > 1 and bool(args[1] & os.O_CREAT)
    return not (name == "write" and args[0] < 3)


def run_in_child(work: Callable[[], object], mode: str = "", at: int = 0) -> tuple[int, int]:
    """Return how a run ended (DONE, REFUSED, CRASHED, KILLED), and how many steps it took where it was not killed."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        code = CRASHED
        injector = Injector(mode, at, changes_a_file)
        injector.install()
        try:
            work()
            code = DONE
        except (CheckpointError, OSError):
            code = REFUSED
        except BaseException:
            traceback.print_exc()
        with open(writer, "w") as pipe:
            pipe.write(str(injector.n_steps))
        os._exit(code)
    os.close(writer)
    with open(reader) as pipe:
        text = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), int(text or 0)
