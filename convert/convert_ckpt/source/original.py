"""Checkpoints under other names than diffusers' (BFL, ComfyUI, ...): told by their tensors, translated by a map."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from convert_ckpt.source.original_configs import config_of
from convert_ckpt.source.toml_files import read_toml
from run_ckpt.contract.errors import CheckpointError, FaultsError
from run_ckpt.contract.file_names import CONFIG_NAME
from run_ckpt.contract.module_names import fill_pattern, pattern_regex
from run_ckpt.storage.views import Rows, View, make_view

_FOLDER = Path(__file__).parent / "originals"
# What stands before the names of the model, also in a file that holds more than the model.
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "")
_SHOWN = 3


@dataclass(frozen=True)
class Rule:
    """What a tensor whose name matches ``pattern`` holds: ``targets`` by diffusers' names, one below the other.

    ``*`` is the same text in all of them. ``is_swapped``: the upper and the lower half of the rows change places.
    """

    pattern: str
    targets: tuple[str, ...]
    is_swapped: bool = False


@dataclass(frozen=True)
class Original:
    """How a class is called elsewhere. ``known_by`` are tensors that no other class has, or only one with fewer such.

    A tensor that holds several is cut by rows: each but the last gets as many as the tensor ``hidden`` has; where that
    is "", all the same number. ``also_with_config``: config.json of the class may lie beside these names.
    """

    class_name: str
    known_by: tuple[str, ...]
    rules: tuple[Rule, ...]
    hidden: str
    also_with_config: bool = False

    def find_rule(self, name: str) -> tuple[Rule, list[str]] | None:
        """Return the rule for a tensor and the names it gives, None where no rule knows it."""
        for rule in self.rules:
            if match := pattern_regex(rule.pattern).fullmatch(name):
                return rule, [fill_pattern(target, match.groups()) for target in rule.targets]
        return None


@dataclass(frozen=True)
class Translation:
    """A checkpoint as it is converted: tensors by shard and place, config.json, and the stored tensors left out.

    ``note`` is what a person should know of it.
    """

    views: tuple[View, ...]
    config: dict[str, Any]
    unused: tuple[View, ...]
    note: str

    def to_json(self) -> dict[str, list[list[Any]]]:
        """Return name -> stored tensor, first row, last row + 1 of each part, see storage.views.Rows."""
        return {view.spec.name: [part.to_json() for part in view.rows] for view in self.views}


def translate(name: str, views: Iterable[View], class_name: str | None) -> Translation | None:
    """Return the checkpoint ``name`` under diffusers' names, None where no map knows it, or where these are its names.

    class_name: what config.json says. Raises FaultsError with the tensors that the map has no place for.
    """
    whole = {view.spec.name: view for view in views}
    original, prefix = _find_original(whole.keys())
    if original is None or (original.class_name == class_name and not original.also_with_config):
        return None
    # A part of the checkpoint may lack it: config_of says so.
    hidden = whole[prefix + original.hidden].n_rows if prefix + original.hidden in whole else 0
    translated: list[View] = []
    unused: list[View] = []
    unknown: list[str] = []
    for stored_name, view in whole.items():
        found = original.find_rule(stored_name.removeprefix(prefix))
        if not stored_name.startswith(prefix) or (found and not found[1]):
            unused.append(view)
        elif found is None:
            unknown.append(stored_name)
        else:
            rule, targets = found
            parts = _halves(view) if rule.is_swapped else _cut(view, len(targets), hidden)
            translated += [make_view(target, rows, whole) for target, rows in zip(targets, parts, strict=True)]
    if unknown:
        more = f" and {len(unknown) - _SHOWN} more" if len(unknown) > _SHOWN else ""
        raise FaultsError(
            f"{name}: can't be converted",
            [
                f"{', '.join(unknown[:_SHOWN])}{more}: no tensors of {original.class_name}, which the others are. Give"
                " a checkpoint of that class, or one in diffusers' form."
            ],
        )
    translated.sort(key=lambda view: (view.shard, view.offset))
    shapes = {view.spec.name.removeprefix(prefix): view.spec.shape for view in unused}
    shapes |= {view.spec.name: view.spec.shape for view in translated}
    left_out = f"; {len(unused)} tensors have no place there" if unused else ""
    note = f"read as {original.class_name}, with names and {CONFIG_NAME} as diffusers has them{left_out}"
    try:
        config = config_of(original.class_name, shapes)
    except CheckpointError as error:
        raise FaultsError(f"{name}: can't be converted", [str(error)]) from error
    return Translation(tuple(translated), config, tuple(unused), note)


def _halves(view: View) -> list[list[Rows]]:
    """Return the rows of the one tensor that a stored one is with its halves exchanged."""
    half, end = view.n_rows // 2, view.n_rows
    return [[Rows(view.spec.name, half, end), Rows(view.spec.name, 0, half)]]


def _cut(view: View, n_parts: int, hidden: int) -> list[list[Rows]]:
    """Return the rows of each tensor that a stored one holds. hidden: of each but the last; 0: all the same number."""
    hidden = hidden or view.n_rows // n_parts
    bounds = [*(hidden * i for i in range(n_parts)), view.n_rows]
    return [[Rows(view.spec.name, *rows)] for rows in pairwise(bounds)]


def _find_original(names: Collection[str]) -> tuple[Original | None, str]:
    for original in sorted(originals(), key=lambda original: -len(original.known_by)):
        for prefix in _PREFIXES:
            if all(prefix + name in names for name in original.known_by):
                return original, prefix
    return None, ""


@cache
def originals() -> tuple[Original, ...]:
    """Return all maps."""
    return tuple(_read_original(path) for path in sorted(_FOLDER.glob("*.toml")))


def _read_original(path: Path) -> Original:
    table = read_toml(path)
    base = _read_original(path.with_name(table["extends"])) if "extends" in table else None
    rules = [Rule(pattern, (target,)) for pattern, target in table["names"].items()]
    rules += [Rule(pattern, tuple(targets)) for pattern, targets in table.get("split", {}).items()]
    rules += [Rule(pattern, (target,), is_swapped=True) for pattern, target in table.get("swapped", {}).items()]
    rules += [Rule(pattern, ()) for pattern in table.get("unused", ())]
    if base:
        hidden = table.get("hidden", base.hidden)
        return Original(table["class"], (*base.known_by, *table["known_by"]), (*rules, *base.rules), hidden)
    also = table.get("also_with_config", False)
    return Original(table["class"], tuple(table["known_by"]), tuple(rules), table.get("hidden", ""), also)
