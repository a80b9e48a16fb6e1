"""TOML files, ours and the user's."""

import sys
from pathlib import Path
from typing import Any

from run_ckpt.contract.errors import UsageError
from run_ckpt.storage.files import read_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_toml(path: Path) -> dict[str, Any]:
    """Return a TOML file's table. Raises UsageError where it cannot be read."""
    try:
        return tomllib.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not a readable TOML file ({error}). Correct it.") from error
