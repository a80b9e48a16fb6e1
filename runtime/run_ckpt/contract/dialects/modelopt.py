"""``modelopt``: NVIDIA ModelOpt's FP8, static by tensor or dynamic by channel, and its NVFP4, as runtimes read them."""

from collections.abc import Mapping
from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, common_scheme, ignore_list
from run_ckpt.contract.formats import CHANNEL_FP8, NVFP4_BLOCK_SIZE, PLAIN_NVFP4, TENSOR_FP8
from run_ckpt.contract.manifest import Manifest

_ALGORITHMS = {TENSOR_FP8: "FP8", CHANNEL_FP8: "FP8_PER_CHANNEL_PER_TOKEN", PLAIN_NVFP4: "NVFP4"}
# vLLM-Omni builds FLUX.2's text encoder with the transformer's config, and an entry matches any part of a name.
_OMNI_ENCODERS = ["text_encoder"]


def _config(manifest: Manifest) -> dict[str, Any]:
    scheme = common_scheme(manifest)
    name = _ALGORITHMS[scheme]
    encoders = _OMNI_ENCODERS if manifest.target == "vllm-omni" else []
    # Without quant_type SGLang rewrites config.json in place (hf_diffusers_utils.py:452-512).
    config = {"quant_method": "modelopt", "quant_algo": name, "quant_type": name}
    return {
        **config,
        "ignore": ignore_list(manifest) + encoders,
        **(_nvfp4(manifest) if scheme == PLAIN_NVFP4 else {}),
    }


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


def _granularity(config: Mapping[str, Any]) -> str:
    return "channel" if config.get("quant_algo") == _ALGORITHMS[CHANNEL_FP8] else "tensor"


DIALECT = Dialect(
    "modelopt",
    {TENSOR_FP8: (), CHANNEL_FP8: (), PLAIN_NVFP4: ("diffusers",)},
    _config,
    granularity=_granularity,
    static=(TENSOR_FP8,),
)
