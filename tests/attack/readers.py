"""Every reader of files that others prepared, fed with bytes: each may refuse by an error of ours, and nothing else."""

import contextlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

from convert_ckpt.plan.preset import read_toml
from convert_ckpt.plan.recipe import read_recipe
from convert_ckpt.source.component import open_component
from convert_ckpt.source.source_card import card_facts
from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.manifest import MANIFEST_NAME, parse_manifest, seal_manifest
from run_ckpt.contract.manifest_checks import manifest_faults
from run_ckpt.storage.checks import config_faults
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
        data = seal_manifest(document).encode()
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


READERS: dict[str, Callable[[bytes], None]] = {
    "header": read_a_header,
    "index": read_an_index,
    "config": read_a_config,
    "manifest": read_a_manifest,
    "recipe": read_recipes,
    "card": read_a_card,
    "statistics": read_some_statistics,
}


def feed(reader: str, data: bytes) -> None:
    """Let a reader have the bytes. Raises whatever it should not."""
    with contextlib.suppress(CheckpointError, OSError):
        READERS[reader](data)


def _fresh(name: str) -> Path:
    folder = _FOLDER / name
    folder.mkdir(exist_ok=True)
    return folder
