"""The bits, in plain torch: quantize and dequantize whole weights.

This file is the reference. Every faster kernel must return the same bytes.
"""

from collections.abc import Callable, Mapping
from functools import cache

import torch
from torch import Tensor

from run_ckpt.contract.elements import (
    decode_e2m1,
    decode_e8m0,
    encode_e2m1,
    pack_nibbles,
    scale_to_units,
    unpack_nibbles,
)
from run_ckpt.contract.formats import (
    E2M1,
    E4M3_MAX,
    E4M3_SMALLEST,
    F32_TINY,
    MX_BLOCK_SIZE,
    NVFP4_BLOCK_SIZE,
    NVFP4_LARGEST,
    ElementFormat,
    Scheme,
)
from run_ckpt.contract.manifest import INVERSE_TENSOR_SCALE, TENSOR_SCALE
from run_ckpt.contract.scale_rules import choose_scale_codes


def quantize(
    weight: Tensor, scheme: Scheme, scale_rule: str, tensor_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the codes and the scale grid of a weight [N, K], row-major without padding, each in its dtype on disk.

    weight: float32, bfloat16 or float16, finite. scale_rule: one of the format's.
    tensor_scale: float32 [1] in a format of two levels, see nvfp4_tensor_scale; default: by the weight's own amax.
    """
    if scheme.format.is_two_level:
        return quantize_nvfp4(weight, nvfp4_tensor_scale(weight.abs().amax()) if tensor_scale is None else tensor_scale)
    return _QUANTIZERS[scheme.format.name](weight, scheme, scale_rule)


def quantize_mx(weight: Tensor, scheme: Scheme, scale_rule: str) -> tuple[Tensor, Tensor]:
    """Return the codes of an MX format, [N, K / elements a byte], and E8M0 scales uint8 [N, K/32], row-major.

    weight: float32, bfloat16 or float16 [N, K], K a multiple of 32. It must be finite: E2M1 has no code for
    NaN or Inf, and none is checked for here.
    scale_rule: one of the format's, see scale_rules.py.
    Source: OCP MX v1.0, 6.3; MXFP4 by rule ``even`` has the bytes of AITER's Triton quantizer.
    """
    element, (rows, cols) = scheme.format.element, weight.shape
    blocks = weight.float().reshape(rows, cols // MX_BLOCK_SIZE, MX_BLOCK_SIZE)
    scale_codes = choose_scale_codes(blocks, scale_rule, element)
    units = scale_to_units(blocks, scale_codes).reshape(rows, cols)
    return _ELEMENT_ENCODERS[element.name](units), scale_codes


def quantize_nvfp4(weight: Tensor, tensor_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return packed E2M1 codes uint8 [N, K/2] and scales float8_e4m3fn [N, K/16], row-major.

    The scale of a block is amax / (6 * tensor_scale), 1 where that is zero, at least 2^-9, the smallest there is;
    the product of both scales, in float32, divides the weight.
    weight: float32, bfloat16 or float16 [N, K], finite, K a multiple of 16. tensor_scale: float32 [1], positive.
    Source: ModelOpt 0.47, torch/quantization/qtensor/nvfp4_tensor.py, but for -0, which keeps its sign here.
    """
    blocks = weight.float().reshape(len(weight), -1, NVFP4_BLOCK_SIZE)
    quotient = blocks.abs().amax(-1) / (E2M1.largest * tensor_scale)
    quotient = torch.where(quotient > 0, quotient, torch.ones_like(quotient))
    scales = quotient.clamp(E4M3_SMALLEST, E4M3_MAX).to(torch.float8_e4m3fn)
    units = blocks / (scales.float() * tensor_scale).unsqueeze(-1)
    return pack_nibbles(encode_e2m1(units.double()).reshape(weight.shape)), scales


def nvfp4_tensor_scale(amax: Tensor) -> Tensor:
    """Return float32 [1]: amax / (6 * 448), or 1 where that is below the normal numbers of float32."""
    scale = amax.float().reshape(1) / NVFP4_LARGEST
    return torch.where(scale >= F32_TINY, scale, torch.ones_like(scale))


def quantize_fp8(weight: Tensor, scale: Tensor) -> Tensor:
    """Return float8_e4m3fn [N, K]: e4m3(clamp(weight / scale, +-448)), nearest, ties to even.

    weight: float32, bfloat16 or float16 [N, K]; NaN becomes the code of NaN, Inf saturates like every large value.
    scale: float32, broadcastable to [N, K].
    The division is in float32. torch before 2.13 gave NaN on overflow, hence the clamp.
    """
    return _encode_e4m3(weight.float() / scale)


def fp8_scale(amax: Tensor) -> Tensor:
    """Return float32 amax / 448, or 1 where that is zero (an all-zero weight)."""
    scale = amax.float() / E4M3_MAX
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def block_amax(weight: Tensor, scheme: Scheme) -> Tensor:
    """Return the largest magnitude of each block, float32 in the shape of the scale grid."""
    (N, K), (n_rows, n_cols) = weight.shape, scheme.scale_grid(*weight.shape)
    rows, cols = scheme.block[0] or N, scheme.block[1] or K
    padded = torch.zeros(n_rows * rows, n_cols * cols)
    padded[:N, :K] = weight.abs()
    return padded.reshape(n_rows, rows, n_cols, cols).amax((1, 3))


def tensor_scale(tensors: Mapping[str, Tensor]) -> Tensor | None:
    """Return what the scales of blocks are multiplied by, float32 [1], given a layer's tensors by role.

    None where a format has one level of scales.
    """
    if INVERSE_TENSOR_SCALE in tensors:
        return 1 / tensors[INVERSE_TENSOR_SCALE].float()
    return tensors.get(TENSOR_SCALE)


def dequantize(codes: Tensor, scales: Tensor, scheme: Scheme, tensor_scale: Tensor | None = None) -> Tensor:
    """Return float32 [n, K]: element * scale, where the scale is first multiplied by ``tensor_scale`` if there is one.

    codes, scales: in row-major order without padding. codes: uint8 [n, K / elements a byte], or the float8 tensor
    [n, K]. scales: those of these rows (see Scheme.scale_rows) as the grid of Scheme.scale_grid, or in another shape
    of as many elements, in the dtype on disk. A NaN code or scale gives NaN.
    """
    element = scheme.format.element
    # torch's own cast from float8 is four times slower than a look-up for each byte.
    values = _values_of_bytes(element, codes.device).index_select(0, codes.view(torch.uint8).flatten().long())
    values = values.view(torch.float32).reshape(len(codes), -1)
    decoded = _SCALE_DECODERS[scheme.format.scale.name](scales)
    return _scale(values, decoded if tensor_scale is None else decoded * tensor_scale.float(), scheme)


def expand_scales(scales: Tensor, scheme: Scheme, N: int, K: int) -> Tensor:
    """Return the scales of an [N, K] weight, decoded, as float32 broadcastable to [N, K]."""
    return _scale(torch.ones(N, K), scales, scheme)


def _scale(values: Tensor, scales: Tensor, scheme: Scheme) -> Tensor:
    """Return ``values`` float32 [n, K], multiplied in place by the scale of their block."""
    (rows, cols), (n, K) = scheme.block, values.shape
    grid = scales.reshape(-1, scheme.scale_grid(n, K)[1])
    if rows and rows > 1:
        grid = grid.repeat_interleave(rows, dim=0)[:n]
    if cols and K % cols:
        return values.mul_(grid.repeat_interleave(cols, dim=1)[:, :K])
    return values.view(n, -1, cols or K).mul_(grid.unsqueeze(-1)).view(n, K)


@cache
def _values_of_bytes(element: ElementFormat, device: torch.device) -> Tensor:
    """The float32 values of each byte side by side, as one element: float32 [256], or two of them as int64 [256]."""
    values = _ELEMENT_DECODERS[element.name](torch.arange(256, dtype=torch.uint8, device=device))
    return values.view(torch.int64) if element.per_byte == 2 else values


def _encode_e4m3(units: Tensor) -> Tensor:
    return units.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def _quantize_fp8(weight: Tensor, scheme: Scheme, scale_rule: str) -> tuple[Tensor, Tensor]:
    scale = fp8_scale(block_amax(weight, scheme))
    return quantize_fp8(weight, expand_scales(scale, scheme, *weight.shape)), scale


_QUANTIZERS: dict[str, Callable[[Tensor, Scheme, str], tuple[Tensor, Tensor]]] = {
    "mxfp4": quantize_mx,
    "mxfp8": quantize_mx,
    "fp8": _quantize_fp8,
}
# Values divided by their scale, float64 or float32 [N, K] -> codes; the inverse of _ELEMENT_DECODERS.
_ELEMENT_ENCODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "e2m1": lambda units: pack_nibbles(encode_e2m1(units)),
    "e4m3fn": lambda units: _encode_e4m3(units.float()),
}
_ELEMENT_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "e2m1": lambda packed: decode_e2m1(unpack_nibbles(packed)),
    "e4m3fn": lambda codes: codes.view(torch.float8_e4m3fn).float(),
    "e5m2": lambda codes: codes.view(torch.float8_e5m2).float(),
}
_SCALE_DECODERS: dict[str, Callable[[Tensor], Tensor]] = {
    "e8m0": decode_e8m0,
    "e4m3fn": Tensor.float,
    "f32": Tensor.float,
}
