"""SGLang's linear method over our backends: what is on disk becomes operands once, then products."""

from typing import Any

from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
from sglang.multimodal_gen.runtime.layers.linear import LinearMethodBase
from torch import Tensor, nn

from run_ckpt.backends.backend import Backend
from run_ckpt.contract.manifest import WEIGHT, Layer


class QuantizedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """``layer`` is this rank's part of one linear of the model, which holds its tensors by role."""

    def __init__(self, layer: Layer, backend: Backend):
        self.layer = layer
        self.backend = backend
        # Operand -> the parameter that holds it.
        self._parameters: dict[str, str] = {}

    def create_weights(self, *args: Any, **options: Any) -> None:
        raise AssertionError("bind.py makes the parameters")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Replace the tensors as on disk by the backend's operands, on the device where they are."""
        if self._parameters:
            return
        home, device = layer.get_parameter(WEIGHT).device, get_local_torch_device()
        tensors = {role: getattr(layer, role).data.to(device) for role in self.layer.tensors}
        for role in tensors:
            delattr(layer, role)
        operands = self.backend.prepare(self.layer, tensors)
        self._parameters = {name: name for name in operands}
        if WEIGHT not in operands:
            # SGLang asks every linear for its weight: LoRA, and the checks of its fused kernels.
            self._parameters[next(iter(operands))] = WEIGHT
        for name, operand in operands.items():
            parameter = nn.Parameter(operand.to(home), requires_grad=False)
            layer.register_parameter(self._parameters[name], parameter)

    def operands(self, layer: nn.Module) -> dict[str, Tensor]:
        return {name: getattr(layer, parameter) for name, parameter in self._parameters.items()}

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        assert x.is_floating_point(), x.dtype
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        if bias is not None:
            bias = bias.to(x.dtype)
        product: Tensor = self.backend.matmul(self.layer, rows, self.operands(layer), bias)
        return product.reshape(*x.shape[:-1], -1)
