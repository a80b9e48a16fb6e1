"""diffusers' from_pretrained and save_pretrained for converted checkpoints, once ``register`` was called."""

from copy import deepcopy
from typing import Any

from run_ckpt.contract.dialects.table import PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.extras import naming_extras

with naming_extras("run_ckpt.integrations.diffusers", "diffusers"):
    import torch
    from diffusers.quantizers import auto
    from diffusers.quantizers.base import DiffusersQuantizer
    from diffusers.quantizers.quantization_config import QuantizationConfigMixin
    from torch import Tensor, nn

    from run_ckpt.integrations.quantizer import (
        OWN_METHOD,
        check_options,
        dispatch_configs,
        refuse_missing,
        replace_declared,
        saved_config,
        stored_names,
    )
    from run_ckpt.loading.linear import QuantizedLinear


def register() -> None:
    """Let ``SomeTransformer.from_pretrained(OUT)`` load what convert-ckpt wrote.

    Its quantized layers run on the backends of this package. Checkpoints of others load as before.
    Source: diffusers/quantizers/auto.py (0.37 to 0.42), which has two tables and no function to add to them.
    """
    auto.AUTO_QUANTIZER_MAPPING[OWN_METHOD] = ConvertedQuantizer
    dispatch_configs(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, ConvertedConfig)


class _Method(str):
    """diffusers reads ``quant_method.value``."""

    @property
    def value(self) -> str:
        return str(self)


class ConvertedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The quantization_config of a converted checkpoint."""

    def __init__(self, config: dict[str, Any]):
        self.quant_method = _Method(OWN_METHOD)
        self.config = config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **_: Any) -> "ConvertedConfig":
        return cls(deepcopy(dict(config_dict)))

    def to_dict(self) -> dict[str, Any]:
        return saved_config(self.config)

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()


class ConvertedQuantizer(DiffusersQuantizer):  # type: ignore[misc]
    """Puts quantized layers into the model and its tensors into them, bit for bit."""

    requires_calibration = False
    # What the class keeps in float32 stays so.
    use_keep_in_fp32_modules = True
    is_serializable = True
    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: ConvertedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        check_options(self)
        self._linears: dict[str, QuantizedLinear] = {}
        self._loaded: set[str] | None = None

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        fused = set(self.quantization_config.config[PRIVATE_KEY].get("fused_scales", ()))
        self._loaded = set(loaded_keys) - fused
        return sorted(self._loaded)

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:
        refuse_missing(model, missing_keys)
        unexpected = sorted((self._loaded or set()) - model.state_dict().keys())
        if unexpected:
            raise CheckpointError(
                f"{type(model).__name__} has no use for {', '.join(unexpected)}. Is it the right class?"
            )
        return missing_keys

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self._linears = replace_declared(model, self.quantization_config.config, "diffusers", backend=None)
        self._stored = stored_names(self._linears)

    def check_if_quantized_param(
        self, model: nn.Module, param_value: Tensor, param_name: str, state_dict: dict[str, Tensor], **_: Any
    ) -> bool:
        return param_name in self._stored

    def check_quantized_param_shape(self, param_name: str, current: Tensor, loaded: Tensor) -> bool:
        raise CheckpointError(
            f"{param_name}: is {list(loaded.shape)}, the model wants {list(current.shape)}. Is it the right config?"
        )

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Tensor],
        unexpected_keys: list[str] | None = None,
        **_: Any,
    ) -> None:
        """Take the tensor from ``state_dict``: ``param_value`` is a scale cast to the model's dtype."""
        path, leaf = param_name.rpartition(".")[::2]
        owner, tensor = model.get_submodule(path), state_dict[param_name]
        wanted = owner.get_buffer(leaf)
        if tensor.dtype != wanted.dtype:
            raise CheckpointError(f"{param_name}: is {tensor.dtype}, the model wants {wanted.dtype}. Convert again.")
        owner._buffers[leaf] = tensor.to(target_device, copy=True)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for linear in self._linears.values():
            linear.prepare(next(iter(linear.stored().values())).device)
