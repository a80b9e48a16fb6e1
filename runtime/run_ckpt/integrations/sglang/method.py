"""SGLang's linear method over our backends, and a linear for where SGLang builds a plain one."""

from typing import Any

from sglang.multimodal_gen.runtime.distributed import get_local_torch_device
from sglang.multimodal_gen.runtime.layers.linear import LinearBase, LinearMethodBase
from torch import Tensor, nn

from run_ckpt.integrations.serving.method import BackendProduct


class QuantizedLinearMethod(BackendProduct, LinearMethodBase):  # type: ignore[misc]
    """Made by bind.py, which gives the linear its parameters too."""

    def create_weights(self, *args: Any, **options: Any) -> None:
        raise AssertionError("bind.py makes the parameters")

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        self.prepare(layer, get_local_torch_device())

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.multiply(layer, x, bias)


class PlainLinear(LinearBase):  # type: ignore[misc]
    """In place of an nn.Linear: whole on each rank, and called for the product alone.

    It is a LinearBase, as SGLang asks only those for process_weights_after_loading.
    """

    def __init__(self, replaced: nn.Linear):
        super().__init__(replaced.in_features, replaced.out_features)
        self.register_parameter("bias", replaced.bias)

    def forward(self, x: Tensor) -> Tensor:
        product: Tensor = self.quant_method.apply(self, x, self.bias)
        return product
