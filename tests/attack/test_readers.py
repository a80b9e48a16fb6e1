"""Readers of files that others prepared: whatever the bytes, what is raised is an error of ours (see fuzz.py)."""

import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.attack.readers import READERS, feed

SEEDS = {
    name: [path.read_bytes() for path in sorted((Path(__file__).parent / "seeds" / name).iterdir())] for name in READERS
}
CUTS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)


def mutate(data: bytes, cuts: list[tuple[float, int, bytes]]) -> bytes:
    """Return ``data`` with some bytes replaced by others, at places given as shares of it."""
    for place, count, new in cuts:
        start = int(place * len(data))
        data = data[:start] + new + data[start + count :]
    return data


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_mutated_files_are_read_or_refused(reader: str, data: st.DataObject) -> None:
    seed = data.draw(st.sampled_from(SEEDS[reader]))
    feed(reader, mutate(seed, data.draw(CUTS)))


@pytest.mark.parametrize("reader", READERS)
@settings(max_examples=30, deadline=None)
@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(reader: str, data: bytes) -> None:
    feed(reader, data)


@pytest.mark.parametrize("reader", READERS)
def test_seeds_are_read_or_refused_soon(reader: str) -> None:
    """Some reach what others don't, some were findings of fuzz.py."""
    for seed in SEEDS[reader]:
        before = time.process_time()
        feed(reader, seed)
        assert time.process_time() - before < 5  # of a second's work, on a busy machine
