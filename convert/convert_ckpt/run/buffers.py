"""Byte buffers that one worker reuses."""

import mmap

import numpy as np


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
