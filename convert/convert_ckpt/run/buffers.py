"""Byte buffers that one worker reuses."""

import mmap
from itertools import accumulate

import numpy as np

_LINE_NBYTES = 64


class Buffers:
    """Buffers by name, grown to the largest request; each begins a page."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def get(self, name: str, nbytes: int) -> np.ndarray:
        """Return ``nbytes`` bytes, uint8, holding whatever was there before."""
        if name not in self._buffers or self._buffers[name].nbytes < nbytes:
            space = np.empty(nbytes + mmap.PAGESIZE, np.uint8)
            self._buffers[name] = space[-space.ctypes.data % mmap.PAGESIZE :]
        return self._buffers[name][:nbytes]

    def get_parts(self, name: str, sizes: list[int]) -> list[np.ndarray]:
        """Return a part for each of ``sizes`` of one such buffer; each begins a cache line."""
        ends = list(accumulate(-(-nbytes // _LINE_NBYTES) * _LINE_NBYTES for nbytes in sizes))
        buffer = self.get(name, ends[-1])
        return [buffer[start : start + nbytes] for start, nbytes in zip([0, *ends], sizes, strict=False)]
