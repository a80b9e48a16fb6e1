"""Backends for every machine: decode the weight for each product, or once at load."""

import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.backends.backend import Backend, Machine, Tensors
from run_ckpt.backends.operators import define_operator
from run_ckpt.contract.formats import MXFP4_BLOCK_SIZE
from run_ckpt.contract.layouts import AITER_SCALE, AITER_WEIGHT
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.storage.rows import cut_rows, decode_fp8, decode_mxfp4, scale_rows

# What the operands are called where the bytes stay in AITER's order.
_SHUFFLED_WEIGHT = "shuffled_weight"
_SHUFFLED_SCALE = "shuffled_scale"


def unshuffle(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 [N, K/2] and [N, K/32] in logical order without padding from layout ``aiter``."""
    rows, width = weight.shape
    n_blocks = 2 * width // MXFP4_BLOCK_SIZE
    return AITER_WEIGHT.unshuffle(weight), AITER_SCALE.unshuffle(scale)[:rows, :n_blocks].contiguous()


def to_plain(layer: Layer, tensors: Tensors) -> Tensors:
    """Return the weight and its scale in logical order without padding, whatever the layout on disk.

    MXFP4: uint8 [N, K/2] and [N, K/32]. FP8: as it is.
    """
    if not _is_shuffled(layer):
        return tensors
    weight, scale = unshuffle(tensors[WEIGHT], tensors[WEIGHT_SCALE])
    return {**tensors, WEIGHT: weight, WEIGHT_SCALE: scale}


def from_plain(layer: Layer, tensors: Tensors) -> Tensors:
    """Return the tensors as on disk; the exact inverse of to_plain."""
    if not _is_shuffled(layer):
        return tensors
    scale = AITER_SCALE.shuffle(AITER_SCALE.pad_to_tile(tensors[WEIGHT_SCALE]))
    return {**tensors, WEIGHT: AITER_WEIGHT.shuffle(tensors[WEIGHT]), WEIGHT_SCALE: scale}


def decode_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the weight [N, K] that plain tensors stand for: decoded in float32, then rounded to ``dtype``.

    weight: uint8 [N, K/2] (MXFP4) or float8_e4m3fn [N, K]. scale: as to_plain gives it.
    """
    if weight.dtype == torch.uint8:
        return decode_mxfp4(weight, scale).to(dtype)
    return decode_fp8(weight.view(torch.uint8), scale).to(dtype)


def _is_shuffled(layer: Layer) -> bool:
    return layer.format == "mxfp4" and layer.layout == "aiter"


def _keep(layer: Layer, tensors: Tensors) -> Tensors:
    if not _is_shuffled(layer):
        return tensors
    return {_SHUFFLED_WEIGHT: tensors[WEIGHT], _SHUFFLED_SCALE: tensors[WEIGHT_SCALE]}


def _give_back(layer: Layer, operands: Tensors) -> Tensors:
    if not _is_shuffled(layer):
        return operands
    return {WEIGHT: operands[_SHUFFLED_WEIGHT], WEIGHT_SCALE: operands[_SHUFFLED_SCALE]}


def _multiply_decoding(x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    if _SHUFFLED_WEIGHT in operands:
        weight, scale = unshuffle(operands[_SHUFFLED_WEIGHT], operands[_SHUFFLED_SCALE])
    else:
        weight, scale = operands[WEIGHT], operands[WEIGHT_SCALE]
    return F.linear(x, _decode_weight(weight, scale, x.dtype), bias)


def _empty_weight(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    K = weight.shape[1] * (2 if weight.dtype == torch.uint8 else 1)
    return weight.new_empty(weight.shape[0], K, dtype=dtype)


# torch.compile would make the decoding tables anew for each product.
_decode_weight = define_operator(
    "decode_weight(Tensor weight, Tensor scale, ScalarType dtype) -> Tensor", decode_weight, _empty_weight
)


def _dequantize(layer: Layer, tensors: Tensors) -> Tensors:
    plain = to_plain(layer, tensors)
    weight, scale = plain[WEIGHT], plain[WEIGHT_SCALE]
    decoded = torch.empty(layer.N, layer.K, dtype=torch.bfloat16, device=weight.device)
    for start, stop in cut_rows(layer):
        part = scale[start:stop] if layer.format == "mxfp4" else scale_rows(layer, scale, start, stop)
        decoded[start:stop] = decode_weight(weight[start:stop], part, torch.bfloat16)
    return {WEIGHT: decoded}


def _multiply_dequantized(x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    return F.linear(x, operands[WEIGHT].to(x.dtype), bias)


def _slow_on_a_gpu(machine: Machine) -> str | None:
    return None if machine.kind == "cpu" else "it decodes the weight for each product, which is slow on a GPU"


# Activations are not quantized, an input_scale is not used: the reference has the error of the weights alone.
REFERENCE = Backend(
    "reference",
    why_not=lambda layer, machine: None,
    prepare=_keep,
    matmul=_multiply_decoding,
    restore=_give_back,
    why_ask=_slow_on_a_gpu,
)
DEQUANTIZE = Backend(
    "dequantize",
    why_not=lambda layer, machine: None,
    prepare=_dequantize,
    matmul=_multiply_dequantized,
    restore=None,
    why_ask=lambda machine: "it holds each weight in BF16, which takes two to four times the memory",
)
