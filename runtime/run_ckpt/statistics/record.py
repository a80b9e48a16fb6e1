"""record_statistics: forward hooks that sum up what goes into every linear layer of a model."""

import hashlib
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.contract.file_names import SUFFIX
from run_ckpt.statistics.fisher import FisherSums
from run_ckpt.statistics.sums import InputSums, sums_nbytes
from run_ckpt.storage.layer_statistics import (
    InputStatistics,
    LayerIdentity,
    fisher_name,
    read_statistics,
    write_statistics,
)
from run_ckpt.storage.units import format_nbytes

# Correlations of the whole input up to this K, in blocks above: what ``auto`` means.
_FULL_UP_TO = 6144
_BLOCK_SIZE = 1024
HELD_OUT_EVERY = 4
_NO_SETTINGS: Mapping[str, Any] = MappingProxyType({})


@contextmanager
def record_statistics(
    model: nn.Module,
    folder: str | Path,
    *,
    hessian: str = "auto",
    fisher: bool = False,
    memory: int | None = None,
    settings: Mapping[str, Any] = _NO_SETTINGS,
) -> Iterator["Recorder"]:
    """Record what goes into the linear layers of ``model`` while the block runs, and write it to ``folder``.

        with record_statistics(pipeline.transformer, "stats") as recorder:
            for prompt in prompts:
                recorder.next_sample()
                pipeline(prompt)

    One sample of four is held out: it measures what the others chose. Without next_sample() each call of ``model`` is
    one sample, which for a diffusion model are steps of the same prompts.

    hessian: ``full``, ``block=N``, ``none``, or ``auto``: full for K <= 6144, else blocks of 1024. fisher: repeat every
    second call of the first 16 samples with gradients, to learn how far an error in each output channel of a layer
    moves the model's output (statistics.fisher); that takes the memory of all activations. memory: bytes that
    the sums may take, where the activations are. Layers whose sums do not fit are ``recorder.left_out``; the same block
    with the same seeds records the next ones, as layers that ``folder`` holds already are skipped. settings: what else
    decides the numbers (prompts, seeds), kept in the files. A 2-D mask argument of the model (``attention_mask`` and
    the like, 1 or True is a token) leaves out the rows of padding where it fits the input.

    Raises UsageError for unknown options, and CheckpointError if ``folder`` holds statistics of another model or other
    settings, if no samples were run or held out, or if layers that shared an input in their first call do so no more.
    Nothing is written if the block raises.
    """
    recorder = Recorder(model, Path(folder), hessian, fisher, memory, settings)
    recorder.start()
    try:
        yield recorder
    except BaseException:
        recorder.stop()
        raise
    recorder.stop()
    recorder.write()


class Recorder:
    """What record_statistics yields."""

    def __init__(
        self,
        model: nn.Module,
        folder: Path,
        hessian: str,
        fisher: bool,
        memory: int | None,
        settings: Mapping[str, Any],
    ) -> None:
        self._model = model
        self._folder = folder
        self._hessian = hessian
        self._memory = memory
        self._settings = {**settings, "hessian": hessian, **({"fisher": True} if fisher else {})}
        self._block_size(1)  # refuses an unknown one before anything runs
        self._layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
        self._fisher = FisherSums(model, self._layers) if fisher else None
        self._done = self._read_done()
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._leader_of: dict[str, str] = {}
        self._sums: dict[str, InputSums] = {}
        self._too_large: set[str] = set()
        self._current: dict[str, _Seen] = {}
        self._masks: list[Tensor] = []
        self._n_samples = self._n_calls = self._n_calls_of_sample = 0
        self._held_out: bool | None = None

    @property
    def left_out(self) -> list[str]:
        """Layers that were called, but whose sums did not fit into the memory."""
        return [name for name, leader in self._leader_of.items() if leader in self._too_large]

    @property
    def uncalled(self) -> list[str]:
        """Layers that have no statistics and were never called."""
        return [name for name in self._layers if name not in self._done and name not in self._leader_of]

    def next_sample(self, *, held_out: bool | None = None) -> None:
        """Say that what runs from here on is another sample; held out or not, or as its turn is.

        Samples of one prompt belong together: held out, they would say that what fits the others fits them.
        """
        self._n_samples += 1
        self._n_calls_of_sample = 0
        self._held_out = held_out

    def start(self) -> None:
        """Hook in."""
        self._hooks.append(self._model.register_forward_pre_hook(self._begin_call, with_kwargs=True))
        self._hooks.append(self._model.register_forward_hook(self._end_call, with_kwargs=True))
        for name, layer in self._layers.items():
            if name not in self._done:
                self._hooks.append(layer.register_forward_hook(partial(self._add, name)))

    def stop(self) -> None:
        """Take the hooks away."""
        for hook in self._hooks:
            hook.remove()

    def write(self) -> None:
        """Write a file for each input; see record_statistics for what it raises."""
        for leader, sums in self._sums.items():
            for count, what in zip(sums.n_rows, ("summed up", "held out"), strict=True):
                if not count:
                    raise CheckpointError(
                        f"{leader}: no rows were {what}. Run several samples, and call next_sample() before each."
                    )
        self._folder.mkdir(parents=True, exist_ok=True)
        while self._sums:
            leader, sums = self._sums.popitem()
            members = {name: self._layers[name] for name, other in self._leader_of.items() if other == leader}
            write_statistics(
                self._folder,
                {**sums.tensors(), "weight_amax": _weight_amax(members.values()), **self._fisher_tensors(members)},
                model=type(self._model).__name__,
                layers={name: _identity(layer) for name, layer in members.items()},
                block_size=sums.block_size,
                settings=self._settings,
            )

    def _read_done(self) -> dict[str, InputStatistics]:
        if not any(self._folder.glob("*" + SUFFIX)):
            return {}
        done = read_statistics(self._folder)
        model = type(self._model).__name__
        for name, found in done.items():
            layer = self._layers.get(name)
            if found.model != model or layer is None or _identity(layer) != found.layers[name]:
                raise CheckpointError(f"{self._folder}: holds statistics of another model ({name} of {found.model}).")
            if found.settings != self._settings:
                raise CheckpointError(
                    f"{self._folder}: holds statistics with settings {dict(found.settings)}, asked for are"
                    f" {self._settings}. Choose another folder."
                )
        return done

    def _begin_call(self, _module: nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        self._n_calls += 1
        self._current.clear()
        self._masks = [
            value
            for name, value in kwargs.items()
            if name.endswith("mask")
            and isinstance(value, Tensor)
            and value.dim() == 2
            and not value.is_floating_point()
        ]

    def _end_call(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        n_sample, n_call = self._n_samples - 1, self._n_calls_of_sample
        if not self._n_samples:
            n_sample, n_call = self._n_calls - 1, 0
        self._n_calls_of_sample += 1
        if self._fisher:
            self._fisher.add_call(n_sample, n_call, args, kwargs)

    def _fisher_tensors(self, layers: Iterable[str]) -> dict[str, np.ndarray]:
        return {fisher_name(name): self._fisher.tensor(name).cpu().numpy() for name in layers} if self._fisher else {}

    def _add(self, name: str, layer: nn.Linear, args: tuple[Tensor, ...], _output: Any) -> None:
        if self._fisher and self._fisher.is_running:
            return
        x = args[0]
        if name not in self._leader_of:
            self._leader_of[name] = next((other for other, seen in self._current.items() if seen.is_(x)), name)
            if self._leader_of[name] == name:
                with torch.inference_mode():
                    self._make_room(name, layer.in_features, x.device)
        leader = self._leader_of[name]
        if leader == name:
            self._current[name] = _Seen(x)
            if name in self._sums:
                with torch.inference_mode():
                    self._sums[name].add(self._rows(x), held_out=self._is_held_out())
        elif leader not in self._current or not self._current[leader].is_(x):
            raise CheckpointError(
                f"{name}: was given the same input as {leader} in its first call, and now another one. Run a model"
                " whose layers always share their inputs, or none."
            )

    def _is_held_out(self) -> bool:
        if self._held_out is not None:
            return self._held_out
        return held_out_in_turn((self._n_samples or self._n_calls) - 1)

    def _make_room(self, leader: str, K: int, device: torch.device) -> None:
        block_size = self._block_size(K)
        if self._memory is not None:
            needed = sums_nbytes(K, block_size)
            if needed > self._memory:
                raise UsageError(
                    f"memory {format_nbytes(self._memory)}: the sums of one input with K = {K} take"
                    f" {format_nbytes(needed)}. Allow that, or record smaller blocks (hessian block=N)."
                )
            if needed + sum(sums_nbytes(sums.K, sums.block_size) for sums in self._sums.values()) > self._memory:
                self._too_large.add(leader)
                return
        self._sums[leader] = InputSums(K, block_size, device, rounding=self._fisher is not None)

    def _block_size(self, K: int) -> int:
        kind, _, size = self._hessian.partition("=")
        if kind == "block" and size.isdecimal() and int(size):
            return min(int(size), K)
        sizes = {"auto": K if K <= _FULL_UP_TO else _BLOCK_SIZE, "full": K, "none": 0}
        if self._hessian not in sizes:
            raise UsageError(f"hessian {self._hessian}: unknown. Say full, block=N, none or auto.")
        return sizes[self._hessian]

    def _rows(self, x: Tensor) -> Tensor:
        for mask in self._masks:
            if x.shape[:-1] == mask.shape:
                return x[mask.to(x.device).bool()]
        return x.reshape(-1, x.shape[-1])


def held_out_in_turn(number: int) -> bool:
    """True for the second of every four, counted from 0."""
    return number % HELD_OUT_EVERY == 1


class _Seen:
    """A tensor as it was when a layer was called with it."""

    def __init__(self, x: Tensor):
        self._x = weakref.ref(x)
        self._version = _version(x)

    def is_(self, x: Tensor) -> bool:
        """True for the same tensor, not written to since."""
        return self._x() is x and self._version == _version(x)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


def _identity(layer: nn.Linear) -> LayerIdentity:
    first_row = None
    if not layer.weight.is_meta:
        row = layer.weight.detach()[0].bfloat16().cpu().view(torch.uint8)
        first_row = hashlib.sha256(row.numpy().tobytes()).hexdigest()
    return LayerIdentity(layer.out_features, first_row)


def _weight_amax(layers: Iterable[nn.Linear]) -> np.ndarray:
    """Return float32 [K], zeros where a weight could not be read."""
    weights = [layer.weight.detach() for layer in layers]
    if any(weight.is_meta for weight in weights):
        return np.zeros(weights[0].shape[1], np.float32)
    columns = torch.stack([weight.abs().amax(0).float().cpu() for weight in weights])
    return columns.amax(0).numpy()
