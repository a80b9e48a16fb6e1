"""A run that was stopped goes on: same bytes, unfinished shards alone, and only if nothing changed."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from convert_ckpt.run.engine import Engine
from convert_ckpt.run.partial_output import Staging
from convert_ckpt.run.readers import ShardReaders
from convert_ckpt.run.schedule import Slab
from run_ckpt.contract.errors import CheckpointError, FaultsError, PartialRunError
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.partial import PartialFolder
from run_ckpt.storage.writer import ShardWriter
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint

COMMAND = "import sys; from convert_ckpt.cli import main; sys.argv[0] = 'convert-ckpt'; main()"
SHARD = "model-0000{}-of-00004.safetensors"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Four shards; the q, k and v of each block lie in different ones."""
    shards = [
        {
            f"model.layers.{layer}.self_attn.{name}.weight": random_weight(256, 1024, seed=10 * layer + shard)
            for layer in range(4)
            for name in (["q_proj"], ["k_proj"], ["v_proj"], ["o_proj"])[shard]
        }
        for shard in range(4)
    ]
    return save_checkpoint(tmp_path / "in", shards, {"architectures": ["LlamaForCausalLM"]})


def test_numbers_that_equal_nothing_in_a_config_do_not_keep_a_run_from_going_on(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "a": NaN, "b": [-Infinity]}')
    stop_after(2, source, tmp_path / "out", monkeypatch, format="mxfp4")
    assert convert(source, tmp_path / "out", format="mxfp4").n_files_resumed == 2
    convert(source, tmp_path / "out", format="mxfp4")  # complete


class StoppedError(Exception):
    """Stands for whatever ends a run."""


def stop_after(n_files: int, source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """Run until ``n_files`` shards are recorded, then fail at the next one."""
    write_record = Staging.write_record

    one_at_a_time = threading.Lock()

    def write_then_stop(self: Staging, component: str, file_name: str, record: dict[str, object]) -> None:
        with one_at_a_time:
            if len(self.read_records(component)) == n_files:
                raise StoppedError
            write_record(self, component, file_name, record)

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Staging, "write_record", write_then_stop)
        convert(source, output, 1, **options)
    assert not output.exists()


def count_bytes_read(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Return a counter of the tensor bytes that runs from now on read of each shard."""
    n_read: Counter[str] = Counter()
    read = ShardReaders.read

    def count(self: ShardReaders, slabs: list[Slab], outs: list[np.ndarray]) -> None:
        for slab in slabs:
            n_read[slab.tensor.shard] += slab.nbytes
        read(self, slabs, outs)

    monkeypatch.setattr(ShardReaders, "read", count)
    return n_read


@pytest.mark.parametrize("n_files", [1, 2, 3])
@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_a_stopped_run_goes_on_with_the_same_bytes(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n_files: int, weight_format: str
) -> None:
    convert(source, tmp_path / "whole", format=weight_format)
    stop_after(n_files, source, tmp_path / "out", monkeypatch, format=weight_format)
    summary = convert(source, tmp_path / "out", format=weight_format)
    assert summary.n_files_resumed == n_files
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_finished_shards_are_not_read_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(2, source, tmp_path / "out", monkeypatch, format="mxfp4")
    assert set(Staging(tmp_path / "out").read_records("root")) == {SHARD.format(1), SHARD.format(2)}
    n_read = count_bytes_read(monkeypatch)
    convert(source, tmp_path / "out", format="mxfp4")
    assert n_read == {SHARD.format(3): 4 * 256 * 1024 * 2, SHARD.format(4): 4 * 256 * 1024 * 2}


def one_block_a_shard(folder: Path, rows: int) -> Path:
    """Write four shards of one block each, its down_proj and its fused q, k and v [rows, 1024]."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj")
    shards = [
        {f"model.layers.{i}.{name}.weight": random_weight(rows, 1024, seed=4 * i + j) for j, name in enumerate(names)}
        for i in range(4)
    ]
    return save_checkpoint(folder, shards, {"architectures": ["LlamaForCausalLM"]})


# Kills its own process, as kill -9 does, when a slab beyond a share of the source is to be read. How soon a finished
# shard is durable is the disk's affair, so that it is waited for.
DIE_AT = """
import os, signal, sys, time
from pathlib import Path
from convert_ckpt.cli import main
from convert_ckpt.run.readers import ShardReaders

share, shard_nbytes, n_records = float(sys.argv.pop(1)), int(sys.argv.pop(1)), int(sys.argv.pop(1))
records = Path(sys.argv[2] + ".partial/records/root")
read = ShardReaders.read

def read_or_die(self, slabs, outs):
    slab = slabs[-1]
    n_shards_before = int(slab.tensor.shard[6:11]) - 1
    if (n_shards_before + (slab.offset + slab.nbytes) / shard_nbytes) / 4 > share:
        deadline = time.monotonic() + 60
        while len(list(records.glob("*.json"))) < n_records and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGKILL)
    read(self, slabs, outs)

ShardReaders.read = read_or_die
main()
"""


@pytest.mark.parametrize("rows", [256, pytest.param(8192, marks=pytest.mark.slow)], ids=["8 MB", "268 MB"])
@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_a_run_killed_at_60_percent_reads_only_the_other_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, weight_format: str, rows: int
) -> None:
    source, output = one_block_a_shard(tmp_path / "in", rows), tmp_path / "out"
    shard_nbytes = (source / SHARD.format(1)).stat().st_size
    command = [sys.executable, "-c", DIE_AT, "0.6", str(shard_nbytes), "2", str(source), str(output)]
    process = subprocess.run([*command, "--format", weight_format, "--quiet"], check=False)
    assert process.returncode == -signal.SIGKILL
    assert not output.exists()
    n_read = count_bytes_read(monkeypatch)
    assert convert(source, output, format=weight_format).n_files_resumed == 2
    # Per-tensor FP8 is scanned, then encoded; what shares its scale with no other and is one slab, in one reading.
    n_readings = {"mxfp4": 4, "fp8": 7 if rows == 256 else 8}[weight_format]
    assert n_read == {SHARD.format(i): n_readings * rows * 1024 * 2 for i in (3, 4)}
    convert(source, tmp_path / "whole", format=weight_format)
    assert folder_bytes(output) == folder_bytes(tmp_path / "whole")


def test_other_options_are_refused_with_the_way_out(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, source, tmp_path / "out", monkeypatch, format="mxfp4")
    with pytest.raises(PartialRunError, match=r"options.scale_rule was 'even', now 'mse'.*--restart"):
        convert(source, tmp_path / "out", format="mxfp4", scale_rule="mse")


def test_a_changed_source_is_refused(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(1, source, tmp_path / "out", monkeypatch, format="mxfp4")
    shard = source / "model-00003-of-00004.safetensors"
    os.utime(shard, ns=(1, 1))
    with pytest.raises(PartialRunError, match=r"model-00003-of-00004.safetensors.mtime_ns was"):
        convert(source, tmp_path / "out", format="mxfp4")


def test_a_source_that_changes_during_the_run_is_noticed_also_at_the_same_size(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Engine.run

    def touch_then_run(self: Engine, n_workers: int) -> None:
        run(self, n_workers)
        os.utime(source / "model-00002-of-00004.safetensors", ns=(1, 1))

    monkeypatch.setattr(Engine, "run", touch_then_run)
    with pytest.raises(CheckpointError, match=r"model-00002-of-00004\.safetensors: changed while it was converted"):
        convert(source, tmp_path / "out", format="fp8")
    assert not (tmp_path / "out").exists()


def test_restart_throws_the_partial_result_away(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_after(1, source, tmp_path / "out", monkeypatch, format="mxfp4")
    convert(source, tmp_path / "out", format="fp8", restart=True)
    convert(source, tmp_path / "whole", format="fp8")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_two_runs_never_share_a_folder(source: Path, tmp_path: Path) -> None:
    with Staging(tmp_path / "out"), pytest.raises(CheckpointError, match="another run is at work"):
        convert(source, tmp_path / "out", format="mxfp4")


def test_a_run_killed_between_publishing_and_cleaning_up_is_finished_by_the_same_command(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(PartialFolder, "discard", die)
        convert(source, tmp_path / "out", format="mxfp4")
    assert (tmp_path / "out").exists()
    with pytest.raises(FaultsError, match="is not empty"):  # it would be thrown away
        convert(source, tmp_path / "out", restart=True, format="mxfp4")
    convert(source, tmp_path / "out", format="mxfp4")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8"])
def test_kill_9_at_any_moment_loses_nothing(source: Path, tmp_path: Path, weight_format: str) -> None:
    convert(source, tmp_path / "whole", format=weight_format)
    output = tmp_path / "out"
    command = [sys.executable, "-c", COMMAND, str(source), str(output), "--format", weight_format, "--quiet"]
    moments = random.Random(0)
    for _ in range(6):
        process = subprocess.Popen(command)
        time.sleep(moments.uniform(0.2, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            break
        assert not (output / "quantization_manifest.json").exists()
    if not output.exists():
        subprocess.run(command, check=True)
    assert folder_bytes(output) == folder_bytes(tmp_path / "whole")


def test_the_fingerprint_names_no_path_of_this_machine(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_after(1, source, tmp_path / "out", monkeypatch, format="mxfp4")
    text = (tmp_path / "out.partial" / "fingerprint.json").read_text()
    assert str(tmp_path) not in text
    assert json.loads(text)["options"]["format"] == "mxfp4"


def z_image(folder: Path) -> Path:
    """Return a checkpoint whose w1 and w3, one layer for SGLang, lie in different shards."""
    shards = [
        {f"layers.{i}.feed_forward.{name}.weight": random_weight(256, 1024, seed=i + j) for i in range(4)}
        for j, name in enumerate(("w1", "w3"))
    ]
    return save_checkpoint(folder, shards, {"_class_name": "ZImageTransformer2DModel"})


@pytest.mark.parametrize("granularity", ["tensor", "block"])
@pytest.mark.parametrize("finished", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_scale_repeated_in_another_shard_survives_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, granularity: str, finished: str
) -> None:
    source = z_image(tmp_path / "z")
    options = {"format": "fp8", "granularity": granularity}
    convert(source, tmp_path / "whole", **options)
    write_record = Staging.write_record
    recorded = threading.Event()

    def write_one(self: Staging, component: str, file_name: str, record: dict[str, object]) -> None:
        if file_name == finished:
            write_record(self, component, file_name, record)
            recorded.set()
        else:
            recorded.wait(30)
            raise StoppedError

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(Staging, "write_record", write_one)
        convert(source, tmp_path / "out", **options)
    assert set(Staging(tmp_path / "out").read_records("root")) == {finished}
    convert(source, tmp_path / "out", **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_manifest_that_is_not_what_was_written_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = Folder.write_parts

    def damage(self: Folder, name: str, parts: Iterable[bytes]) -> None:
        write(self, name, [*parts, b" "] if name == MANIFEST_NAME else parts)

    monkeypatch.setattr(Folder, "write_parts", damage)
    with pytest.raises(CheckpointError, match=f"{MANIFEST_NAME}: is not what was written"):
        convert(source, tmp_path / "out", format="mxfp4")
    assert not (tmp_path / "out").exists()


def test_a_shard_with_another_header_than_planned_is_not_published(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = ShardWriter.finish

    def damage(self: ShardWriter) -> dict[str, Any]:
        os.pwrite(self._fd, b"[", 8)
        return finish(self)

    monkeypatch.setattr(ShardWriter, "finish", damage)
    with pytest.raises(CheckpointError, match="the header is not valid JSON"):
        convert(source, tmp_path / "out", format="mxfp4")
    assert not (tmp_path / "out").exists()
