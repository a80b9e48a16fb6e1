"""Measure 1, 2 and 4 Ray tasks on this machine, fit a model of what a conversion costs, and calculate clusters by it.

    python scripts/bench_scale.py [--gib 1] [--format mxfp4] [--folder DIR]

The model. A run of n shards of s GB each by w tasks at once takes

    fixed + n / w (task + s work)        seconds, with w <= cores, one thread per task

where ``fixed`` is connecting, planning and publishing, ``task`` what Ray and the opening of files take, ``work`` the
seconds of one thread per GB of BF16. The three are fitted (least squares) to runs of a few large and of many tiny
shards, all in the page cache. For a cluster a task has more threads and whole waves of tasks count; bytes read and
written take at least what the machines' links and the shared file system give. These rates are assumed, as options
say: nothing here measures them.
"""

import math
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click
import numpy as np
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from bench_convert import make_shards, source_nbytes

from convert_ckpt.options import Options
from convert_ckpt.pipeline import convert_checkpoint
from convert_ckpt.run.cluster import Cluster
from run_ckpt.progress import Silent

TERABYTE_GB = 1000.0
N_LARGE, N_TINY, TINY_NBYTES = 8, 48, 2**20


@dataclass(frozen=True)
class Run:
    """A measured run: ``n_tasks`` shards of ``nbytes`` together, ``width`` tasks at once."""

    n_tasks: int
    nbytes: int
    width: int
    seconds: float

    def row(self, cores: int) -> tuple[float, float, float]:
        """Return what ``fixed``, ``task`` and ``work`` of the model are multiplied by."""
        width = min(self.width, cores)
        return 1.0, self.n_tasks / width, self.nbytes / 1e9 / width


@dataclass(frozen=True)
class Model:
    """Seconds: of a run, of each task, and of one thread per GB."""

    fixed: float
    task: float
    work: float


@dataclass(frozen=True)
class Machines:
    """What a cluster is assumed to be; rates in GB/s, ``written`` in bytes per byte of the source."""

    n_nodes: int
    tasks_per_node: int
    threads_per_task: int
    node_rate: float
    storage_rate: float
    shard_gb: float
    written: float

    def seconds(self, model: Model) -> tuple[float, str]:
        """Return how long a terabyte takes, and what it waits for."""
        n_shards = math.ceil(TERABYTE_GB / self.shard_gb)
        at_once = self.n_nodes * self.tasks_per_node
        moved = TERABYTE_GB * (1 + self.written)
        one_task = model.task + self.shard_gb * model.work / self.threads_per_task
        limits = {
            "threads" if n_shards > at_once else "number of shards": math.ceil(n_shards / at_once) * one_task,
            "links of the machines": moved / (self.node_rate * min(self.n_nodes, n_shards)),
            "shared file system": moved / self.storage_rate,
        }
        slowest = max(limits, key=lambda name: limits[name])
        return model.fixed + limits[slowest], slowest


@click.command()
@click.option("--gib", default=1.0, show_default=True, help="Size of the measured checkpoint.")
@click.option("--format", "weight_format", default="mxfp4", show_default=True)
@click.option("--folder", type=click.Path(path_type=Path), help="Where to build it.  [default: a temporary folder]")
@click.option("--cores", default=2, show_default=True, help="Of this machine, so that more tasks gain nothing.")
@click.option("--tasks-per-node", default=4, show_default=True, help="Assumed, with four threads each.")
@click.option("--node-rate", default=3.0, show_default=True, help="Assumed: GB/s of a machine's link (25 Gbit/s).")
@click.option("--storage-rate", default=20.0, show_default=True, help="Assumed: GB/s of the shared file system.")
@click.option("--shard-gb", default=5.0, show_default=True, help="Assumed: size of a shard.")
def main(
    gib: float,
    weight_format: str,
    folder: Path | None,
    cores: int,
    tasks_per_node: int,
    node_rate: float,
    storage_rate: float,
    shard_gb: float,
) -> None:
    """Print what was measured, the model, and what a terabyte costs by it."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        runs, written = measure(Path(name), int(gib * 2**30), weight_format)
    model = fit(runs, cores)
    print_runs(runs, model, cores)
    table = Table(title=f"calculated: 1 TB of BF16 to {weight_format}")
    for column in ("machines", "time", "machine hours", "waits for"):
        table.add_column(column, justify="left" if column == "waits for" else "right")
    for n_nodes in (1, 8, 64):
        table.add_row(*row(Machines(n_nodes, tasks_per_node, 4, node_rate, storage_rate, shard_gb, written), model))
    Console().print(table)


def row(machines: Machines, model: Model) -> tuple[str, str, str, str]:
    """Return how many machines, their time and hours for a terabyte, and what they wait for."""
    seconds, limit = machines.seconds(model)
    return str(machines.n_nodes), f"{seconds:.0f} s", f"{machines.n_nodes * seconds / 3600:.2f}", limit


def measure(work: Path, nbytes: int, weight_format: str) -> tuple[list[Run], float]:
    """Return the runs, and how many bytes are written for each that is read."""
    large = make_shards(work / "large", N_LARGE, nbytes // N_LARGE)
    tiny = make_shards(work / "tiny", N_TINY, TINY_NBYTES)
    runs, written = [], 0.0
    with local_cluster(4) as address:
        convert(tiny, work / "out", weight_format, address, 4)  # starts the workers and compiles the kernels
        for width in (1, 2, 4):
            for source, n_tasks in ((large, N_LARGE), (tiny, N_TINY)):
                seconds, nbytes_out = convert(source, work / "out", weight_format, address, width)
                runs.append(Run(n_tasks, source_nbytes(source), width, seconds))
                if source == large:
                    written = nbytes_out / source_nbytes(source)
    return runs, written


def convert(source: Path, output: Path, weight_format: str, address: str, width: int) -> tuple[float, int]:
    """Return the seconds of a run and the bytes that it wrote; remove the result."""
    for path in source.glob("*.safetensors"):
        path.read_bytes()  # into the page cache, in every run
    started = time.monotonic()
    summary = convert_checkpoint(
        source,
        output,
        Options(format=weight_format, preset="generic"),
        n_workers=1,
        restart=False,
        progress=Silent(),
        cluster=Cluster(address, width, 1),
    )
    seconds = time.monotonic() - started
    for path in output.iterdir():
        path.unlink()
    output.rmdir()
    return seconds, summary.output_nbytes


@contextmanager
def local_cluster(n_nodes: int) -> Iterator[str]:
    """Yield the address of a cluster of nodes of one CPU, all on this machine; the driver keeps connected to it."""
    import ray
    from ray.cluster_utils import Cluster as LocalCluster

    cluster = LocalCluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    for _ in range(n_nodes):
        cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    try:
        yield cluster.address
    finally:
        ray.shutdown()
        for node in cluster.list_all_nodes()[::-1]:
            node.kill_all_processes(check_alive=False, allow_graceful=False, wait=True)


def fit(runs: list[Run], cores: int) -> Model:
    """Return the model with the least squared relative error over the runs."""
    rows = np.array([np.array(run.row(cores)) / run.seconds for run in runs])
    found, *_ = np.linalg.lstsq(rows, np.ones(len(runs)), rcond=None)
    return Model(*np.maximum(found, 0).tolist())


def print_runs(runs: list[Run], model: Model, cores: int) -> None:
    """Print each run beside the model's answer."""
    table = Table(title=f"measured here, {cores} cores")
    for column in ("shards", "GB", "tasks at once", "measured", "model"):
        table.add_column(column, justify="right")
    for run in runs:
        predicted = float(np.dot(run.row(cores), (model.fixed, model.task, model.work)))
        table.add_row(
            str(run.n_tasks), f"{run.nbytes / 1e9:.2f}", str(run.width), f"{run.seconds:.2f} s", f"{predicted:.2f} s"
        )
    Console().print(table)
    Console().print(
        f"fixed {model.fixed:.2f} s, task {model.task * 1000:.0f} ms, work {model.work:.2f} s per GB and thread"
    )


if __name__ == "__main__":
    main()
