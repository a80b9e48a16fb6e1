"""The backends in order of preference, and the choice among them, with its reasons."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from run_ckpt.backends.activations import BLOCKED
from run_ckpt.backends.aiter import AITER
from run_ckpt.backends.backend import ACTIVATIONS, MXFP4, NVFP4, Backend, Device, Tensors
from run_ckpt.backends.block_scaled_mm import BLOCK_SCALED_MM
from run_ckpt.backends.petit import PETIT
from run_ckpt.backends.reference import DEQUANTIZE, REFERENCE
from run_ckpt.backends.scaled_mm import SCALED_MM
from run_ckpt.backends.triton.backend import TRITON
from run_ckpt.contract.errors import BackendError, UsageError
from run_ckpt.contract.manifest import INPUT_SCALE, Layer

BACKENDS: tuple[Backend, ...] = (AITER, SCALED_MM, BLOCK_SCALED_MM, PETIT, TRITON, REFERENCE, DEQUANTIZE)
BACKEND_NAMES = tuple(backend.name for backend in BACKENDS)


@dataclass(frozen=True)
class Choice:
    """The backend of one layer, and why each one before it in the table was not taken (name -> reason).

    ``rounded_to``: what activations are rounded to before they are multiplied; None: the backend's own way is taken.
    """

    backend: Backend
    passed_over: dict[str, str]
    rounded_to: str | None = None

    @property
    def has_gradient(self) -> bool:
        return self.backend.has_gradient and self.rounded_to is None

    @property
    def matmul(self) -> Callable[[Layer, Tensor, Tensors, Tensor | None], Tensor]:
        """The backend's product, see Backend.matmul, of x or of what x is rounded to; it can be pickled."""
        return (
            partial(_multiply_rounded, self.backend.name, self.rounded_to) if self.rounded_to else self.backend.matmul
        )


def choose_backend(layer: Layer, device: Device, name: str | None = None, activations: str | None = None) -> Choice:
    """Return the first backend that can run the layer on the device, or the one of that name.

    activations: one of ACTIVATIONS, None for the backend's own. Raises UsageError for an unknown name, BackendError
    where the named one, or every one, can't.
    """
    check_activations(activations)
    if name is not None:
        return _choose_named(layer, device, name, activations)
    passed_over: dict[str, str] = {}
    for backend in BACKENDS:
        reason = why_not(backend, layer, device, activations)
        if reason is None:
            return Choice(backend, passed_over, _rounded_to(backend, layer, activations))
        passed_over[backend.name] = reason
    reasons = "; ".join(f"{backend}: {reason}" for backend, reason in passed_over.items())
    raise BackendError(
        f"{layer.module}: no backend takes it{_with(activations)} on {device} by itself ({reasons})."
        " Ask for one by name, or install what is missing."
    )


def why_not(backend: Backend, layer: Layer, device: Device, activations: str | None = None) -> str | None:
    """Return why a backend is not taken for a layer unless it is asked for, None where it is."""
    return _unsupported(backend, layer, device, activations) or backend.only_if_asked(device, activations)


def taken_activations(backend: Backend, layer: Layer) -> tuple[str, ...]:
    """Return which of ACTIVATIONS a backend takes for a layer that it can run, its own first."""
    own = backend.activations(layer)
    others = [asked for asked in ACTIVATIONS if asked != own and _rounded_to(backend, layer, asked)]
    return own, *(asked for asked in others if _unsupported_activations(backend, layer, asked) is None)


def _multiply_rounded(
    name: str, activations: str, layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None
) -> Tensor:
    backend = find_backend(name)
    assert backend.round_rows is not None
    return backend.matmul(layer, backend.round_rows(x, activations, operands.get(INPUT_SCALE)), operands, bias)


def find_backend(name: str) -> Backend:
    """Return the backend of that name. Raises UsageError where there is none."""
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise UsageError(f"no backend {name!r}. Choose one of {', '.join(BACKEND_NAMES)}.")


def check_activations(activations: str | None) -> None:
    """Raise UsageError unless it is one of ACTIVATIONS, or None."""
    if activations is not None and activations not in ACTIVATIONS:
        raise UsageError(f"no activations {activations!r}. Choose one of {', '.join(ACTIVATIONS)}.")


def _choose_named(layer: Layer, device: Device, name: str, activations: str | None) -> Choice:
    backend = find_backend(name)
    reason = _unsupported(backend, layer, device, activations)
    if reason is not None:
        raise BackendError(f"{layer.module}: backend {name} can't run it{_with(activations)} on {device}: {reason}.")
    return Choice(backend, {}, _rounded_to(backend, layer, activations))


def _unsupported(backend: Backend, layer: Layer, device: Device, activations: str | None) -> str | None:
    return backend.unsupported(layer, device) or _unsupported_activations(backend, layer, activations)


def _unsupported_activations(backend: Backend, layer: Layer, asked: str | None) -> str | None:
    rounded_to = _rounded_to(backend, layer, asked)
    if rounded_to is None:
        return None
    if backend.round_rows is None:
        return f"it multiplies {layer.format} weights by {backend.activations(layer)} activations"
    if rounded_to in BLOCKED and layer.K % (block_size := BLOCKED[rounded_to][0].block[1] or 1):
        return f"K = {layer.K} is not a multiple of {block_size}, the block of {rounded_to} activations"
    return None


def _rounded_to(backend: Backend, layer: Layer, asked: str | None) -> str | None:
    """Return what was asked for unless it is the backend's own, or is not for this layer.

    No weight of 8 bits takes activations of 4: a folder may mix both.
    """
    is_too_few = asked in (NVFP4, MXFP4) and layer.format.element.per_byte == 1
    return None if is_too_few or asked == backend.activations(layer) else asked


def _with(activations: str | None) -> str:
    return f" with {activations} activations" if activations else ""
