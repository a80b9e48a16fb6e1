"""How a decoder reads the tensors of its layer."""

from typing import Protocol

import numpy as np


class ReadPart(Protocol):
    """Reads the tensors of a layer."""

    def __call__(self, role: str, start: int, count: int, /, n_rows: int | None = None) -> np.ndarray:
        """Return rows start.. of the tensor that plays a role, [count, ...] as as_stored() does.

        n_rows: of how many it is, where not of as many as its first dimension says.
        """


def as_stored(data: np.ndarray, dtype: str) -> np.ndarray:
    """Return scales, uint8 as they lie in a file, as bytes where they are codes, else as float32."""
    if dtype == "BF16":
        return (data.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    if dtype == "F16":
        return data.view(np.float16).astype(np.float32)
    return data.view(np.float32) if dtype == "F32" else data
