"""The quantization config that vLLM and vLLM-Omni hold for our checkpoints: methods that decide by what is loaded."""

from collections.abc import Mapping
from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from run_ckpt.contract.dialects.mxfp4 import DIALECT
from run_ckpt.contract.dialects.table import DIALECTS, PRIVATE_KEY
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.foreign import declared_layout, layers_in_config
from run_ckpt.contract.formats import FORMATS
from run_ckpt.integrations.vllm.method import LoadingMethod

# As vLLM knows the config of language models; a quantization_config says who else can read it.
METHOD = "convert_ckpt_mxfp4"


class CheckpointConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM asks it for a method when it builds a linear, by a name that is not the checkpoint's.

    So each linear learns from its tensors what it is; see method.py. Text encoders that are built with the same
    config have plain tensors and become unquantized.
    """

    # So that with CPU offloading it is loaded where it stays.
    is_checkpoint_quantized = True

    def __init__(self, declared: Mapping[str, Any], naming: str = "diffusers"):
        """declared: our quantization_config. Raises CheckpointError for one that this version can't read."""
        super().__init__()
        layers_in_config(declared, {}, naming)  # raises
        self.layout = declared_layout(declared)
        # Role -> what follows the module in a tensor's name.
        self.suffixes = _suffixes(declared, naming)
        self._method = str(declared["quant_method"])

    def get_name(self) -> str:
        return f"convert_ckpt_{self._method}"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "CheckpointConfig":
        """Return that of a language model."""
        if any(".experts." in module for module in config[PRIVATE_KEY]["quantized_modules"]):
            raise CheckpointError(
                "a mixture of experts in MXFP4 of ours can't be run by vLLM. Convert it with --target vllm."
            )
        return cls(config, "transformers")

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Claim what convert-ckpt wrote in a dialect that vLLM does not read by itself."""
        is_ours = hf_quant_cfg.get("quant_method") == DIALECT.name and PRIVATE_KEY in hf_quant_cfg
        return METHOD if is_ours else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> LoadingMethod | None:
        return LoadingMethod(self.layout, self.suffixes, prefix) if isinstance(layer, LinearBase) else None


def _suffixes(declared: Mapping[str, Any], naming: str) -> dict[str, str]:
    """Return role -> suffix, the same for all layers."""
    dialect, names = (
        DIALECTS[declared["quant_method"]],
        sorted(set(declared[PRIVATE_KEY]["quantized_modules"].values())),
    )
    layout, granularity = declared_layout(declared).name, dialect.granularity(declared)
    found = [dialect.suffixes(FORMATS[name].scheme(layout, granularity), naming) for name in names]
    if any(suffixes != found[0] for suffixes in found):
        raise CheckpointError(f"layers in {' and '.join(names)} have other tensors each. vLLM can't load both.")
    return found[0]
