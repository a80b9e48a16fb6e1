"""`run-ckpt assemble`: the complete folder of a pipeline with converted transformers in place of its own, by links."""

import os
from pathlib import Path

from run_ckpt.contract.errors import FaultsError
from run_ckpt.storage.atomic import target_faults
from run_ckpt.storage.components import PIPELINE_INDEX_NAME, find_components
from run_ckpt.storage.json_files import read_json_object
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.storage.partial import build_folder, remove_what_is_left
from run_ckpt.storage.pipelines import pipeline_folder, rest_of_pipeline
from run_ckpt.storage.reference import parse_reference

_ALONE = "transformer"
_TOOL = "run-ckpt-assemble"


def assemble(output: Path, folder: Path, base: str) -> None:
    """Make ``folder`` a pipeline: ``output``'s components, and all else of ``base``; it appears complete or not at all.

    base: a pipeline's folder, or a Hub repo of which all but those components is fetched into the Hub's own cache.
    Nothing is done where ``folder`` is that already. Raises CheckpointError where ``output`` is no result, or ``base``
    no pipeline that has its components.
    """
    components = {name or _ALONE: Path(os.path.realpath(path)) for name, path in find_components(output).items()}
    for path in components.values():
        read_checked_manifest(path)
    source = pipeline_folder(parse_reference(base), components)
    links = components | rest_of_pipeline(source, components)
    remove_what_is_left(folder, _TOOL, of_links=True)
    if _links_in(folder) == links:
        return
    faults = target_faults(output, folder) or target_faults(source, folder)
    faults += _base_faults(source, base, list(components))
    if faults:
        raise FaultsError("nothing was written", faults)
    with build_folder(folder, _TOOL, of_links=True) as result:
        for name, path in links.items():
            result.link(name, path)


def _links_in(folder: Path) -> dict[str, Path]:
    """Return name -> target of what is in a folder, "" for what is no link; {} where there is none."""
    if not folder.is_dir():
        return {}
    return {entry.name: entry.readlink() if entry.is_symlink() else Path() for entry in folder.iterdir()}


def _base_faults(source: Path, base: str, components: list[str]) -> list[str]:
    index, faults = read_json_object(source / PIPELINE_INDEX_NAME)
    return faults or [
        f"{base}: its {PIPELINE_INDEX_NAME} has no {name}. Give the pipeline that OUTPUT was made of."
        for name in components
        if name not in (index or {})
    ]
