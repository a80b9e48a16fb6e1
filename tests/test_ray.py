"""A Ray cluster of several nodes, all of them here, makes the bytes of one run, whatever is lost on the way."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from convert_ckpt.api import convert as convert_by_name
from run_ckpt.contract.errors import CheckpointError, NonFiniteError, UsageError
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.progress import Silent
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint
from tests.conftest import set_credentials
from tests.hub_fixtures import assert_same_but_for_the_source
from tests.test_resume import COMMAND, z_image
from tests.test_tasks import calibrated_llm

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

N_SHARDS = 6


@pytest.fixture(scope="module")
def cluster(s3_endpoint: str) -> Iterator[Any]:
    """A head without CPUs, for the driver, and three nodes of one CPU, all with credentials for S3."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")  # or they get little of a core that other tests run on
        set_credentials(patch, s3_endpoint)
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
        for _ in range(3):
            made.add_node(num_cpus=1)
        made.wait_for_nodes()
        yield made
        stop(made)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six shards; q, k and v of each block lie in three of them."""
    shards = [
        {
            f"model.layers.{layer}.self_attn.{name}_proj.weight": random_weight(256, 1024, seed=10 * layer + shard)
            for layer in range(2)
        }
        | {f"model.layers.{shard}.mlp.down_proj.weight": random_weight(256, 512, seed=shard)}
        for shard, name in enumerate("qkvo")
    ]
    shards += [{f"model.layers.{i}.mlp.up_proj.weight": random_weight(512, 512, seed=i)} for i in (8, 9)]
    return save_checkpoint(tmp_path / "in", shards, {"architectures": ["LlamaForCausalLM"]})


def on_ray(source: str | Path, output: str | Path, cluster: Any, **options: Any) -> Any:
    return convert_by_name(source, output, engine="ray", ray_address=cluster.address, **options)


@pytest.mark.parametrize("ray_workers", [None, 1, 2])
@pytest.mark.parametrize("weight_format", ["mxfp4", "fp8", "nvfp4"])
def test_the_bytes_are_those_of_one_machine(
    source: Path, tmp_path: Path, cluster: Any, weight_format: str, ray_workers: int | None
) -> None:
    convert(source, tmp_path / "whole", format=weight_format)
    on_ray(source, tmp_path / "out", cluster, format=weight_format, ray_workers=ray_workers)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("granularity", ["tensor", "block"])
def test_a_scale_that_another_shard_repeats(tmp_path: Path, cluster: Any, granularity: str) -> None:
    source, options = z_image(tmp_path / "z"), {"format": "fp8", "granularity": granularity}
    convert(source, tmp_path / "whole", **options)
    on_ray(source, tmp_path / "out", cluster, **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_relative_paths_mean_the_drivers(source: Path, tmp_path: Path, cluster: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    convert(source, tmp_path / "whole", format="mxfp4")
    on_ray(Path("in"), Path("out"), cluster, format="mxfp4")
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_a_remote_source_is_fetched_where_it_is_converted(source: Path, tmp_path: Path, cluster: Any) -> None:
    convert(source, tmp_path / "local", format="fp8")
    on_ray(f"file://{source}", tmp_path / "out", cluster, format="fp8")
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")


@pytest.mark.parametrize(
    "options", [{"format": "mxfp4", "ray_workers": 1}, {"format": "fp8", "static": True}, {"format": "nvfp4"}]
)
def test_layers_with_statistics_are_tasks_of_their_own(tmp_path: Path, cluster: Any, options: dict[str, Any]) -> None:
    source, stats = calibrated_llm(tmp_path)
    on_ray(source, tmp_path / "out", cluster, calibration=stats, **options)
    options.pop("ray_workers", None)
    convert(source, tmp_path / "whole", calibration=stats, **options)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")


def test_shards_come_from_a_bucket_to_where_they_are_converted_and_the_result_goes_to_one(
    s3: Any, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats = calibrated_llm(tmp_path)
    convert(source, tmp_path / "local", format="fp8", calibration=stats)
    s3.put(str(source), "bucket/llm", recursive=True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    progress = Lines()
    on_ray("s3://bucket/llm", "s3://bucket/out/llm", cluster, format="fp8", calibration=stats, progress=progress)
    s3.get("bucket/out/llm", str(tmp_path / "out"), recursive=True)
    assert_same_but_for_the_source(tmp_path / "out", tmp_path / "local")
    assert [*(tmp_path / "here").iterdir()] == []
    # Of three shards, one scan of each for q, k and v, which lie in all of them, and one for the file.
    assert sorted(line.split()[1] for line in progress.lines if line.startswith("fetched")) == sorted(
        2 * [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    )


class Lines(Silent):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def log(self, line: str) -> None:
        self.lines.append(line)


def test_a_fault_of_the_source_is_the_error_that_one_machine_gives(tmp_path: Path, cluster: Any) -> None:
    weight = random_weight(256, 256)
    weight[3, 5] = float("nan")
    shards = [
        {"model.layers.0.mlp.up_proj.weight": random_weight(256, 256)},
        {"model.layers.1.mlp.up_proj.weight": weight},
    ]
    source = save_checkpoint(tmp_path / "in", shards, {"architectures": ["LlamaForCausalLM"]})
    with pytest.raises(NonFiniteError, match=r"model-00002.*up_proj\.weight\[3, 5\] is nan"):
        on_ray(source, tmp_path / "out", cluster, format="mxfp4")
    assert not (tmp_path / "out").exists()


def test_more_threads_than_a_machine_has_are_refused(source: Path, tmp_path: Path, cluster: Any) -> None:
    with pytest.raises(UsageError, match="no machine of the cluster has so many CPUs, at most 1"):
        on_ray(source, tmp_path / "out", cluster, format="mxfp4", workers=2)


def test_a_task_that_no_machine_can_hold_is_an_error_and_no_endless_wait(
    source: Path, tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("convert_ckpt.run.fleet._TASK_NBYTES", 2**50)
    with pytest.raises(CheckpointError, match="more than any machine of the cluster has for tasks"):
        on_ray(source, tmp_path / "out", cluster, format="mxfp4")


# Makes one file after the other at a pace that lets a test do something between them.
SLOW_TASKS = """
import time
from run_ckpt.storage.writer import ShardWriter
finish = ShardWriter.finish
def slowly(self):
    time.sleep(1.5)
    return finish(self)
ShardWriter.finish = slowly
"""


@pytest.fixture
def slow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each task of clusters that start from now on take a second and a half."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(SLOW_TASKS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *sys.path]))


@pytest.fixture
def slow_cluster(slow: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    from ray.cluster_utils import Cluster

    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_worker_niceness", "0")
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(2):
        made.add_node(num_cpus=1)
    made.wait_for_nodes()
    yield made
    stop(made)


def stop(cluster: Any) -> None:
    """Kill all nodes; Cluster.shutdown() refuses after a driver in this process."""
    for node in cluster.list_all_nodes()[::-1]:
        node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def records(output: Path) -> set[str]:
    return {path.stem for path in Path(f"{output}.partial/records/root").glob("*.json")}


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def start(source: Path, output: Path, cluster: Any) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", COMMAND, str(source), str(output), "--format", "mxfp4", "--engine", "ray"]
    return subprocess.Popen([*command, "--ray-address", cluster.address], stderr=subprocess.PIPE, text=True)


def test_a_node_killed_in_the_middle_loses_nothing_but_its_tasks(
    source: Path, tmp_path: Path, slow_cluster: Any
) -> None:
    convert(source, tmp_path / "whole", format="mxfp4")
    process = start(source, tmp_path / "out", slow_cluster)
    wait_for(lambda: len(records(tmp_path / "out")) >= 1)
    slow_cluster.remove_node(slow_cluster.list_all_nodes()[-1], allow_graceful=False)
    _, lines = process.communicate(timeout=180)
    assert process.returncode == 0, lines
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    made = [line for line in lines.splitlines() if line.startswith("wrote ")]
    lost = [line for line in lines.splitlines() if "the task was lost, and runs again" in line]
    assert len(made) == N_SHARDS  # each record was written once
    assert len(lost) <= 1  # the one task of the node


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_a_driver_that_ended_goes_on_with_what_is_finished(
    source: Path, tmp_path: Path, slow_cluster: Any, how: signal.Signals
) -> None:
    convert(source, tmp_path / "whole", format="mxfp4")
    process = start(source, tmp_path / "out", slow_cluster)
    wait_for(lambda: len(records(tmp_path / "out")) >= 2)
    process.send_signal(how)
    _, lines = process.communicate(timeout=60)
    assert process.returncode == {signal.SIGKILL: -signal.SIGKILL, signal.SIGINT: 130}[how], lines
    finished = records(tmp_path / "out")
    assert 2 <= len(finished) < N_SHARDS
    assert not (tmp_path / "out" / MANIFEST_NAME).exists()
    summary = on_ray(source, tmp_path / "out", slow_cluster, format="mxfp4")
    assert summary.n_files_resumed == len(finished)
    assert folder_bytes(tmp_path / "out") == folder_bytes(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()
