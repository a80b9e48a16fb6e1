"""What the quantizer plug-ins of diffusers and transformers share: our quantization_config -> layers in a model."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from run_ckpt.contract.dialects.table import PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.foreign import READABLE_METHODS, is_ours, layers_in_config
from run_ckpt.loading.build import find_renaming
from run_ckpt.loading.experts import separate_experts
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.loading.renamed import left_out_by
from run_ckpt.loading.replace import replace_linears

# The name of our quantizer in the tables of the library. A quantization_config says who else can read it
# ("fp8", "mxfp4", ...); ours is told apart by its private key.
OWN_METHOD = "convert_ckpt"


class ConfigDispatch:
    """Stands in the library's table of config classes for one quant_method: ours to us, others as before."""

    def __init__(self, ours: Any, theirs: Any, method: str):
        self._ours, self._theirs, self._method = ours, theirs, method

    def from_dict(self, config: dict[str, Any], **kwargs: Any) -> Any:
        if is_ours(config):
            return self._ours.from_dict(config, **kwargs)
        if self._theirs is None:
            raise ValueError(
                f"quant_method {self._method!r}: not written by convert-ckpt, and no one else reads it here."
            )
        return self._theirs.from_dict(config, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._theirs, name)


def dispatch_configs(table: dict[str, Any], ours: Any) -> None:
    """Put a ConfigDispatch before every entry of ``table`` that could be ours. Once is enough."""
    for method in READABLE_METHODS:
        if not isinstance(table.get(method), ConfigDispatch):
            table[method] = ConfigDispatch(ours, table.get(method), method)


def saved_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the quantization_config for a folder that save_pretrained writes, which has no manifest."""
    private = {key: value for key, value in config[PRIVATE_KEY].items() if key != "manifest"}
    return {**config, PRIVATE_KEY: private}


def replace_declared(
    model: nn.Module, config: Mapping[str, Any], naming: str, backend: str | None
) -> dict[str, QuantizedLinear]:
    """Put quantized layers where the config says, and return them by name. Raises CheckpointError."""
    if naming == "transformers":
        config = _renamed_config(config, find_renaming(model))
        separate_experts(model, config[PRIVATE_KEY]["quantized_modules"])
    shapes = {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    layers = layers_in_config(config, shapes, naming)
    is_left_out = left_out_by(model)
    declared = config[PRIVATE_KEY]["quantized_modules"].keys()
    absent = sorted(name for name in declared - layers.keys() if not is_left_out(f"{name}.weight"))
    if absent:
        raise FaultsError(
            f"{type(model).__name__}: not the model that this checkpoint was made from",
            [f"{name}: the model has no such nn.Linear. Load it with the class that was converted." for name in absent],
        )
    return replace_linears(model, layers, backend)


def _renamed_config(config: Mapping[str, Any], rename: Callable[[str], str]) -> dict[str, Any]:
    """Return the config with its modules as the model names them."""
    private = config[PRIVATE_KEY]
    modules = {
        rename(f"{module}.weight").removesuffix(".weight"): weight_format
        for module, weight_format in private.get("quantized_modules", {}).items()
    }
    return {**config, PRIVATE_KEY: {**private, "quantized_modules": modules}}


def stored_names(linears: Mapping[str, QuantizedLinear]) -> set[str]:
    """Return the names of all tensors of the quantized layers."""
    return {name for linear in linears.values() for name in linear.layer.tensors.values()}


def refuse_missing(model: nn.Module, missing: list[str]) -> None:
    """Raise FaultsError: a converted checkpoint is whole, so nothing may be made up."""
    if missing:
        faults = [f"{name}: the model wants it, the checkpoint lacks it. Fetch or convert again." for name in missing]
        raise FaultsError(f"{type(model).__name__}: not all of the checkpoint is there", sorted(faults))


def check_options(config: Any) -> None:
    """Raise CheckpointError unless the library was asked to load what is quantized already."""
    if not config.pre_quantized:
        raise CheckpointError("convert-ckpt's formats are made offline: run convert-ckpt, then load its OUTPUT.")
