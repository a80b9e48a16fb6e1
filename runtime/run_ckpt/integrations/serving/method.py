"""A server's linear over our backends: what is on disk becomes operands once, then products."""

import torch
from torch import Tensor, nn

from run_ckpt.backends.choose import Choice
from run_ckpt.contract.manifest import WEIGHT, Layer


class BackendProduct:
    """``layer`` is this rank's part of one linear of the model, which holds its tensors by role."""

    def __init__(self, layer: Layer, choice: Choice):
        self.layer = layer
        self.choice = choice
        # Operand -> the parameter that holds it.
        self._parameters: dict[str, str] = {}

    def prepare(self, linear: nn.Module, device: torch.device) -> None:
        """Replace the tensors as on disk by the backend's operands, made on ``device`` and kept where they are."""
        if self._parameters:
            return
        home = linear.get_parameter(WEIGHT).device
        tensors = {role: getattr(linear, role).data.to(device) for role in self.layer.tensors}
        for role in tensors:
            delattr(linear, role)
        operands = self.choice.backend.prepare(self.layer, tensors)
        self._parameters = {name: name for name in operands}
        if WEIGHT not in operands:
            # Servers ask every linear for its weight: LoRA, and the checks of fused kernels.
            self._parameters[next(iter(operands))] = WEIGHT
        for name, operand in operands.items():
            parameter = nn.Parameter(operand.to(home), requires_grad=False)
            linear.register_parameter(self._parameters[name], parameter)

    def operands(self, linear: nn.Module) -> dict[str, Tensor]:
        """Return operand -> tensor, as the backend made them."""
        return {name: getattr(linear, parameter) for name, parameter in self._parameters.items()}

    def multiply(self, linear: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return x [..., K] times the weight, plus the bias [N]."""
        assert x.is_floating_point(), x.dtype
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if bias is not None:
            bias = bias.to(x.dtype)
        product: Tensor = self.choice.matmul(self.layer, rows, self.operands(linear), bias)
        return product.reshape(*x.shape[:-1], -1)
