"""The small files of the result: config.json, the index, what SOURCE holds besides, the manifest."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from convert_ckpt.plan.plan import Plan
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects.table import DIALECTS, quantization_config
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME, INDEX_SUFFIX
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.storage.files import read_small
from run_ckpt.storage.folders import Folder
from run_ckpt.storage.hashing import write_parts
from run_ckpt.storage.json_files import config_text, index_parts, make_index


def output_names(source: Component, plan: Plan) -> list[str]:
    """Return the names of all files of the result."""
    return sorted({MANIFEST_NAME, *(file.name for file in plan.files), *_texts(source, plan), *_copied(source, plan)})


def write_side_files(
    folder: Folder, source: Component, plan: Plan, blake3_before: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Write config.json, the index and the copies; return name -> what the manifest says of each.

    blake3_before: of each file of ``source.side_files`` when the run began. Raises CheckpointError for one that is
    another by now.
    """
    copied = _copied(source, plan)
    texts = _texts(source, plan)
    described = {}
    for name in sorted({*texts, *copied}):
        parts = texts[name]() if name in texts else [read_small(copied[name])]
        described[name] = write_parts(folder, name, parts)
        if name in copied and described[name]["blake3"] != blake3_before[name]:
            raise CheckpointError(f"{name}: changed while the shards were converted. Start again with --restart.")
    return described


def make_config(config: dict[str, Any] | None, manifest: Manifest) -> dict[str, Any] | None:
    """Return config.json with its quantization_config, or None if there is nothing to say."""
    declared = quantization_config(manifest)
    if declared is None:
        return config
    return {**(config or {}), CONFIG_KEY: declared}


def _texts(source: Component, plan: Plan) -> dict[str, Callable[[], Iterable[bytes]]]:
    """Return what makes each file that is not copied."""
    texts: dict[str, Callable[[], Iterable[bytes]]] = {}
    config = make_config(source.config, plan.manifest)
    if config is not None:
        texts[CONFIG_NAME] = lambda: [config_text(config).encode()]
    if index_name := _index_name(source, plan):
        stored = ((tensor.spec, file.name) for file in plan.files for tensor in file.header.tensors)
        texts[index_name] = lambda: index_parts(make_index(stored))
    return texts


def _copied(source: Component, plan: Plan) -> dict[str, Path]:
    ours = {MANIFEST_NAME, *_texts(source, plan)}
    return {path.name: path for path in source.side_files if path.name not in ours}


def _index_name(source: Component, plan: Plan) -> str | None:
    if DIALECTS[plan.manifest.dialect].file_name:
        return None
    if source.folder.index_name or len(plan.files) == 1:
        return source.folder.index_name
    stem = "model" if plan.manifest.recipe["naming"] == "transformers" else "diffusion_pytorch_model"
    return stem + INDEX_SUFFIX
