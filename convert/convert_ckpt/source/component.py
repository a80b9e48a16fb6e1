"""A checkpoint to read: headers and configuration now, bytes on demand."""

import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from convert_ckpt.source.experts import separate_experts
from convert_ckpt.source.original import Translation, translate
from convert_ckpt.source.quantized import EncodedWeight, Quantization, read_quantization
from convert_ckpt.source.signatures import find_refusal
from convert_ckpt.source.source_card import read_source_card
from run_ckpt.contract.display import shown
from run_ckpt.contract.errors import FaultsError
from run_ckpt.contract.file_names import CARD_NAME, CONFIG_KEY, CONFIG_NAME, INDEX_SUFFIX, SUFFIX
from run_ckpt.storage.files import leads_outside
from run_ckpt.storage.foreign import is_about_quantization
from run_ckpt.storage.json_files import read_json_object
from run_ckpt.storage.shards import TensorFolder, read_folder, shard_count
from run_ckpt.storage.side_files import WEIGHT_SUFFIXES, is_side_file
from run_ckpt.storage.views import View, whole_views

_LONGEST_NAME = 1000
# Hub cache folders: models--ORG--NAME/snapshots/REVISION[/component]
_HUB_CACHE = re.compile(
    r"models--(?P<org>[^/]+)--(?P<name>[^/]+)/snapshots/(?P<revision>[0-9a-f]{40})(?P<rest>(/.*)?)$"
)


@dataclass(frozen=True)
class Component:
    """One model component: its shards, its config.json and the small files beside them.

    ``name`` is a folder name or a Hub repo id, never a path; ``config`` is None without config.json;
    ``card`` is what source_card.py takes from its model card. With a ``quantization`` its tensors are weights in codes,
    and ``config`` and ``side_files`` say nothing of it. With a ``translation`` they have other names: diffusers', and
    ``config`` is as diffusers would have written it, or those of experts one by one.
    """

    folder: TensorFolder
    name: str
    revision: str | None
    config: dict[str, Any] | None
    side_files: tuple[Path, ...]
    notes: tuple[str, ...]
    card: dict[str, Any] = field(default_factory=dict)
    translation: Translation | None = None
    quantization: Quantization | None = None

    @cached_property
    def views(self) -> tuple[View, ...]:
        """The tensors to convert: as they are stored, as a translation has them, or as numbers; by shard, by offset."""
        seen = self.translation or self.quantization
        return seen.views if seen else whole_views(self.folder)

    @cached_property
    def encoded(self) -> Mapping[str, EncodedWeight]:
        """Name of a view -> the weight whose codes lie there, in a source that is quantized already."""
        if self.quantization is None:
            return {}
        holder = {view.spec.name: view.rows[0].tensor if view.rows else view.spec.name for view in self.views}
        weights = self.quantization.weights
        return {name: weights[tensor] for name, tensor in holder.items() if tensor in weights}

    @cached_property
    def n_stacked(self) -> dict[str, int]:
        """Name of a view whose rows are those of several matrices, one below the other -> how many."""
        coded = {name: weight.layer.n_stacked for name, weight in self.encoded.items()}
        found = {view.spec.name: len(view.rows) for view in self.views if view.columns and len(view.rows) > 1}
        return found | {name: count for name, count in coded.items() if count}

    @property
    def class_name(self) -> str | None:
        """The diffusers class, or transformers' first architecture."""
        name = _class_name(self.config or {})
        return None if name is None else str(name)

    @property
    def naming(self) -> str:
        """Whose file names these are: "diffusers" or "transformers"."""
        config = self.config or {}
        return "transformers" if "architectures" in config or "model_type" in config else "diffusers"


def open_component(path: Path) -> Component:
    """Return the checked source at ``path``. Raises FaultsError with every fault found."""
    folder = read_folder(path)
    faults: list[str] = []
    config, side_files, notes = None, [], list(folder.notes)
    if path.is_dir():
        config, faults = read_json_object(path / CONFIG_NAME)
        side_files = _find_side_files(path, folder, notes)
        faults += _link_faults([path / CONFIG_NAME, path / CARD_NAME, *side_files])
    elif (count := shard_count(path.name)) > 1:
        faults = [f"it is one of {count} shards. Give the folder that holds them all: {shown(path.parent)}."]
    faults += _name_faults(folder, config, side_files)
    name, revision = _identify(path)
    card = read_source_card(path) if path.is_dir() else {}
    component = Component(folder, name, revision, config, tuple(side_files), tuple(notes), card)
    refusal = find_refusal([tensor.spec.name for _, tensor in folder.tensors()], component.class_name)
    faults += [refusal] if refusal else []
    try:
        quantization = read_quantization(path, config or {}, folder)
    except FaultsError as error:
        faults += [] if refusal else error.faults
    if faults:
        raise FaultsError(f"{path.name}: can't be converted", faults)
    if quantization:
        plain = {key: value for key, value in config.items() if key != CONFIG_KEY} if config else None
        carried = tuple(file for file in side_files if not is_about_quantization(file.name))
        component = replace(component, config=plain, side_files=carried, quantization=quantization)
    translation = translate(path.name, component.views, component.class_name)
    if component.naming == "transformers":
        translation = translation or separate_experts(component.views, component.config)
    if translation is None:
        return component
    if quantization:
        _check_cuts(path.name, translation, quantization)
    notes.append(translation.note)
    is_known = component.class_name is not None and component.class_name == _class_name(translation.config)
    config = component.config if is_known else translation.config
    return replace(component, config=config, notes=tuple(notes), translation=translation)


def _check_cuts(name: str, translation: Translation, quantization: Quantization) -> None:
    """Raises FaultsError for each tensor of several weights that is cut within a block of codes."""
    faults = [
        f"{rows.tensor}: is cut at row {rows.start}, within {multiple} rows that share scales. Give the original"
        " checkpoint."
        for view in translation.views
        for rows in view.rows
        if rows.tensor in quantization.weights
        and rows.start % (multiple := quantization.weights[rows.tensor].layer.scheme.row_multiple)
    ]
    if faults:
        raise FaultsError(f"{name}: can't be converted", faults)


def _class_name(config: dict[str, Any]) -> Any:
    architectures = config.get("architectures") or []
    names = [config.get("_class_name"), *(architectures if isinstance(architectures, list) else [architectures])]
    return next((name for name in names if name), None)


def _find_side_files(path: Path, folder: TensorFolder, notes: list[str]) -> list[Path]:
    files = []
    shards = {shard.name for shard in folder.shards}
    for entry in sorted(path.iterdir()):
        if not entry.is_file() or entry.name.startswith(".") or entry.name == CONFIG_NAME:
            continue
        if entry.name == CARD_NAME:
            notes.append(f"{entry.name}: left out, it describes the source; run-ckpt card writes the result's")
        elif is_side_file(entry):
            files.append(entry)
        elif not entry.name.endswith(WEIGHT_SUFFIXES):
            notes.append(f"{entry.name}: left out, over 64 MiB")
        elif entry.name not in shards and not entry.name.endswith((SUFFIX, INDEX_SUFFIX)):
            notes.append(f"{entry.name}: left out, weights in another container")
    return files


def _link_faults(paths: Iterable[Path]) -> Iterator[str]:
    """Yield a sentence for every file that would be carried along from another folder."""
    for path in paths:
        if leads_outside(path):
            target = os.path.realpath(path)
            yield f"{path.name}: is a link to {target}, out of its folder. Copy that file, or remove the link."


def _name_faults(folder: TensorFolder, config: dict[str, Any] | None, side_files: Iterable[Path]) -> Iterator[str]:
    """Yield a sentence for every name that no framework makes, and that what reads it might take for something else."""
    names = [*(path.name for path in side_files), *(shard.name for shard in folder.shards)]
    names += [tensor.spec.name for _, tensor in folder.tensors()]
    for name in names:
        if not name.isprintable():
            yield f"{name!r}: a name with control characters or half a character. Rename it."
        elif len(name) > _LONGEST_NAME:
            yield f"{name[:40]}...: a name of {len(name):,} characters. Rename it."
    class_name = _class_name(config or {})
    if class_name is not None and not (isinstance(class_name, str) and class_name.isidentifier()):
        yield f"{CONFIG_NAME}: {class_name!r} is no name of a class. Fetch it again."


def _identify(path: Path) -> tuple[str, str | None]:
    absolute = path.absolute()
    match = _HUB_CACHE.search(absolute.as_posix())
    if match:
        return f"{match['org']}/{match['name']}{match['rest']}", match["revision"]
    return shown(absolute.name), None
