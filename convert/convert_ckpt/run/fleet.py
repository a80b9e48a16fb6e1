"""Files made by a Ray cluster, which places the tasks, repeats those of lost machines, and brings their results."""

import logging
import math
import os
import sys
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from convert_ckpt.run.assignment import Assignment, OnFile
from convert_ckpt.run.cluster import Cluster
from convert_ckpt.run.fleet_progress import LOOK_SECONDS, Report, Shown, Tally
from convert_ckpt.run.layers import MadeLayers
from convert_ckpt.run.memory import largest_layer, n_workers_within
from convert_ckpt.run.output_files import FileRecord
from convert_ckpt.run.tasks import Task, file_tasks, scan_tasks
from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.progress import Progress
from run_ckpt.storage.folders import Folder, open_folder
from run_ckpt.storage.units import format_nbytes
from run_ckpt.version import VERSION

# What a task takes without statistics: 196 MiB were measured, with four threads; large slabs take 384 MiB more.
_TASK_NBYTES = 640 * 2**20
# More threads wait for the disk sooner than they help, and a shard is converted in seconds.
_MOST_THREADS = 4
# Tasks handed to Ray at once, so that it can place, and a cluster that grows sees what for.
_MOST_TASKS = 1000
_RETRIES = 3
# Signs of life (RAY_grpc_client_keepalive_time_ms) are not asked for sooner: the machines of a cluster that others
# started take more than one in five minutes for abuse, and end the connection of a task that lasts.
_RAY_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",  # else Ray reports to its makers
    "RAY_task_oom_retries": str(_RETRIES),  # else for ever
    # In a cluster of our own; at Ray's 15 a task gets a thirtieth of a core that somebody else uses, too.
    "RAY_worker_niceness": "0",
}


class Fleet:
    """The connection to a cluster; a context manager. Its ``make`` is that of an assignment.Maker.

    A task scans the scale groups of one shard, makes the layers of one input whose codes are chosen by statistics, or
    makes one output file, into which those are put; it is given a plan narrowed to that. Only this process writes
    records and publishes. A task that was lost with its machine runs again on another one, and so does one whose layers
    were lost with it: until their file is made, they lie in the memory of the cluster.
    """

    def __init__(self, cluster: Cluster, max_memory: int):
        self._cluster = cluster
        self._max_memory = max_memory

    def __enter__(self) -> "Fleet":
        with ExitStack() as on_exit:
            # Ray prints what happens to machines, and standard output is for results.
            on_exit.enter_context(redirect_stdout(sys.stderr))
            if not ray.is_initialized():
                _connect(self._cluster.address)
                on_exit.callback(ray.shutdown)
            machines = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
            self._n_threads = _choose_threads(self._cluster.n_threads, machines)
            # Where there is none yet, one will come that is large enough.
            self._memory = max((machine["memory"] for machine in machines), default=math.inf)
            here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            self._tally: Any = ray.remote(Tally).options(num_cpus=0, scheduling_strategy=here).remote()
            self._on_exit = on_exit.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._on_exit.close()

    def make(self, assignment: Assignment, folder: Folder, fetched: Path, on_file: OnFile, progress: Progress) -> None:
        """Make the files of an assignment, first the scans that they wait for."""
        amax = dict(assignment.group_amax)

        def on_scan(_: dict[str, FileRecord], found: dict[str, int]) -> None:
            for group, bits in found.items():
                amax[group] = max(amax.get(group, 0), bits)

        def on_made(records: dict[str, FileRecord], _: dict[str, int]) -> None:
            for name, record in records.items():
                on_file(name, record)

        self._run(scan_tasks(assignment), folder.path, on_scan, progress)
        tasks = [part for task in file_tasks(assignment, amax) for part in (*task.parts, task)]
        self._run(tasks, folder.path, on_made, progress)

    def _run(
        self,
        tasks: list[Task],
        folder: Path,
        on_done: Callable[[dict[str, FileRecord], dict[str, int]], None],
        progress: Progress,
    ) -> None:
        """Carry out all; ``on_done`` is given the results of each, in the order in which they end."""
        waiting = deque(tasks)
        running: dict[Any, str] = {}
        layers: dict[str, Any] = {}
        shown = Shown(progress)
        try:
            while waiting or running:
                while waiting and len(running) < (self._cluster.n_tasks or _MOST_TASKS):
                    task = waiting.popleft()
                    result, made = self._submit(task, folder, [layers.pop(part.name) for part in task.parts])
                    running[result] = task.name
                    if task.is_apart:
                        layers[task.name] = made
                done, _ = ray.wait([*running], timeout=LOOK_SECONDS)
                shown.update(*ray.get(self._tally.read.remote()))
                for reference in done:
                    on_done(*_result(reference, running.pop(reference)))
            shown.update(*ray.get(self._tally.read.remote(forget=True)))
        finally:
            for reference in running:
                ray.cancel(reference, force=True)

    def _submit(self, task: Task, folder: Path, made: list[Any]) -> tuple[Any, Any]:
        """Hand a task to Ray; return what stands for its results, and for the layers that it made."""
        plan = task.assignment.plan
        most = min(self._max_memory, max(0, self._memory - _TASK_NBYTES))
        n_threads = n_workers_within(int(most), plan, self._n_threads)
        if task.is_apart:
            n_threads = min(n_threads, len(plan.tensors))
        memory = _TASK_NBYTES + n_threads * largest_layer(plan)
        if memory > self._memory:
            raise CheckpointError(
                f"{task.name}: takes {format_nbytes(memory)} of memory, more than any machine of the cluster has for"
                f" tasks ({format_nbytes(int(self._memory))}). Add a larger one, or record smaller blocks."
            )
        remote = ray.remote(_carry_out).options(
            num_returns=2,
            num_cpus=n_threads,
            memory=memory,
            max_retries=_RETRIES,
            retry_exceptions=[OSError],
            scheduling_strategy="SPREAD",
        )
        result, layers = remote.remote(VERSION, replace(task, parts=()), n_threads, folder, self._tally, *made)
        return result, layers


def _connect(address: str | None) -> None:
    for name, value in _RAY_SETTINGS.items():
        os.environ.setdefault(name, value)
    # Left out, Ray would look, for minutes, for the cluster that was last started here, though it be gone.
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, include_dashboard=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"--ray-address {address}: no Ray cluster answers ({error}). Start one with ray start."
        ) from error


def _choose_threads(asked: int | None, machines: list[dict[str, float]]) -> int:
    """Return how many threads a task has. Raises UsageError for more than any machine's CPUs."""
    cpus = [int(machine["CPU"]) for machine in machines]
    if asked and cpus and asked > max(cpus):
        raise UsageError(f"--workers {asked}: no machine of the cluster has so many CPUs, at most {max(cpus)}.")
    return asked or max(1, min([_MOST_THREADS, *cpus]))


def _carry_out(
    version: str, task: Task, n_threads: int, path: Path, tally: Any, *made: MadeLayers
) -> tuple[tuple[dict[str, FileRecord], dict[str, int]], MadeLayers | None]:
    """Run on a machine of the cluster: return the records of the files made and what is known of scale groups.

    And the layers that were made apart from their file.
    """
    if version != VERSION:
        raise CheckpointError(f"this machine has convert-ckpt {VERSION}, the driver {version}. Install the same.")
    report = Report(tally, task.name)
    try:
        folder = open_folder(path, follow=False)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: is not on this machine. OUTPUT must be shared by the cluster.") from error
    with folder:
        records, amax, layers = task.carry_out(folder, n_threads, report, made)
    report.send()
    return (records, amax), layers


def _result(reference: Any, name: str) -> tuple[dict[str, FileRecord], dict[str, int]]:
    """Return what a task returned; raise what it raised."""
    try:
        result: tuple[dict[str, FileRecord], dict[str, int]] = ray.get(reference)
    except RayTaskError as error:
        raise error.cause from error
    except RayError as error:
        raise CheckpointError(
            f"{name}: its process or machine was lost {_RETRIES + 1} times ({type(error).__name__}). See why, then"
            " run the same command again."
        ) from error
    return result
