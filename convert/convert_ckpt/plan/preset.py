"""What is known of each model class: the data files in presets/, read into records."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path
from typing import Any

from convert_ckpt.source.toml_files import read_toml
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.module_names import matches_pattern

PRESET_FOLDER = Path(__file__).parent / "presets"
GENERIC = "generic"


@dataclass(frozen=True)
class FusedPattern:
    """Linears that become one at load. ``*`` stands for the same text in every member.

    ``scale_name`` is the fused module whose scale must be on disk too; ``block_scale`` says that
    this holds for block scales as well.
    """

    members: tuple[str, ...]
    scale_name: str | None = None
    block_scale: bool = False


@dataclass(frozen=True)
class FoldPattern:
    """Linears whose common input comes from a norm or a modulation that nothing else reads.

    ``writer`` is the norm, whose weight and bias are [K]; or the linear layer of the modulation, whose rows are
    ``n_chunks`` chunks of K, of which number ``shift`` and ``scale`` make norm(x) * (1 + scale) + shift. ``classes``:
    the only model classes in which that is so; (): all of the preset.
    """

    layers: tuple[str, ...]
    writer: str
    n_chunks: int = 1
    shift: int | None = None
    scale: int | None = None
    classes: tuple[str, ...] = ()

    @property
    def is_modulation(self) -> bool:
        return self.scale is not None

    @property
    def chunks(self) -> tuple[int, ...]:
        """The chunks that are divided."""
        return tuple(chunk for chunk in (self.shift, self.scale) if chunk is not None) or (0,)


@dataclass(frozen=True)
class Runtime:
    """What one target's runtime makes of the linears of a class.

    ``names`` maps a pattern on those that it can quantize to their name there; all others it builds as plain linears.
    The block index in a name may be shifted by the blocks of another container (``index_follows``).
    ``names_if`` maps a pattern to names that hold instead where the checkpoint has such a module.
    ``keep`` maps a pattern to the reason why a linear that has a name must stay as it is for this target.
    ``ignores`` is False where linears are built without names, so that no ignore list reaches them.
    ``refuses`` maps a pattern on tensor names to the reason why it runs no quantized result of what has such a tensor.
    """

    names: dict[str, str] = field(default_factory=lambda: {"*": "*"})
    names_if: dict[str, dict[str, str]] = field(default_factory=dict)
    index_follows: dict[str, str] = field(default_factory=dict)
    keep: dict[str, str] = field(default_factory=dict)
    ignores: bool = True
    refuses: dict[str, str] = field(default_factory=dict)


# Of a target that takes every linear under its name in the checkpoint.
PLAIN_RUNTIME = Runtime()


@dataclass(frozen=True)
class Preset:
    """Facts about a model class. A file's ``base`` is the preset of a kin, whose facts hold too, but not its runtimes.

    ``keep`` maps a pattern on module names to the reason why these are sensitive; ``embeddings`` are patterns of
    tables that look like linear weights but are none; ``runtimes`` maps a target to what it makes of the linears.
    ``folds`` are those that are exact in the class's graph. ``dialect`` is the only one that is read of the class.
    ``told_by`` maps a class to tensors that all its checkpoints have, which tell it without a config.json.
    """

    name: str
    classes: tuple[str, ...]
    naming: str
    keep: dict[str, str]
    embeddings: tuple[str, ...]
    fused: tuple[FusedPattern, ...]
    folds: tuple[FoldPattern, ...]
    runtimes: dict[str, Runtime]
    dialect: str | None = None
    told_by: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def runtime(self, target: str) -> Runtime:
        """Return what a target makes of the linears; nothing is known against one without an entry."""
        return self.runtimes.get(target, PLAIN_RUNTIME)

    def is_embedding(self, module: str) -> bool:
        return any(matches_pattern(pattern, module) for pattern in self.embeddings)


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.toml"))


@cache
def load_preset(name: str) -> Preset:
    """Return a preset by name. Raises UsageError with the known names."""
    if name not in preset_names():
        raise UsageError(f"--preset {name}: unknown. Known presets: {', '.join(preset_names())}.")
    table = read_toml(PRESET_FOLDER / f"{name}.toml")
    base = load_preset(table["base"]) if "base" in table else None
    fused = [
        FusedPattern(tuple(entry["members"]), entry.get("scale_name"), entry.get("block_scale", False))
        for entry in table.get("fused", [])
    ]
    folds = [_fold_pattern(**entry) for entry in table.get("fold", [])]
    return Preset(
        name=name,
        classes=tuple(table["classes"]),
        naming=base.naming if base else table["naming"],
        keep={**(base.keep if base else {}), **_reasons(table.get("keep", {}))},
        embeddings=(*(base.embeddings if base else ()), *table.get("embeddings", ())),
        fused=(*(base.fused if base else ()), *fused),
        folds=(*(base.folds if base else ()), *folds),
        runtimes={target: _runtime(table["runtimes"], **entry) for target, entry in table.get("runtimes", {}).items()},
        dialect=table.get("dialect"),
        told_by={name: tuple(tensors) for name, tensors in table.get("told_by", {}).items()},
    )


def _runtime(others: Mapping[str, Any], names_of: str = "", **entry: Any) -> Runtime:
    """Return a runtime from its table. names_of: the one whose names it has too."""
    if names_of:
        entry["names"] = others[names_of]["names"]
    return Runtime(**{**entry, **{key: _reasons(entry.get(key, {})) for key in ("keep", "refuses")}})


def _reasons(patterns_of: dict[str, list[str]]) -> dict[str, str]:
    return {pattern: reason for reason, patterns in patterns_of.items() for pattern in patterns}


def _fold_pattern(
    layers: list[str], norm: str = "", modulation: str = "", classes: tuple[str, ...] = (), **chunks: int
) -> FoldPattern:
    return FoldPattern(tuple(layers), norm or modulation, classes=tuple(classes), **chunks)


def find_preset(class_name: str | None) -> Preset:
    """Return the preset whose classes match ``class_name``, or the generic one."""
    presets = [load_preset(name) for name in preset_names()]
    # One that names the class before one whose pattern it matches.
    presets.sort(key=lambda preset: class_name not in preset.classes)
    for preset in presets:
        if class_name and any(fnmatchcase(class_name, pattern) for pattern in preset.classes):
            return preset
    return load_preset(GENERIC)


def tell_classes(tensor_names: Collection[str]) -> dict[str, str]:
    """Return class -> preset of those that a checkpoint without config.json may be of: it has all their telling names.

    A class that adds to another's has the other's names too, so that of several those with most count.
    """
    names = set(tensor_names)
    presets = map(load_preset, preset_names())
    told = [
        (len(tensors), kind, preset.name)
        for preset in presets
        for kind, tensors in preset.told_by.items()
        if names.issuperset(tensors)
    ]
    most = max((count for count, _, _ in told), default=0)
    return {kind: preset for count, kind, preset in told if count == most}
