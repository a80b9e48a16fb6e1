"""Which backend takes which layers on a device, and why not the others: the answer to `inspect --device`."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from run_ckpt.backends.backend import Device, describe_device
from run_ckpt.backends.select import BACKENDS, choose_backend
from run_ckpt.contract.errors import BackendError, UsageError
from run_ckpt.contract.manifest import Layer
from run_ckpt.contract.manifest_checks import read_checked_manifest


@dataclass(frozen=True)
class BackendRow:
    """One backend: how many of the layers it gets, and reason -> for how many it is not taken."""

    name: str
    n_layers: int
    reasons: dict[str, int]


@dataclass(frozen=True)
class Availability:
    """What would run a checkpoint on a device. ``n_unsupported`` layers are taken by no backend unasked."""

    machine: str
    rows: tuple[BackendRow, ...]
    n_unsupported: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def device_availability(path: Path, device: str) -> Availability:
    """Return what would run the component in folder ``path`` on a torch device.

    Raises ManifestError, ProblemsError, or UsageError where this machine has no such device.
    """
    try:
        described = describe_device(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"--device {device}: {reason}. Choose one that this machine has, or cpu.") from error
    return backend_availability(read_checked_manifest(path).layers.values(), described)


def backend_availability(layers: Iterable[Layer], device: Device) -> Availability:
    """Return a row for each backend, in order of preference."""
    taken: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {backend.name: Counter() for backend in BACKENDS}
    n_unsupported = 0
    for layer in layers:
        for backend in BACKENDS:
            reason = backend.unsupported(layer, device) or backend.only_if_named(device)
            if reason is not None:
                reasons[backend.name][reason] += 1
        try:
            taken[choose_backend(layer, device).backend.name] += 1
        except BackendError:
            n_unsupported += 1
    rows = (BackendRow(backend.name, taken[backend.name], dict(reasons[backend.name])) for backend in BACKENDS)
    return Availability(str(device), tuple(rows), n_unsupported)
