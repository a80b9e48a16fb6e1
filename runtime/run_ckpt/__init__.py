"""Converted checkpoints: their contract, what checks and rewrites them, and what runs them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from run_ckpt.loading.load import load_quantized
    from run_ckpt.statistics.record import record_statistics

__all__ = ["load_quantized", "record_statistics"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for: run-ckpt --help and the converter need no torch."""
    if name == "load_quantized":
        from run_ckpt.loading.load import load_quantized

        return load_quantized
    if name == "record_statistics":
        from run_ckpt.statistics.record import record_statistics

        return record_statistics
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
