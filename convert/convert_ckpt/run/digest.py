"""SHA-256 of files whose bytes pass by in pieces; of several files in one step where the processor gains by it."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

BLOCK_NBYTES = hashlib.sha256().block_size
# With fewer streams in a vector's lanes hashlib is faster.
_FEWEST_IN_LANES = 4


class Digest(Protocol):
    """What hashlib.sha256() returns, as far as it is used here."""

    def hexdigest(self) -> str: ...


@dataclass(frozen=True)
class Hasher:
    """How to hash on this processor: up to widths[-1] streams in one call, and ``n_chains`` such calls side by side.

    make_kernel: of convert_ckpt.kernels.sha256, for any of ``widths``; None for hashlib, one stream after the other.
    """

    widths: tuple[int, ...]
    n_chains: int
    make_kernel: Callable[[int], Callable[..., None]] | None = None

    @property
    def n_lanes(self) -> int:
        """How many streams one call hashes best."""
        return self.widths[-1]

    def open(self, data: bytes = b"") -> Digest:
        """Return a digest that holds ``data``."""
        if self.make_kernel is None:
            return hashlib.sha256(data)
        digest = _LaneDigest(self)
        self.update([digest], [np.frombuffer(data, np.uint8)])
        return digest

    def update(self, digests: Sequence[Any], pieces: Sequence[np.ndarray]) -> None:
        """Add pieces[i], uint8 and contiguous, to digests[i]; all digests come from open() and differ."""
        if self.make_kernel is None:
            for digest, piece in zip(digests, pieces, strict=True):
                digest.update(piece.data)
            return
        spans = [(digest, digest.cut(piece)) for digest, piece in zip(digests, pieces, strict=True)]
        while waiting := [(digest, blocks) for digest, blocks in spans if blocks]:
            lanes = waiting[: self.n_lanes]
            nbytes = min(len(blocks[0]) for _, blocks in lanes)
            self.add_blocks([digest.state for digest, _ in lanes], [blocks[0][:nbytes] for _, blocks in lanes])
            for _, blocks in lanes:
                rest = blocks.pop(0)[nbytes:]
                if len(rest):
                    blocks.insert(0, rest)

    def add_blocks(self, states: list[np.ndarray], blocks: list[np.ndarray]) -> None:
        """Advance each state, uint32 [8], by whole blocks, as many for all."""
        assert self.make_kernel
        n_streams = next(width for width in self.widths if width >= len(states))
        n_spare = n_streams - len(states)
        states = [*states, *(np.zeros(8, np.uint32) for _ in range(n_spare))]
        blocks = [*blocks, *blocks[:1] * n_spare]
        addresses = np.array([array.ctypes.data for array in (*states, *blocks)], np.uint64)
        self.make_kernel(n_streams)(addresses.ctypes.data, len(blocks[0]) // BLOCK_NBYTES)


def choose_hasher(n_streams: int) -> Hasher:
    """Return the fastest way to hash about ``n_streams`` streams."""
    from convert_ckpt.kernels import sha256

    if sha256.has_sha_instructions():
        return Hasher((1, 2), 2, sha256.hash_interleaved)
    if sha256.has_wide_vectors() and n_streams >= _FEWEST_IN_LANES:
        return Hasher((8,), 1, sha256.hash_lanes)
    return Hasher((1,), 2)


class _LaneDigest:
    """One stream: its state after all whole blocks, and the bytes that begin the next."""

    def __init__(self, hasher: Hasher) -> None:
        from convert_ckpt.kernels.sha256 import INITIAL_STATE

        self._hasher = hasher
        self.state = np.array(INITIAL_STATE, np.uint32)
        self._rest = b""
        self._nbytes = 0

    def cut(self, piece: np.ndarray) -> list[np.ndarray]:
        """Return what is to be hashed now, in runs of whole blocks; keep the rest for later."""
        self._nbytes += len(piece)
        blocks = []
        if self._rest:
            missing = BLOCK_NBYTES - len(self._rest)
            self._rest += piece[:missing].tobytes()
            piece = piece[missing:]
            if len(self._rest) < BLOCK_NBYTES:
                return []
            blocks.append(np.frombuffer(self._rest, np.uint8))
        n_whole = len(piece) // BLOCK_NBYTES * BLOCK_NBYTES
        if n_whole:
            blocks.append(piece[:n_whole])
        self._rest = piece[n_whole:].tobytes()
        return blocks

    def hexdigest(self) -> str:
        """Pad a copy (FIPS 180-4, 5.1.1) and return its state."""
        n_zeros = -(len(self._rest) + 9) % BLOCK_NBYTES
        end = self._rest + b"\x80" + bytes(n_zeros) + (8 * self._nbytes).to_bytes(8, "big")
        state = self.state.copy()
        self._hasher.add_blocks([state], [np.frombuffer(end, np.uint8)])
        return state.astype(">u4").tobytes().hex()
