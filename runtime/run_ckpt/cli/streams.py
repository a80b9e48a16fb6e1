"""Standard output and error as they may be: closed, broken, full, or without the characters that are printed."""

import errno
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any


@contextmanager
def usable_streams() -> Iterator[None]:
    """Let printing succeed on whatever the two streams are: what was done counts, not who reads of it."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free descriptor, which no file of ours may get
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = _prepare(sys.stdout, 1), _prepare(sys.stderr, 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before


def _prepare(stream: IO[str] | None, fd: int) -> Any:
    if stream is None:  # closed before Python began
        stream = open(fd, "w", closefd=False)  # noqa: SIM115
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="backslashreplace")
    return _Unbroken(stream)


class _Unbroken:
    """A stream that goes on, into nothing, when its reader or its terminal has gone."""

    def __init__(self, stream: IO[str]):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            self._give_up(error)
            return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Let what is still in the stream's buffer go where it can. Raises an error that says something else."""
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise error
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, self._stream.fileno())
        os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
