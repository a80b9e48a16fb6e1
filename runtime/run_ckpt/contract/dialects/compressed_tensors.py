"""``compressed-tensors``: vLLM, transformers and SGLang's language models."""

from collections.abc import Mapping
from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, common_scheme, usual_scale_shape, usual_suffixes
from run_ckpt.contract.formats import (
    CHANNEL_FP8,
    FP8,
    MX_BLOCK_SIZE,
    MXFP4,
    MXFP8,
    PLAIN_MXFP4,
    PLAIN_MXFP8,
    TENSOR_FP8,
    QuantFormat,
    Scheme,
)
from run_ckpt.contract.manifest import WEIGHT, Manifest


def _suffixes(scheme: Scheme, naming: str) -> dict[str, str]:
    suffixes = usual_suffixes(scheme, naming)
    return {**suffixes, WEIGHT: "weight_packed"} if scheme.format == MXFP4 else suffixes


def _scale_shape(N: int, K: int, scheme: Scheme) -> tuple[int, ...]:
    return (N, 1) if scheme == CHANNEL_FP8 else usual_scale_shape(N, K, scheme)


def _config(manifest: Manifest) -> dict[str, Any]:
    scheme = common_scheme(manifest)
    by_granularity = {"num_bits": 8, "strategy": scheme.granularity}
    # Format -> container, weights, activations.
    containers: dict[QuantFormat, tuple[str, dict[str, Any], dict[str, Any]]] = {
        MXFP4: ("mxfp4-pack-quantized", _MXFP4, _MXFP4),
        MXFP8: ("mxfp8-quantized", _MXFP8, _MXFP8),
        FP8: ("float-quantized", by_granularity, {"num_bits": 8, "strategy": "token"}),
    }
    container, weights, activations = containers[scheme.format]
    symmetric_float = {"type": "float", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": container,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**weights, **symmetric_float, "dynamic": False},
                "input_activations": {**activations, **symmetric_float, "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": sorted(manifest.unquantized_linears),
        "kv_cache_scheme": None,
    }


def _granularity(config: Mapping[str, Any]) -> str:
    groups = config.get("config_groups") or {}
    return str(groups["group_0"]["weights"]["strategy"]) if "group_0" in groups else "tensor"


_MXFP4 = {
    "num_bits": 4,
    "strategy": "group",
    "group_size": MX_BLOCK_SIZE,
    "scale_dtype": "torch.uint8",
    "zp_dtype": "torch.uint8",
}

_MXFP8 = _MXFP4 | {"num_bits": 8}

DIALECT = Dialect(
    "compressed-tensors",
    {PLAIN_MXFP4: (), PLAIN_MXFP8: ("transformers",), TENSOR_FP8: ("transformers",), CHANNEL_FP8: ("transformers",)},
    _config,
    suffixes=_suffixes,
    scale_shape=_scale_shape,
    granularity=_granularity,
)
