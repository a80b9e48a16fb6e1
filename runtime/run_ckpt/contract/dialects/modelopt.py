"""``modelopt``: NVIDIA ModelOpt's FP8 with static activations, as SGLang and vLLM read it."""

from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, sglang_ignore_list
from run_ckpt.contract.formats import TENSOR_FP8
from run_ckpt.contract.manifest import Manifest


def _config(manifest: Manifest) -> dict[str, Any]:
    # Without quant_type SGLang rewrites config.json in place (hf_diffusers_utils.py:452-512).
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "quant_type": "FP8",
        "ignore": sglang_ignore_list(manifest),
    }


DIALECT = Dialect("modelopt", {TENSOR_FP8: ()}, _config, static=(TENSOR_FP8,), sglang_matching="name")
