"""The manifest of a converted component, read from its folder."""

from collections.abc import Mapping
from pathlib import Path

from run_ckpt.contract.errors import FaultsError, ManifestError
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest, parse_manifest
from run_ckpt.contract.manifest_checks import manifest_faults
from run_ckpt.storage.files import MAX_MANIFEST_NBYTES, read_small
from run_ckpt.storage.hashing import hash_bytes, hash_path


def read_manifest(folder: Path) -> Manifest:
    """Return the manifest in ``folder``. Raises ManifestError where it is missing or as parse_manifest."""
    path = folder / MANIFEST_NAME
    try:
        data = read_small(path, MAX_MANIFEST_NBYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ManifestError(
            f"{folder}: no {MANIFEST_NAME}. This is no finished result of convert-ckpt; run convert-ckpt on the source."
        ) from error
    except OSError as error:
        raise ManifestError(f"{path}: can't be read: {error.strerror}. Fetch it again, or convert again.") from error
    return parse_manifest(path, data)


def read_checked_manifest(folder: Path) -> Manifest:
    """Return the manifest in ``folder``. Raises ManifestError, or FaultsError where it contradicts itself."""
    manifest = read_manifest(folder)
    check_manifest(folder, manifest)
    return manifest


def check_manifest(folder: Path, manifest: Manifest) -> None:
    """Raise FaultsError where the manifest in ``folder`` contradicts itself."""
    if faults := manifest_faults(manifest):
        raise FaultsError(f"{folder / MANIFEST_NAME}: contradicts itself", faults)


def confirm_manifest(folder: Path, digest: str) -> None:
    """Raise ManifestError unless the manifest in ``folder`` has the BLAKE3 ``digest`` and is one that can be read."""
    path = folder / MANIFEST_NAME
    if path.stat().st_size > MAX_MANIFEST_NBYTES:
        raise ManifestError(
            f"{path}: takes more than {MAX_MANIFEST_NBYTES:,} bytes, which nothing of ours reads again. Report"
            " this with the number of tensors."
        )
    if hash_path(path) != digest:
        raise ManifestError(f"{path}: is not what was written a moment ago. Look at the disk, then convert again.")


def result_hash(components: Mapping[str, Path]) -> str:
    """Return the hash of a result whose components lie in these folders, see hash_of_manifests."""
    return hash_of_manifests({name: hash_path(path / MANIFEST_NAME) for name, path in components.items()})


def hash_of_manifests(hashes: Mapping[str, str]) -> str:
    """Return a hash that ties every file of a result to who states it.

    hashes: component -> BLAKE3 of its manifest, which holds the hashes of all its files.
    BLAKE3 of the lines "COMPONENT HASH", by component.
    """
    return hash_bytes("".join(f"{name} {digest}\n" for name, digest in sorted(hashes.items())).encode())
