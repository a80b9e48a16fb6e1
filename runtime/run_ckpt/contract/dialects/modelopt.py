"""``modelopt``: NVIDIA ModelOpt's FP8 with static activations, and its NVFP4, as SGLang and vLLM read them."""

from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, common_scheme, sglang_ignore_list
from run_ckpt.contract.formats import NVFP4_BLOCK_SIZE, PLAIN_NVFP4, TENSOR_FP8
from run_ckpt.contract.manifest import Manifest


def _config(manifest: Manifest) -> dict[str, Any]:
    is_nvfp4 = common_scheme(manifest) == PLAIN_NVFP4
    name = "NVFP4" if is_nvfp4 else "FP8"
    # Without quant_type SGLang rewrites config.json in place (hf_diffusers_utils.py:452-512).
    config = {"quant_method": "modelopt", "quant_algo": name, "quant_type": name}
    return {**config, "ignore": sglang_ignore_list(manifest), **(_nvfp4(manifest) if is_nvfp4 else {})}


def _nvfp4(manifest: Manifest) -> dict[str, Any]:
    """SGLang 0.5.23, multimodal_gen/runtime/layers/quantization/modelopt_quant.py.

    The low nibble is the even k, as ModelOpt packs it: its language models are read so, and by the same FlashInfer
    product, which no GPU has run here. Only files of other tools, packed for that product, are swapped there.
    """
    return {
        "group_size": NVFP4_BLOCK_SIZE,
        "swap_weight_nibbles": bool(manifest.recipe.get("swap_weight_nibbles")),
        # Else SGLang fills in 1.0 for the input_scale that is not there, and says nothing.
        "dynamic_input_scale": True,
    }


DIALECT = Dialect(
    "modelopt",
    {TENSOR_FP8: (), PLAIN_NVFP4: ("diffusers",)},
    _config,
    static=(TENSOR_FP8,),
    unsound={
        (PLAIN_NVFP4, "transformers"): (
            "for language models vLLM and SGLang multiply by an input_scale, which NVFP4 here has not. Use --dialect"
            " compressed-tensors, whose activations stay as they are."
        )
    },
    sglang_matching="name",
)
