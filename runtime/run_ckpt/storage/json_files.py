"""The small JSON files beside the shards: config.json and the index."""

import json
import re
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import CheckpointError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.contract.tensors import TensorSpec
from run_ckpt.storage.files import MAX_TEXT_NBYTES, read_text

# Python reads more than it can write, and no model's config needs ten.
_MAX_DEPTH = 100
_LINES_AT_ONCE = 1000
# Half of a surrogate pair, maybe with its other half, which alone is no text that can be written.
_MAYBE_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def read_config(folder: Path) -> dict[str, Any] | None:
    """Return config.json of a component's folder, None where there is none. Raises CheckpointError if it is broken."""
    config, faults = read_json_object(folder / CONFIG_NAME)
    if faults:
        raise CheckpointError(f"{folder}: {faults[0]}")
    return config


def read_json_object(path: Path, max_nbytes: int = MAX_TEXT_NBYTES) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the object in a JSON file, None where there is no such file, and a fault where it is no object."""
    try:
        text = read_text(path, max_nbytes)
        value = json.loads(text)
        if _MAYBE_HALF.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        if _is_deeper(value, _MAX_DEPTH):
            raise ValueError(f"nested deeper than {_MAX_DEPTH}")
    except FileNotFoundError as error:
        return None, [f"{path.name}: is a link to nothing ({error}). Fetch it again."] if path.is_symlink() else []
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{path.name}: not readable ({error}). Fetch it again, or convert again."]
    return value, []


def _is_deeper(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        level = [part for parts in level for part in (parts.values() if isinstance(parts, dict) else parts)]
        level = [part for part in level if isinstance(part, dict | list)]
    return bool(level)


def make_index(stored: Iterable[tuple[TensorSpec, str]]) -> dict[str, Any]:
    """Return the index of tensors and the shards that hold them; ``total_size`` counts tensor bytes."""
    total, weight_map = 0, {}
    for spec, shard in stored:
        total += spec.nbytes
        weight_map[spec.name] = shard
    return {"metadata": {"total_size": total}, "weight_map": weight_map}


def config_text(config: dict[str, Any]) -> str:
    """Return config.json as it is written: keys in their order."""
    return json.dumps(config, indent=2, ensure_ascii=False) + "\n"


def index_parts(index: dict[str, Any]) -> Iterator[bytes]:
    """Yield the parts of the index as it is written: keys sorted, as safetensors' other writers do.

    Made line by line: Python's json takes several times as long for indented text, and holds all of it.
    """
    lines = _index_lines(index)
    while batch := "".join(islice(lines, _LINES_AT_ONCE)).encode():
        yield batch


def _index_lines(index: dict[str, Any]) -> Iterator[str]:
    encode = json.JSONEncoder(ensure_ascii=False).encode
    weight_map = index["weight_map"]
    before = f'{{\n  "metadata": {{\n    "total_size": {index["metadata"]["total_size"]}\n  }},\n  "weight_map": {{\n'
    for name in sorted(weight_map):
        yield f"{before}    {encode(name)}: {encode(weight_map[name])}"
        before = ",\n"
    yield "\n  }\n}\n"
