"""A conversion cut into tasks, done one by one in any order: the bytes are those of one run."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from convert_ckpt.run.assignment import Assignment, OnFile
from convert_ckpt.run.layers import MadeLayers
from convert_ckpt.run.tasks import Task, file_tasks, scan_tasks
from run_ckpt.progress import Progress, Silent
from run_ckpt.storage.folders import Folder
from tests.checkpoints import convert, folder_bytes, random_weight, save_checkpoint
from tests.test_calibrated import MODEL, make_hessian, write_input

LAYER = "model.layers.{}."
INPUTS = [
    *[tuple(f"{LAYER.format(i)}self_attn.{letter}_proj" for letter in "qkv") for i in range(2)],
    *[(f"{LAYER.format(i)}mlp.{name}_proj",) for i in range(2) for name in ("down", "up")],
]


def calibrated_llm(folder: Path) -> tuple[Path, Path]:
    """Return a source of three shards and its statistics: in the first all layers of one block, q, k and v of another
    in all of them.
    """
    block, other = [[name for names in INPUTS for name in names if name.startswith(LAYER.format(i))] for i in range(2)]
    names = [[*block, *other[:1]], other[1:2], other[2:]]
    shards = [{f"{name}.weight": random_weight(256, 256, seed=hash_of(name)) for name in part} for part in names]
    shards[0][f"{LAYER.format(0)}input_layernorm.weight"] = random_weight(1, 256)[0]
    source = save_checkpoint(folder / "in", shards, {"architectures": [MODEL], "model_type": "llama"})
    for i, layers in enumerate(INPUTS):
        write_input(folder / "stats", source, layers, make_hessian(256, i), make_hessian(256, i + 50))
    return source, folder / "stats"


def hash_of(name: str) -> int:
    return sum(name.encode())


class TaskByTask:
    """A maker that does one task after the other, in an order of its own, and keeps what it did."""

    def __init__(self, seed: int):
        self._random = random.Random(seed)
        self.done: list[Task] = []
        self.counted = Counted()
        self.nbytes = 0

    def make(self, assignment: Assignment, folder: Folder, fetched: Path, on_file: OnFile, progress: Progress) -> None:
        self.nbytes += assignment.nbytes()
        amax = dict(assignment.group_amax)
        for scan in self._shuffled(scan_tasks(assignment)):
            for group, bits in self._do(scan, folder, [])[1].items():
                amax[group] = max(amax.get(group, 0), bits)
        for task in self._shuffled(file_tasks(assignment, amax)):
            layers = {part.name: self._do(part, folder, [])[2] for part in self._shuffled(task.parts)}
            for name, record in self._do(task, folder, [layers[part.name] for part in task.parts])[0].items():
                on_file(name, record)

    def _do(self, task: Task, folder: Folder, made: list[Any]) -> tuple[Any, Any, MadeLayers | None]:
        self.done.append(task)
        return task.carry_out(folder, 2, self.counted, made)

    def _shuffled(self, tasks: Any) -> list[Task]:
        return self._random.sample(tasks, len(tasks))


class Counted(Silent):
    """Sums up what it is told."""

    def __init__(self) -> None:
        self.nbytes = 0

    def advance(self, nbytes: int) -> None:
        self.nbytes += nbytes


@pytest.fixture
def by_tasks(monkeypatch: pytest.MonkeyPatch) -> TaskByTask:
    maker = TaskByTask(seed=1)

    @contextmanager
    def open_maker(*_: object) -> Iterator[TaskByTask]:
        yield maker

    monkeypatch.setattr("convert_ckpt.pipeline._open_maker", open_maker)
    return maker


@pytest.mark.parametrize(
    "options",
    [
        {"format": "mxfp4"},
        {"format": "nvfp4"},
        {"format": "fp8", "granularity": "tensor", "static": True},
        {"format": "fp8", "granularity": "block"},
        {"format": "mxfp4", "fold": True},
        {"format": "fp8", "shard_size": 300_000},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_layers_made_apart_give_the_bytes_of_one_run(
    options: dict[str, Any], tmp_path: Path, by_tasks: TaskByTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, stats = calibrated_llm(tmp_path)
    convert(source, tmp_path / "tasks", calibration=stats, **options)
    assert sum(task.is_apart for task in by_tasks.done) >= 3
    assert by_tasks.counted.nbytes == by_tasks.nbytes
    monkeypatch.undo()
    convert(source, tmp_path / "whole", calibration=stats, **options)
    assert folder_bytes(tmp_path / "tasks") == folder_bytes(tmp_path / "whole")
