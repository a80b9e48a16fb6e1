"""Our own dialect: every layout of MXFP4, beside FP8; read by the plug-in for SGLang and by load_quantized."""

from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, sglang_ignore_list
from run_ckpt.contract.formats import AITER_MXFP4, MX_BLOCK_SIZE, MXFP4, PLAIN_MXFP4, TENSOR_FP8
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import Manifest


def _config(manifest: Manifest) -> dict[str, Any]:
    layout = next((layer.scheme.layout for layer in manifest.layers.values() if layer.format == MXFP4), PLAIN)
    return {
        "quant_method": "mxfp4",
        "is_checkpoint_mxfp4_serialized": True,
        "layout": layout.name,
        **layout.facts,
        "block_size": MX_BLOCK_SIZE,
        "scale_rule": manifest.recipe["scale_rule"],
        "ignored_layers": sglang_ignore_list(manifest),
    }


DIALECT = Dialect(
    "mxfp4",
    {AITER_MXFP4: ("diffusers", "transformers"), PLAIN_MXFP4: (), TENSOR_FP8: ()},
    _config,
    is_mixed=True,
)
