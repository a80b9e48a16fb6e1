"""``vllm-omni``: FP8 as vLLM-Omni 0.30 reads it from a transformer's config.json, with no key that it does not know."""

from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, common_scheme, ignore_list
from run_ckpt.contract.formats import BLOCK_FP8, FP8_BLOCK_SIZE, TENSOR_FP8
from run_ckpt.contract.manifest import Manifest


def _config(manifest: Manifest) -> dict[str, Any]:
    """Its keys become arguments of vLLM's Fp8Config; without the flag the codes are taken for BF16 weights."""
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "is_checkpoint_fp8_serialized": True,
        "activation_scheme": "dynamic",
        "ignored_layers": ignore_list(manifest),
    }
    if common_scheme(manifest) == BLOCK_FP8:
        config["weight_block_size"] = [FP8_BLOCK_SIZE, FP8_BLOCK_SIZE]
    return config


DIALECT = Dialect("vllm-omni", {TENSOR_FP8: (), BLOCK_FP8: ()}, _config, is_open=False)
