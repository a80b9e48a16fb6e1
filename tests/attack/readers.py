"""Every reader of files that others prepared, fed with bytes: each may refuse by an error of ours, and nothing else."""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from convert_ckpt.plan.candidates import Group
from convert_ckpt.plan.preset import read_toml
from convert_ckpt.plan.recipe import read_recipe
from convert_ckpt.plan.sensitivities import read_sensitivities
from convert_ckpt.run.partial_output import Staging
from convert_ckpt.source.component import open_component
from convert_ckpt.source.source_card import card_facts
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.manifest import MANIFEST_NAME, parse_manifest
from run_ckpt.contract.manifest_checks import manifest_faults
from run_ckpt.contract.manifest_text import seal_manifest
from run_ckpt.contract.tensors import DTYPE_BITS, TensorSpec
from run_ckpt.storage.checks import config_faults
from run_ckpt.storage.foreign import read_foreign_manifest
from run_ckpt.storage.hashing import hash_bytes
from run_ckpt.storage.header import build_header, parse_header
from run_ckpt.storage.json_files import read_json_object
from run_ckpt.storage.layer_statistics import read_statistics
from run_ckpt.storage.manifest_file import read_checked_manifest
from run_ckpt.storage.shards import read_folder

_FOLDER = Path(tempfile.mkdtemp(prefix="attack-"))


def read_a_header(data: bytes) -> None:
    """Read the bytes as those of a safetensors file."""
    (_FOLDER / "model.safetensors").write_bytes(data)
    read_folder(_FOLDER / "model.safetensors")
    parse_header("x", data, len(data))


def read_an_index(data: bytes) -> None:
    folder = _fresh("index")
    (folder / "model.safetensors").write_bytes(build_header([]).data)
    (folder / "model.safetensors.index.json").write_bytes(data)
    read_folder(folder)


def read_a_config(data: bytes) -> None:
    folder = _fresh("config")
    (folder / "model.safetensors").write_bytes(build_header([]).data)
    (folder / "config.json").write_bytes(data)
    read_json_object(folder / "config.json")
    open_component(folder)


def read_a_manifest(data: bytes) -> None:
    """Read the bytes as a manifest; what is JSON is sealed first, or nothing behind the seal would be reached."""
    try:
        document = json.loads(data)
        data = b"".join(seal_manifest(document))
    except (ValueError, TypeError, AttributeError, RecursionError):
        pass
    folder = _fresh("manifest")
    (folder / MANIFEST_NAME).write_bytes(data)
    manifest_faults(parse_manifest(folder / MANIFEST_NAME, data))
    config_faults(folder, read_checked_manifest(folder))


def read_recipes(data: bytes) -> None:
    (_FOLDER / "recipe.toml").write_bytes(data)
    read_toml(_FOLDER / "recipe.toml")
    read_recipe(_FOLDER / "recipe.toml")


def read_a_card(data: bytes) -> None:
    (_FOLDER / "README.md").write_bytes(data)
    card_facts(_FOLDER / "README.md")


def read_some_statistics(data: bytes) -> None:
    folder = _fresh("statistics")
    (folder / "a.safetensors").write_bytes(data)
    read_statistics(folder)


def read_a_gguf(data: bytes) -> None:
    (_FOLDER / "model.gguf").write_bytes(data)
    for read in (read_foreign_manifest, open_component):
        with contextlib.suppress(CheckpointError):
            read(_FOLDER / "model.gguf")


def read_foreign_tensors(data: bytes) -> None:
    """Read {"config": config.json, "hf_quant_config": ..., "tensors": {name: [dtype, shape]}} as a quantized source.

    It may have "quant_model_description" too, and the "metadata" of its file.
    """
    document = _json_object(data)
    try:
        specs = [
            TensorSpec(name, dtype, tuple(shape))
            for name, (dtype, shape) in document["tensors"].items()
            if dtype in DTYPE_BITS and all(type(size) is int and 0 <= size < 2**40 for size in shape) and _is_utf8(name)
        ]
    except (KeyError, TypeError, ValueError, AttributeError):
        return
    folder = _fresh("foreign")
    metadata = document.get("metadata")
    is_text = isinstance(metadata, dict) and all(
        isinstance(text, str) and _is_utf8(key + text) for key, text in metadata.items()
    )
    header = build_header([spec for spec in specs if spec.nbytes < 2**50], metadata if is_text else None)
    (folder / "model.safetensors").write_bytes(header.data)
    os.truncate(folder / "model.safetensors", min(header.file_nbytes, 2**43))
    for name in ("config", "hf_quant_config", "quant_model_description"):
        if name in document:
            (folder / f"{name}.json").write_text(json.dumps(document[name]))
    for read in (read_foreign_manifest, open_component):
        with contextlib.suppress(CheckpointError):
            read(folder)


def read_records(data: bytes) -> None:
    """Read {"fingerprint": ..., "records": {name: record}} as what an unfinished run left, its records sealed."""
    document = _json_object(data)
    named = document.get("records")
    with Staging(_FOLDER / "records" / "out") as staging:
        fingerprint = json.dumps(document.get("fingerprint")).encode()
        (staging.folder / "fingerprint.json").write_bytes(fingerprint)
        records = staging.folder / "records" / "root"
        records.mkdir(parents=True, exist_ok=True)
        for name, record in named.items() if isinstance(named, dict) else ():
            if not name.isidentifier():
                continue
            seal = hash_bytes(json.dumps([fingerprint.decode(), "root", name, record], sort_keys=True).encode())
            (records / f"{name}.json").write_text(json.dumps({"record": record, "blake3": seal}, sort_keys=True))
        staging.pinned_revision("owner/name")
        with contextlib.suppress(CheckpointError):
            staging.adopt({"files": {}, "source": {}}, restart=False)
        staging.read_records("root")
        staging.remove()


def read_measured(data: bytes) -> None:
    """Read the bytes as measured sensitivities of a group that may become two formats."""
    groups = [Group("", ("a", "b"), {"mxfp4": (), "fp8": ()}, 1)]
    for name in ("sensitivities.json", "sensitivities.toml"):
        (_FOLDER / name).write_bytes(data)
        with contextlib.suppress(CheckpointError):
            read_sensitivities(_FOLDER / name, groups)


READERS: dict[str, Callable[[bytes], None]] = {
    "header": read_a_header,
    "index": read_an_index,
    "config": read_a_config,
    "manifest": read_a_manifest,
    "recipe": read_recipes,
    "card": read_a_card,
    "statistics": read_some_statistics,
    "foreign": read_foreign_tensors,
    "gguf": read_a_gguf,
    "records": read_records,
    "sensitivities": read_measured,
}


def feed(reader: str, data: bytes) -> None:
    """Let a reader have the bytes. Raises whatever it should not."""
    with contextlib.suppress(CheckpointError, OSError):
        READERS[reader](data)


def _json_object(data: bytes) -> dict[str, Any]:
    """Return the object in the bytes, an empty one where there is none."""
    try:
        document = json.loads(data)
        return document if isinstance(document, dict) else {}
    except (ValueError, RecursionError):
        return {}


def _is_utf8(text: str) -> bool:
    return text == text.encode(errors="ignore").decode()


def _fresh(name: str) -> Path:
    folder = _FOLDER / name
    folder.mkdir(exist_ok=True)
    return folder
