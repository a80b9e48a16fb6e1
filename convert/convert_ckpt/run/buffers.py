"""Byte buffers that one worker reuses, placed so that the kernel copies to and from files at full speed.

Some processors (AMD Zen 3) copy at a fifth of their speed to an address that lies, within its page, up to 63 bytes
behind the one copied from.
"""

import numpy as np

_PAGE_NBYTES = 4096
_LINE_NBYTES = 64


class Scratch:
    """Buffers by name, grown to the largest request; each begins a cache line."""

    def __init__(self) -> None:
        self._buffers: dict[str, np.ndarray] = {}

    def take(self, name: str, nbytes: int) -> np.ndarray:
        """Return ``nbytes`` bytes, uint8, holding whatever was there before."""
        return self._take(name, nbytes, 0)

    def take_to_read(self, name: str, nbytes: int, file_offset: int) -> np.ndarray:
        """The same, to be filled from a file."""
        return self._take(name, nbytes, file_offset // _LINE_NBYTES)

    def take_to_write(self, name: str, nbytes: int, file_offset: int) -> np.ndarray:
        """The same, to be written to a file."""
        return self._take(name, nbytes, -(-file_offset // _LINE_NBYTES))

    def _take(self, name: str, nbytes: int, line: int) -> np.ndarray:
        if name not in self._buffers or self._buffers[name].nbytes < nbytes + _PAGE_NBYTES:
            self._buffers[name] = np.empty(nbytes + _PAGE_NBYTES, np.uint8)
        buffer = self._buffers[name]
        start = (line * _LINE_NBYTES - buffer.ctypes.data) % _PAGE_NBYTES
        return buffer[start : start + nbytes]
