"""One component: what an earlier run finished is taken over, the rest converted, then the small files written."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Protocol

from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.run.engine import Engine, FileRecord
from convert_ckpt.run.fingerprint import check_unchanged, shard_identities
from convert_ckpt.run.partial_output import Staging
from convert_ckpt.run.side_files import write_side_files
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.errors import ManifestError
from run_ckpt.contract.file_names import join_names
from run_ckpt.contract.manifest import MANIFEST_NAME, Layer, Manifest
from run_ckpt.progress import Progress
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.hashing import describe_entry
from run_ckpt.storage.manifest_file import read_manifest
from run_ckpt.storage.units import format_nbytes


class ShardListener(Protocol):
    """Told which shards will come, of each that is finished (from any thread), and before they get another path."""

    def start(self, names: Iterable[str]) -> None: ...
    def add(self, name: str, path: Path, nbytes: int) -> None: ...
    def stop(self) -> None: ...


def convert_component(
    opened: OpenedSource,
    planned: ComponentPlan,
    staging: Staging,
    n_workers: int,
    progress: Progress,
    listener: ShardListener | None,
) -> int:
    """Convert one component into the staging folder; return how many files were finished before."""
    with staging.open_result(planned.name) as folder:
        before = shard_identities(opened, planned)
        component = planned.name or "root"
        records = _take_over(staging.read_records(component), folder, progress)
        n_resumed = len(records)

        def hand_over(name: str, record: FileRecord) -> None:
            if listener:
                listener.add(join_names(planned.name, name), folder.path / name, record.file["nbytes"])

        def on_file(name: str, record: FileRecord) -> None:
            staging.write_record(component, name, asdict(record))
            records[name] = record
            progress.log(f"wrote {join_names(planned.name, name)} ({format_nbytes(record.file['nbytes'])})")
            hand_over(name, record)

        for name, record in records.items():
            hand_over(name, record)

        shards = planned.source.folder.shards
        provider = opened.provide_shards(planned.name, shards, staging.fetched / component, progress)
        engine = Engine(planned.plan, shards, folder, records.copy(), on_file, progress, provider)
        progress.start(f"convert {planned.name}".strip(), engine.progress_nbytes)
        engine.run(n_workers)
        check_unchanged(before, shard_identities(opened, planned))
        side_files = write_side_files(folder, planned.source, planned.plan)
        sources = {
            name: {**entry, **opened.stated_sha256(planned.name, name)}
            for record in records.values()
            for name, entry in record.sources.items()
        }
        manifest = _complete_manifest(planned.plan.manifest, records, side_files, sources)
        folder.write(MANIFEST_NAME, manifest.to_json().encode())
        return n_resumed


def _take_over(records: dict[str, dict[str, Any]], folder: Folder, progress: Progress) -> dict[str, FileRecord]:
    """Return the records of those files of an earlier run that are still as it wrote them."""
    progress.start("check what is there", sum(entry["file"]["nbytes"] for entry in records.values()))
    intact = {}
    for name, entry in records.items():
        if describe_entry(folder, name) == entry["file"]:
            intact[name] = FileRecord(**entry)
        else:
            progress.log(f"{name}: is no longer as it was written; it is converted again")
        progress.advance(entry["file"]["nbytes"])
    return intact


def _complete_manifest(
    manifest: Manifest,
    records: Mapping[str, FileRecord],
    side_files: dict[str, dict[str, Any]],
    sources: dict[str, dict[str, Any]],
) -> Manifest:
    measured = {module: entry for record in records.values() for module, entry in record.layers.items()}
    return replace(
        manifest,
        source={**manifest.source, "files": sources},
        layers={module: replace(layer, **measured[module]) for module, layer in manifest.layers.items()},
        files={**side_files, **{name: record.file for name, record in records.items()}},
    )


def is_published(output: Path, planned: ComponentPlan) -> bool:
    """True where OUTPUT holds what the plan makes: its manifest is the plan's but for what only a run knows."""
    try:
        found = read_manifest(output / planned.name)
    except ManifestError:
        return False
    return _planned(found).to_json() == _planned(planned.plan.manifest).to_json()


def _planned(manifest: Manifest) -> Manifest:
    source = {key: value for key, value in manifest.source.items() if key != "files"}
    return replace(
        manifest, source=source, files={}, layers={name: _unmeasured(layer) for name, layer in manifest.layers.items()}
    )


def _unmeasured(layer: Layer) -> Layer:
    return replace(layer, sqnr_db=None, max_abs_error=None, method=None, output_sqnr_db=None)
