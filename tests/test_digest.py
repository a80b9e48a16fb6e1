"""Several streams hashed in one step have the digests that hashlib gives them one by one."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert_ckpt.kernels import sha256
from convert_ckpt.run import digest
from convert_ckpt.run.digest import Hasher, choose_hasher
from convert_ckpt.run.finish import FileHashing

LANES = Hasher((8,), 1, sha256.hash_lanes)
HASHERS = {"hashlib": Hasher((1,), 2), "lanes": LANES}
if sha256.has_sha_instructions():
    HASHERS["interleaved"] = Hasher((1, 2), 2, sha256.hash_interleaved)


def random_bytes(nbytes: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


@pytest.mark.parametrize("hasher", HASHERS.values(), ids=HASHERS)
@pytest.mark.parametrize("nbytes", [0, 1, 55, 56, 63, 64, 65, 119, 120, 128, 100_003])
def test_a_stream_of_any_length_is_padded_as_the_standard_has_it(hasher: Hasher, nbytes: int) -> None:
    data = random_bytes(nbytes, seed=nbytes)
    assert hasher.open(data.tobytes()).hexdigest() == hashlib.sha256(data).hexdigest()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(0, 300), min_size=1, max_size=11), min_size=1, max_size=6))
@pytest.mark.parametrize("hasher", HASHERS.values(), ids=HASHERS)
def test_pieces_of_any_lengths_add_up(hasher: Hasher, rounds: list[list[int]]) -> None:
    """rounds[i][j]: how many bytes stream j gets in step i, if any."""
    n_streams = max(len(lengths) for lengths in rounds)
    ours = [hasher.open(bytes(j)) for j in range(n_streams)]
    theirs = [hashlib.sha256(bytes(j)) for j in range(n_streams)]
    for i, lengths in enumerate(rounds):
        pieces = [random_bytes(nbytes, seed=100 * i + j) for j, nbytes in enumerate(lengths)]
        hasher.update(ours[: len(lengths)], pieces)
        for other, piece in zip(theirs, pieces, strict=False):
            other.update(piece)
        assert [stream.hexdigest() for stream in ours] == [other.hexdigest() for other in theirs]


@pytest.mark.parametrize("hasher", HASHERS.values(), ids=HASHERS)
def test_files_are_hashed_side_by_side(hasher: Hasher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convert_ckpt.run.finish._PIECE_NBYTES", 4096)
    lengths = [0, 1, 4095, 4096, 4097, 8192, 100_000, 50_001, 12_288, 3, 77_777]
    for i, nbytes in enumerate(lengths):
        (tmp_path / str(i)).write_bytes(random_bytes(nbytes, seed=i).tobytes())

    def hash_file(i: int) -> str:
        fd = os.open(tmp_path / str(i), os.O_RDONLY)
        try:
            return hashing.hash_file(fd)
        finally:
            os.close(fd)

    with FileHashing(hasher) as hashing, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(hash_file, range(len(lengths))))
    assert found == [hashlib.sha256((tmp_path / str(i)).read_bytes()).hexdigest() for i in range(len(lengths))]


def test_a_file_that_can_not_be_read_fails_by_itself(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "write-only", os.O_WRONLY | os.O_CREAT)
    with FileHashing(LANES) as hashing, pytest.raises(OSError, match="Bad file descriptor"):
        hashing.hash_file(fd)
    os.close(fd)


@pytest.mark.parametrize(
    ("features", "n_streams", "n_lanes"),
    [("+sha,+avx2", 1, 2), ("+avx2", 8, 8), ("+avx2", 4, 8), ("+avx2", 3, 1), ("", 8, 1), ("+sha2", 8, 1)],
)
def test_the_processor_and_the_number_of_streams_decide(
    features: str, n_streams: int, n_lanes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sha256, "processor", lambda: ("some", features))
    assert choose_hasher(n_streams).n_lanes == n_lanes


def test_the_constants_are_those_of_the_standard() -> None:
    assert sha256.INITIAL_STATE[0] == 0x6A09E667
    assert sha256._ROUND_CONSTANTS[0] == 0x428A2F98
    assert sha256._ROUND_CONSTANTS[-1] == 0xC67178F2
    assert digest.BLOCK_NBYTES == sha256.BLOCK_NBYTES
