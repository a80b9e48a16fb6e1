"""OUTPUT that is there already: the result of this very command, or something else."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.differences import first_of, manifest_differences
from run_ckpt.contract.errors import ManifestError
from run_ckpt.contract.file_names import join_names
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.progress import Progress
from run_ckpt.storage.hashing import hash_path
from run_ckpt.storage.manifest_file import read_manifest


def is_result(output: Path) -> bool:
    """True where ``output`` holds a finished conversion, of whatever source."""
    with suppress(OSError):  # a name that no folder can have
        return any(output.glob(MANIFEST_NAME)) or any(output.glob(f"*/{MANIFEST_NAME}"))
    return False


def is_published(output: Path, planned: ComponentPlan) -> bool:
    """True where OUTPUT holds what the plan makes: its manifest is the plan's but for what only a run knows."""
    try:
        return not manifest_differences(read_manifest(output / planned.name), planned.plan.manifest)
    except ManifestError:
        return False


def result_faults(output: Path, opened: OpenedSource, plans: list[ComponentPlan], progress: Progress) -> list[str]:
    """Return why ``output`` is not what a run of ``plans`` would write: nothing where it is.

    A source on this machine is hashed, so that a changed one does not pass for the one that was converted; of a
    source elsewhere the revision, the sizes and the SHA-256, as far as they are stated, are compared.
    """
    manifests = {planned.name: read_manifest(output / planned.name) for planned in plans}
    faults = []
    for planned in plans:
        found = manifest_differences(manifests[planned.name], planned.plan.manifest)
        if found:
            faults.append(f"{output}: holds another result ({first_of(found)})")
    if not faults:
        progress.start("hash source", sum(planned.plan.source_nbytes for planned in plans) if not opened.store else 0)
        for planned in plans:
            faults += _file_faults(output / planned.name, planned, manifests[planned.name])
            faults += _source_faults(opened, planned, manifests[planned.name], progress)
    return [f"{fault}. Choose another folder, or remove {output}." for fault in faults]


def _file_faults(folder: Path, planned: ComponentPlan, manifest: Manifest) -> Iterator[str]:
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["nbytes"]:
            yield f"{path}: is missing or of another size than its manifest says"


def _source_faults(
    opened: OpenedSource, planned: ComponentPlan, manifest: Manifest, progress: Progress
) -> Iterator[str]:
    for shard in planned.source.folder.shards:
        entry = manifest.source["files"].get(shard.name, {})
        if opened.store:
            stated = opened.stated_sha256(planned.name, shard.name)
            is_same = shard.header.file_nbytes == entry.get("nbytes") and stated.items() <= entry.items()
        else:
            is_same = hash_path(shard.path, progress.advance) == entry.get("blake3")
        if not is_same:
            yield f"{join_names(planned.name, shard.name)}: is not the file that the result was made from"
