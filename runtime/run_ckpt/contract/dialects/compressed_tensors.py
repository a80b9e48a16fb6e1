"""``compressed-tensors``: vLLM, transformers and SGLang's language models."""

from collections.abc import Mapping
from typing import Any

from run_ckpt.contract.dialects.dialect import (
    Dialect,
    common_scheme,
    ignore_list_with_fused,
    usual_scale_shape,
    usual_suffixes,
)
from run_ckpt.contract.formats import (
    CHANNEL_FP8,
    E2M1,
    FP8,
    MX_BLOCK_SIZE,
    MXFP4,
    MXFP8,
    NVFP4,
    NVFP4_BLOCK_SIZE,
    PLAIN_MXFP4,
    PLAIN_MXFP8,
    PLAIN_NVFP4,
    TENSOR_FP8,
    QuantFormat,
    Scheme,
)
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Manifest


def _suffixes(scheme: Scheme, naming: str) -> dict[str, str]:
    suffixes = usual_suffixes(scheme, naming)
    if scheme.format == NVFP4:
        suffixes = {WEIGHT_SCALE: suffixes[WEIGHT_SCALE], INVERSE_TENSOR_SCALE: "weight_global_scale"}
    return {**suffixes, WEIGHT: "weight_packed"} if scheme.format.element == E2M1 else suffixes


def _scale_shape(N: int, K: int, scheme: Scheme) -> tuple[int, ...]:
    return (N, 1) if scheme == CHANNEL_FP8 else usual_scale_shape(N, K, scheme)


def _config(manifest: Manifest) -> dict[str, Any]:
    scheme = common_scheme(manifest)
    by_granularity = {"num_bits": 8, "strategy": scheme.granularity}
    # Format -> container, weights, activations.
    containers: dict[QuantFormat, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
        MXFP4: ("mxfp4-pack-quantized", _MXFP4, _MXFP4),
        MXFP8: ("mxfp8-quantized", _MXFP8, _MXFP8),
        # Activations in NVFP4 would need an input_global_scale: W4A16 needs no calibration.
        NVFP4: ("nvfp4-pack-quantized", _NVFP4, None),
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
                "input_activations": activations and {**activations, **symmetric_float, "dynamic": True},
                "output_activations": None,
            }
        },
        "ignore": ignore_list_with_fused(manifest),
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
_NVFP4 = {
    "num_bits": 4,
    "strategy": "tensor_group",
    "group_size": NVFP4_BLOCK_SIZE,
    "scale_dtype": "torch.float8_e4m3fn",
    "zp_dtype": "torch.float8_e4m3fn",
}

DIALECT = Dialect(
    "compressed-tensors",
    {
        PLAIN_MXFP4: (),
        PLAIN_MXFP8: ("transformers",),
        PLAIN_NVFP4: ("transformers",),
        TENSOR_FP8: ("transformers",),
        CHANNEL_FP8: ("transformers",),
    },
    _config,
    suffixes=_suffixes,
    scale_shape=_scale_shape,
    granularity=_granularity,
)
