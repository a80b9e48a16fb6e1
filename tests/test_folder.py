"""A checkpoint folder is read whole or refused with every fault at once."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.file_names import unsafe_file_name
from run_ckpt.storage.shards import TensorFolder, read_folder

INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
UNSAFE_NAMES = {
    "parent": "../x.safetensors",
    "absolute": "/etc/x.safetensors",
    "subfolder": "sub/x.safetensors",
    "dot-slash": "./x.safetensors",
    "trailing-slash": "x.safetensors/",
    "backslash": "..\\x.safetensors",
    "drive": "C:x.safetensors",
    "drive-root": "C:\\x.safetensors",
    "network": "\\\\host\\share\\x.safetensors",
    "nul": "x\0.safetensors",
    "empty": "",
    "dot": ".",
    "dot-dot": "..",
}


def write_shard(folder: Path, file_name: str, *tensors: str) -> None:
    save_file({name: torch.ones(4) for name in tensors}, folder / file_name)


def write_index(folder: Path, weight_map: object, file_name: str = INDEX) -> None:
    (folder / file_name).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards and their index: a and b in the first, c in the second."""
    write_shard(tmp_path, FIRST, "a", "b")
    write_shard(tmp_path, SECOND, "c")
    write_index(tmp_path, {"a": FIRST, "b": FIRST, "c": SECOND})
    return tmp_path


def faults(folder: Path) -> tuple[str, ...]:
    with pytest.raises(FaultsError) as caught:
        read_folder(folder)
    return caught.value.faults


def the_problem(folder: Path) -> str:
    found = faults(folder)
    assert len(found) == 1, found
    return found[0]


def tensors_by_shard(folder: TensorFolder) -> dict[str, list[str]]:
    return {shard.name: [tensor.spec.name for tensor in shard.header.tensors] for shard in folder.shards}


def test_sharded_checkpoint_is_read_by_its_index(sharded: Path) -> None:
    folder = read_folder(sharded)
    assert tensors_by_shard(folder) == {FIRST: ["a", "b"], SECOND: ["c"]}
    assert (folder.index_name, folder.notes) == (INDEX, ())


def test_tensors_come_shard_by_shard(sharded: Path) -> None:
    found = [(shard.name, tensor.spec.name) for shard, tensor in read_folder(sharded).tensors()]
    assert found == [(FIRST, "a"), (FIRST, "b"), (SECOND, "c")]


def test_single_file_in_a_folder_needs_no_index(tmp_path: Path) -> None:
    write_shard(tmp_path, "model.safetensors", "a")
    folder = read_folder(tmp_path)
    assert (tensors_by_shard(folder), folder.index_name) == ({"model.safetensors": ["a"]}, None)


def test_a_file_given_by_name_is_read_alone(sharded: Path) -> None:
    folder = read_folder(sharded / SECOND)
    assert (tensors_by_shard(folder), folder.index_name, folder.root) == ({SECOND: ["c"]}, None, sharded)


def test_numbered_shards_without_an_index_are_all_read(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert tensors_by_shard(read_folder(sharded)) == {FIRST: ["a", "b"], SECOND: ["c"]}


@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_plain_file_is_preferred_to_its_variants(tmp_path: Path, stem: str) -> None:
    write_shard(tmp_path, f"{stem}.safetensors", "a")
    write_shard(tmp_path, f"{stem}.fp16.safetensors", "a")
    folder = read_folder(tmp_path)
    assert list(tensors_by_shard(folder)) == [f"{stem}.safetensors"]
    assert folder.notes == (f"{stem}.fp16.safetensors: left out, {stem}.safetensors is there",)


def test_usual_index_is_preferred_to_that_of_a_variant(sharded: Path) -> None:
    write_index(sharded, {"a": "other.safetensors"}, "model.fp16.safetensors.index.json")
    assert read_folder(sharded).index_name == INDEX


def test_file_that_the_index_does_not_list_is_left_out_and_noted(sharded: Path) -> None:
    write_shard(sharded, "extra.safetensors", "a")
    folder = read_folder(sharded)
    assert list(tensors_by_shard(folder)) == [FIRST, SECOND]
    assert folder.notes == (f"extra.safetensors: left out, {INDEX} does not list it",)


def test_missing_shard_is_named(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    assert the_problem(sharded).startswith(f"{SECOND}: missing")


def test_folder_in_place_of_a_shard_counts_as_missing(sharded: Path) -> None:
    (sharded / SECOND).unlink()
    (sharded / SECOND).mkdir()
    assert the_problem(sharded).startswith(f"{SECOND}: missing")


def test_truncated_shard_is_named(sharded: Path) -> None:
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(content[:-1])
    assert the_problem(sharded).startswith(f"{SECOND}: truncated")


def test_tensor_in_two_shards_is_named_with_both(tmp_path: Path) -> None:
    write_shard(tmp_path, FIRST, "a", "b")
    write_shard(tmp_path, SECOND, "b", "c")
    assert the_problem(tmp_path).startswith(f"b: stored in {FIRST} and {SECOND}.")


def test_tensor_that_the_index_leaves_out_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "c": SECOND})
    assert the_problem(sharded) == f"b: in {FIRST} but not in the index."


def test_tensor_that_no_shard_holds_is_named(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": SECOND})
    assert the_problem(sharded) == f"d: the index says {SECOND}, but that shard does not hold it."


def test_tensor_in_another_shard_than_the_index_says_is_named_with_both(sharded: Path) -> None:
    write_index(sharded, {"a": FIRST, "b": SECOND, "c": SECOND})
    assert the_problem(sharded) == f"b: the index says {SECOND}, but it is in {FIRST}."


def test_number_missing_from_shards_without_an_index_is_named(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / FIRST).unlink()
    assert the_problem(sharded).startswith("model: shards [1] of 2 are missing")


def test_folder_without_weights_is_refused(tmp_path: Path) -> None:
    assert "no .safetensors file" in the_problem(tmp_path)


def test_several_indexes_without_the_usual_name_are_refused(sharded: Path) -> None:
    (sharded / INDEX).rename(sharded / "a.safetensors.index.json")
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND}, "b.safetensors.index.json")
    found = the_problem(sharded)
    assert "a.safetensors.index.json" in found
    assert "b.safetensors.index.json" in found


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff{}",
        b"{}",
        b'{"weight_map": null}',
        b'{"weight_map": ["a"]}',
        b'{"weight_map": {"a": 1}}',
        b"[" * 200_000,
    ],
    ids=["empty", "cut", "list", "null", "not-utf-8", "no-map", "null-map", "list-map", "number", "deep-nesting"],
)
def test_index_that_says_nothing_usable_is_refused(sharded: Path, text: bytes) -> None:
    (sharded / INDEX).write_bytes(text)
    assert any(fault.startswith(f"{INDEX}: not a usable index") for fault in faults(sharded))


@pytest.mark.parametrize("name", UNSAFE_NAMES.values(), ids=UNSAFE_NAMES)
def test_name_that_is_not_a_file_of_the_folder_is_unsafe(name: str) -> None:
    assert unsafe_file_name(name)


@pytest.mark.parametrize("name", [FIRST, "weights.v2.safetensors", "größe.safetensors", "..x.safetensors"])
def test_plain_file_name_is_safe(name: str) -> None:
    assert not unsafe_file_name(name)


@pytest.mark.parametrize("name", UNSAFE_NAMES.values(), ids=UNSAFE_NAMES)
def test_index_that_names_a_file_outside_the_folder_is_refused(sharded: Path, name: str) -> None:
    write_index(sharded, {"a": FIRST, "b": FIRST, "c": SECOND, "d": name})
    assert the_problem(sharded) == f"{INDEX}: names {name!r}, which is not a file of this folder."


def test_file_outside_the_folder_is_not_opened(sharded: Path) -> None:
    inner = sharded / "inner"
    inner.mkdir()
    (sharded / "outside.safetensors").write_bytes(b"not a safetensors file")
    write_shard(inner, "model.safetensors", "a")
    write_index(inner, {"a": "model.safetensors", "b": "../outside.safetensors"})
    assert "outside.safetensors" in the_problem(inner)


def test_all_faults_are_reported_together(sharded: Path) -> None:
    content = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(content[:-1])
    write_index(sharded, {"a": FIRST, "z": FIRST, "c": SECOND, "m": "gone.safetensors", "e": "../e.safetensors"})
    starts = [
        f"{INDEX}: names '../e.safetensors'",
        "gone.safetensors: missing",
        f"{SECOND}: truncated",
        f"z: the index says {FIRST}, but",
        "b: in",
    ]
    found = faults(sharded)
    assert [[start for start in starts if fault.startswith(start)] for fault in found] == [[s] for s in starts]


def test_title_names_the_folder_and_the_number_of_faults(sharded: Path) -> None:
    (sharded / FIRST).unlink()
    (sharded / SECOND).unlink()
    with pytest.raises(FaultsError, match=rf"{sharded.name}: not a readable checkpoint \(2 found\)"):
        read_folder(sharded)
