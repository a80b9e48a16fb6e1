"""What can be wrong with SOURCE and OUTPUT: reported together, before anything is written."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from run_ckpt.contract.errors import CheckpointError, FaultsError
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint


@pytest.fixture
def source(tmp_path: Path) -> Path:
    shards = [{f"blocks.{i}.proj.weight": random_weight(256, 256, seed=i)} for i in range(3)]
    return save_checkpoint(tmp_path / "in", shards, {"_class_name": "SomeTransformer"})


def assert_refused(source: Path, output: Path, *messages: str) -> None:
    """Check that the conversion fails with all messages at once and leaves nothing behind."""
    before = folder_bytes(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, output, format="mxfp4")
    for message in messages:
        assert message in str(caught.value)
    assert folder_bytes(source) == before
    assert not output.with_name(output.name + ".partial").exists()


def test_all_faults_are_reported_together(source: Path, tmp_path: Path) -> None:
    (source / "model-00001-of-00003.safetensors").unlink()
    shard = source / "model-00002-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    (source / "config.json").write_text("{")
    assert_refused(source, tmp_path / "out", "model-00001-of-00003.safetensors: missing", "truncated")


def test_an_already_quantized_source_is_refused(source: Path, tmp_path: Path) -> None:
    config = {"quantization_config": {"quant_method": "fp8"}}
    (source / "config.json").write_text(json.dumps(config))
    assert_refused(source, tmp_path / "out", "already quantized (quant_method fp8)")


@pytest.mark.parametrize("name", ["blocks.0.proj.weight_scale", "blocks.0.proj.qweight", "blocks.0.proj.input_scale"])
def test_scales_beside_the_weights_are_a_quantized_source(tmp_path: Path, name: str) -> None:
    source = save_checkpoint(tmp_path / "in", [{name: torch.ones(1)}], {})
    assert_refused(source, tmp_path / "out", f"{name}: already quantized")


def test_float8_tensors_are_a_quantized_source(tmp_path: Path) -> None:
    weight = random_weight(256, 256).to(torch.float8_e4m3fnuz)  # E4M3 and E5M2 are read: test_undeclared.py
    source = save_checkpoint(tmp_path / "in", [{"blocks.0.proj.weight": weight}], {})
    assert_refused(source, tmp_path / "out", "already quantized")


def test_nothing_to_convert_is_an_error(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "in", [{"norm.weight": torch.ones(8)}], {})
    assert_refused(source, tmp_path / "out", "nothing to convert")


def test_a_source_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "out", format="mxfp4")


def test_a_folder_without_weights_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert_refused(tmp_path / "empty", tmp_path / "out", "holds no .safetensors file")


def test_an_output_that_is_not_empty_is_refused_and_kept(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    assert_refused(source, tmp_path / "out", "is not empty")
    assert (tmp_path / "out" / "mine").read_text() == "precious"


def test_an_empty_output_folder_is_fine(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(source, tmp_path / "out", format="mxfp4")
    assert (tmp_path / "out" / "quantization_manifest.json").exists()


def test_output_as_source_is_refused(source: Path) -> None:
    assert_refused(source, source, "is the source")


def test_output_in_source_is_refused(source: Path) -> None:
    assert_refused(source, source / "out", "lies in the source")


def test_output_that_holds_source_is_refused(source: Path, tmp_path: Path) -> None:
    assert_refused(source, tmp_path, "holds the source")


def test_output_that_is_a_file_is_refused(source: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    assert_refused(source, tmp_path / "out", "is a file")


def test_a_full_disk_is_seen_before_anything_is_written(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    assert_refused(source, tmp_path / "out", "1 kB free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=2 * 2**20))
    convert(source, tmp_path / "out", format="mxfp4")


def test_a_refused_run_leaves_no_folder_and_nothing_of_others_goes(source: Path, tmp_path: Path) -> None:
    (source / "config.json").write_text("{")
    assert_refused(source, tmp_path / "a" / "b" / "out", "config.json: not readable")
    assert not (tmp_path / "a").exists()
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "mine").write_text("precious")
    with pytest.raises(CheckpointError):
        convert(source, tmp_path / "out", format="mxfp4")
    assert (tmp_path / "out.partial" / "mine").read_text() == "precious"


def test_faults_of_all_components_of_a_pipeline_are_reported_together(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        save_checkpoint(tmp_path / "in" / name, [{f"{name}.qweight": torch.ones(1)}], {})
    with pytest.raises(FaultsError) as caught:
        convert(tmp_path / "in", tmp_path / "out", format="mxfp4")
    assert "transformer.qweight" in str(caught.value)
    assert "transformer_2.qweight" in str(caught.value)
