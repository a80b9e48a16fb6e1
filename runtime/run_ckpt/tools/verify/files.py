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


def source_faults(
    manifest: Manifest,
    output: TensorFolder,
    source_path: Path,
    source: TensorFolder,
    views: Collection[View],
    progress: Progress,
) -> list[str]:
    """Return a sentence for everything in SOURCE that is not what the checkpoint says it was made from.

    views: the source's tensors under the names that they have in the checkpoint.
    """
    files = manifest.source["files"]
    is_translated = "tensors" in manifest.source
    faults = [
        f"source {shard.name}: the checkpoint was not made from it. Give the SOURCE it was made from."
        for shard in source.shards
        if shard.name not in files and not is_translated
    ]
    faults += [f"source {fault}" for fault in file_faults(source.root, files, "the manifest", progress)]
    expected = {
        layer.source_tensor: TensorSpec(layer.source_tensor, layer.source_dtype, (layer.N, layer.K))
        for layer in manifest.layers.values()
    } | {kept.spec.name: kept.spec for kept in manifest.kept.values()}
    stored = {view.spec.name: view.spec for view in views}
    shard_of = {view.spec.name: f"source {view.shard}" for view in views}
    faults += spec_faults(expected, stored, shard_of, "the manifest")
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
