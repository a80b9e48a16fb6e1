"""The backends in order of preference, and the choice among them, with its reasons."""

from dataclasses import dataclass

from run_ckpt.backends.aiter import AITER
from run_ckpt.backends.backend import Backend, Device
from run_ckpt.backends.petit import PETIT
from run_ckpt.backends.reference import DEQUANTIZE, REFERENCE
from run_ckpt.backends.scaled_mm import SCALED_MM
from run_ckpt.backends.triton.backend import TRITON
from run_ckpt.contract.errors import BackendError, UsageError
from run_ckpt.contract.manifest import Layer

BACKENDS: tuple[Backend, ...] = (AITER, SCALED_MM, PETIT, TRITON, REFERENCE, DEQUANTIZE)
BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)


@dataclass(frozen=True)
class Choice:
    """The backend of one layer, and why each one before it in the table was not taken (name -> reason)."""

    backend: Backend
    passed_over: dict[str, str]


def choose_backend(layer: Layer, device: Device, name: str | None = None) -> Choice:
    """Return the first backend that can run the layer on the device, or the one of that name.

    Raises UsageError for an unknown name, BackendError where the named one, or every one, can't.
    """
    if name is not None:
        return Choice(_named(layer, device, name), {})
    passed_over: dict[str, str] = {}
    for backend in BACKENDS:
        reason = backend.unsupported(layer, device) or backend.only_if_named(device)
        if reason is None:
            return Choice(backend, passed_over)
        passed_over[backend.name] = reason
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed_over.items())
    raise BackendError(
        f"{layer.module}: no backend takes it on {device} by itself ({reasons})."
        " Ask for one by name, or install what is missing."
    )


def find_backend(name: str) -> Backend:
    """Return the backend of that name. Raises UsageError where there is none."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise UsageError(f"no backend {name!r}. Choose one of {', '.join(BACKEND_NAMES)}.")


def _named(layer: Layer, device: Device, name: str) -> Backend:
    backend = find_backend(name)
    reason = backend.unsupported(layer, device)
    if reason is not None:
        raise BackendError(f"{layer.module}: backend {name} can't run it on {device}: {reason}.")
    return backend
