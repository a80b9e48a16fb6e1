"""What a backend is, and what it may know of the machine."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from run_ckpt.contract.manifest import Layer

# Role (or a backend's own word) -> tensor.
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Machine:
    """Where a layer is to run: ``kind`` is "cpu", "cuda" (NVIDIA), "rocm" (AMD) or another torch device type.

    ``arch`` is the GPU's architecture ("gfx950", "sm90"), "" elsewhere.
    """

    kind: str
    arch: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.arch}".strip()


@dataclass(frozen=True)
class Backend:
    """One way to multiply by a quantized weight.

    ``why_not`` says why a layer can't run on a machine, None where it can. It touches no device.
    ``why_ask`` says why the backend is taken only if asked for by name, None where it is not so.
    ``prepare`` turns the tensors as on disk (role -> tensor, all on their device) into operands; where
    bytes serve as they are it makes no copy. It may use up its argument.
    ``restore`` is the exact inverse, None where there is none.
    ``matmul`` returns x @ weight.T + bias as [M, N] in x's dtype for x [M, K] (contiguous; bfloat16,
    float16 or float32), operands and bias [N] or None. torch.compile takes it whole.
    """

    name: str
    why_not: Callable[[Layer, Machine], str | None]
    prepare: Callable[[Layer, Tensors], Tensors]
    matmul: Callable[[Tensor, Tensors, Tensor | None], Tensor]
    restore: Callable[[Layer, Tensors], Tensors] | None
    why_ask: Callable[[Machine], str | None] = lambda machine: None


def finish(product: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return a kernel's BF16 product [M, N] in x's dtype, with the bias that the kernel could not take."""
    product = product.to(x.dtype)
    return product if bias is None else product + bias.to(x.dtype)


def describe_machine(device: torch.device) -> Machine:
    """Return what a torch device is. Raises RuntimeError (torch's own) where there is no such GPU."""
    if device.type != "cuda":
        return Machine(device.type)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        # "gfx950:sramecc+:xnack-"
        return Machine("rocm", properties.gcnArchName.partition(":")[0])
    return Machine("cuda", f"sm{properties.major}{properties.minor}")
