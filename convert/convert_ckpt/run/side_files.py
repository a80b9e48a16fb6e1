"""The small files of the result: config.json, the index, what SOURCE holds besides, the manifest."""

import shutil
from pathlib import Path
from typing import Any

from convert_ckpt.plan.plan import Plan
from convert_ckpt.source.component import Component
from run_ckpt.contract.dialects.table import DIALECTS, quantization_config
from run_ckpt.contract.file_names import CONFIG_KEY, CONFIG_NAME, INDEX_SUFFIX
from run_ckpt.contract.manifest import MANIFEST_NAME, Manifest
from run_ckpt.storage.atomic import write_durably
from run_ckpt.storage.hashing import describe_file
from run_ckpt.storage.json_files import config_text, index_text, make_index


def write_side_files(folder: Path, source: Component, plan: Plan) -> dict[str, dict[str, Any]]:
    """Write config.json, the index and the copies; return name -> what the manifest says of each."""
    texts = {}
    config = make_config(source.config, plan.manifest)
    if config is not None:
        texts[CONFIG_NAME] = config_text(config)
    index_name = _index_name(source, plan)
    if index_name:
        stored = ((tensor.spec, file.name) for file in plan.files for tensor in file.header.tensors)
        texts[index_name] = index_text(make_index(stored))
    for name, text in texts.items():
        write_durably(folder / name, text)
    for path in source.side_files:
        if path.name not in texts and path.name != MANIFEST_NAME:
            shutil.copyfile(path, folder / path.name)
            texts[path.name] = ""
    return {name: describe_file(folder / name) for name in sorted(texts)}


def make_config(config: dict[str, Any] | None, manifest: Manifest) -> dict[str, Any] | None:
    """Return config.json with its quantization_config, or None if there is nothing to say."""
    declared = quantization_config(manifest)
    if declared is None:
        return config
    return {**(config or {}), CONFIG_KEY: declared}


def _index_name(source: Component, plan: Plan) -> str | None:
    if DIALECTS[plan.manifest.dialect].file_name:
        return None
    if source.folder.index_name or len(plan.files) == 1:
        return source.folder.index_name
    stem = "model" if plan.manifest.recipe["naming"] == "transformers" else "diffusion_pytorch_model"
    return stem + INDEX_SUFFIX
