"""Convert safetensors checkpoints to MXFP4 or FP8, file to file: the Python API.

    from convert_ckpt import convert

    summary = convert("FLUX.1-dev", "flux-mxfp4", format="mxfp4")

``import convert_ckpt`` needs the standard library only; the rest is imported when ``convert`` is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from run_ckpt.contract.errors import (
    CheckpointError,
    FaultsError,
    FetchError,
    MissingPackageError,
    NonFiniteError,
    PartialRunError,
    PublishError,
    StatisticsError,
    UsageError,
)
from run_ckpt.version import VERSION as __version__

if TYPE_CHECKING:
    from convert_ckpt.api import convert, plan_conversion
    from convert_ckpt.options import Options
    from convert_ckpt.pipeline import Preview
    from convert_ckpt.run_summary import RunSummary
    from run_ckpt.progress import Progress

__all__ = [
    "CheckpointError",
    "FaultsError",
    "FetchError",
    "MissingPackageError",
    "NonFiniteError",
    "Options",
    "PartialRunError",
    "Preview",
    "Progress",
    "PublishError",
    "RunSummary",
    "StatisticsError",
    "UsageError",
    "__version__",
    "convert",
    "plan_conversion",
]

_HOMES = {
    "convert": "convert_ckpt.api",
    "plan_conversion": "convert_ckpt.api",
    "Options": "convert_ckpt.options",
    "Preview": "convert_ckpt.pipeline",
    "RunSummary": "convert_ckpt.run_summary",
    "Progress": "run_ckpt.progress",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
