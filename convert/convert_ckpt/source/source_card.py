"""What the model card beside a source says that holds for the result too: licence, task, tags."""

from pathlib import Path
from typing import Any

from run_ckpt.contract.file_names import CARD_NAME
from run_ckpt.storage.components import PIPELINE_INDEX_NAME
from run_ckpt.storage.files import MAX_TEXT_NBYTES, leads_outside

# Of the card's metadata, what a card of the result may carry over; run_ckpt/tools/publish chooses from it.
_FACTS = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "tags")


def read_source_card(path: Path) -> dict[str, Any]:
    """Return the facts from the README.md of a source; one component's lies in its pipeline's folder."""
    folders = [path, path.parent] if (path.parent / PIPELINE_INDEX_NAME).is_file() else [path]
    for folder in folders:
        card = folder / CARD_NAME
        if card.is_file() and card.stat().st_size <= MAX_TEXT_NBYTES and not leads_outside(card):
            return card_facts(card)
    return {}


def card_facts(card: Path) -> dict[str, Any]:
    """Return the facts in a card, none where it has no readable metadata."""
    from huggingface_hub import metadata_load

    try:
        metadata = metadata_load(card) or {}
    except Exception:  # YAML's own error among them, which huggingface_hub does not export
        return {}
    return {key: metadata[key] for key in _FACTS if key in metadata and _is_plain(metadata[key])}


def _is_plain(value: object) -> bool:
    """True for text and lists of text: a date or a nested map is no fact of these."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
