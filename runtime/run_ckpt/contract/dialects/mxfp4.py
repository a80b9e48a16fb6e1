"""Our own dialect: every layout of MXFP4, beside the other formats; read by our plug-in for SGLang and our loader."""

from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, ignore_list
from run_ckpt.contract.formats import (
    AITER_MXFP4,
    MX_BLOCK_SIZE,
    MXFP4,
    PLAIN_MXFP4,
    PLAIN_MXFP8,
    PLAIN_NVFP4,
    TENSOR_FP8,
)
from run_ckpt.contract.manifest import Manifest


def _config(manifest: Manifest) -> dict[str, Any]:
    leading = min(manifest.layers.values(), key=lambda layer: layer.format != MXFP4)
    layout = leading.scheme.layout
    return {
        "quant_method": "mxfp4",
        "is_checkpoint_mxfp4_serialized": True,
        "layout": layout.name,
        **layout.facts,
        "block_size": leading.scheme.block[1] or MX_BLOCK_SIZE,
        "scale_rule": leading.scale_rule,
        "ignored_layers": ignore_list(manifest),
    }


DIALECT = Dialect(
    "mxfp4",
    {
        AITER_MXFP4: ("diffusers", "transformers"),
        PLAIN_MXFP4: (),
        PLAIN_MXFP8: ("diffusers",),
        PLAIN_NVFP4: (),
        TENSOR_FP8: (),
    },
    _config,
    is_mixed=True,
)
