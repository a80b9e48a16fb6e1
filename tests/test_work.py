"""The order of the work: every byte read once in order, every weight encoded once, nothing waited for in vain."""

import os
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from convert_ckpt.options import Options
from convert_ckpt.plan.make_plan import make_plan
from convert_ckpt.plan.plan import Plan
from convert_ckpt.run.schedule import Slab, list_slabs, list_turns, scale_group
from convert_ckpt.source.component import open_component
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.storage.reader import read_parts
from tests.checkpoints import random_weight, save_checkpoint


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


def test_every_byte_is_read_in_order_and_every_weight_encoded_once(plan: Plan) -> None:
    slabs = list_slabs(plan, set())
    for tensor in plan.tensors:
        readings = {slab.action for slab in slabs if slab.tensor is tensor}
        for action in readings:
            parts = sorted((s.start, s.nbytes) for s in slabs if s.tensor is tensor and s.action == action)
            assert parts[0][0] == 0
            assert all(start + nbytes == next_start for (start, nbytes), (next_start, _) in pairwise(parts))
            assert sum(parts[-1]) == tensor.spec.nbytes
        assert readings == ({"scan", "encode"} if tensor.layer else {"copy"})
    for shard in {tensor.shard for tensor in plan.tensors}:
        hashed = [slab for slab in slabs if slab.tensor.shard == shard and slab.hash_order is not None]
        assert [slab.hash_order for slab in hashed] == list(range(len(hashed)))
        assert [slab.offset for slab in hashed] == sorted(slab.offset for slab in hashed)


def test_a_group_is_encoded_after_its_last_scan(plan: Plan) -> None:
    slabs = list_slabs(plan, set())
    scans, encodes = positions(slabs, "scan"), positions(slabs, "encode")
    assert scans.keys() == encodes.keys()
    assert all(min(encodes[group]) > max(scans[group]) for group in scans)


def test_encoding_alternates_with_reading_on(plan: Plan) -> None:
    slabs = list_slabs(plan, set())
    first_encode = next(i for i, slab in enumerate(slabs) if slab.action == "encode")
    rest = [slab.action == "encode" for slab in slabs[first_encode:]]
    assert rest[:9] == [True, True, False] * 3


def test_a_shard_begins_when_all_of_the_one_before_is_read(plan: Plan) -> None:
    first_readings = [slab.tensor.shard for slab in list_slabs(plan, set()) if slab.hash_order is not None]
    assert first_readings == sorted(first_readings)


def test_no_turn_reads_several_shards(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    slabs = list_slabs(plan, set())
    monkeypatch.setattr("convert_ckpt.run.schedule.SLAB_NBYTES", 2**30)
    turns = list_turns(slabs)
    assert max(len(turn) for turn in turns) > 4
    assert all(len({slab.shards for slab in turn}) == 1 for turn in turns)


def test_turns_keep_the_order_and_take_small_slabs_together(plan: Plan) -> None:
    empty = replace(list_slabs(plan, set())[0], nbytes=0)
    slabs = [*[empty] * 200, *list_slabs(plan, set())]
    turns = list_turns(slabs)
    assert [slab for turn in turns for slab in turn] == slabs
    assert [len(turn) for turn in turns[:2]] == [128, 73]  # the 72 that are left, and one of 16 KiB
    assert all(len(turn) == 1 for turn in turns[2:])


def test_small_tensors_that_lie_behind_each_other_here_and_there_are_one_slab(tmp_path: Path) -> None:
    weight, norms = "model.layers.0.mlp.down_proj.weight", [f"model.{part}_{i}" for part in "an" for i in range(20)]
    tensors = {name: torch.ones(4, dtype=torch.bfloat16) for name in norms}
    tensors |= {weight: random_weight(256, 256), "model.a_2": torch.ones(4)}
    source = open_component(save_checkpoint(tmp_path / "in", [tensors], {"architectures": ["LlamaForCausalLM"]}))
    slabs = list_slabs(make_plan(source, Options(format="fp8")), set())
    assert [(slab.action, slab.tensor.spec.name, len(slab.others)) for slab in slabs] == [
        ("copy", "model.a_2", 0),  # of another dtype
        ("copy", "model.a_0", 18),
        ("quantize", weight, 0),
        ("copy", "model.n_0", 19),
    ]


def test_parts_of_a_file_are_read_one_after_the_other_however_little_a_call_gives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(bytes(range(20)))
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, offset: preadv(fd, [views[0][:3]], offset))
    parts = [bytearray(5), bytearray(0), bytearray(7)]
    with open(tmp_path / "file", "rb") as file:
        read_parts(file.fileno(), [memoryview(part) for part in parts], 4, "file")
        assert b"".join(parts) == bytes(range(4, 16))
        with pytest.raises(CheckpointError, match="file: ended at byte 20"):
            read_parts(file.fileno(), [memoryview(bytearray(9))], 12, "file")
