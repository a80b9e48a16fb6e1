"""The hash of a file is BLAKE3 as its authors define it, however the file is cut into parts."""

import hashlib
from pathlib import Path

import pytest

from run_ckpt.storage import hashing
from run_ckpt.storage.hashing import add_file, describe_file, hash_path

# Of the bytes 0, 1, ... 250, 0, 1, ...: BLAKE3's own test_vectors.json, the first 32 bytes of "hash".
VECTORS = {
    0: "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    1: "2d3adedff11b61f14c886e35afa036736dcd87a74d27b5c1510225d0f592e213",
    1024: "42214739f095a406f3fc83deb889744ac00df831c10daa55189b5d121c855af7",
    102400: "bc3e3d41a1146b069abffad3c0d44860cf664390afce4d9661f7902e7943e085",
}


def write(path: Path, nbytes: int) -> Path:
    path.write_bytes(bytes(i % 251 for i in range(nbytes)))
    return path


@pytest.mark.parametrize("part_nbytes", [1000, 1024, 2**20])
@pytest.mark.parametrize("nbytes", VECTORS)
def test_a_file_has_the_hash_of_the_test_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nbytes: int, part_nbytes: int
) -> None:
    monkeypatch.setattr(hashing, "_READ_NBYTES", part_nbytes)
    path = write(tmp_path / "file", nbytes)
    parts: list[int] = []
    assert hash_path(path, parts.append) == VECTORS[nbytes]
    assert sum(parts) == nbytes
    assert describe_file(path) == {"nbytes": nbytes, "blake3": VECTORS[nbytes]}


def test_any_digest_takes_a_file(tmp_path: Path) -> None:
    path, digest = write(tmp_path / "file", 5000), hashlib.sha256()
    add_file(digest, path)
    assert digest.hexdigest() == hashlib.sha256(path.read_bytes()).hexdigest()
