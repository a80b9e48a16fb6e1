"""Where a reader of a model card gets the tool: asked for, configured, or what the installed package says."""

import os
from importlib import metadata

from run_ckpt.contract.errors import UsageError

VARIABLE = "CONVERT_CKPT_URL"
# As in pyproject.toml's [project.urls], until there is a place to name.
PLACEHOLDER = "https://github.com/OWNER/convert-ckpt"
_DISTRIBUTION = "convert-ckpt"


def tool_url(asked: str | None = None) -> str:
    """Return the address of the tool's repository; PLACEHOLDER where none is known."""
    return asked or os.environ.get(VARIABLE) or _installed_url() or PLACEHOLDER


def checked_tool_url(asked: str | None = None) -> str:
    """Return the address. Raises UsageError for the placeholder, which no published card may hold."""
    url = tool_url(asked)
    if url == PLACEHOLDER:
        raise UsageError(
            f"the card would send readers to {PLACEHOLDER}, a placeholder. Give --tool-url URL, or set {VARIABLE}."
        )
    return url


def _installed_url() -> str | None:
    try:
        urls = metadata.metadata(_DISTRIBUTION).get_all("Project-URL") or []
    except metadata.PackageNotFoundError:
        return None
    return next((url.partition(", ")[2] for url in urls if url.startswith("Repository, ")), None)
