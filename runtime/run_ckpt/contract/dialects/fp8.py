"""``fp8``: SGLang and vLLM with dynamic activations; transformers' FineGrainedFP8 for block scales."""

from collections.abc import Mapping
from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, common_scheme, ignore_list
from run_ckpt.contract.formats import BLOCK_FP8, FP8_BLOCK_SIZE, TENSOR_FP8
from run_ckpt.contract.manifest import Manifest


def _config(manifest: Manifest) -> dict[str, Any]:
    ignored = ignore_list(manifest)
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ignored,
        "modules_to_not_convert": ignored,
    }
    if common_scheme(manifest) == BLOCK_FP8:
        config["weight_block_size"] = [FP8_BLOCK_SIZE, FP8_BLOCK_SIZE]
    return config


def _granularity(config: Mapping[str, Any]) -> str:
    return "block" if config.get("weight_block_size") else "tensor"


DIALECT = Dialect(
    "fp8",
    {TENSOR_FP8: ("diffusers",), BLOCK_FP8: ("diffusers", "transformers")},
    _config,
    granularity=_granularity,
)
