"""Which backend takes which layers on a device, and why not the others: the answer to `inspect --device`."""

import re
from collections import Counter
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from run_ckpt.backends.backend import Backend, Device, describe_device
from run_ckpt.backends.choose import BACKEND_NAMES, BACKENDS, choose_backend, taken_activations, why_not
from run_ckpt.contract.errors import BackendError, UsageError
from run_ckpt.contract.manifest import Layer, Manifest
from run_ckpt.contract.memory import load_nbytes, weights_nbytes
from run_ckpt.storage.manifest_file import read_checked_manifest

_ARCHITECTURE = re.compile(r"(gfx|sm)[0-9][0-9a-f]+")


@dataclass(frozen=True)
class BackendRow:
    """One backend: how many of the layers it gets, and reason -> for how many it is not taken.

    ``activations``: format -> in which of ACTIVATIONS it takes those of weights in it, its own first.
    """

    name: str
    n_layers: int
    reasons: dict[str, int]
    activations: dict[str, tuple[str, ...]]


@dataclass(frozen=True)
class Availability:
    """What would run a checkpoint on a device. ``n_unsupported`` layers are taken by no backend unasked.

    ``weights_nbytes`` are all tensors on the device; ``load_nbytes`` is about the most while they are loaded, when
    the largest layer may exist in two orders of bytes. ``is_here``: False for a GPU that was only asked about.
    """

    device: str
    rows: tuple[BackendRow, ...]
    n_unsupported: int
    weights_nbytes: int
    load_nbytes: int
    is_here: bool

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def device_availability(path: Path, name: str) -> Availability:
    """Return what would run the component in folder ``path`` on a device, see find_device.

    Raises ManifestError, FaultsError, or UsageError.
    """
    return manifest_availability(read_checked_manifest(path), find_device(name))


def find_device(name: str) -> Device:
    """Return what a torch device of this machine is, or a GPU by the name of its architecture, here or not.

    Raises UsageError where it is neither.
    """
    if architecture := _ARCHITECTURE.fullmatch(name):
        return Device("rocm" if architecture[1] == "gfx" else "cuda", name, is_here=False)
    try:
        return describe_device(torch.device(name))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"--device {name}: {reason}. Choose one that this machine has, cpu, or a GPU's architecture such as gfx950,"
            " gfx942, sm90 or sm120."
        ) from error


def manifest_availability(manifest: Manifest, device: Device) -> Availability:
    """Return a row for each backend, in order of preference."""
    layers = manifest.layers.values()
    taken: Counter[str] = Counter()
    reasons: dict[str, Counter[str]] = {backend.name: Counter() for backend in BACKENDS}
    n_unsupported = 0
    for layer in layers:
        for backend in BACKENDS:
            reason = why_not(backend, layer, device)
            if reason is not None:
                reasons[backend.name][reason] += 1
        try:
            taken[choose_backend(layer, device).backend.name] += 1
        except BackendError:
            n_unsupported += 1
    able = {backend.name: _activations(backend, layers, device) for backend in BACKENDS}
    rows = (BackendRow(name, taken[name], dict(reasons[name]), able[name]) for name in BACKEND_NAMES)
    memory = (weights_nbytes(manifest), load_nbytes(manifest))
    return Availability(str(device), tuple(rows), n_unsupported, *memory, device.is_here)


def _activations(backend: Backend, layers: Collection[Layer], device: Device) -> dict[str, tuple[str, ...]]:
    able = [layer for layer in layers if backend.unsupported(layer, device) is None]
    return {layer.format.name: taken_activations(backend, layer) for layer in able}
