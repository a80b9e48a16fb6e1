"""Results and sources of the Hub as folders here: fetched into the Hub's own cache, for what reads folders."""

from pathlib import Path

from run_ckpt.contract.errors import FetchError, UsageError
from run_ckpt.contract.file_names import join_names
from run_ckpt.contract.manifest import MANIFEST_NAME
from run_ckpt.storage.hub_client import CLIENT, hub_errors
from run_ckpt.storage.reference import HubRef, UrlRef, parse_reference

_SMALL_FILES = ("*.json", "*.md")


def local_path(name: str | Path, *, small: bool = False) -> Path:
    """Return the folder or file that ``name`` means: a path here, or the snapshot of what it names on the Hub.

    small: the manifests, configs and cards are enough; where there is no manifest, all is fetched after all. Raises
    FetchError, and UsageError for another store.
    """
    reference = parse_reference(name)
    if isinstance(reference, UrlRef):
        raise UsageError(f"{reference}: only convert-ckpt reads other stores than the Hub. Copy it here first.")
    if isinstance(reference, Path):
        return reference
    if small and any((path := _fetch(reference, _SMALL_FILES)).rglob(MANIFEST_NAME)):
        return path
    return _fetch(reference, ("*",))


def repo_or_name(name: str | Path) -> str:
    """Return owner/name of what lies on the Hub, and of a path its last part."""
    reference = parse_reference(name)
    return reference.repo_id if isinstance(reference, HubRef) else Path(name).resolve().name


def _fetch(reference: HubRef, patterns: tuple[str, ...]) -> Path:
    """Return where files of these patterns lie, of the folder that is meant; or the file that is meant."""
    from huggingface_hub import snapshot_download

    folder, repo_id = reference.folder, reference.repo_id
    wanted = [join_names(folder, pattern) for pattern in patterns] + ([folder] if folder else [])
    try:
        with hub_errors(repo_id, revision=reference.revision):
            snapshot = snapshot_download(repo_id, revision=reference.revision, allow_patterns=wanted, **CLIENT)
    except FetchError as error:
        raise reference.as_path_error(error) from error.__cause__
    path = Path(snapshot) / folder
    if not path.exists():
        raise FetchError(f"{reference}: no {folder} in this repo. Check the name on its page.")
    return path
