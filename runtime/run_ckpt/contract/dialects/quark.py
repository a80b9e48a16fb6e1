"""``quark``: as amd-quark 0.13 exports it, in the spellings of transformers and of diffusers."""

from typing import Any

from run_ckpt.contract.dialects.dialect import Dialect, common_scheme, ignore_list_with_fused, usual_suffixes
from run_ckpt.contract.formats import FP8, MX_BLOCK_SIZE, MXFP4, PLAIN_MXFP4, TENSOR_FP8, Scheme
from run_ckpt.contract.manifest import WEIGHT_SCALE, Manifest


def _suffixes(scheme: Scheme, naming: str) -> dict[str, str]:
    suffixes = usual_suffixes(scheme, naming)
    return {**suffixes, WEIGHT_SCALE: "weight_quantizer.scale"} if naming == "diffusers" else suffixes


def _config(manifest: Manifest) -> dict[str, Any]:
    """vLLM and SGLang read FP8 only with dynamic activations per token."""
    weight, activation = _SPECS[common_scheme(manifest).format]
    return {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": {**weight, "is_dynamic": False},
            "input_tensors": {**activation, "is_dynamic": True},
            "output_tensors": None,
            "bias": None,
            "target_device": None,
        },
        "exclude": ignore_list_with_fused(manifest),
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "kv_cache_quant_config": {},
        "kv_cache_post_rope": False,
        "softmax_quant_spec": None,
        "algo_config": None,
        "quant_mode": "eager_mode",
        "version": "0.13",
        "export": {
            "kv_cache_group": [],
            "min_kv_scale": 0.0,
            "pack_method": "reorder",
            "weight_format": "real_quantized",
            "weight_merge_groups": None,
        },
    }


_COMMON: dict[str, Any] = {
    "scale_type": "float",
    "round_method": "half_even",
    "zero_point_type": "int32",
    "is_scale_quant": False,
    "mx_element_dtype": None,
}
_MXFP4: dict[str, Any] = _COMMON | {
    "dtype": "fp4",
    "qscheme": "per_group",
    "group_size": MX_BLOCK_SIZE,
    "ch_axis": -1,
    "symmetric": None,
    "scale_format": "e8m0",
    "scale_calculation_mode": "even",
    "observer_cls": "PerBlockMXObserver",
}
_FP8: dict[str, Any] = _COMMON | {
    "dtype": "fp8_e4m3",
    "qscheme": "per_tensor",
    "group_size": None,
    "ch_axis": None,
    "symmetric": True,
    "scale_format": None,
    "scale_calculation_mode": None,
    "observer_cls": "PerTensorMinMaxObserver",
}
_FP8_PER_TOKEN = _FP8 | {"qscheme": "per_channel", "ch_axis": 1, "observer_cls": "PerChannelMinMaxObserver"}
# Format -> what is said of weights and of activations.
_SPECS = {MXFP4: (_MXFP4, _MXFP4), FP8: (_FP8, _FP8_PER_TOKEN)}

DIALECT = Dialect("quark", {PLAIN_MXFP4: ("diffusers", "transformers"), TENSOR_FP8: ()}, _config, suffixes=_suffixes)
