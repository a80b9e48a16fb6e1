"""What a pipeline has besides its converted components: found here or on the Hub, and linked beside them."""

import os
from collections.abc import Collection
from pathlib import Path

from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.file_names import INDEX_SUFFIX, SUFFIX
from run_ckpt.storage.components import PIPELINE_INDEX_NAME
from run_ckpt.storage.files import similar_path
from run_ckpt.storage.hub_client import CLIENT, hub_errors
from run_ckpt.storage.reference import HubRef, Reference, parse_reference


def check_base(base: str, *, is_pipeline: bool) -> None:
    """Raise UsageError where --model-path means something here that is no model, before anything is loaded."""
    path = parse_reference(base)
    if not isinstance(path, Path):
        return
    if not path.exists():
        raise UsageError(f"--model-path {base}: no such folder{similar_path(path)}. Give a folder or owner/name.")
    if is_pipeline and not (path / PIPELINE_INDEX_NAME).is_file():
        raise UsageError(f"--model-path {base}: no {PIPELINE_INDEX_NAME}, so it is no pipeline in diffusers' layout.")


def pipeline_folder(base: Reference, components: Collection[str]) -> Path:
    """Return the folder of a pipeline; of one on the Hub all but ``components`` (patterns) is fetched into its cache.

    Raises UsageError where it is no pipeline in diffusers' layout, and FetchError.
    """
    folder = base if isinstance(base, Path) else None
    if isinstance(base, HubRef) and not base.folder:
        folder = _fetch(base, components)
    if folder is None or not (folder / PIPELINE_INDEX_NAME).is_file():
        raise UsageError(f"{base}: no {PIPELINE_INDEX_NAME}, so it is no pipeline in diffusers' layout.")
    return folder


def rest_of_pipeline(source: Path, components: Collection[str]) -> dict[str, Path]:
    """Return name -> place of all that is in the pipeline ``source`` but ``components``, hidden files and weight files.

    The index, by which a pipeline is known, comes last.
    """
    entries = sorted(source.iterdir(), key=lambda entry: (entry.name == PIPELINE_INDEX_NAME, entry.name))
    return {
        entry.name: Path(os.path.realpath(entry))
        for entry in entries
        if not (entry.name in components or entry.name.startswith(".") or _is_weight(entry))
    }


def link_rest(source: Path, folder: Path, components: Collection[str]) -> None:
    """Link the rest of the pipeline ``source`` into ``folder``. What is there stays."""
    for name, place in rest_of_pipeline(source, components).items():
        if not os.path.lexists(folder / name):
            (folder / name).symlink_to(place)


def _is_weight(entry: Path) -> bool:
    return entry.is_file() and entry.name.endswith((SUFFIX, INDEX_SUFFIX))


def _fetch(repo: HubRef, components: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download

    ignored = [f"{name}/*" for name in components]
    with hub_errors(repo.repo_id, revision=repo.revision):
        return Path(snapshot_download(repo.repo_id, revision=repo.revision, ignore_patterns=ignored, **CLIENT))
