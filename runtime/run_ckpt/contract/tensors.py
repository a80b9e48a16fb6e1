"""A tensor without its bytes, in safetensors' words."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache

# Bits per element. The order is that of the `Dtype` enum in tensor.rs: a file lists its tensors
# from the last of these to the first (by falling alignment), then by name.
DTYPE_BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    "U8": 8,
    "I8": 8,
    "F8_E5M2": 8,
    "F8_E4M3": 8,
    "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8,
    "I16": 16,
    "U16": 16,
    "F16": 16,
    "BF16": 16,
    "I32": 32,
    "U32": 32,
    "F32": 32,
    "C64": 64,
    "F64": 64,
    "I64": 64,
    "U64": 64,
}
# The entry of a header that is no tensor.
METADATA_KEY = "__metadata__"
# The ``__metadata__`` of a file that holds torch tensors.
PT_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor without its bytes. ``shape`` is in elements of ``dtype`` (a safetensors name)."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BITS[self.dtype] // 8


def one_shape(sizes: Iterable[int]) -> tuple[int, ...]:
    """Return a shape, the same object for equal ones: there may be very many tensors, of few shapes."""
    return _one_shape(*sizes)


@lru_cache(1024)
def _one_shape(*sizes: int) -> tuple[int, ...]:
    return sizes
