"""Backends for every machine: decode the weight for each product, or once at load."""

import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.backends.activations import round_rows
from run_ckpt.backends.backend import Backend, Device, Tensors
from run_ckpt.backends.operators import define_operator
from run_ckpt.contract.codec import dequantize, tensor_scale
from run_ckpt.contract.formats import FORMATS, Scheme, read_scheme
from run_ckpt.contract.layouts import PLAIN, Layout
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer
from run_ckpt.storage.rows import cut_rows


def to_plain(layer: Layer, tensors: Tensors) -> Tensors:
    """Return the weight and its scale in logical order without padding, whatever the layout on disk.

    MXFP4: uint8 [N, K/2] and [N, K/32]. FP8: as it is.
    """
    weight, scale = _unshuffle(tensors[WEIGHT], tensors[WEIGHT_SCALE], layer.scheme)
    return {**tensors, WEIGHT: weight, WEIGHT_SCALE: scale}


def from_plain(layer: Layer, tensors: Tensors) -> Tensors:
    """Return the tensors as on disk; the exact inverse of to_plain."""
    return shuffle(tensors, layer.scheme.layout)


def shuffle(plain: Tensors, layout: Layout) -> Tensors:
    """Return a weight and its scale, given in logical order without padding, in a storage order, the scale padded."""
    if layout == PLAIN:
        return plain
    scale = layout.scale.shuffle(layout.scale.pad_to_tile(plain[WEIGHT_SCALE]))
    return {**plain, WEIGHT: layout.weight.shuffle(plain[WEIGHT]), WEIGHT_SCALE: scale}


def decode_weight(
    weight: Tensor, scale: Tensor, scheme: Scheme, dtype: torch.dtype, second: Tensor | None = None
) -> Tensor:
    """Return the weight [N, K] that tensors as on disk stand for: decoded in float32, then rounded to ``dtype``.

    second: the scale of the whole tensor, see codec.tensor_scale.
    """
    codes, scales = _unshuffle(weight, scale, scheme)
    return dequantize(codes, scales, scheme, second).to(dtype)


def _unshuffle(weight: Tensor, scale: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    if scheme.layout == PLAIN:
        return weight, scale
    n_rows, n_cols = scheme.scale_grid(len(weight), weight.shape[1] * scheme.format.element.per_byte)
    grid = scheme.layout.scale.unshuffle(scale)[:n_rows, :n_cols].contiguous()
    return scheme.layout.weight.unshuffle(weight), grid


def _decode(weight: Tensor, scale: Tensor, second: Tensor | None, names: list[str], dtype: torch.dtype) -> Tensor:
    return decode_weight(weight, scale, read_scheme(*names), dtype, second)


def _empty_weight(weight: Tensor, scale: Tensor, second: Tensor | None, names: list[str], dtype: torch.dtype) -> Tensor:
    return weight.new_empty(weight.shape[0], weight.shape[1] * FORMATS[names[0]].element.per_byte, dtype=dtype)


# torch.compile would make the decoding tables anew for each product.
_decode_weight = define_operator(
    "decode_weight(Tensor weight, Tensor scale, Tensor? second, str[] scheme, ScalarType dtype) -> Tensor",
    _decode,
    _empty_weight,
)


def _multiply_decoding(layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    scheme = layer.scheme
    names = [scheme.format.name, scheme.layout.name, scheme.granularity]
    second = tensor_scale(operands)
    return F.linear(x, _decode_weight(operands[WEIGHT], operands[WEIGHT_SCALE], second, names, x.dtype), bias)


def _as_they_are(layer: Layer, tensors: Tensors) -> Tensors:
    return tensors


def _dequantize(layer: Layer, tensors: Tensors) -> Tensors:
    plain = to_plain(layer, tensors)
    weight, scheme = plain[WEIGHT], layer.scheme
    scale, second = plain[WEIGHT_SCALE].reshape(scheme.scale_grid(layer.N, layer.K)), tensor_scale(plain)
    decoded = torch.empty(layer.N, layer.K, dtype=torch.bfloat16, device=weight.device)
    for start, stop in cut_rows(layer):
        decoded[start:stop] = dequantize(weight[start:stop], scale[scheme.scale_rows(start, stop)], scheme, second)
    return {WEIGHT: decoded}


def _multiply_dequantized(layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    return F.linear(x, operands[WEIGHT].to(x.dtype), bias)


def _slow_on_a_gpu(device: Device, activations: str | None) -> str | None:
    return None if device.kind == "cpu" else "it decodes the weight for each product, which is slow on a GPU"


# Activations stay as they are unless other ones are asked for, so the error is that of the weights.
REFERENCE = Backend(
    "reference",
    unsupported=lambda layer, device: None,
    prepare=_as_they_are,
    matmul=_multiply_decoding,
    restore=_as_they_are,
    only_if_asked=_slow_on_a_gpu,
    has_gradient=True,
    round_rows=round_rows,
)
DEQUANTIZE = Backend(
    "dequantize",
    unsupported=lambda layer, device: None,
    prepare=_dequantize,
    matmul=_multiply_dequantized,
    restore=None,
    only_if_asked=lambda device, activations: "it holds each weight in BF16, which takes two to four times the memory",
    has_gradient=True,
    round_rows=round_rows,
)
