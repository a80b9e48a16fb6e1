"""`run-ckpt assemble`: the complete folder of a pipeline with converted transformers in place of its own, by links."""

import shutil
from pathlib import Path

from run_ckpt.contract.errors import FaultsError
from run_ckpt.storage.atomic import target_faults
from run_ckpt.storage.components import PIPELINE_INDEX_NAME, find_components
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.storage.pipelines import link_rest, pipeline_folder
from run_ckpt.storage.reference import parse_reference

_ALONE = "transformer"


def assemble(output: Path, folder: Path, base: str) -> None:
    """Make ``folder`` a pipeline: ``output``'s components, and all else of ``base``; it appears complete or not at all.

    base: a pipeline's folder, or a Hub repo of which all but those components is fetched into the Hub's own cache.
    Raises CheckpointError where ``output`` is no result, or ``base`` no pipeline that has its components.
    """
    components = {name or _ALONE: path.resolve() for name, path in find_components(output).items()}
    for path in components.values():
        read_checked_manifest(path)
    source = pipeline_folder(parse_reference(base), components)
    faults = target_faults(output, folder) + _base_faults(source, base, list(components))
    if faults:
        raise FaultsError("nothing was written", faults)
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, path in components.items():
        (partial / name).symlink_to(path)
    link_rest(source, partial, components)
    partial.replace(folder)


def _base_faults(source: Path, base: str, components: list[str]) -> list[str]:
    index = (source / PIPELINE_INDEX_NAME).read_text(encoding="utf-8")
    return [
        f"{base}: its {PIPELINE_INDEX_NAME} has no {name}. Give the pipeline that OUTPUT was made of."
        for name in components
        if f'"{name}"' not in index
    ]
