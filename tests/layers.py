"""Quantized layers for tests of the backends: a weight -> its Layer and its tensors as on disk."""

import torch
from torch import Tensor

from run_ckpt.backends.backend import Tensors
from run_ckpt.backends.reference import from_plain
from run_ckpt.contract.codec import fp8_scale, quantize_fp8, quantize_mxfp4
from run_ckpt.contract.dialects.dialect import usual_scale_shape
from run_ckpt.contract.formats import (
    AITER_MXFP4,
    BLOCK_FP8,
    CHANNEL_FP8,
    FP8_BLOCK_SIZE,
    MXFP4,
    PLAIN_MXFP4,
    TENSOR_FP8,
)
from run_ckpt.contract.manifest import INPUT_SCALE, WEIGHT, WEIGHT_SCALE, Layer
from tests.codec import expand_fp8_scale

MODULE = "blocks.0.proj"
SCHEMES = {
    "mxfp4-aiter": AITER_MXFP4,
    "mxfp4-plain": PLAIN_MXFP4,
    "fp8-tensor": TENSOR_FP8,
    "fp8-channel": CHANNEL_FP8,
    "fp8-block": BLOCK_FP8,
}


def describe_layer(scheme: str, N: int, K: int, *, is_static: bool = False) -> Layer:
    """Return the Layer of an [N, K] weight, without its tensors."""
    roles = [WEIGHT, WEIGHT_SCALE] + [INPUT_SCALE] * is_static
    return Layer(
        module=MODULE,
        scheme=SCHEMES[scheme],
        N=N,
        K=K,
        source_tensor=f"{MODULE}.weight",
        source_dtype="BF16",
        scale_rule="even",
        tensors={role: f"{MODULE}.{role}" for role in roles},
        scale_shape=usual_scale_shape(N, K, SCHEMES[scheme]),
    )


def make_layer(scheme: str, weight: Tensor, input_scale: float | None = None) -> tuple[Layer, Tensors]:
    """Quantize ``weight`` [N, K] with the contract's codec, or take it as it is where every value has a code."""
    layer = describe_layer(scheme, *weight.shape, is_static=input_scale is not None)
    if layer.format == MXFP4:
        packed, codes = quantize_mxfp4(weight, "even")
        return layer, from_plain(layer, {WEIGHT: packed, WEIGHT_SCALE: codes})
    scale = fp8_scale(_amax(weight, layer.scheme.granularity))
    tensors = {
        WEIGHT: quantize_fp8(weight, expand_fp8_scale(scale, *weight.shape)),
        WEIGHT_SCALE: scale.reshape(layer.scale_shape),
    }
    if input_scale is not None:
        tensors[INPUT_SCALE] = torch.tensor([input_scale])
    return layer, tensors


def _amax(weight: Tensor, granularity: str) -> Tensor:
    if granularity == "tensor":
        return weight.abs().amax().reshape(1)
    if granularity == "channel":
        return weight.abs().amax(1)
    bands = weight.abs().split(FP8_BLOCK_SIZE, dim=0)
    return torch.stack([torch.stack([block.amax() for block in band.split(FP8_BLOCK_SIZE, 1)]) for band in bands])
