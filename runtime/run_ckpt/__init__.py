"""Load and run checkpoints that ``convert-ckpt`` made: the Python API.

``import run_ckpt`` needs the standard library only; torch is imported when a name that needs it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from run_ckpt.contract.errors import (
    BackendError,
    CheckpointError,
    FaultsError,
    ManifestError,
    MissingPackageError,
    UsageError,
)
from run_ckpt.extras import naming_extras
from run_ckpt.version import VERSION as __version__

if TYPE_CHECKING:
    from run_ckpt.loading.linear import QuantizedLinear
    from run_ckpt.loading.load import load_quantized
    from run_ckpt.statistics.record import record_statistics

__all__ = [
    "BackendError",
    "CheckpointError",
    "FaultsError",
    "ManifestError",
    "MissingPackageError",
    "QuantizedLinear",
    "UsageError",
    "__version__",
    "load_quantized",
    "record_statistics",
]

# Name -> the module that has it and imports torch.
_HOMES = {
    "load_quantized": "run_ckpt.loading.load",
    "QuantizedLinear": "run_ckpt.loading.linear",
    "record_statistics": "run_ckpt.statistics.record",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with naming_extras(name):
        return getattr(import_module(_HOMES[name]), name)
