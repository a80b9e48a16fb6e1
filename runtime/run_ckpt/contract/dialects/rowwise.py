"""``rowwise``: FP8 by channel, declared in the header of one file; SGLang and diffusers from_single_file read it."""

import json

from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.formats import CHANNEL_FP8
from run_ckpt.contract.manifest import Manifest
from run_ckpt.contract.tensors import PT_METADATA

_RECIPE = "rowwise-float8_e4m3fn"


def _metadata(manifest: Manifest) -> dict[str, str]:
    """Source: SGLang 0.5.23 utils/quantization_utils.py, diffusers 0.42 quantizers/bfl."""
    declaration = {
        "format_version": "1.1",
        "layers": {module: {"format": _RECIPE} for module in sorted(manifest.layers)},
        "quant_configs": {_RECIPE: {"scale_recipe": "rowwise"}},
    }
    text = json.dumps(declaration, sort_keys=True, separators=(",", ":"))
    return {"_quantization_metadata": text, **PT_METADATA}


DIALECT = Dialect(
    "rowwise",
    {CHANNEL_FP8: ("diffusers",)},
    config=None,
    metadata=_metadata,
    # Not a name that from_pretrained looks for: it would load the codes and drop the scales.
    file_name="transformer-rowwise-fp8.safetensors",
)
