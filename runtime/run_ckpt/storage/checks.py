"""Files, headers, index and config.json against the manifest beside them: every contradiction, as sentences."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from run_ckpt.contract.dialects.table import header_metadata, quantization_config
from run_ckpt.contract.errors import FaultsError, ManifestError
from run_ckpt.contract.file_names import CARD_NAME, CONFIG_KEY, CONFIG_NAME, INDEX_SUFFIX, MAP_NAME
from run_ckpt.contract.manifest import MANIFEST_NAME, WEIGHT, Manifest
from run_ckpt.contract.manifest_checks import spec_faults
from run_ckpt.contract.manifest_types import type_faults
from run_ckpt.storage.files import MAX_INDEX_NBYTES
from run_ckpt.storage.hashing import hash_path
from run_ckpt.storage.header import Header, build_header, confirm_header
from run_ckpt.storage.json_files import make_index, read_json_object
from run_ckpt.storage.manifest_file import check_manifest, confirm_manifest, read_checked_manifest
from run_ckpt.storage.shards import TensorFolder, read_folder, read_shards

_REFETCH = "Fetch it again, or convert again."


def check_structure(path: Path) -> None:
    """Raise ManifestError, or FaultsError with all that contradicts the rest in the converted component ``path``.

    This is what run-ckpt verify finds without reading a tensor or hashing a file.
    """
    manifest, folder = read_checked_manifest(path), read_folder(path)
    _check(path, manifest, folder, [*text_faults(folder), *index_faults(manifest, folder)])


def check_written(path: Path, manifest: Manifest, digest: str, headers: Mapping[str, Header]) -> None:
    """Check as check_structure what was just written to ``path``, and raise as it.

    What is known need not be parsed again, only compared with the bytes on the disk: ``headers`` of the shards, as
    build_header made them, ``manifest``, whose text has the BLAKE3 ``digest``, and the index, of which it states that.
    """
    confirm_manifest(path, digest)
    if wrong := next(type_faults(manifest.document()), None):
        raise ManifestError(f"{path / MANIFEST_NAME}: {wrong}: is of the wrong type. Report this with the command.")
    check_manifest(path, manifest)
    found: list[str] = []
    shards = read_shards(path, sorted(headers), lambda shard: confirm_header(shard, headers[shard.name]), found)
    index_name = next(iter(_listed_indexes(manifest)), None)
    folder = TensorFolder(path, tuple(shards), index_name, ())
    _check(path, manifest, folder, [*found, *_written_index_faults(manifest, folder)])


def _check(path: Path, manifest: Manifest, folder: TensorFolder, found: list[str]) -> None:
    faults = [*unlisted_faults(path, manifest), *config_faults(path, manifest), *found]
    faults += header_faults(manifest, folder)
    if faults:
        raise FaultsError(f"{path}: not the checkpoint that its manifest describes", faults)


def header_faults(manifest: Manifest, folder: TensorFolder) -> list[str]:
    """Return a sentence for every tensor and ``__metadata__`` that is not exactly what the manifest implies."""
    stored = {tensor.spec.name: tensor.spec for _, tensor in folder.tensors()}
    shard_of = {tensor.spec.name: shard.name for shard, tensor in folder.tensors()}
    faults = spec_faults(manifest.specs(), stored, shard_of, "the manifest")
    metadata = header_metadata(manifest)
    for shard in folder.shards:
        if shard.header.metadata != metadata:
            faults.append(
                f"{shard.name}: __metadata__ is {_short(dict(shard.header.metadata))}, the {manifest.dialect} dialect"
                f" says {_short(dict(metadata))}. Convert again."
            )
    return faults + list(_separated(manifest, shard_of))


def text_faults(folder: TensorFolder) -> list[str]:
    """Return a sentence for every header that is another text than safetensors would write for its tensors."""
    return [
        f"{shard.name}: the header's text or order is not the one safetensors writes. Convert again."
        for shard in folder.shards
        if build_header((tensor.spec for tensor in shard.header.tensors), shard.header.metadata).data
        != shard.header.data
    ]


def _separated(manifest: Manifest, shard_of: Mapping[str, str]) -> Iterator[str]:
    """Scales must lie beside their weight: consumers and our own passes go shard by shard."""
    beside = {
        name: layer.tensors[WEIGHT]
        for layer in manifest.layers.values()
        for role, name in layer.tensors.items()
        if role != WEIGHT
    }
    for name, fused in manifest.fused_scales.items():
        beside[name] = manifest.layers[fused.members[0]].tensors[WEIGHT]
    for scale, weight in sorted(beside.items()):
        if scale in shard_of and weight in shard_of and shard_of[scale] != shard_of[weight]:
            yield f"{scale}: in {shard_of[scale]}, but its weight is in {shard_of[weight]}. Convert again."


def config_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Return a sentence for every key of config.json's quantization_config that is not as the manifest implies."""
    expected = quantization_config(manifest)
    config, faults = read_json_object(folder / CONFIG_NAME)
    if faults:
        return faults
    declared = (config or {}).get(CONFIG_KEY)
    if expected is None:
        return [f"{CONFIG_NAME}: has a {CONFIG_KEY}; the {manifest.dialect} dialect has none."] if declared else []
    if not isinstance(declared, dict):
        return [f"{CONFIG_NAME}: has no {CONFIG_KEY}; consumers would load codes as weights. {_REFETCH}"]
    expected = json.loads(json.dumps(expected))
    wrong = sorted(key for key in expected.keys() | declared.keys() if expected.get(key) != declared.get(key))
    return [
        f"{CONFIG_NAME}: {CONFIG_KEY}: {key} is {_short(declared.get(key))}, the manifest implies"
        f" {_short(expected.get(key))}. {_REFETCH}"
        for key in wrong
    ]


def unlisted_faults(folder: Path, manifest: Manifest) -> list[str]:
    """Return a sentence for every file or folder the manifest does not list.

    Names with a dot in front are free, and so is the model card.
    """
    listed = {*manifest.files, MANIFEST_NAME, CARD_NAME, MAP_NAME}
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    return [f"{name}: not listed in the manifest. Remove it." for name in names if name not in listed]


def index_faults(manifest: Manifest, folder: TensorFolder) -> list[str]:
    """Return a sentence for everything in the index that is not exactly what the shards hold."""
    listed = _listed_indexes(manifest)
    name = folder.index_name
    if name is None:
        if len(folder.shards) > 1:
            return [f"{len(folder.shards)} shards but no *{INDEX_SUFFIX}: from_pretrained finds none. {_REFETCH}"]
        return [f"{missing}: not found where the index belongs. {_REFETCH}" for missing in listed]
    if listed != [name]:
        return [f"{name}: is the index here, but the manifest lists {listed}. {_REFETCH}"]
    index, faults = read_json_object(folder.root / name, MAX_INDEX_NBYTES)
    if faults or index is None:
        return faults
    expected = make_index((tensor.spec, shard.name) for shard, tensor in folder.tensors())
    if index.get("weight_map") != expected["weight_map"]:
        faults.append(f"{name}: weight_map is not what the shards hold. {_REFETCH}")
    if index.get("metadata") != expected["metadata"]:
        faults.append(
            f"{name}: metadata is {index.get('metadata')}, the tensors make {expected['metadata']}. {_REFETCH}"
        )
    return faults


def _written_index_faults(manifest: Manifest, folder: TensorFolder) -> list[str]:
    name = folder.index_name
    if name is None or _listed_indexes(manifest) != [name]:
        return index_faults(manifest, folder)
    is_same = hash_path(folder.root / name) == manifest.files[name]["blake3"]
    return [] if is_same else [f"{name}: is not what was written a moment ago. Look at the disk, then convert again."]


def _listed_indexes(manifest: Manifest) -> list[str]:
    return sorted(name for name in manifest.files if name.endswith(INDEX_SUFFIX))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:80] + "..."
