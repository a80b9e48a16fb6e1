"""The vocabularies of the consumers: which tensors a dialect names how, and its quantization_config."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from run_ckpt.contract.formats import FP8_BLOCK_SIZE, MXFP4_BLOCK_SIZE
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import MANIFEST_NAME, SCHEMA_VERSION, WEIGHT, WEIGHT_SCALE, Layer, Manifest
from run_ckpt.contract.tensors import PT_METADATA

PRIVATE_KEY = "convert_ckpt"


@dataclass(frozen=True)
class Scheme:
    """How a layer is stored: its format with what each format leaves open."""

    format: str
    layout: str
    granularity: str

    def __str__(self) -> str:
        detail = f"--layout {self.layout}" if self.format == "mxfp4" else f"--granularity {self.granularity}"
        return f"--format {self.format} {detail}"


def scheme_of(layer: Layer) -> Scheme:
    return Scheme(layer.format, layer.layout, layer.granularity)


AITER_MXFP4 = Scheme("mxfp4", "aiter", "group")
PLAIN_MXFP4 = Scheme("mxfp4", "plain", "group")
TENSOR_FP8 = Scheme("fp8", "plain", "tensor")
CHANNEL_FP8 = Scheme("fp8", "plain", "channel")
BLOCK_FP8 = Scheme("fp8", "plain", "block")

# Which schemes a dialect can say, and whether its activations are static (input_scale).
DIALECT_SCHEMES: dict[str, tuple[Scheme, ...]] = {
    "mxfp4": (AITER_MXFP4, PLAIN_MXFP4, TENSOR_FP8),
    "quark": (PLAIN_MXFP4, TENSOR_FP8),
    "compressed-tensors": (PLAIN_MXFP4, TENSOR_FP8, CHANNEL_FP8),
    "fp8": (TENSOR_FP8, BLOCK_FP8),
    "modelopt": (TENSOR_FP8,),
    "rowwise": (CHANNEL_FP8,),
}
DIALECTS = tuple(DIALECT_SCHEMES)
STATIC_DIALECTS = ("modelopt",)


def default_dialect(scheme: Scheme, naming: str, *, static: bool) -> str:
    """Return the dialect that the usual consumers of such a checkpoint read."""
    if static:
        return "modelopt"
    if scheme.format == "mxfp4":
        return "mxfp4" if scheme.layout == "aiter" else "quark"
    if scheme.granularity == "block":
        return "fp8"
    if naming == "transformers":
        return "compressed-tensors"
    return "fp8" if scheme.granularity == "tensor" else "rowwise"


def tensor_names(module: str, scheme: Scheme, dialect: str, naming: str) -> dict[str, str]:
    """Return role -> tensor name of one layer (weight and weight scale)."""
    weight, scale = "weight", "weight_scale"
    if dialect == "compressed-tensors" and scheme.format == "mxfp4":
        weight = "weight_packed"
    if dialect == "quark" and naming == "diffusers":
        scale = "weight_quantizer.scale"
    if scheme.granularity == "block":
        scale = "weight_scale_inv"
    return {WEIGHT: f"{module}.{weight}", WEIGHT_SCALE: f"{module}.{scale}"}


def scale_shape(N: int, K: int, scheme: Scheme, dialect: str) -> tuple[int, ...]:
    """Return the shape on disk of the weight scale of an [N, K] weight."""
    if scheme.format == "mxfp4":
        shape = (N, K // MXFP4_BLOCK_SIZE)
        return AITER_SCALE.padded_shape(*shape) if scheme.layout == "aiter" else shape
    if scheme.granularity == "tensor":
        return (1,)
    if scheme.granularity == "block":
        return (-(-N // FP8_BLOCK_SIZE), -(-K // FP8_BLOCK_SIZE))
    return (N, 1) if dialect == "compressed-tensors" else (N,)


def header_metadata(manifest: Manifest) -> dict[str, str]:
    """Return the safetensors ``__metadata__``: ``{"format": "pt"}`` in every dialect but rowwise.

    Source: SGLang 0.5.23 utils/quantization_utils.py, diffusers 0.42 quantizers/bfl.
    """
    if manifest.dialect != "rowwise":
        return PT_METADATA
    recipe = "rowwise-float8_e4m3fn"
    declaration = {
        "format_version": "1.1",
        "layers": {module: {"format": recipe} for module in sorted(manifest.layers)},
        "quant_configs": {recipe: {"scale_recipe": "rowwise"}},
    }
    text = json.dumps(declaration, sort_keys=True, separators=(",", ":"))
    return {"_quantization_metadata": text, **PT_METADATA}


def quantization_config(manifest: Manifest) -> dict[str, Any] | None:
    """Return what config.json's ``quantization_config`` says, or None where the dialect has none."""
    builder = _CONFIG_BUILDERS[manifest.dialect]
    if builder is None:
        return None
    private = {
        "schema_version": SCHEMA_VERSION,
        "manifest": MANIFEST_NAME,
        "quantized_modules": {name: layer.format for name, layer in sorted(manifest.layers.items())},
        "fused_scales": sorted(manifest.fused_scales),
    }
    return {**builder(manifest), PRIVATE_KEY: private}


def sglang_ignore_list(manifest: Manifest) -> list[str]:
    """Return both spellings of the linears that SGLang would quantize but that were left alone.

    A linear without a name there (prefix "") gets its own spelling alone: "" would match everything.
    """
    named = {module: prefix for module, prefix in manifest.unquantized_linears.items() if prefix is not None}
    return sorted({*named, *filter(None, named.values())})


def layout_names(layout: str) -> dict[str, str]:
    """Return the storage orders of MXFP4 weights and scales, as a quantization_config names them."""
    shuffled = layout == "aiter"
    return {
        "weight_layout": AITER_WEIGHT.name if shuffled else "row_major",
        "scale_layout": AITER_SCALE.name if shuffled else "row_major",
    }


def _mxfp4_config(manifest: Manifest) -> dict[str, Any]:
    layouts = sorted({layer.layout for layer in manifest.layers.values() if layer.format == "mxfp4"})
    return {
        "quant_method": "mxfp4",
        "is_checkpoint_mxfp4_serialized": True,
        "layout": layouts[0],
        **layout_names(layouts[0]),
        "block_size": MXFP4_BLOCK_SIZE,
        "scale_rule": manifest.recipe["scale_rule"],
        "ignored_layers": sglang_ignore_list(manifest),
    }


def _fp8_config(manifest: Manifest) -> dict[str, Any]:
    ignored = sglang_ignore_list(manifest)
    config: dict[str, Any] = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "ignored_layers": ignored,
        "modules_to_not_convert": ignored,
    }
    if manifest.recipe["granularity"] == "block":
        config["weight_block_size"] = [FP8_BLOCK_SIZE, FP8_BLOCK_SIZE]
    return config


def _modelopt_config(manifest: Manifest) -> dict[str, Any]:
    # Without quant_type SGLang rewrites config.json in place (hf_diffusers_utils.py:452-512).
    return {
        "quant_method": "modelopt",
        "quant_algo": "FP8",
        "quant_type": "FP8",
        "ignore": sglang_ignore_list(manifest),
    }


def _quark_config(manifest: Manifest) -> dict[str, Any]:
    """As amd-quark 0.13 exports. vLLM and SGLang read FP8 with dynamic activations per token alone."""
    mxfp4 = manifest.recipe["format"] == "mxfp4"
    weight = _QUARK_MXFP4 if mxfp4 else _QUARK_FP8
    activation = _QUARK_MXFP4 if mxfp4 else _QUARK_FP8_PER_TOKEN
    return {
        "quant_method": "quark",
        "global_quant_config": {
            "weight": {**weight, "is_dynamic": False},
            "input_tensors": {**activation, "is_dynamic": True},
            "output_tensors": None,
            "bias": None,
            "target_device": None,
        },
        "exclude": sorted(manifest.unquantized_linears),
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


_QUARK_COMMON: dict[str, Any] = {
    "scale_type": "float",
    "round_method": "half_even",
    "zero_point_type": "int32",
    "is_scale_quant": False,
    "mx_element_dtype": None,
}
_QUARK_MXFP4: dict[str, Any] = _QUARK_COMMON | {
    "dtype": "fp4",
    "qscheme": "per_group",
    "group_size": MXFP4_BLOCK_SIZE,
    "ch_axis": -1,
    "symmetric": None,
    "scale_format": "e8m0",
    "scale_calculation_mode": "even",
    "observer_cls": "PerBlockMXObserver",
}
_QUARK_FP8: dict[str, Any] = _QUARK_COMMON | {
    "dtype": "fp8_e4m3",
    "qscheme": "per_tensor",
    "group_size": None,
    "ch_axis": None,
    "symmetric": True,
    "scale_format": None,
    "scale_calculation_mode": None,
    "observer_cls": "PerTensorMinMaxObserver",
}
_QUARK_FP8_PER_TOKEN = _QUARK_FP8 | {
    "qscheme": "per_channel",
    "ch_axis": 1,
    "observer_cls": "PerChannelMinMaxObserver",
}


def _compressed_tensors_config(manifest: Manifest) -> dict[str, Any]:
    weights: dict[str, Any]
    if manifest.recipe["format"] == "mxfp4":
        container = "mxfp4-pack-quantized"
        common = {"num_bits": 4, "strategy": "group", "group_size": MXFP4_BLOCK_SIZE}
        common |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
        weights = activations = common
    else:
        container = "float-quantized"
        weights = {"num_bits": 8, "strategy": manifest.recipe["granularity"]}
        activations = {"num_bits": 8, "strategy": "token"}
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


_CONFIG_BUILDERS = {
    "mxfp4": _mxfp4_config,
    "quark": _quark_config,
    "compressed-tensors": _compressed_tensors_config,
    "fp8": _fp8_config,
    "modelopt": _modelopt_config,
    "rowwise": None,
}
