"""What decides the bytes of a result: a run goes on only where all of it is the same."""

from collections.abc import Sequence
from typing import Any

from blake3 import blake3

from convert_ckpt.options import Options
from convert_ckpt.plan.calibration import calibration_digest
from convert_ckpt.plan.plan import ComponentPlan
from convert_ckpt.run.side_files import output_names
from convert_ckpt.source.opened import OpenedSource
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.storage.hashing import hash_path
from run_ckpt.version import VERSION


def fingerprint(opened: OpenedSource, plans: Sequence[ComponentPlan], options: Options) -> dict[str, Any]:
    """Everything that decides the bytes: a run goes on only where all of it is the same."""
    files = {"recipe": options.recipe, "sensitivities": options.sensitivities}
    contents = {name: hash_path(path) for name, path in files.items() if path}
    if options.calibration:
        contents["calibration"] = calibration_digest(options.calibration)
    result = {
        "tool_version": VERSION,
        "options": {**options.to_json(), **contents},
        "source": {planned.name: _identity(opened, planned) for planned in plans},
        "files": {planned.name: output_names(planned.source, planned.plan) for planned in plans},
    }
    if opened.store:
        result["remote"] = {"reference": opened.reference, "revision": opened.store.revision}
    return result


def _identity(opened: OpenedSource, planned: ComponentPlan) -> dict[str, Any]:
    source = planned.source
    side_files = {path.name: hash_path(path) for path in source.side_files}
    shards = shard_identities(opened, planned)
    return {"name": source.name, "shards": shards, CONFIG_NAME: source.config, "side_files": side_files}


def shard_identities(opened: OpenedSource, planned: ComponentPlan) -> dict[str, dict[str, Any]]:
    """Return shard -> what changes when its content does, as far as that is known without reading it."""
    identities = {}
    for shard in planned.source.folder.shards:
        header = blake3(shard.header.data).hexdigest()
        file = opened.remote_file(planned.name, shard.name)
        if file:
            identities[shard.name] = {"nbytes": file.nbytes, "version": file.version, "header_blake3": header}
        else:
            stat = shard.path.stat()
            # ctime can't be set: it tells a file of the same size and mtime from the one that was there.
            times = {"mtime_ns": stat.st_mtime_ns, "ctime_ns": stat.st_ctime_ns}
            identities[shard.name] = {"nbytes": stat.st_size, **times, "header_blake3": header}
    return identities


def check_unchanged(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError with the shards whose identity is another one than before."""
    changed = [name for name, identity in after.items() if identity != before[name]]
    if changed:
        raise CheckpointError(f"{', '.join(changed)}: changed while it was converted. Start again with --restart.")
