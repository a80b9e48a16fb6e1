"""The errors a user can cause or meet: one base class, one class per kind of fault."""

from collections.abc import Sequence


class CheckpointError(Exception):
    """Something about a checkpoint stops the work. The text says what, where and how to fix it."""


class UsageError(CheckpointError):
    """Options that contradict each other or name something that does not exist."""


class MissingPackageError(CheckpointError, ImportError):
    """A package of an extra that is not installed. The text holds the command that installs it."""


class HeaderError(CheckpointError):
    """A file that is not a well-formed safetensors file."""


class NonFiniteError(CheckpointError):
    """A weight holds NaN or Inf, which no quantized code can stand for."""


class StatisticsError(CheckpointError):
    """Statistics of a layer from which no codes can be chosen."""


class ManifestError(CheckpointError):
    """A folder without a usable quantization_manifest.json, or one that contradicts it."""


class PartialRunError(CheckpointError):
    """What an earlier run left behind belongs to another source or other options."""


class FetchError(CheckpointError):
    """A store does not hand out what was asked for: it is missing, forbidden, out of reach or not what it was."""


class TransientError(FetchError):
    """The same request may succeed later. ``wait_seconds`` is how long the store asks to wait, if it does.

    ``is_answer``: a store said so; else nobody may be there.
    """

    def __init__(self, text: str, wait_seconds: float | None = None, *, is_answer: bool = True):
        self.wait_seconds = wait_seconds
        self.is_answer = is_answer
        super().__init__(text)


class SliceError(CheckpointError):
    """Rows or columns of a quantized weight that can't be had without changing its values."""


class BackendError(CheckpointError):
    """No backend, or not the one asked for, can run a layer on a machine."""


class PublishError(CheckpointError):
    """The Hub can't be reached, refuses, or holds something else."""


class FaultsError(CheckpointError):
    """Several faults found together. ``faults`` holds one sentence for each."""

    def __init__(self, title: str, faults: Sequence[str]):
        self.title, self.faults = title, tuple(faults)
        lines = "\n".join(f"  - {fault}" for fault in self.faults)
        super().__init__(f"{title} ({len(self.faults)} found):\n{lines}")

    def __reduce__(self) -> tuple[object, ...]:  # for those that come from another process
        return type(self), (self.title, self.faults)


def first_line(error: object) -> str:
    """Return the first line of what an error says, or its type where it says nothing."""
    return (str(error) or type(error).__name__).strip().splitlines()[0]
