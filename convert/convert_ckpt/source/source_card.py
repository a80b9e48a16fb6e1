"""What the model card beside a source says that holds for the result too: licence, task, tags."""

import re
from pathlib import Path
from typing import Any

from run_ckpt.contract.file_names import CARD_NAME
from run_ckpt.storage.components import PIPELINE_INDEX_NAME
from run_ckpt.storage.files import MAX_TEXT_NBYTES, leads_outside, read_text

# Of the card's metadata, what a card of the result may carry over; run_ckpt/tools/publish chooses from it.
_FACTS = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "tags")
# As huggingface_hub finds it.
_METADATA = re.compile(r"\s*---(?:\r\n|\r|\n)(?P<yaml>.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)
# YAML's reader in Python takes some 30 s for a MiB.
_MAX_METADATA_LENGTH = 32 * 2**10
_TEXT = "tag:yaml.org,2002:str"


def read_source_card(path: Path) -> dict[str, Any]:
    """Return the facts from the README.md of a source; one component's lies in its pipeline's folder."""
    folders = [path, path.parent] if (path.parent / PIPELINE_INDEX_NAME).is_file() else [path]
    for folder in folders:
        card = folder / CARD_NAME
        if card.is_file() and card.stat().st_size <= MAX_TEXT_NBYTES and not leads_outside(card):
            return card_facts(card)
    return {}


def card_facts(card: Path) -> dict[str, Any]:
    """Return the facts in a card, none where it has no readable metadata.

    The YAML is parsed and not built: a few lines of merged maps may stand for gigabytes.
    """
    import yaml

    try:
        match = _METADATA.match(read_text(card).removeprefix("\ufeff"))
        if not match or len(match["yaml"]) > _MAX_METADATA_LENGTH:
            return {}
        root = yaml.compose(match["yaml"], Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(root, yaml.MappingNode):
        return {}
    found = {key.value: _as_text(value) for key, value in root.value if key.tag == _TEXT and key.value in _FACTS}
    return {key: found[key] for key in _FACTS if found.get(key) is not None}


def _as_text(node: Any) -> str | list[str] | None:
    """Return a text or list of texts, None for all else: a date or a nested map is no fact of these."""
    if node.tag == _TEXT:
        return str(node.value)
    is_list = node.id == "sequence" and all(item.tag == _TEXT for item in node.value)
    return [str(item.value) for item in node.value] if is_list else None
