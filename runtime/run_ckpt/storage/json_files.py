"""The small JSON files beside the shards."""

import json
from pathlib import Path
from typing import Any


def read_json_object(path: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the object in a JSON file, None where there is no such file, and a fault where it is no object."""
    if not path.is_file():
        return None, []
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return None, [f"{path.name}: not readable ({error}). Fetch it again, or convert again."]
    return (
        (value, [])
        if isinstance(value, dict)
        else (None, [f"{path.name}: not a JSON object. Fetch it again, or convert again."])
    )
