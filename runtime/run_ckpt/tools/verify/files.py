"""Files of a converted checkpoint against its manifest, config.json and index: every fault, as sentences."""

import os
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME, INDEX_SUFFIX, SUFFIX
from run_ckpt.contract.manifest import Manifest
from run_ckpt.contract.manifest_checks import spec_faults
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.progress import Progress
from run_ckpt.storage.hashing import hash_path
from run_ckpt.storage.json_files import read_json_object
from run_ckpt.storage.shards import TensorFolder
from run_ckpt.storage.views import View

_REFETCH = "Fetch it again, or convert again."


def file_faults(folder: Path, files: Mapping[str, Mapping[str, Any]], authority: str, progress: Progress) -> list[str]:
    """Return a sentence for every file that is missing or not of the size and BLAKE3 in ``files``."""
    faults, to_hash = [], []
    for name in sorted(files):
        path = folder / name
        if not path.is_file():
            faults.append(f"{name}: missing, but {authority} lists it. {_REFETCH}")
        elif path.stat().st_size != files[name]["nbytes"]:
            size = f"{path.stat().st_size:,} bytes, {authority} says {files[name]['nbytes']:,}"
            faults.append(f"{name}: {size}. {_REFETCH}")
        else:
            to_hash.append(name)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        digests = pool.map(lambda name: hash_path(folder / name, progress.advance), to_hash)
        for name, digest in zip(to_hash, digests, strict=True):
            if digest != files[name]["blake3"]:
                says = f"BLAKE3 is {digest[:12]}..., {authority} says {files[name]['blake3'][:12]}..."
                faults.append(f"{name}: {says}: its bytes have changed. {_REFETCH}")
    return faults


def other_model(manifest: Manifest, source_path: Path, views: Collection[View]) -> str | None:
    """Return a sentence where SOURCE is of another model: most tensors are not there in their dtype and shape."""
    stored = {view.spec.name: view.spec for view in views}
    expected = _expected(manifest)
    wrong = sorted(name for name, spec in expected.items() if stored.get(name) != spec)
    if 2 * len(wrong) <= len(expected):
        return None
    which = f"{len(wrong)} of {len(expected)} tensors are not in it, such as {wrong[0]}"
    return f"source {source_path.name}: the checkpoint was not made from it: {which}. {_give_source(manifest)}"


def other_bytes(manifest: Manifest, source_path: Path) -> str:
    """Return a sentence about a SOURCE of which no shard is the one that was converted."""
    reason = "no shard has the BLAKE3 that the manifest states"
    return f"source {source_path.name}: the checkpoint was not made from it: {reason}. {_give_source(manifest)}"


def _give_source(manifest: Manifest) -> str:
    revision = manifest.source.get("revision")
    return f"Give the SOURCE it was made from, {manifest.source['name']}{f' at {revision[:12]}' if revision else ''}."


def _expected(manifest: Manifest) -> dict[str, TensorSpec]:
    layers = manifest.layers.values()
    weights = [TensorSpec(layer.source_tensor, layer.source_dtype, (layer.N, layer.K)) for layer in layers]
    return {spec.name: spec for spec in [*weights, *(kept.spec for kept in manifest.kept.values())]}


def source_faults(
    manifest: Manifest,
    output: TensorFolder,
    source_path: Path,
    source: TensorFolder,
    views: Collection[View],
) -> list[str]:
    """Return a sentence for everything in SOURCE, the shards' bytes aside, that is not as the checkpoint says.

    views: the source's tensors under the names that they have in the checkpoint.
    """
    files = manifest.source["files"]
    is_translated = "tensors" in manifest.source
    faults = [
        f"source {shard.name}: the checkpoint was not made from it. Give the SOURCE it was made from."
        for shard in source.shards
        if shard.name not in files and not is_translated
    ]
    stored = {view.spec.name: view.spec for view in views}
    shard_of = {view.spec.name: f"source {view.shard}" for view in views}
    faults += spec_faults(_expected(manifest), stored, shard_of, "the manifest")
    if source.index_name and output.index_name not in (source.index_name, None):
        faults.append(f"{output.index_name}: the source calls its index {source.index_name}. Convert again.")
    if source_path.is_dir():
        faults += [] if is_translated else _config_difference(source_path, output.root)
        faults += _side_file_differences(manifest, output, source_path)
    return faults


def _config_difference(source_path: Path, output_path: Path) -> list[str]:
    configs = []
    for path in (source_path / CONFIG_NAME, output_path / CONFIG_NAME):
        config, faults = read_json_object(path)
        if faults:
            return faults
        configs.append({key: value for key, value in (config or {}).items() if key != CONFIG_KEY})
    before, after = configs
    wrong = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
    return [f"{CONFIG_NAME}: {wrong} differ from the source's. Convert again."] if wrong else []


def _side_file_differences(manifest: Manifest, output: TensorFolder, source_path: Path) -> Iterator[str]:
    for name in sorted(manifest.files):
        if name == CONFIG_NAME or name.endswith((SUFFIX, INDEX_SUFFIX)) or not (output.root / name).is_file():
            continue
        if not (source_path / name).is_file():
            yield f"{name}: the source has no such file. Give the SOURCE it was made from."
        elif hash_path(source_path / name) != hash_path(output.root / name):
            yield f"{name}: differs from the source's. Convert again."
