"""What the model card beside a source says that holds for the result too: licence, task, tags."""

from pathlib import Path
from typing import Any

from run_ckpt.contract.file_names import CARD_NAME
from run_ckpt.storage.components import PIPELINE_INDEX_NAME

# Of the card's metadata, what a card of the result may carry over; run_ckpt/tools/publish chooses from it.
_FACTS = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag", "tags")
_MARK = "---"


def read_source_card(path: Path) -> dict[str, Any]:
    """Return the facts from the README.md of a source; one component's lies in its pipeline's folder."""
    folders = [path, path.parent] if (path.parent / PIPELINE_INDEX_NAME).is_file() else [path]
    for folder in folders:
        card = folder / CARD_NAME
        if card.is_file():
            return card_facts(card.read_text(encoding="utf-8", errors="replace"))
    return {}


def card_facts(text: str) -> dict[str, Any]:
    """Return the facts in a card's text, none where it has no readable metadata."""
    lines = text.removeprefix("\ufeff").splitlines()
    if not lines or lines[0].rstrip() != _MARK or _MARK not in (marks := [line.rstrip() for line in lines[1:]]):
        return {}
    import yaml

    try:
        metadata = yaml.safe_load("\n".join(lines[1 : marks.index(_MARK) + 1]))
    except yaml.YAMLError:
        return {}
    facts = metadata if isinstance(metadata, dict) else {}
    return {key: facts[key] for key in _FACTS if key in facts and _is_plain(facts[key])}


def _is_plain(value: object) -> bool:
    """True for text and lists of text: a date or a nested map is no fact of these."""
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
