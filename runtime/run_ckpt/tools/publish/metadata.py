"""The YAML at the top of a model card: what the source's card says, and what is new."""

from collections.abc import Sequence
from re import fullmatch
from typing import Any

from run_ckpt.storage.hub_client import page_of_repo
from run_ckpt.tools.publish.rows import ConvertedComponent

# Of the source's card; the rest (evaluation results, widgets, gating) speaks of the source alone.
_CARRIED = ("license", "license_name", "license_link", "language", "library_name", "pipeline_tag")
_DROPPED_TAGS = ("safetensors", "diffusion-single-file", "region:us")
_DROPPED_TAG_PREFIXES = ("base_model:", "license:", "arxiv:", "doi:", "diffusers:", "endpoints_")


def make_metadata(components: Sequence[ConvertedComponent], *, base_model: str | None) -> dict[str, Any]:
    """Return the metadata. base_model: Hub id; default: the source, where it is a Hub repo."""
    first = components[0].manifest
    source_card = first.source.get("card") or {}
    base = base_model or hub_id(components)
    metadata = {key: source_card[key] for key in _CARRIED if source_card.get(key)}
    metadata.setdefault("library_name", first.recipe["naming"])
    link = metadata.get("license_link")
    if base and link and "://" not in link and link not in first.files:
        metadata["license_link"] = f"{page_of_repo(base)}/blob/main/{link}"
    if base:
        metadata["base_model"] = base
        metadata["base_model_relation"] = "quantized"
    metadata["tags"] = _tags(components, source_card)
    return metadata


def hub_id(components: Sequence[ConvertedComponent]) -> str | None:
    """Return the Hub repo that the result was made from, None where it was made from a folder."""
    source = components[0].manifest.source
    parts = str(source["name"]).split("/")
    is_repo = len(parts) > 1 and all(fullmatch(r"[\w.-]+", part) for part in parts)
    return "/".join(parts[:2]) if source.get("revision") and is_repo else None


def front_matter(metadata: dict[str, Any]) -> str:
    """Return the metadata as YAML between its marks."""
    from huggingface_hub import ModelCardData

    return f"---\n{ModelCardData(**metadata).to_yaml()}\n---\n"


def _tags(components: Sequence[ConvertedComponent], source_card: dict[str, Any]) -> list[str]:
    carried = [str(tag) for tag in source_card.get("tags") or []]
    kept = [tag for tag in carried if tag not in _DROPPED_TAGS and not tag.startswith(_DROPPED_TAG_PREFIXES)]
    formats = sorted({layer.format.name for component in components for layer in component.manifest.layers.values()})
    dialects = sorted({component.manifest.dialect for component in components})
    return list(dict.fromkeys([*kept, *formats, *dialects, "quantized", "convert-ckpt"]))
