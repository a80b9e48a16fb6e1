"""--shard-size: more and smaller output files with the same tensors, whatever else happens."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from run_ckpt.contract.errors import UsageError
from run_ckpt.progress import Silent
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.shards import read_folder
from run_ckpt.tools.verify.component import verify_output
from tests.checkpoints import FLUX_DIGITS, convert, folder_bytes, load_all
from tests.test_resume import stop_after, z_image

LIMIT = 900_000


@pytest.mark.parametrize("options", [{"format": "mxfp4"}, {"format": "fp8"}], ids=["mxfp4", "fp8"])
def test_files_keep_to_the_limit_and_hold_the_same_tensors(tmp_path: Path, options: dict[str, Any]) -> None:
    convert(FLUX_DIGITS, tmp_path / "whole", **options)
    convert(FLUX_DIGITS, tmp_path / "cut", shard_size=LIMIT, **options)
    whole, cut = load_all(tmp_path / "whole"), load_all(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name].view(torch.uint8), cut[name].view(torch.uint8)) for name in whole)
    (report,) = verify_output(tmp_path / "cut", FLUX_DIGITS, Silent())
    assert report.faults == ()
    manifest = read_manifest(tmp_path / "cut")
    assert manifest.layers == read_manifest(tmp_path / "whole").layers
    of_layer = {spec.name: name for name, layer in manifest.layers.items() for spec in layer.specs().values()}
    shards = read_folder(tmp_path / "cut").shards
    for shard in shards:
        nbytes = sum(tensor.spec.nbytes for tensor in shard.header.tensors)
        together = {of_layer.get(tensor.spec.name, tensor.spec.name) for tensor in shard.header.tensors}
        assert nbytes <= LIMIT or len(together) == 1
    assert len(shards) > 4


def test_files_are_numbered_and_the_index_lists_them(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "cut", format="mxfp4", shard_size="900kB")
    names = sorted(path.name for path in (tmp_path / "cut").glob("*.safetensors"))
    stem = "diffusion_pytorch_model"
    assert names == [f"{stem}-{i:05}-of-{len(names):05}.safetensors" for i in range(1, len(names) + 1)]
    index = json.loads((tmp_path / "cut" / f"{stem}.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == names


def test_a_limit_that_nothing_reaches_changes_no_byte(tmp_path: Path) -> None:
    convert(FLUX_DIGITS, tmp_path / "whole", format="mxfp4")
    convert(FLUX_DIGITS, tmp_path / "same", format="mxfp4", shard_size="5GB")
    whole, same = folder_bytes(tmp_path / "whole"), folder_bytes(tmp_path / "same")
    assert {name for name in whole if whole[name] != same.get(name)} == {"quantization_manifest.json"}


@pytest.mark.parametrize("options", [{"format": "mxfp4"}, {"format": "fp8"}], ids=["mxfp4", "fp8"])
@pytest.mark.parametrize("n_files", [1, 3])
def test_a_stopped_run_goes_on_within_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], n_files: int
) -> None:
    convert(FLUX_DIGITS, tmp_path / "whole", shard_size=LIMIT, **options)
    stop_after(n_files, FLUX_DIGITS, tmp_path / "out", monkeypatch, shard_size=LIMIT, **options)
    summary = convert(FLUX_DIGITS, tmp_path / "out", shard_size=LIMIT, **options)
    assert summary.n_files_resumed == n_files
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_scales_that_are_repeated_are_whole_where_their_layers_lie_apart(tmp_path: Path, granularity: str) -> None:
    source = z_image(tmp_path / "z")
    options = {"format": "fp8", "granularity": granularity}
    convert(source, tmp_path / "whole", **options)
    convert(source, tmp_path / "cut", shard_size=1, **options)
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 8  # a layer each
    (report,) = verify_output(tmp_path / "cut", source, Silent())
    assert report.faults == ()


def test_a_dialect_of_one_file_refuses_a_limit(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shard-size: dialect rowwise is one file"):
        convert(FLUX_DIGITS, tmp_path / "out", format="fp8", granularity="channel", dialect="rowwise", shard_size="1MB")
