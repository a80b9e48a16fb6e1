"""Petit: MXFP4 weights with BF16 activations on CDNA2 and CDNA3, which have no FP4 units."""

import torch
from torch import Tensor

from run_ckpt.backends.backend import Backend, Device, Tensors, finish
from run_ckpt.backends.operators import define_operator
from run_ckpt.backends.packages import why_no_petit
from run_ckpt.backends.reference import to_plain
from run_ckpt.contract.errors import BackendError
from run_ckpt.contract.formats import E8M0_BIAS, MX_BLOCK_SIZE, MXFP4
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer

_ARCHITECTURES = ("gfx90a", "gfx942")
# The grid has one row of workgroups per 32 weight rows, a tile of scales spans K = 256.
_N_MULTIPLE, _K_MULTIPLE = 32, 256
# It folds a power of two into the scales (2^-15, 2^7), which must not leave E8M0's range.
_MIN_SCALE, _MAX_SCALE = 16, 247
_MAGNITUDES = 0x77


def _unsupported(layer: Layer, device: Device) -> str | None:
    if layer.format != MXFP4:
        return f"Petit takes MXFP4 weights, this one is {layer.format}"
    if device.kind != "rocm" or device.arch not in _ARCHITECTURES:
        return f"Petit is for {' and '.join(_ARCHITECTURES)}"
    if layer.N % _N_MULTIPLE or layer.K % _K_MULTIPLE:
        return f"N = {layer.N} and K = {layer.K} are not multiples of {_N_MULTIPLE} and {_K_MULTIPLE}"
    return why_no_petit() if device.is_here else None


def _prepare(layer: Layer, tensors: Tensors) -> Tensors:
    from petit_kernel import process_mxfp4_scales, repack_mxfp4

    plain = to_plain(layer, tensors)
    weight = plain[WEIGHT]
    scale = _scale_in_range(layer, weight, plain[WEIGHT_SCALE])
    return {
        WEIGHT: repack_mxfp4(weight.view(torch.int32), layer.N, layer.K),
        WEIGHT_SCALE: process_mxfp4_scales(scale, layer.N, layer.K),
        "global_scale": torch.ones(1, device=weight.device),
    }


def _scale_in_range(layer: Layer, weight: Tensor, scale: Tensor) -> Tensor:
    """Return the scale with that of each block of zeros, which any value serves, inside Petit's range."""
    blocks = weight.reshape(layer.N, -1, MX_BLOCK_SIZE // 2)
    is_zero = ((blocks & _MAGNITUDES) == 0).all(-1)
    scale = scale.masked_fill(is_zero, E8M0_BIAS)
    low, high = int(scale.min()), int(scale.max())
    if low < _MIN_SCALE or high > _MAX_SCALE:
        raise BackendError(
            f"{layer.module}: its scale codes reach from {low} to {high}, Petit takes {_MIN_SCALE} to {_MAX_SCALE}."
            ' Load it with backend="triton", or uninstall petit_kernel.'
        )
    return scale


def _multiply(layer: Layer, x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    product = _petit_mxfp4(x.bfloat16(), operands[WEIGHT], operands[WEIGHT_SCALE], operands["global_scale"])
    return finish(product, x, bias)


def _multiply_bf16(x: Tensor, weight: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    """Return bfloat16 [M, N] from x bfloat16 [M, K] and what Petit made of weight [N/16, 2K] and scale [N/32, K]."""
    from petit_kernel import mul_mxfp4_a16

    M, K, N = *x.shape, 16 * len(weight)
    if not M:
        return x.new_empty(0, N)
    # -1: Petit chooses the kernel by the shape.
    product: Tensor = mul_mxfp4_a16(x, weight, scale, global_scale, M, N, K, -1)
    return product


def _empty_product(x: Tensor, weight: Tensor, scale: Tensor, global_scale: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], 16 * weight.shape[0])


_petit_mxfp4 = define_operator(
    "petit_mxfp4(Tensor x, Tensor weight, Tensor scale, Tensor global_scale) -> Tensor", _multiply_bf16, _empty_product
)

# Petit turns -0 into +0: no way back to the bytes on disk.
PETIT = Backend("petit", unsupported=_unsupported, prepare=_prepare, matmul=_multiply, restore=None)
