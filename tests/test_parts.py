"""Several runs make one result: each a part of it, in any order and at the same time, and the last one publishes."""

import os
import random
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import fsspec
import pytest

from convert_ckpt import api
from convert_ckpt.options import Options
from convert_ckpt.plan.make_plan import make_plan
from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.run.component import Conversion
from convert_ckpt.run.partial_output import Staging
from convert_ckpt.run.share import NOTHING, Share, files_of_share, parse_share
from convert_ckpt.source.component import open_component
from run_ckpt.contract.errors import CheckpointError, FaultsError, PartialRunError, UsageError
from run_ckpt.contract.manifest import MANIFEST_NAME
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint
from tests.hub_fixtures import assert_same_but_for_the_source, convert_remote
from tests.test_resume import COMMAND, SHARD, z_image

N_SHARDS = 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four shards; the q, k and v of each block lie in different ones, so that FP8's scales reach over all parts."""
    shards = [
        {
            f"model.layers.{layer}.self_attn.{name}_proj.weight": random_weight(256, 1024, seed=10 * layer + shard)
            for layer in range(3)
        }
        for shard, name in enumerate("qkvo")
    ]
    return save_checkpoint(tmp_path / "in", shards, {"architectures": ["LlamaForCausalLM"]})


def shares(count: int) -> list[Share]:
    return [Share(i + 1, count) for i in range(count)]


def command(source: Path, output: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, str(source), str(output), "--quiet", *arguments]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 9])
@pytest.mark.parametrize(
    "options",
    [{"format": "mxfp4"}, {"format": "fp8"}, {"format": "nvfp4"}, {"format": "mxfp4", "min_sqnr": 30}],
    ids=str,
)
def test_any_number_of_parts_in_any_order_makes_the_bytes_of_one_run(
    source: Path, tmp_path: Path, options: dict[str, str], count: int
) -> None:
    convert(source, tmp_path / "whole", **options)
    order = shares(count)
    random.Random(count).shuffle(order)
    summaries = [convert(source, tmp_path / "out", share=share, **options) for share in order]
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
    # An empty part may come last, after OUTPUT is published: that is no failure.
    assert all(summary.share is None or summary.n_files_missing for summary in summaries)
    assert summaries[-1].share is None


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("order", [(1, 2), (2, 1)])
def test_a_scale_repeated_in_the_shard_of_another_part(
    tmp_path: Path, granularity: str, order: tuple[int, int]
) -> None:
    source, options = z_image(tmp_path / "z"), {"format": "fp8", "granularity": granularity}
    convert(source, tmp_path / "whole", **options)
    for number in order:
        convert(source, tmp_path / "out", share=Share(number, 2), **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_components_are_shared_out_together(tmp_path: Path) -> None:
    for name in ("transformer", "transformer_2"):
        shards = [{f"blocks.{i}.proj.weight": random_weight(256, 256, seed=i)} for i in range(2)]
        save_checkpoint(tmp_path / "pipe" / name, shards, {"_class_name": "SomeTransformer"})
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    convert(tmp_path / "pipe", tmp_path / "whole", format="mxfp4")
    for share in shares(3):
        convert(tmp_path / "pipe", tmp_path / "out", share=share, format="mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_shares_are_disjoint_neighbours_of_about_the_same_size(tmp_path: Path) -> None:
    rows = [random.Random(i).choice([32, 64, 256, 320]) for i in range(12)]
    shards = [{f"blocks.{i}.proj.weight": random_weight(n, 256)} for i, n in enumerate(rows)]
    component = open_component(save_checkpoint(tmp_path / "in", shards, {"_class_name": "SomeTransformer"}))
    plan = make_plan(component, Options(format="fp8", preset="generic"))
    names = [file.name for file in plan.files]
    for count in range(1, 15):
        made = [files_of_share([ComponentPlan("", component, plan)], share)[""] for share in shares(count)]
        assert sorted(name for files in made for name in files) == names
        for files in made:
            positions = sorted(names.index(name) for name in files)
            assert all(after == before + 1 for before, after in pairwise(positions))
            assert sum(rows[i] for i in positions) <= sum(rows) / count + max(rows)


def test_different_numbers_of_parts_and_a_whole_run_go_on_from_each_other(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", format="fp8")
    convert(source, tmp_path / "out", share=Share(1, 2), format="fp8")
    summary = convert(source, tmp_path / "out", share=Share(3, 4), format="fp8")
    assert (summary.n_files_missing, summary.n_files_resumed) == (1, 0)
    assert convert(source, tmp_path / "out", format="fp8").n_files_resumed == 3
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_part_that_comes_after_the_end_has_nothing_to_do(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", format="mxfp4")
    before = folder_bytes(tmp_path / "out")
    for share in (Share(2, 3), NOTHING):
        assert convert(source, tmp_path / "out", share=share, format="mxfp4").share is None
    assert folder_bytes(tmp_path / "out") == before
    assert not (tmp_path / "out.partial").exists()
    with pytest.raises(FaultsError, match="holds another result"):
        convert(source, tmp_path / "out", share=Share(1, 2), format="fp8")
    assert not (tmp_path / "out.partial").exists()


def test_finalize_names_what_is_missing_and_publishes_what_nobody_did(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(source, tmp_path / "whole", format="mxfp4")
    with pytest.raises(FaultsError, match="no run has finished it"):
        convert(source, tmp_path / "out", share=NOTHING, format="mxfp4")
    assert not (tmp_path / "out.partial").exists()
    convert(source, tmp_path / "out", share=Share(1, 2), format="mxfp4")
    with pytest.raises(FaultsError) as caught:
        convert(source, tmp_path / "out", share=NOTHING, format="mxfp4")
    assert [fault.partition(":")[0] for fault in caught.value.faults] == [SHARD.format(3), SHARD.format(4)]
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "take_alone", lambda self: False)  # as where another one is not yet at its end
        assert convert(source, tmp_path / "out", share=Share(2, 2), format="mxfp4").n_files_missing == 0
    assert not (tmp_path / "out").exists()
    convert(source, tmp_path / "out", share=NOTHING, format="mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_part_with_other_options_is_refused(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "out", share=Share(1, 2), format="mxfp4")
    with pytest.raises(PartialRunError, match=r"options\.scale_rule was 'even', now 'mse'"):
        convert(source, tmp_path / "out", share=Share(2, 2), format="mxfp4", scale_rule="mse")


def test_while_parts_are_made_no_whole_run_and_no_finalize_gets_in(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Conversion.make

    def intrude_then_make(self: Conversion, share: Share | None = None) -> int:
        if share == Share(2, 2):
            with pytest.raises(CheckpointError, match="another run is at work"):
                convert(source, tmp_path / "out", format="mxfp4")
            convert(source, tmp_path / "out", share=Share(1, 2), format="mxfp4")
            n_files = make(self, share)
            with pytest.raises(CheckpointError, match="others are at work"):
                convert(source, tmp_path / "out", share=NOTHING, format="mxfp4")
            return n_files
        return make(self, share)

    monkeypatch.setattr(Conversion, "make", intrude_then_make)
    assert convert(source, tmp_path / "out", share=Share(2, 2), format="mxfp4").share is None
    convert(source, tmp_path / "whole", format="mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_who_publishes_checks_what_the_others_made(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", format="mxfp4")
    convert(source, tmp_path / "out", share=Share(1, 2), format="mxfp4")
    with open(tmp_path / "out.partial" / "result" / SHARD.format(1), "r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))
    convert(source, tmp_path / "out", share=Share(2, 2), format="mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_parts_at_the_same_time_some_of_them_twice(source: Path, tmp_path: Path, weight_format: str) -> None:
    convert(source, tmp_path / "whole", format=weight_format)
    parts = ["1/3", "2/3", "3/3", "2/3", "3/3"]
    runs = [
        subprocess.Popen(command(source, tmp_path / "out", "--format", weight_format, "--part", part)) for part in parts
    ]
    assert [run.wait(120) for run in runs] == [0] * len(parts)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_killed_parts_are_made_by_the_same_command(source: Path, tmp_path: Path) -> None:
    convert(source, tmp_path / "whole", format="fp8")
    moments = random.Random(1)
    output = tmp_path / "out"
    for _ in range(3):
        runs = [
            subprocess.Popen(command(source, output, "--format", "fp8", "--part", f"{i}/{N_SHARDS}"))
            for i in range(1, N_SHARDS + 1)
        ]
        time.sleep(moments.uniform(0.3, 1.5))
        for run in runs[1:]:
            run.send_signal(signal.SIGKILL)
        for run in runs:
            run.wait(120)
        assert (output / MANIFEST_NAME).exists() or not output.exists()
    for i in range(1, N_SHARDS + 1):
        subprocess.run(command(source, output, "--format", "fp8", "--part", f"{i}/{N_SHARDS}"), check=True)
    assert folder_bytes(output) == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_parts_of_a_remote_source_fetch_their_own_shards_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    convert(source, tmp_path / "local", format="mxfp4")
    memory = fsspec.filesystem("memory")
    memory.put(str(source), "/models/parts", recursive=True)
    for share in shares(2):
        convert_remote("memory://models/parts", tmp_path / "out", share=share, format="mxfp4")
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    assert [*(tmp_path / "scratch").iterdir()] == []
    memory.rm("/models/parts", recursive=True)


@pytest.mark.parametrize("text", ["", "3", "0/4", "5/4", "1/0", "-1/2", "1/2/3", "a/b", "1.0/2"])
def test_a_part_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is no part"):
        parse_share(text)


@pytest.mark.parametrize("others", [{"restart": True}, {"push_to_hub": "me/repo"}, {"finalize": True}], ids=str)
def test_what_concerns_the_whole_result_does_not_go_with_a_part(tmp_path: Path, others: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="does not go with"):
        api.convert(tmp_path, tmp_path / "out", format="mxfp4", part="1/2", **others)
