"""The errors a user can cause or meet: one base class, one class per kind of fault."""

from collections.abc import Sequence


class CheckpointError(Exception):
    """Something about a checkpoint stops the work. The text says what, where and how to fix it."""


class UsageError(CheckpointError):
    """Options that contradict each other or name something that does not exist."""


class HeaderError(CheckpointError):
    """A file that is not a well-formed safetensors file."""


class NonFiniteError(CheckpointError):
    """A weight holds NaN or Inf, which no quantized code can stand for."""


class ManifestError(CheckpointError):
    """A folder without a usable quantization_manifest.json, or one that contradicts it."""


class PartialRunError(CheckpointError):
    """What an earlier run left behind belongs to another source or other options."""


class SliceError(CheckpointError):
    """Rows or columns of a quantized weight that can't be had without changing its values."""


class BackendError(CheckpointError):
    """No backend, or not the one asked for, can run a layer on a machine."""


class ProblemsError(CheckpointError):
    """Several faults found together. ``problems`` holds one sentence for each."""

    def __init__(self, title: str, problems: Sequence[str]):
        self.problems = tuple(problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        super().__init__(f"{title} ({len(self.problems)} found):\n{lines}")
