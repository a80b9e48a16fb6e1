"""The tasks that an assignment is cut into, each for whatever machine: scans, layers made apart, and files."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from convert_ckpt.plan.plan import Plan, TensorPlan
from convert_ckpt.run.assignment import Assignment
from convert_ckpt.run.layers import MadeLayers, read_made, set_apart
from convert_ckpt.run.output_files import FileRecord
from convert_ckpt.run.schedule import list_scans, list_slabs, narrow
from run_ckpt.contract.file_names import join_names
from run_ckpt.progress import Progress
from run_ckpt.storage.folders import Folder, open_folder


@dataclass(frozen=True)
class Task:
    """An assignment under the name that the user reads.

    Its file is made of nothing but layers for another file (``is_apart``), or is given those of ``parts``.
    """

    name: str
    assignment: Assignment
    is_apart: bool = False
    parts: tuple["Task", ...] = ()

    def carry_out(
        self, folder: Folder, n_threads: int, progress: Progress, made: Sequence[MadeLayers]
    ) -> tuple[dict[str, FileRecord], dict[str, int], MadeLayers | None]:
        """Return the records of files made in ``folder``, what is known of scale groups, and layers made apart.

        made: the layers of the parts.
        """
        records: dict[str, FileRecord] = {}
        with TemporaryDirectory(prefix="convert-ckpt-") as name:
            scratch = Path(name)
            with open_folder(scratch) if self.is_apart else nullcontext(folder) as place:
                fetched = scratch / "source"
                amax = self.assignment.carry_out(place, fetched, n_threads, records.__setitem__, progress, made)
            if not self.is_apart:
                return records, amax, None
            (file,) = self.assignment.plan.files
            return {}, amax, read_made(scratch / file.name, file, records[file.name])


def scan_tasks(assignment: Assignment) -> list[Task]:
    """Return the scans, shard by shard, that have to be done before any file is made."""
    scans = list_scans(assignment.plan, assignment.group_amax.keys())
    cuts = [_cut(assignment, scan, {}) for scan in scans]
    return [Task(join_names(assignment.component, f"scan of {cut.shards[0].name}"), cut) for cut in cuts]


def file_tasks(assignment: Assignment, group_amax: dict[str, int]) -> list[Task]:
    """Return a task for each file. group_amax: with what the scans found.

    Of a source elsewhere each shard is fetched once, so that its layers are made where its file is.
    """
    tasks = []
    for file in assignment.plan.files:
        name = join_names(assignment.component, file.name)
        plan = narrow(assignment.plan, {file.name}, group_amax.keys())
        apart, rest = ([], plan) if assignment.opened.store else set_apart(plan)
        cuts = (_cut(assignment, layers, group_amax) for layers in apart)
        parts = tuple(Task(f"{name}: {cut.plan.tensors[0].spec.name}", cut, is_apart=True) for cut in cuts)
        tasks.append(Task(name, _cut(assignment, rest, group_amax), parts=parts))
    return tasks


def _cut(assignment: Assignment, plan: Plan, group_amax: dict[str, int]) -> Assignment:
    """Return the part of an assignment that ``plan`` is, with paths that mean the same on every machine."""
    names = {shard for slab in list_slabs(plan, group_amax.keys()) for shard in slab.shards}
    shards = (replace(s, path=s.path.absolute()) for s in assignment.shards if s.name in names)
    plan = replace(plan, tensors=tuple(_with_absolute_path(tensor) for tensor in plan.tensors))
    return replace(assignment, plan=plan, shards=tuple(shards), group_amax=group_amax)


def _with_absolute_path(tensor: TensorPlan) -> TensorPlan:
    statistics = tensor.statistics
    return replace(tensor, statistics=replace(statistics, path=statistics.path.absolute())) if statistics else tensor
