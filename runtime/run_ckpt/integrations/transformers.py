"""transformers' from_pretrained and save_pretrained for converted checkpoints, once ``register`` was called."""

from copy import deepcopy
from typing import Any

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.extras import naming_extras

with naming_extras("run_ckpt.integrations.transformers", "diffusers"):
    from torch import nn
    from transformers.quantizers import auto
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    from run_ckpt.integrations.quantizer import (
        OWN_METHOD,
        check_options,
        dispatch_configs,
        refuse_missing,
        replace_declared,
        saved_config,
    )
    from run_ckpt.loading.experts import SeparateExperts
    from run_ckpt.loading.linear import QuantizedLinear


def register() -> None:
    """Let ``AutoModelForCausalLM.from_pretrained(OUT)`` load what convert-ckpt wrote.

    Its quantized layers run on the backends of this package. Checkpoints of others load as before:
    transformers' own function refuses names that are taken, and these are (fp8, mxfp4, quark, ...).
    """
    auto.AUTO_QUANTIZER_MAPPING[OWN_METHOD] = ConvertedQuantizer
    dispatch_configs(auto.AUTO_QUANTIZATION_CONFIG_MAPPING, ConvertedConfig)


class ConvertedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The quantization_config of a converted checkpoint."""

    def __init__(self, config: dict[str, Any]):
        self.quant_method = OWN_METHOD
        self.config = config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        config = cls(deepcopy(dict(config_dict)))
        return (config, kwargs) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        return saved_config(self.config)


class ConvertedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts quantized layers into the model; the loader fills their buffers in the buffers' own dtypes."""

    is_trainable = False
    is_compileable = True

    def __init__(self, quantization_config: ConvertedConfig, **kwargs: Any):
        super().__init__(quantization_config, **kwargs)
        check_options(self)
        self._linears: dict[str, QuantizedLinear] = {}

    def is_serializable(self) -> bool:
        return True

    def update_attn_implementation(self, config: Any) -> Any:
        """Refuse kernels of the Hub: whether config.json or the caller asked for one can't be told from here."""
        for part in (config, *(getattr(config, key, None) for key in config.sub_configs)):
            name = getattr(part, "_attn_implementation", None)
            if name and "/" in name:
                raise CheckpointError(
                    f"attn_implementation {name!r} is code that would be fetched from the Hub. Load the checkpoint with"
                    ' attn_implementation="sdpa"; if you trust that code, call model.set_attn_implementation() then.'
                )
        return config

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """Leave experts as they are stored where the model has them one by one now."""
        if not any(isinstance(module, SeparateExperts) for module in model.modules()):
            return weight_conversions
        return [conversion for conversion in weight_conversions if not _merges_experts(conversion)]

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        self._linears = replace_declared(model, self.quantization_config.config, "transformers", backend=None)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        missing = []
        for linear in self._linears.values():
            for role, tensor in linear.stored().items():
                # transformers marks what it loaded, and fills the rest with numbers of its own.
                if not getattr(tensor, "_is_hf_initialized", False):
                    missing.append(linear.layer.tensors[role])
        refuse_missing(model, missing)
        for linear in self._linears.values():
            linear.prepare(next(iter(linear.stored().values())).device)
        return model


def _merges_experts(conversion: Any) -> bool:
    """True for a WeightConverter, which transformers 4 has not, of all experts' weights to one parameter."""
    return hasattr(conversion, "operations") and any("experts.*." in name for name in conversion.source_patterns)
