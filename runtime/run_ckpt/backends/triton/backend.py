"""Triton kernels that decode weights on the way to the matrix units: any GPU that Triton serves."""

from torch import Tensor

from run_ckpt.backends.backend import Backend, Machine, Tensors
from run_ckpt.backends.operators import define_operator
from run_ckpt.backends.packages import why_no_triton
from run_ckpt.backends.reference import from_plain, to_plain
from run_ckpt.contract.manifest import WEIGHT, WEIGHT_SCALE, Layer

# The first NVIDIA GPUs with matrix units for BF16.
_MIN_SM = 80


def _why_not(layer: Layer, machine: Machine) -> str | None:
    if machine.kind not in ("cuda", "rocm"):
        return f"Triton compiles for GPUs, not for {machine}"
    if machine.kind == "cuda" and int(machine.arch.removeprefix("sm")) < _MIN_SM:
        return f"NVIDIA GPUs multiply BF16 from sm{_MIN_SM} on, this is {machine.arch}"
    return why_no_triton()


def _multiply(x: Tensor, operands: Tensors, bias: Tensor | None) -> Tensor:
    return _linear(x, operands[WEIGHT], operands[WEIGHT_SCALE], bias)


def _multiply_decoding(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    from run_ckpt.backends.triton.matmul import multiply

    return multiply(x, weight, scale, bias)


def _empty_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_linear = define_operator(
    "triton_linear(Tensor x, Tensor weight, Tensor scale, Tensor? bias) -> Tensor", _multiply_decoding, _empty_product
)

# Activations are not quantized, an input_scale is not used: the error is that of the weights alone.
TRITON = Backend("triton", why_not=_why_not, prepare=to_plain, matmul=_multiply, restore=from_plain)
