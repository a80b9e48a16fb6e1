"""NaN and infinity in a source: which element of which tensor is the first, and how many there are."""

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from convert_ckpt.plan.plan import TensorPlan
from convert_ckpt.run.schedule import Slab
from convert_ckpt.run.slab import is_finite, largest_magnitude, to_float, weight_bits
from run_ckpt.contract.tensors import DTYPE_BITS

# The kernel that looks for the largest magnitude takes so many elements at a time.
_STEP = 16
# Elements that numpy looks through in less time than it takes to call the kernel.
_FEW = 1024
_FLOATS = ("BF16", "F16", "F32")


@dataclass(frozen=True)
class _Found:
    """What a tensor holds: ``first`` is the flat index of the first element, ``value`` what it is."""

    tensor: TensorPlan
    first: int
    value: float
    count: int

    def __str__(self) -> str:
        shape = self.tensor.spec.shape
        place = [int(i) for i in np.unravel_index(self.first, shape)] if shape else []
        more = f", the first of {self.count:,}" if self.count > 1 else ""
        return f"{self.tensor.shard}: {self.tensor.spec.name}{place} is {self.value}{more}"


class NonFiniteElements:
    """Those that were met so far, from any thread. ``is_refused``: in a weight that is to be quantized."""

    def __init__(self) -> None:
        self.is_refused = False
        self._lock = threading.Lock()
        self._found: dict[str, _Found] = {}

    def look_at_copy(self, slab: Slab, raw: np.ndarray) -> None:
        """Look at the bytes of tensors that are only copied."""
        if slab.tensor.spec.dtype not in _FLOATS or not slab.nbytes:
            return
        bits = weight_bits(raw, slab.tensor.spec.dtype, 1)
        whole = len(bits) // _STEP * _STEP if len(bits) > _FEW else 0
        largest = largest_magnitude(bits[:whole].reshape(1, -1)) if whole else 0
        if is_finite(largest) and np.isfinite(to_float(bits[whole:])).all():
            return
        for part, data in slab.separate(raw):
            bits = weight_bits(data, part.tensor.spec.dtype, 1)
            if not np.isfinite(to_float(bits)).all():
                self.add(part, bits)

    def add(self, slab: Slab, bits: np.ndarray) -> None:
        """Note what a slab holds; bits as from weight_bits."""
        bad = ~np.isfinite(to_float(bits).reshape(-1))
        index = int(np.argmax(bad))
        spec = slab.tensor.spec
        row = math.prod(spec.shape[1:])
        start = slab.row * row if slab.tensor.encoded else slab.start * 8 // DTYPE_BITS[spec.dtype]
        value = float(to_float(bits).reshape(-1)[index])
        found = _Found(slab.tensor, start + index, value, int(bad.sum()))
        with self._lock:
            self.is_refused |= slab.tensor.layer is not None
            known = self._found.get(slab.tensor.spec.name, replace(found, count=0))
            first = min(known, found, key=lambda part: part.first)
            self._found[slab.tensor.spec.name] = replace(first, count=known.count + found.count)

    def refusal(self) -> str | None:
        """Return what is wrong with the weights that are to be quantized, and what to do."""
        found = [part for part in self._sorted() if part.tensor.layer]
        if not found:
            return None
        kept = " ".join(f"--ignore {part.tensor.layer.module}" for part in found if part.tensor.layer)
        if len(found) == 1:
            return f"{found[0]}: no code stands for it. Repair the source, or keep this layer: {kept}"
        lines = "".join(f"\n  - {part}" for part in found)
        return f"NaN and infinity, for which no code stands. Repair the source, or keep these layers: {kept}{lines}"

    def notes(self) -> Iterator[str]:
        """Yield a line for each tensor that was copied with them."""
        for part in self._sorted():
            if part.tensor.layer is None:
                yield f"note: {part}; copied as it is"

    def _sorted(self) -> list[_Found]:
        return sorted(self._found.values(), key=lambda part: (part.tensor.shard, part.tensor.view.offset))
