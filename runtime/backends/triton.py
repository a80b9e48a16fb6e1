"""Triton kernels that decode weights on the way to the matrix units: any GPU that Triton serves."""

import torch
from torch import Tensor

from runtime.backends.backend import Backend, Machine, Tensors
from runtime.backends.packages import why_no_triton
from runtime.backends.reference import from_plain, to_plain
from runtime.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer

# The first NVIDIA GPUs with matrix units for BF16.
_MIN_SM = 80


def _why_not(layer: Layer, machine: Machine) -> str | None:
    if machine.kind not in ("cuda", "rocm"):
        return f"Triton compiles for GPUs, not for {machine}"
    if machine.kind == "cuda" and int(machine.arch.removeprefix("sm")) < _MIN_SM:
        return f"NVIDIA GPUs multiply BF16 from sm{_MIN_SM} on, this is {machine.arch}"
    return why_no_triton()


def _multiply(x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    return _multiply_decoding(x, operands[WEIGHT], operands[WEIGHT_SCALE], bias)


@torch.library.custom_op("run_ckpt::triton_linear", mutates_args=())
def _multiply_decoding(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from runtime.kernels.matmul import multiply

    product: Tensor = multiply(x, weight, scale, bias)
    return product


@_multiply_decoding.register_fake
def _(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


# Activations are not quantized, an input_scale is not used: the error is that of the weights alone.
TRITON = Backend("triton", why_not=_why_not, prepare=to_plain, matmul=_multiply, restore=from_plain)
