"""What a backend is, and what it may know of the device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from run_ckpt.contract.manifest import Layer

# Role (or a backend's own word) -> tensor.
Tensors = dict[str, Tensor]

# What a product makes of its activations. BF16: they stay as they come, in 16 or 32 bits.
# FP8: E4M3 with one F32 scale for each token, or with the layer's input_scale.
# MXFP8, MXFP4: blocks of 32 along K under an E8M0 scale. NVFP4: blocks of 16 under an E4M3 scale, in units of one F32
# scale for all tokens of a product. ACTIVATIONS: from most bits to fewest.
BF16, FP8, MXFP8, NVFP4, MXFP4 = ACTIVATIONS = ("bf16", "fp8", "mxfp8", "nvfp4", "mxfp4")


@dataclass(frozen=True)
class Device:
    """Where a layer is to run: ``kind`` is "cpu", "cuda" (NVIDIA), "rocm" (AMD) or another torch device type.

    ``arch`` is the GPU's architecture ("gfx950", "sm90"), "" elsewhere. ``is_here`` is False for a GPU that is only
    asked about: then every package that serves it counts as installed.
    """

    kind: str
    arch: str = ""
    is_here: bool = True

    def __str__(self) -> str:
        return f"{self.kind} {self.arch}".strip()


@dataclass(frozen=True)
class Backend:
    """One way to multiply by a quantized weight.

    ``unsupported`` says why a layer can't run on a device, None where it can. It touches no device.
    ``only_if_asked`` says why the backend is taken only if asked for, by name or by other activations (the second
    argument, None for none), None where it is not so.
    ``prepare`` turns the tensors as on disk (role -> tensor, all on their device) into operands; where
    bytes serve as they are it makes no copy. It may use up its argument.
    ``restore`` is the exact inverse, None where there is none.
    ``matmul`` returns x @ weight.T + bias as [M, N] in x's dtype for a layer, x [M, K] (contiguous; bfloat16,
    float16 or float32), its operands and bias [N] or None. torch.compile takes it whole.
    ``has_gradient`` is True where a gradient of the product reaches x, so that what lies before can be trained.
    ``activations`` says in what format ``matmul`` takes x for a layer, one of ACTIVATIONS. ``round_rows``
    rounds x to another of them first, byte for byte as that of activations.py; None where the backend has only its own.
    """

    name: str
    unsupported: Callable[[Layer, Device], str | None]
    prepare: Callable[[Layer, Tensors], Tensors]
    matmul: Callable[[Layer, Tensor, Tensors, Tensor | None], Tensor]
    restore: Callable[[Layer, Tensors], Tensors] | None
    only_if_asked: Callable[[Device, str | None], str | None] = lambda device, activations: None
    has_gradient: bool = False
    activations: Callable[[Layer], str] = lambda layer: BF16
    round_rows: Callable[[Tensor, str, Tensor | None], Tensor] | None = None


def finish(product: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return a kernel's BF16 product [M, N] in x's dtype, with the bias that the kernel could not take."""
    product = product.to(x.dtype)
    return product if bias is None else product + bias.to(x.dtype)


def describe_device(device: torch.device) -> Device:
    """Return what a torch device is. Raises RuntimeError (torch's own) where there is no such GPU."""
    if device.type != "cuda":
        return Device(device.type)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        # "gfx950:sramecc+:xnack-"
        return Device("rocm", properties.gcnArchName.partition(":")[0])
    return Device("cuda", f"sm{properties.major}{properties.minor}")
