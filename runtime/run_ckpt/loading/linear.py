"""The quantized linear layer: tensors as on disk at first, then the operands of a backend."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from run_ckpt.backends.backend import Tensors, describe_device
from run_ckpt.backends.choose import choose_backend, find_backend
from run_ckpt.contract.errors import BackendError
from run_ckpt.contract.manifest import Layer
from run_ckpt.loading.placeholder import WeightPlaceholder
from run_ckpt.storage.rows import STORED_DTYPES

_OPERAND = "operand_"


# Why this class reaches into nn.Module's own ``_buffers`` and ``_modules``.
#
# A layer holds one of two sets of tensors: those on disk, or the operands that a backend made of them (shuffled,
# padded, in another FP8 variant). state_dict must show the first set at all times, in the names, dtypes and bytes of
# the file: save_pretrained writes what it returns and must write a checkpoint that every consumer still reads;
# from_pretrained matches names and dtypes with the file before a byte is read; sharding and offloading tools move
# tensors by these names. nn.Module has no way to swap a set of buffers, so ``_forget`` empties the tables and
# ``store`` or ``prepare`` fills them again. ``_modules`` is among them since a name on disk may have a dot
# (amd-quark's ``weight_quantizer.scale``) and then lies in a nested module. Operands are not persistent, so that the
# default state_dict leaves them out, and ``_save_to_state_dict`` adds the tensors as on disk in their stead.


class QuantizedLinear(nn.Linear):
    """x [..., K] -> x @ weight.T + bias [..., N] in x's dtype, by a backend.

    Made on the meta device. The weight and its scales are buffers, named as on disk, until ``prepare``
    hands them to a backend; that happens in the first forward at the latest, and anew in the first
    forward on another kind of device. state_dict always holds the tensors as on disk, bit for bit,
    and casts (``.to(torch.float16)``) reach the bias alone.

    It is an nn.Linear so that a LoRA can be put beside it: peft and diffusers look for that class. They and
    T5 ask ``weight`` for its dtype, which must not be that of a code: it is a WeightPlaceholder.

    layer: what is stored. bias: the parameter of the replaced layer. backend: the name of one, or
    None for the first in the table that runs. activations: one of backend.ACTIVATIONS, or None for the backend's own.
    dtype: of the weight that it stands for; casts change it.
    """

    bias: nn.Parameter | None  # type: ignore[assignment]
    backend: str | None = None
    activations: str | None = None
    prepared_for: str | None = None
    _matmul: Callable[[Layer, Tensor, Tensors, Tensor | None], Tensor]
    _has_gradient: bool

    def __init__(
        self,
        layer: Layer,
        bias: nn.Parameter | None = None,
        backend: str | None = None,
        dtype: torch.dtype = torch.bfloat16,
        activations: str | None = None,
    ):
        nn.Module.__init__(self)  # nn.Linear's own would make the weight
        self.layer = layer
        self.in_features, self.out_features = layer.K, layer.N
        self.dtype = dtype
        self.register_parameter("bias", bias)
        self.asked = (backend, activations)
        self.store(
            {
                role: torch.empty(spec.shape, dtype=STORED_DTYPES[spec.dtype], device="meta")
                for role, spec in layer.specs().items()
            }
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """A placeholder [N, K]; or the codes as long as they are on meta, to be filled by a library's loader."""
        codes = self._buffers.get("weight")
        if codes is not None and codes.is_meta:
            return codes
        return WeightPlaceholder.make(self.layer.N, self.layer.K, self.dtype, next(self.buffers()).device)

    def forward(self, x: Tensor) -> Tensor:
        if self.prepared_for != x.device.type:
            self.prepare(x.device)
        if x.requires_grad and torch.is_grad_enabled() and not self._has_gradient:
            raise BackendError(
                f"{self.layer.module}: backend {self.backend} gives no gradient to train with by {self.activations}"
                ' activations. Load the checkpoint with backend="reference" or "dequantize", and activations="bf16".'
            )
        flat = x.reshape(-1, self.layer.K).contiguous()
        product = self._matmul(self.layer, flat, self._operands(), self.bias)
        return product.reshape(*x.shape[:-1], self.layer.N)

    def prepare(self, device: torch.device) -> None:
        """Choose a backend for ``device``, where the tensors must lie already, and hand them over.

        Raises BackendError where no backend takes them, or where one used them up for another device.
        """
        tensors = self.stored()
        choice = choose_backend(self.layer, describe_device(device), *self.asked)
        operands = choice.backend.prepare(self.layer, tensors)
        del tensors
        self._forget()
        for name, operand in operands.items():
            self.register_buffer(_OPERAND + name, operand, persistent=False)
        self._matmul, self._has_gradient = choice.matmul, choice.has_gradient
        self.activations = choice.rounded_to or choice.backend.activations(self.layer)
        self.backend, self.prepared_for = choice.backend.name, device.type

    def stored(self) -> Tensors:
        """Return role -> tensor as on disk. Raises BackendError where the backend has used them up."""
        if self.backend is None:
            buffers = dict(self.named_buffers())
            return {role: buffers[suffix] for role, suffix in self._suffixes().items()}
        restore = find_backend(self.backend).restore
        if restore is None:
            raise BackendError(
                f"{self.layer.module}: backend {self.backend} keeps no copy of the tensors as they were stored."
                " Load the checkpoint anew for this device; to save it, copy its folder."
            )
        return restore(self.layer, self._operands())

    def store(self, tensors: Tensors) -> None:
        """Take role -> tensor as on disk, to be prepared later."""
        self._forget()
        for role, suffix in self._suffixes().items():
            path, _, leaf = suffix.rpartition(".")
            if path:
                self.add_module(path, nn.Module())
            # register_buffer would take the property for another attribute called weight.
            self.get_submodule(path)._buffers[leaf] = tensors[role]

    def extra_repr(self) -> str:
        sizes = f"in_features={self.layer.K}, out_features={self.layer.N}, bias={self.bias is not None}"
        scheme = f"{self.layer.format}, layout={self.layer.scheme.layout}"
        return f"{sizes}, {scheme}, backend={self.backend}, activations={self.activations}"

    def _suffixes(self) -> dict[str, str]:
        """Role -> name within this module, as on disk."""
        return {role: name.removeprefix(f"{self.layer.module}.") for role, name in self.layer.tensors.items()}

    def _operands(self) -> Tensors:
        return {name.removeprefix(_OPERAND): buffer for name, buffer in self._buffers.items() if buffer is not None}

    def _forget(self) -> None:
        """Drop either set of tensors; the bias is a parameter and stays."""
        self._buffers.clear()
        self._modules.clear()
        if self.backend is not None:
            self.backend = self.activations = self.prepared_for = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "QuantizedLinear":
        """Move codes and scales with the layer; as bytes, so that no cast reaches them.

        nn.Module's own would cast every floating tensor, float8 codes and float32 scales included.
        """
        for owner in self.modules():
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = fn(buffer.view(torch.uint8)).view(buffer.dtype)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=next(self.buffers()).device)).dtype
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Add the bias, and the tensors as on disk, restored from the operands where a backend has them."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.backend is not None:
            for role, tensor in self.stored().items():
                destination[prefix + self._suffixes()[role]] = tensor

    def _load_from_state_dict(self, *args: Any) -> None:
        """Take tensors as on disk: first go back to them, as they are copied into buffers of their name."""
        if self.backend is not None:
            self.store(self.stored())
        super()._load_from_state_dict(*args)
