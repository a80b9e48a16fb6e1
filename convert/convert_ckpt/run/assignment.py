"""Files to make, and what that takes: the same for a whole run, for a part, and for a task on another machine."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

from convert_ckpt.plan.plan import Plan
from convert_ckpt.run.engine import Engine
from convert_ckpt.run.layers import MadeLayers, with_layers
from convert_ckpt.run.memory import n_workers_within
from convert_ckpt.run.output_files import FileRecord
from convert_ckpt.run.schedule import Slab, list_slabs
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.progress import Progress
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.shards import Shard

OnFile = Callable[[str, FileRecord], None]


@dataclass(frozen=True)
class Assignment:
    """The files of ``plan``, a component's or a share of it (schedule.narrow): names and offsets, nothing to decide.

    ``shards`` are those that it reads; ``group_amax`` holds the float32 bits of the amax of scale groups, as far as
    they are known.
    """

    opened: OpenedSource
    component: str
    plan: Plan
    shards: tuple[Shard, ...]
    group_amax: dict[str, int]

    @cached_property
    def slabs(self) -> list[Slab]:
        """The work as slabs, in order."""
        return list_slabs(self.plan, self.group_amax.keys())

    def nbytes(self) -> int:
        """Return the sum of what a progress will be told."""
        return sum(slab.work_nbytes for slab in self.slabs)

    def carry_out(
        self,
        folder: Folder,
        fetched: Path,
        n_workers: int,
        on_file: OnFile,
        progress: Progress,
        made: Sequence[MadeLayers] = (),
    ) -> dict[str, int]:
        """Make the files in ``folder`` by ``n_workers`` threads; return the amax of all scale groups known now.

        fetched: the folder for shards of a remote source. on_file: called for each finished file, from any thread.
        made: layers that only have to be put into the one file of the plan.
        """
        tensors = {name: data for part in made for name, data in part.tensors.items()}

        def on_made(name: str, record: FileRecord) -> None:
            on_file(name, with_layers(record, made))

        provider = self.opened.provide_shards(self.component, self.shards, fetched, progress)
        engine = Engine(
            self.plan, self.slabs, self.shards, folder, self.group_amax, on_made, progress, provider, tensors
        )
        return engine.run(n_workers)


class Maker(Protocol):
    """Carries out an assignment, on this machine or on others."""

    def make(
        self, assignment: Assignment, folder: Folder, fetched: Path, on_file: OnFile, progress: Progress
    ) -> None: ...


@dataclass(frozen=True)
class ThisMachine:
    """Up to ``n_workers`` threads; max_memory: bytes for layers whose codes are chosen by statistics."""

    n_workers: int
    max_memory: int

    def make(self, assignment: Assignment, folder: Folder, fetched: Path, on_file: OnFile, progress: Progress) -> None:
        """Make the files of an assignment."""
        n_workers = n_workers_within(self.max_memory, assignment.plan, self.n_workers)
        assignment.carry_out(folder, fetched, n_workers, on_file, progress)
