"""Fisher information of linear layers: how far an error in each output channel moves the output of the model.

A model is called once more on the arguments of a call, and random signs over its output are taken back to the output y
[rows, N] of each layer: the mean square of that gradient over signs is the sum of (d output / d y)^2 over all outputs
(Hutchinson). With signs divided by the norm of the output it is in units of the output's energy: errors e of the layer,
independent of each other, change the output by the sum over n of fisher_n mean(e_n^2), relative and squared.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from run_ckpt.contract.errors import CheckpointError

# Of the first samples every second call, as steps of a sampler are much alike; each with two draws of signs.
_N_SAMPLES, _EVERY, _N_SIGNS = 16, 2, 2


class FisherSums:
    """Sums over calls of a model, for its linear layers by name; float32 [N] each."""

    def __init__(self, model: nn.Module, layers: Mapping[str, nn.Linear]):
        self._model = model
        self._layers = layers
        self._sums: dict[str, Tensor] = {}
        self._n_draws = 0
        self.is_running = False

    def add_call(self, n_sample: int, n_call: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Add the call of that number in the sample of that number, from 0; or pass it over. Dropout must be off.

        Raises CheckpointError where no gradient comes back from the output.
        """
        if n_sample >= _N_SAMPLES or n_call % _EVERY:
            return
        self.is_running = True
        try:
            with ExitStack() as stack:
                # What inference mode made can't be differentiated; copies made outside of it can.
                stack.enter_context(torch.inference_mode(mode=False))
                stack.enter_context(torch.enable_grad())
                stack.callback(_freeze(self._model))
                for name, layer in self._layers.items():
                    stack.callback(layer.register_forward_hook(partial(self._watch, name)).remove)
                self._draw(self._model.forward(*_copy(args), **_copy(dict(kwargs))))
        finally:
            self.is_running = False

    def tensor(self, name: str) -> Tensor:
        """Return squared gradients, summed over the rows of a call, mean of calls and signs; zero where none came."""
        if not self._n_draws:
            raise CheckpointError(f"{name}: no call of the model was differentiated. Run the model in the block.")
        N = self._layers[name].out_features
        return self._sums[name] / self._n_draws if name in self._sums else torch.zeros(N)

    def _watch(self, name: str, _layer: nn.Linear, _args: Any, y: Tensor) -> Tensor:
        if not y.requires_grad:
            y = y.detach().requires_grad_().clone()  # a leaf could not be written to by what comes next
        y.register_hook(partial(self._add, name))  # type: ignore[no-untyped-call]
        return y

    def _add(self, name: str, gradient: Tensor) -> None:
        squares = gradient.detach().float().square().reshape(-1, gradient.shape[-1]).sum(0)
        self._sums[name] = self._sums[name] + squares if name in self._sums else squares

    def _draw(self, output: Any) -> None:
        outputs = [tensor for tensor in _tensors(output) if tensor.requires_grad]
        if not outputs:
            raise CheckpointError(
                f"{type(self._model).__name__}: no gradient comes back from its output. Record it without fisher."
            )
        for n in range(_N_SIGNS):
            generator = torch.Generator().manual_seed(self._n_draws)
            signs = [_signs(tensor, generator) / tensor.detach().float().norm() for tensor in outputs]
            gradients = [sign.to(tensor.dtype) for sign, tensor in zip(signs, outputs, strict=True)]
            torch.autograd.backward(outputs, gradients, retain_graph=n + 1 < _N_SIGNS)
            self._n_draws += 1


def _freeze(model: nn.Module) -> Any:
    """Let no parameter want a gradient; return what undoes that."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def want(is_wanted: bool) -> None:
        for parameter in parameters:
            parameter.requires_grad_(is_wanted)

    want(False)
    return partial(want, True)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {name: _copy(item) for name, item in value.items()}
    return type(value)(map(_copy, value)) if type(value) in (list, tuple) else value


def _tensors(output: Any) -> Iterator[Tensor]:
    """Yield the floating-point tensors that a model returns: one, or those of tuples, lists (Z-Image) and records."""
    if isinstance(output, Tensor):
        yield from (output,) if output.is_floating_point() else ()
    elif isinstance(output, (tuple, list, Mapping)):
        for item in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(item)


def _signs(tensor: Tensor, generator: torch.Generator) -> Tensor:
    return (torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1).float().to(tensor.device)
