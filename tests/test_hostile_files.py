"""Files that somebody prepared: links, pipes, devices, sparse giants, names and numbers that no framework writes."""

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from time import process_time
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from convert_ckpt.plan.candidates import Group
from convert_ckpt.plan.sensitivities import read_sensitivities
from convert_ckpt.source.component import open_component
from run_ckpt.contract.errors import CheckpointError, FaultsError, HeaderError, ManifestError, UsageError
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.contract.manifest_text import seal_manifest
from run_ckpt.progress import Silent
from run_ckpt.storage.atomic import write_durably
from run_ckpt.storage.checks import config_faults
from run_ckpt.storage.header import parse_header
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.tools.publish.card import make_card
from run_ckpt.tools.publish.report import make_report
from run_ckpt.tools.publish.rows import read_result
from run_ckpt.tools.rewrite.dequantize import dequantize
from tests.checkpoints import convert, random_weight, save_checkpoint

MISSING = object()
CLASS = {"_class_name": "SomeTransformer"}


# Maps that a builder multiplies by ten for each line, a list that takes it a minute.
MERGED = "".join(f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}\n" for i in range(1, 10))
BOMBS = {"maps": "a0: &a0 {x: 1}\n" + MERGED, "list": "tags:\n" + "- a\n" * 500_000, "deep": "a: " + "[" * 9999}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shards = [{f"blocks.{i}.proj.weight": random_weight(256, 256, seed=i)} for i in range(2)]
    folder = save_checkpoint(tmp_path / "in", shards, CLASS)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def faults_of(source: Path) -> str:
    with pytest.raises(FaultsError) as caught:
        open_component(source)
    return str(caught.value)


def write_through_a_device(path: Path) -> None:
    path.symlink_to("/dev/null")


def write_through_a_link(path: Path) -> None:
    path.with_name("target").write_text("precious")
    path.symlink_to(path.with_name("target"))


@pytest.mark.parametrize("plant", [write_through_a_device, write_through_a_link, os.mkfifo, os.mkdir])
def test_a_report_replaces_only_files(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    plant(tmp_path / "report.html")
    with pytest.raises(CheckpointError, match="Give the name of a file"):
        write_durably(tmp_path / "report.html", b"text")
    assert not (tmp_path / "target").exists() or (tmp_path / "target").read_text() == "precious"


def test_a_report_leaves_the_files_beside_it(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("old")
    (tmp_path / "report.html.part").write_text("precious")
    write_durably(tmp_path / "report.html", b"new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {
        "report.html": "new",
        "report.html.part": "precious",
    }


@pytest.mark.parametrize("name", ["tokenizer.json", "config.json", "README.md"])
@pytest.mark.parametrize("absolute", [False, True], ids=["relative", "absolute"])
def test_a_small_file_that_is_a_link_out_of_its_folder_is_refused(
    source: Path, tmp_path: Path, name: str, absolute: bool
) -> None:
    (tmp_path / "secret").write_text("{}")
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(tmp_path / "secret" if absolute else "../secret")
    assert f"{name}: is a link to {tmp_path}/secret" in faults_of(source)


def test_links_within_the_folder_and_of_shards_are_followed(source: Path, tmp_path: Path) -> None:
    (source / "vocab.json").symlink_to("tokenizer.json")
    shard = source / "model-00001-of-00002.safetensors"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    convert(source, tmp_path / "out", format="mxfp4")
    assert (tmp_path / "out" / "vocab.json").read_text() == "{}"
    assert not (tmp_path / "out" / "vocab.json").is_symlink()


@pytest.mark.parametrize("inside", ["", "transformer"])
def test_the_hubs_cache_is_read_through_its_links(source: Path, tmp_path: Path, inside: str) -> None:
    repo = tmp_path / "models--me--model"
    snapshot = repo / "snapshots" / ("0" * 40) / inside
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(source.iterdir())):
        path.rename(repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(os.path.relpath(repo / "blobs" / str(number), snapshot))
    (tmp_path / "short").symlink_to(snapshot)
    for number, path in enumerate((snapshot, tmp_path / "short")):
        convert(path, tmp_path / f"out{number}", format="mxfp4")
        assert (tmp_path / f"out{number}" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "secret").write_text("{}")
    (snapshot / "more.json").symlink_to(tmp_path / "secret")
    assert "more.json: is a link to" in faults_of(snapshot)


def zero(path: Path) -> None:
    path.symlink_to("/dev/zero")


def sparse(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 3 * 2**30)


PLANTS: dict[str, Callable[[Path], Any]] = {"pipe": os.mkfifo, "folder": Path.mkdir, "device": zero, "sparse": sparse}


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_a_small_file_of_the_source_that_is_none_is_refused(
    source: Path, name: str, plant: Callable[[Path], None]
) -> None:
    (source / name).unlink()
    plant(source / name)
    assert name in faults_of(source)


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_a_recipe_that_is_no_small_file_is_refused(source: Path, tmp_path: Path, plant: Callable[[Path], None]) -> None:
    plant(tmp_path / "recipe.toml")
    with pytest.raises(UsageError, match=r"recipe\.toml"):
        convert(source, tmp_path / "out", format="mxfp4", recipe=tmp_path / "recipe.toml")


@pytest.mark.parametrize("plant", [plant for name, plant in PLANTS.items() if name != "folder"])
def test_a_calibration_that_is_no_checkpoint_is_refused(
    source: Path, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    plant(tmp_path / "ranges")
    with pytest.raises(UsageError, match="--calibration"):
        convert(source, tmp_path / "out", format="fp8", calibration=tmp_path / "ranges")


@pytest.mark.parametrize("plant", PLANTS.values(), ids=PLANTS)
def test_a_manifest_that_is_no_small_file_is_refused(
    source: Path, tmp_path: Path, plant: Callable[[Path], None]
) -> None:
    convert(source, tmp_path / "out", format="mxfp4")
    (tmp_path / "out" / MANIFEST_NAME).unlink()
    plant(tmp_path / "out" / MANIFEST_NAME)
    with pytest.raises(ManifestError, match=MANIFEST_NAME):
        read_checked_manifest(tmp_path / "out")


@pytest.mark.parametrize("amax", [1e-45, 1e-37, 0.0, -1.0, float("inf"), float("nan")])
def test_a_range_without_a_scale_is_refused(source: Path, tmp_path: Path, amax: float) -> None:
    ranges = {f"blocks.{i}.proj.input_amax": torch.tensor([amax]) for i in range(2)}
    save_file(ranges, tmp_path / "ranges.safetensors")
    with pytest.raises(FaultsError, match=r"blocks\.0\.proj: ranges\.safetensors says that its largest input is"):
        convert(source, tmp_path / "out", format="fp8", calibration=tmp_path / "ranges.safetensors")


@pytest.mark.parametrize("char", ["\n", "\x1b", "\x7f", "\x9b", "\u202e", "\u2028"])
def test_a_tensor_name_that_no_framework_makes_is_refused(tmp_path: Path, char: str) -> None:
    name = f"blocks.0{char}.proj"
    tensors = {f"{name}.weight": random_weight(256, 256), f"{name}.weight_scale": torch.ones(1)}
    source = save_checkpoint(tmp_path / "in", [tensors], CLASS)
    assert f"{name + '.weight'!r}: a name with control characters" in faults_of(source)


@pytest.mark.parametrize("name", ["more\x1b[2J.json", "more\udcff.json"])
def test_a_file_name_that_nobody_can_write_is_refused(source: Path, name: str) -> None:
    (source / name).write_text("{}")
    assert f"{name!r}: a name with control characters" in faults_of(source)


@pytest.mark.parametrize("config", [{"architectures": 1}, {"_class_name": 5}, {"_class_name": "A\nimport os"}])
def test_a_class_that_is_no_name_is_refused(source: Path, config: dict[str, Any]) -> None:
    (source / "config.json").write_text(json.dumps(config))
    assert "is no name of a class" in faults_of(source)


@pytest.mark.parametrize("declared", ["fp8", 5, [], ["fp8"], None])
def test_a_config_that_declares_nonsense_is_converted_or_refused(source: Path, tmp_path: Path, declared: Any) -> None:
    (source / "config.json").write_text(json.dumps({**CLASS, "quantization_config": declared}))
    with contextlib.suppress(CheckpointError):
        convert(source, tmp_path / "out", format="fp8")
        assert config_faults(tmp_path / "out", read_checked_manifest(tmp_path / "out")) == []


def test_a_small_file_called_as_ours_would_be_for_a_moment_is_carried_along(source: Path, tmp_path: Path) -> None:
    name = f"{MANIFEST_NAME}.part"
    (source / name).write_text("text")
    convert(source, tmp_path / "out", format="fp8")
    assert (tmp_path / "out" / name).read_text() == "text"
    assert name in read_checked_manifest(tmp_path / "out").files


def test_what_verify_would_reject_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert_ckpt.run.side_files.quantization_config", lambda _: {"quant_method": "other"})
    with pytest.raises(CheckpointError, match="quant_method is 'other'"):
        convert(source, tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists()


def reseal(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads((folder / MANIFEST_NAME).read_text())
    edit(document)
    (folder / MANIFEST_NAME).write_bytes(b"".join(seal_manifest(document)))


def set_source(name: str) -> Callable[[dict[str, Any]], None]:
    def edit(document: dict[str, Any]) -> None:
        document["layers"]["blocks.1.proj"]["source_tensor"] = name

    return edit


@pytest.mark.parametrize("name", ["blocks.0.proj.weight", "__metadata__", "other.weight", ""])
def test_a_sealed_manifest_with_another_source_tensor_is_refused(source: Path, tmp_path: Path, name: str) -> None:
    convert(source, tmp_path / "out", format="mxfp4")
    reseal(tmp_path / "out", set_source(name))
    with pytest.raises(FaultsError, match=f"source_tensor is {name}"):
        dequantize(tmp_path / "out", tmp_path / "plain", dtype="bfloat16", progress=Silent())
    assert not (tmp_path / "plain").exists()


def paths(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the place of every value in a JSON document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [where, *(path for key, part in inner for path in paths(part, (*where, key)))]


@pytest.mark.parametrize("wrong", [MISSING, None, 5, -1, 1e400, "text", [], {}, [5], {"a": []}, True])
def test_a_field_of_a_manifest_of_whatever_type_is_read_or_refused(source: Path, tmp_path: Path, wrong: Any) -> None:
    convert(source, tmp_path / "out", format="mxfp4")
    text = (tmp_path / "out" / MANIFEST_NAME).read_text()
    for path in paths(json.loads(text)):
        document = json.loads(text)
        if not path or path[0] == "blake3_of_the_rest":
            continue
        inner = document
        for key in path[:-1]:
            inner = inner[key]
        if wrong is MISSING:
            del inner[path[-1]]
        else:
            inner[path[-1]] = wrong
        try:
            sealed = b"".join(seal_manifest(document))
        except ValueError:
            continue  # no JSON
        (tmp_path / "out" / MANIFEST_NAME).write_bytes(sealed)
        try:
            result = read_result(tmp_path / "out")
        except CheckpointError:
            continue
        make_card(result, "me/model")
        make_report({"out": result})


def test_a_header_that_repeats_one_of_many_keys_is_refused_soon() -> None:
    entry = '"{}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}'
    text = "{" + ",".join(entry.format(i) for i in [*range(50_000), 7]) + "}"
    data = len(text).to_bytes(8, "little") + text.encode()
    with pytest.raises(HeaderError, match=r"names \['7'\] more than once"):
        parse_header("x.safetensors", data, len(data))


@pytest.mark.parametrize("shape", [[10**4000], [2**62] * 100_000, [0] * 100_000, [2**62] * 100_000 + [0]])
def test_a_header_with_absurd_sizes_is_refused_soon(shape: list[int]) -> None:
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}})
    data = len(text).to_bytes(8, "little") + text.encode()
    with pytest.raises(HeaderError):
        parse_header("x.safetensors", data, len(data) + 4)


@pytest.mark.parametrize("text", ['{"a": "\\ud800"}', '{"\\uDC00": 1}'])
def test_half_a_character_in_a_config_is_refused(source: Path, text: str) -> None:
    (source / "config.json").write_text(text)
    assert "config.json: not readable" in faults_of(source)


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_card_that_would_take_minutes_is_passed_over(source: Path, bomb: str) -> None:
    (source / "README.md").write_text(f"---\nlicense: mit\n{bomb}---\n")
    started = process_time()
    assert set(open_component(source).card) <= {"license"}
    assert process_time() - started < 10


@pytest.mark.parametrize("name", ["README.md", "config.json", "tokenizer.json", "model.safetensors.index.json"])
def test_a_link_to_itself_is_refused_or_passed_over(source: Path, name: str) -> None:
    (source / name).unlink(missing_ok=True)
    (source / name).symlink_to(name)
    with contextlib.suppress(FaultsError):
        assert open_component(source)


@pytest.mark.parametrize("value", ["1e309", "-1e300", "1" + "0" * 400, "true", "null", "NaN", "[1]", '"1"'])
def test_a_sensitivity_that_is_no_number_of_db_is_refused(tmp_path: Path, value: str) -> None:
    (tmp_path / "measured.json").write_text(f'{{"snr_db": {{"a": {{"fp8": {value}}}}}}}')
    with pytest.raises(FaultsError, match="not a number of dB"):
        read_sensitivities(tmp_path / "measured.json", [Group("", ("a",), {"fp8": ()}, 1)])


@pytest.mark.parametrize("plant", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"])
def test_sensitivities_that_are_no_small_file_are_refused(tmp_path: Path, plant: Callable[[Path], None]) -> None:
    plant(tmp_path / "measured.json")
    with pytest.raises(UsageError, match="not a readable JSON file"):
        read_sensitivities(tmp_path / "measured.json", [])


@pytest.mark.parametrize("shape", [(0, 256), (256, 0), (0, 0)])
def test_quantized_weights_of_no_elements_are_refused(tmp_path: Path, shape: tuple[int, int]) -> None:
    tensors = {"a.weight": torch.zeros(shape, dtype=torch.float8_e4m3fn), "a.weight_scale": torch.ones(1)}
    source = save_checkpoint(tmp_path / "in", [tensors], {**CLASS, "quantization_config": {"quant_method": "fp8"}})
    assert "is empty" in faults_of(source)
    with pytest.raises(FaultsError, match="is empty"):
        dequantize(source, tmp_path / "out", dtype="bfloat16", progress=Silent())
