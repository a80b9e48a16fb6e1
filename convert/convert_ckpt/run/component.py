"""The components of a run: what an earlier one finished is taken over, the rest made, then the small files written."""

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.run.assignment import Assignment, Maker
from convert_ckpt.run.fingerprint import check_unchanged, shard_identities
from convert_ckpt.run.output_files import FileRecord
from convert_ckpt.run.partial_output import Staging
from convert_ckpt.run.schedule import narrow
from convert_ckpt.run.share import Share, files_of_share
from convert_ckpt.run.shared_scales import check_shared_scales, in_result
from convert_ckpt.run.side_files import write_side_files
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.file_names import join_names
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.progress import Progress
from run_ckpt.storage.checks import check_written
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.hashing import describe_entry, write_parts
from run_ckpt.storage.units import format_nbytes

# A disk or a network file system answers several readers faster than one.
_HASHED_AT_ONCE = 4


class ShardListener(Protocol):
    """Told which shards will come and component -> its manifest to be, of each shard that is finished (from any
    thread), and before they get another path.
    """

    def start(self, names: Iterable[str], manifests: Mapping[str, Manifest]) -> None: ...
    def add(self, name: str, path: Path, nbytes: int) -> None: ...
    def stop(self) -> None: ...


@dataclass(frozen=True)
class Conversion:
    """What a run makes of ``plans`` in ``staging``, as a whole or a share of it.

    ``listener`` gets each shard as soon as it is finished, those of an earlier run first.
    """

    opened: OpenedSource
    plans: list[ComponentPlan]
    staging: Staging
    maker: Maker
    progress: Progress
    listener: ShardListener | None = None

    def make(self, share: Share | None = None) -> int:
        """Make the files of a share (None: all) that are not there yet; return how many were."""
        names = files_of_share(self.plans, share)
        left = [self._left_to_do(planned, names[planned.name]) for planned in self.plans if names[planned.name]]
        self.progress.start("convert", sum(work.assignment.nbytes() for work in left))
        for work in left:
            self._make_files(work)
        return sum(len(work.intact) for work in left)

    def missing(self) -> list[str]:
        """Return the names of the files that no run has finished."""
        return [
            join_names(planned.name, name)
            for planned in self.plans
            for name in sorted({file.name for file in planned.plan.files} - self._records(planned).keys())
        ]

    def complete(self, fingerprint: Mapping[str, Any]) -> dict[str, Manifest]:
        """Write the small files of the components, whose shards are all finished; return the manifests.

        fingerprint: of the source as the run began with it; the small files that are copied must still be those.
        Raises CheckpointError for a result that run-ckpt verify would refuse without reading a tensor.
        """
        manifests = {}
        for planned in self.plans:
            with self.staging.open_result(planned.name) as folder:
                if self.opened.store and planned.source.quantization:  # a source that is here was looked at before
                    check_shared_scales(planned.plan, in_result(planned.plan, folder.path))
                before = fingerprint["source"][planned.name]["side_files"]
                side_files = write_side_files(folder, planned.source, planned.plan, before)
                manifest = _complete_manifest(self.opened, planned, self._records(planned), side_files)
                digest = write_parts(folder, MANIFEST_NAME, manifest.to_json())["blake3"]
                headers = {file.name: file.header for file in planned.plan.files}
                check_written(folder.path, manifest, digest, headers)
            manifests[planned.name] = manifest
        return manifests

    def _left_to_do(self, planned: ComponentPlan, names: set[str]) -> "_Work":
        records = self._records(planned)
        with self.staging.open_result(planned.name) as folder:
            intact = _check({name: records[name] for name in records.keys() & names}, folder, self.progress)
        group_amax = {group: bits for record in records.values() for group, bits in record.group_amax.items()}
        plan = narrow(planned.plan, names - intact, group_amax)
        assignment = Assignment(self.opened, planned.name, plan, planned.source.folder.shards, group_amax)
        return _Work(planned, assignment, {name: records[name] for name in sorted(intact)})

    def _make_files(self, work: "_Work") -> None:
        planned, component = work.planned, _folder_name(work.planned)
        with self.staging.open_result(planned.name) as folder:
            before = shard_identities(self.opened, planned)

            def hand_over(name: str, record: FileRecord) -> None:
                if self.listener:
                    self.listener.add(join_names(planned.name, name), folder.path / name, record.file["nbytes"])

            def on_file(name: str, record: FileRecord) -> None:
                self.staging.write_record(component, name, asdict(record))
                self.progress.log(f"wrote {join_names(planned.name, name)} ({format_nbytes(record.file['nbytes'])})")
                hand_over(name, record)

            for name, record in work.intact.items():
                hand_over(name, record)

            fetched = self.staging.fetched / component
            self.maker.make(work.assignment, folder, fetched, on_file, self.progress)
            check_unchanged(before, shard_identities(self.opened, planned))

    def _records(self, planned: ComponentPlan) -> dict[str, FileRecord]:
        found = self.staging.read_records(_folder_name(planned))
        return {name: FileRecord(**entry) for name, entry in found.items()}


@dataclass(frozen=True)
class _Work:
    """What is left of a component: the files to make, and the records of those that are intact."""

    planned: ComponentPlan
    assignment: Assignment
    intact: dict[str, FileRecord]


def _folder_name(planned: ComponentPlan) -> str:
    return planned.name or "root"


def _check(records: dict[str, FileRecord], folder: Folder, progress: Progress) -> set[str]:
    """Return those of the files of an earlier run, or of others, that are still as they were written."""
    progress.start("check what is there", sum(record.file["nbytes"] for record in records.values()))

    def is_intact(name: str) -> bool:
        if not (intact := describe_entry(folder, name) == records[name].file):
            progress.log(f"{name}: is no longer as it was written; it is converted again")
        progress.advance(records[name].file["nbytes"])
        return intact

    with ThreadPoolExecutor(_HASHED_AT_ONCE) as pool:
        return {name for name, intact in zip(records, pool.map(is_intact, records), strict=True) if intact}


def _complete_manifest(
    opened: OpenedSource,
    planned: ComponentPlan,
    records: dict[str, FileRecord],
    side_files: dict[str, dict[str, Any]],
) -> Manifest:
    manifest = planned.plan.manifest
    measured = {module: entry for record in records.values() for module, entry in record.layers.items()}
    sources = {
        name: {**entry, **opened.stated_sha256(planned.name, name)}
        for record in records.values()
        for name, entry in record.sources.items()
    }
    return replace(
        manifest,
        source={**manifest.source, "files": sources},
        layers={module: replace(layer, **measured[module]) for module, layer in manifest.layers.items()},
        files={**side_files, **{name: record.file for name, record in records.items()}},
    )
