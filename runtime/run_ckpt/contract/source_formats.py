"""Formats that are only read: a weight in one of them is decoded, and never written."""

import math
from collections.abc import Mapping

from run_ckpt.contract.formats import (
    E2M1,
    E4M3,
    E4M3_SCALE,
    E8M0,
    F32,
    FP8,
    MX_BLOCK_SIZE,
    NVFP4_BLOCK_SIZE,
    ElementFormat,
    QuantFormat,
    Scheme,
)
from run_ckpt.contract.layouts import PLAIN
from run_ckpt.contract.manifest import TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.contract.tensors import TensorSpec

BY_ROW = "row"
# The scale rule of a layer whose scales another tool chose.
UNKNOWN_RULE = "unknown"
# Roles beside those of a layer: zero points, and JSON as bytes by which ComfyUI says how one weight is quantized.
WEIGHT_OFFSET, COMFY_MARK = "weight_offset", "comfy_quant"


def opaque_format(name: str, label: str, row_multiple: int = 1) -> QuantFormat:
    """Return a format whose rows storage/decoders.py knows; ``row_multiple`` of them are decoded together."""
    return _read_only(name, label, ElementFormat(name, "U8", 1, math.inf, None), {BY_ROW: (row_multiple, None)})


def opaque_layer(
    quant_format: QuantFormat,
    tensors: dict[str, str],
    specs: Mapping[str, TensorSpec],
    shape: tuple[int, int],
    source_dtype: str,
) -> Layer:
    """Return the layer that tensors make, role -> name, in a format that storage/decoders.py knows. shape: [N, K]."""
    module, scale = tensors[WEIGHT].removesuffix(".weight"), specs.get(tensors.get(WEIGHT_SCALE, ""))
    return Layer(
        module=module,
        scheme=Scheme(quant_format, PLAIN, BY_ROW),
        N=shape[0],
        K=shape[1],
        source_tensor=f"{module}.weight",
        source_dtype=source_dtype,
        scale_rule=UNKNOWN_RULE,
        tensors=tensors,
        scale_shape=scale.shape if scale else (1,),
    )


def int8_layer(tensors: dict[str, str], specs: Mapping[str, TensorSpec], source_dtype: str) -> Layer:
    """Return the layer that INT8 codes make with one scale, or one for each row. Raises ValueError."""
    weight, scale = specs[tensors[WEIGHT]], specs[tensors[WEIGHT_SCALE]]
    others = [specs[name] for role, name in tensors.items() if role == WEIGHT_OFFSET]
    is_matrix = weight.dtype == "I8" and len(weight.shape) == 2 and weight.nbytes > 0
    fits = is_matrix and math.prod(scale.shape) in (1, weight.shape[0]) and scale.dtype in F32.readable
    if not fits or any(other.shape != scale.shape for other in others):
        listed = ", ".join(f"{spec.dtype} {list(spec.shape)}" for spec in (weight, scale, *others))
        raise ValueError(f"{listed}: no INT8 weight with a scale for each row")
    return opaque_layer(INT8, tensors, specs, (weight.shape[0], weight.shape[1]), source_dtype)


def blocked_layer(tensors: dict[str, str], specs: Mapping[str, TensorSpec]) -> Layer:
    """Return the layer that ComfyUI's codes make with scales in cuBLAS' order. Raises ValueError.

    NVFP4: U8 [N, K/2] with scales F8_E4M3 and one of the tensor. MXFP8: F8_E4M3 [N, K] with scales in E8M0.
    """
    weight, scale = specs[tensors[WEIGHT]], specs[tensors[WEIGHT_SCALE]]
    second = [specs[name] for role, name in tensors.items() if role == TENSOR_SCALE]
    found, per_byte, block = (
        (BLOCKED_NVFP4, 2, NVFP4_BLOCK_SIZE) if weight.dtype == E2M1.dtype else (BLOCKED_MXFP8, 1, MX_BLOCK_SIZE)
    )
    N, K = weight.shape[0] if weight.shape else 0, weight.shape[-1] * per_byte if len(weight.shape) == 2 else 0
    rows, cols = BLOCKED_TILE
    readable = E4M3_SCALE.readable if found == BLOCKED_NVFP4 else E8M0.readable
    fits = (
        weight.dtype in (E2M1.dtype, E4M3.dtype)
        and N * K > 0
        and K % block == 0
        and scale.dtype in readable
        and scale.shape == (-(-N // rows) * rows, -(-K // block // cols) * cols)
        and [math.prod(spec.shape) for spec in second if spec.dtype == "F32"] == [1] * (found == BLOCKED_NVFP4)
    )
    if not fits:
        listed = ", ".join(f"{spec.dtype} {list(spec.shape)}" for spec in (weight, scale, *second))
        raise ValueError(f"{listed}: neither NVFP4 nor MXFP8 as ComfyUI stores it")
    return opaque_layer(found, tensors, specs, (N, K), "BF16")


def _read_only(
    name: str, label: str, element: ElementFormat, blocks: dict[str, tuple[int | None, int | None]]
) -> QuantFormat:
    return QuantFormat(
        name=name,
        label=label,
        element=element,
        scale=F32,
        blocks=blocks,
        layouts=(PLAIN,),
        scale_rules=(UNKNOWN_RULE,),
        K_granule=1,
        min_N=1,
        N_multiple=1,
        K_multiple=1,
        summary=label,
        machines="",
    )


# OFP8, E5M2: the upper byte of a float16; it has infinities.
E5M2 = ElementFormat("e5m2", "F8_E5M2", per_byte=1, largest=57344.0, nan_magnitude=None)
FP8_E5M2 = _read_only("fp8_e5m2", "FP8 (E5M2)", E5M2, FP8.blocks)
INT8 = opaque_format("int8", "INT8")
# Scales in the tiles that cuBLAS wants.
BLOCKED_TILE = (128, 4)
BLOCKED_NVFP4 = opaque_format("nvfp4_blocked", "NVFP4 with scales in cuBLAS' order", BLOCKED_TILE[0])
BLOCKED_MXFP8 = opaque_format("mxfp8_blocked", "MXFP8 with scales in cuBLAS' order", BLOCKED_TILE[0])
