"""`run-ckpt assemble`: the complete folder of a pipeline with converted transformers in place of its own, by links."""

import shutil
from pathlib import Path

from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.file_names import INDEX_SUFFIX, SUFFIX
from run_ckpt.storage.atomic import target_faults
from run_ckpt.storage.components import PIPELINE_INDEX_NAME, find_components
from run_ckpt.storage.hub_client import CLIENT, hub_errors
from run_ckpt.storage.manifest_file import read_checked_manifest

_ALONE = "transformer"


def assemble(output: Path, folder: Path, base: str) -> None:
    """Make ``folder`` a pipeline: ``output``'s components, and all else of ``base``; it appears complete or not at all.

    base: a pipeline's folder, or a Hub repo of which all but those components is fetched into the Hub's own cache.
    Raises CheckpointError where ``output`` is no result, or ``base`` no pipeline that has its components.
    """
    components = {name or _ALONE: path.resolve() for name, path in find_components(output).items()}
    for path in components.values():
        read_checked_manifest(path)
    source = Path(base) if Path(base).is_dir() else _fetch(base, list(components))
    faults = target_faults(output, folder) + _base_faults(source, base, list(components))
    if faults:
        raise FaultsError("nothing was written", faults)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for entry in sorted(source.iterdir()):
        is_weight = entry.is_file() and entry.name.endswith((SUFFIX, INDEX_SUFFIX))
        if entry.name not in components and not entry.name.startswith(".") and not is_weight:
            (partial / entry.name).symlink_to(entry.resolve())
    for name, path in components.items():
        (partial / name).symlink_to(path)
    partial.replace(folder)


def _fetch(repo_id: str, components: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    with hub_errors(repo_id):
        return Path(snapshot_download(repo_id, ignore_patterns=[f"{name}/*" for name in components], **CLIENT))


def _base_faults(source: Path, base: str, components: list[str]) -> list[str]:
    if not (source / PIPELINE_INDEX_NAME).is_file():
        return [f"{base}: no {PIPELINE_INDEX_NAME}, so it is no pipeline in diffusers' layout."]
    index = (source / PIPELINE_INDEX_NAME).read_text(encoding="utf-8")
    return [
        f"{base}: its {PIPELINE_INDEX_NAME} has no {name}. Give the pipeline that OUTPUT was made of."
        for name in components
        if f'"{name}"' not in index
    ]
