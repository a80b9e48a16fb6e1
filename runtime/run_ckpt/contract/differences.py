"""How two records of what decides a result differ, in words: "recipe.scale_rule was 'even', now 'mse'"."""

import json
from typing import Any

from run_ckpt.contract.manifest import Manifest

# What is known of a layer only once it is converted.
_MEASURED = ("sqnr_db", "max_abs_error", "method", "output_sqnr_db")
_N_SHOWN = 3
_LONGEST = 60
# What is compared of a manifest, what a reader knows best first: one that differs makes most of the others differ too.
_BLOCKS = ("tool", "source", "recipe", "kept", "fused_scales", "unquantized_linears", "layers")


def differences(old: Any, new: Any, where: str = "") -> list[str]:
    """Return a phrase for each value that differs between two JSON documents."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = sorted(old.keys() | new.keys())
        return [line for key in keys for line in differences(old.get(key), new.get(key), f"{where}.{key}".lstrip("."))]
    old_text, new_text = (json.dumps(value, sort_keys=True) for value in (old, new))  # in which NaN is NaN
    return [] if old_text == new_text else [f"{where} was {_short(old)}, now {_short(new)}"]


def first_of(found: list[str]) -> str:
    """Return the first differences in a line, options before files, and how many more there are."""
    shown = sorted(found, key=lambda phrase: not phrase.startswith("options."))
    more = f" and {len(found) - _N_SHOWN} more" if len(found) > _N_SHOWN else ""
    return "; ".join(shown[:_N_SHOWN]) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def manifest_differences(finished: Manifest, planned: Manifest) -> list[str]:
    """Return how a result differs from what a plan would make, but for what is measured: none if it is that result.

    The bytes of the source are not compared, nor is anything of the files.
    """
    old, new = _planned_part(finished), _planned_part(planned)
    by_block = (differences(old[block], new[block], block) for block in _BLOCKS)
    return next((found for found in by_block if found), [])


def _planned_part(manifest: Manifest) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(b"".join(manifest.to_json()))
    for layer in document["layers"].values():
        for name in _MEASURED:
            layer.pop(name, None)
    document["source"].pop("files", None)
    return document
