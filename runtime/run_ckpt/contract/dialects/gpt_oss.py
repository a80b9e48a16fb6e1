"""``gpt-oss``: the MXFP4 of OpenAI's gpt-oss, whose experts alone are quantized, all of a block in one tensor."""

from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect
from run_ckpt.contract.formats import PLAIN_MXFP4, Scheme
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Manifest

# As its config.json has it; transformers 5.23 and SGLang 0.5.23 match by such patterns, vLLM 0.30 by the kind of layer.
_NOT_CONVERTED = ("model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head")


def _config(manifest: Manifest) -> dict[str, Any]:
    return {"quant_method": "mxfp4", "modules_to_not_convert": list(_NOT_CONVERTED)}


def _suffixes(scheme: Scheme, naming: str) -> dict[str, str]:
    return {WEIGHT: "_blocks", WEIGHT_SCALE: "_scales"}


DIALECT = Dialect("gpt-oss", {PLAIN_MXFP4: ()}, _config, _suffixes, joint="", experts_only=True, is_open=False)
