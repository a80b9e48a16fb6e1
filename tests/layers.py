"""Quantized layers for tests of the backends: a weight -> its Layer and its tensors as on disk."""

import torch
from torch import Tensor

from run_ckpt.backends.backend import Tensors
from run_ckpt.backends.reference import from_plain
from run_ckpt.contract.codec import nvfp4_tensor_scale, quantize
from run_ckpt.contract.dialects.dialect import usual_scale_shape, usual_suffixes
from run_ckpt.contract.formats import (
    AITER_MXFP4,
    BLOCK_FP8,
    CHANNEL_FP8,
    PLAIN_MXFP4,
    PLAIN_MXFP8,
    PLAIN_NVFP4,
    TENSOR_FP8,
)
from run_ckpt.contract.manifest import INPUT_SCALE, TENSOR_SCALE, WEIGHT, WEIGHT_SCALE, Layer

MODULE = "blocks.0.proj"
SCHEMES = {
    "mxfp4-aiter": AITER_MXFP4,
    "mxfp4-plain": PLAIN_MXFP4,
    "nvfp4": PLAIN_NVFP4,
    "mxfp8": PLAIN_MXFP8,
    "fp8-tensor": TENSOR_FP8,
    "fp8-channel": CHANNEL_FP8,
    "fp8-block": BLOCK_FP8,
}


def describe_layer(scheme: str, N: int, K: int, *, is_static: bool = False) -> Layer:
    """Return the Layer of an [N, K] weight, without its tensors."""
    roles = [*usual_suffixes(SCHEMES[scheme], "diffusers")] + [INPUT_SCALE] * is_static
    return Layer(
        module=MODULE,
        scheme=SCHEMES[scheme],
        N=N,
        K=K,
        source_tensor=f"{MODULE}.weight",
        source_dtype="BF16",
        scale_rule=SCHEMES[scheme].format.scale_rules[0],
        tensors={role: f"{MODULE}.{role}" for role in roles},
        scale_shape=usual_scale_shape(N, K, SCHEMES[scheme]),
    )


def make_layer(scheme: str, weight: Tensor, input_scale: float | None = None) -> tuple[Layer, Tensors]:
    """Quantize ``weight`` [N, K] with the contract's codec, or take it as it is where every value has a code."""
    layer = describe_layer(scheme, *weight.shape, is_static=input_scale is not None)
    codes, scales = quantize(weight, layer.scheme, layer.scale_rule)
    tensors = from_plain(layer, {WEIGHT: codes, WEIGHT_SCALE: scales})
    tensors[WEIGHT_SCALE] = tensors[WEIGHT_SCALE].reshape(layer.scale_shape)
    if layer.format.is_two_level:
        tensors[TENSOR_SCALE] = nvfp4_tensor_scale(weight.abs().amax())
    if input_scale is not None:
        tensors[INPUT_SCALE] = torch.tensor([input_scale])
    return layer, tensors
