"""Swap the linear layers of a model for quantized ones, by name."""

from collections.abc import Mapping
from typing import Any, NoReturn

from torch import nn

from run_ckpt.contract.errors import FaultsError, UsageError
from run_ckpt.contract.manifest import Layer
from run_ckpt.loading.linear import QuantizedLinear


def replace_linears(
    model: nn.Module, layers: Mapping[str, Layer], backend: str | None = None, activations: str | None = None
) -> dict[str, QuantizedLinear]:
    """Put a QuantizedLinear in place of each module of ``model`` that ``layers`` names; return them by name.

    Raises FaultsError, with the model untouched, where a module is missing, no nn.Linear or of another shape.
    """
    modules = dict(model.named_modules())
    faults = [fault for name, layer in layers.items() if (fault := _fault(modules.get(name), layer))]
    if faults:
        raise FaultsError(f"{type(model).__name__}: not the model that this checkpoint was made from", faults)
    replaced = {}
    for name, layer in layers.items():
        old = modules[name]
        # The very parameter of the old layer, not a copy: it may be tied, and fill.py finds it by its identity.
        linear = QuantizedLinear(layer, old.bias, backend, old.weight.dtype, activations)
        linear.train(old.training)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, linear)
        replaced[name] = linear
    if hasattr(model, "fuse_lora"):
        # peft would change layers that are not quantized before it meets one that is.
        model.fuse_lora = _refuse_to_fuse  # type: ignore[assignment]
    return replaced


def _refuse_to_fuse(*_: Any, **__: Any) -> NoReturn:
    raise UsageError(
        "fuse_lora: a LoRA can't become part of quantized weights. Leave it beside them, where it runs as it is;"
        " or convert the checkpoint back with run-ckpt dequantize, and fuse it there."
    )


def _fault(module: nn.Module | None, layer: Layer) -> str | None:
    if module is None:
        return f"{layer.module}: the model has no such module. Give the class and config that were converted."
    if isinstance(module, QuantizedLinear):
        return f"{layer.module}: is quantized already. Give the model as its class builds it."
    if not isinstance(module, nn.Linear):
        return f"{layer.module}: is a {type(module).__name__}, only nn.Linear can be replaced. Convert without it."
    if (module.out_features, module.in_features) != (layer.N, layer.K):
        shape = [module.out_features, module.in_features]
        return f"{layer.module}: is {shape} in the model, [{layer.N}, {layer.K}] in the checkpoint."
    return None
