"""The order of the work: every byte read once in order, every weight encoded once, nothing waited for in vain."""

import ctypes
import mmap
import os
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from convert_ckpt.options import Options
from convert_ckpt.plan.plan import Plan, make_plan
from convert_ckpt.run.schedule import Slab, list_batches, list_slabs, scale_group
from convert_ckpt.source.component import open_component
from tests.checkpoints import convert, random_weight, save_checkpoint


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """FP8 of four shards: a large weight in the first, groups over three of them, a shard with no group."""
    monkeypatch.setattr("convert_ckpt.run.schedule.SLAB_NBYTES", 32 * 256 * 2)
    attention = "model.layers.{}.self_attn.{}_proj.weight"
    shards = [
        {
            "model.layers.0.mlp.down_proj.weight": random_weight(1024, 512),
            **{attention.format(i, "q"): random_weight(256, 256) for i in range(2)},
        },
        {attention.format(i, "k"): random_weight(256, 256) for i in range(2)},
        {attention.format(i, "v"): random_weight(256, 256) for i in range(2)},
        {"model.embed_tokens.weight": random_weight(300, 256)},
    ]
    source = open_component(save_checkpoint(tmp_path / "in", shards, {"architectures": ["LlamaForCausalLM"]}))
    return make_plan(source, Options(format="fp8"))


def positions(slabs: list[Slab], action: str) -> dict[str, list[int]]:
    """Return scale group -> where its slabs of that action stand."""
    found = defaultdict(list)
    for i, slab in enumerate(slabs):
        if slab.action == action:
            found[scale_group(slab.tensor) or ""].append(i)
    return found


@pytest.mark.parametrize("n_at_once", [1, 2, 4, 8])
def test_every_byte_is_read_in_order_and_every_weight_encoded_once(plan: Plan, n_at_once: int) -> None:
    slabs = list_slabs(plan, set(), set(), n_at_once)
    for tensor in plan.tensors:
        readings = {slab.action for slab in slabs if slab.tensor is tensor}
        for action in readings:
            parts = sorted((s.start, s.nbytes) for s in slabs if s.tensor is tensor and s.action == action)
            assert parts[0][0] == 0
            assert all(start + nbytes == next_start for (start, nbytes), (next_start, _) in pairwise(parts))
            assert sum(parts[-1]) == tensor.spec.nbytes
        assert readings == ({"scan", "encode"} if tensor.layer else {"copy"})
        spans = [set(slab.replaced) for slab in slabs if slab.tensor is tensor]
        assert set().union(*spans) == set(range(tensor.stored.offset, tensor.stored.offset + tensor.output_nbytes))
    for shard in {tensor.shard for tensor in plan.tensors}:
        turns = [slab.turn for slab in slabs if slab.tensor.shard == shard and slab.turn is not None]
        assert turns == list(range(len(turns)))


@pytest.mark.parametrize("n_at_once", [1, 2, 4, 8])
def test_a_group_is_encoded_after_its_last_scan(plan: Plan, n_at_once: int) -> None:
    slabs = list_slabs(plan, set(), set(), n_at_once)
    scans, encodes = positions(slabs, "scan"), positions(slabs, "encode")
    assert scans.keys() == encodes.keys()
    assert all(min(encodes[group]) > max(scans[group]) for group in scans)


def test_encoding_alternates_with_reading_on(plan: Plan) -> None:
    slabs = list_slabs(plan, set(), set(), 1)
    first_encode = next(i for i, slab in enumerate(slabs) if slab.action == "encode")
    rest = [slab.action == "encode" for slab in slabs[first_encode:]]
    assert rest[:9] == [True, True, False] * 3


def test_what_is_encoded_side_by_side_goes_to_different_files(plan: Plan) -> None:
    slabs = list_slabs(plan, set(), set(), 4)
    pairs = [pair for pair in pairwise(slabs) if [slab.action for slab in pair] == ["encode", "encode"]]
    assert any(one.outputs != other.outputs for one, other in pairs)


def test_a_batch_holds_one_slab_of_each_shard(plan: Plan) -> None:
    batches = list_batches(list_slabs(plan, set(), set(), 4), 2)
    assert {len(batch) for batch in batches} == {1, 2}
    for batch in batches:
        assert len({slab.tensor.shard for slab in batch}) == len(batch)
        assert len(batch) == 1 or all(slab.turn is not None for slab in batch)


def n_cached_pages(path: Path) -> int:
    """Return how many pages of the file the kernel holds (mincore)."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ, flags=mmap.MAP_PRIVATE) as mapped:
        data = np.frombuffer(mapped, np.uint8)
        cached = np.zeros(-(-len(data) // mmap.PAGESIZE), np.uint8)
        status = ctypes.CDLL(None).mincore(ctypes.c_void_p(data.ctypes.data), ctypes.c_size_t(len(data)), cached.ctypes)
        del data
    assert status == 0
    return int((cached & 1).sum())


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_what_is_written_replaces_as_much_in_the_page_cache(tmp_path: Path, weight_format: str) -> None:
    weights = {f"blocks.{i}.proj.weight": random_weight(4096, 1024) for i in range(4)}
    source = save_checkpoint(tmp_path / "in", [weights], {}) / "model.safetensors"
    with open(source, "rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if n_cached_pages(source):
            pytest.skip("a file system that lives in the page cache")
        file.read()
    n_cached = n_cached_pages(source)
    convert(source, tmp_path / "out", format=weight_format)
    n_written = (tmp_path / "out" / "model.safetensors").stat().st_size // mmap.PAGESIZE
    # Groups of pages at the ends stay.
    assert n_cached - 1.1 * n_written < n_cached_pages(source) < n_cached - 0.7 * n_written
