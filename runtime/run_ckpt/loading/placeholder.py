"""What a quantized layer shows as its weight: shape, dtype and device, but no numbers and no memory."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from run_ckpt.contract.errors import UsageError

# Beside the getters of attributes (dtype, device, shape, data, ...). None of them reads an element.
_HARMLESS = {"size", "dim", "numel", "stride", "element_size", "is_contiguous", "is_floating_point", "is_complex"}


class WeightPlaceholder(Tensor):
    """An [N, K] tensor that can be asked what it is, by peft, diffusers and transformers, but not be used.

    Raises UsageError where its numbers are wanted or changed: a LoRA that is fused, DoRA's norms, concatenated
    projections.
    """

    # transformers initializes the weights that it did not load.
    _is_hf_initialized = True

    @classmethod
    def make(cls, N: int, K: int, dtype: torch.dtype, device: torch.device) -> "WeightPlaceholder":
        return torch.empty((), dtype=dtype, device=device).expand(N, K).as_subclass(cls)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func.__name__ == "__get__" or func.__name__ in _HARMLESS:
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        raise UsageError(
            f"{func.__name__}: the weight of a QuantizedLinear is codes, with no numbers to read or to change."
            " Keep a LoRA beside it: don't fuse or merge it, don't use DoRA, and don't fuse projections. Or convert"
            " the checkpoint back with run-ckpt dequantize, and fuse it there."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"WeightPlaceholder({list(self.shape)}, dtype={self.dtype}, device={self.device})"
