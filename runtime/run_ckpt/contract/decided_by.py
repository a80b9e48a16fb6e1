"""Who decided what becomes of a tensor: the words that the manifest uses."""

from dataclasses import dataclass

FORMAT = "format"
IGNORE = "ignore"
RECIPE = "recipe"
PRESET = "preset"
TARGET = "target"
BOTH = "preset and target"
SHAPE = "shape"
UNKNOWN_CLASS = "unknown class"
FUSED = "fused"
EDGE = "edge"
BUDGET = "budget"
NOT_LINEAR = "not linear"
# Word -> what it stands for, and what ``rule`` then is.
DECIDERS = {
    FORMAT: "--format, as no rule says otherwise",
    IGNORE: "--ignore; its pattern",
    RECIPE: "a rule of the recipe; its pattern",
    PRESET: "a rule of the preset; its pattern",
    TARGET: "that the target does not run it quantized; the preset's pattern for that",
    BOTH: "a rule of the preset, and that the target does not run it quantized; its pattern",
    SHAPE: "its shape or dtype, which the format does not take",
    UNKNOWN_CLASS: "that no preset knows the class, and it lies outside of the numbered blocks",
    FUSED: "a layer that it is fused with at load; that layer",
    EDGE: "--keep-first or --keep-last; the pattern of its block",
    BUDGET: "a budget, for which formats were chosen layer by layer; its option",
    NOT_LINEAR: "that it is no 2-D weight of a linear layer",
}


@dataclass(frozen=True, slots=True)
class DecidedBy:
    """``by`` is one of DECIDERS, ``rule`` the pattern or the layer that it names there, else None."""

    by: str
    rule: str | None = None

    def __post_init__(self) -> None:
        if self.by not in DECIDERS:
            raise ValueError(f"decided_by {self.by!r} is unknown")

    def to_json(self) -> dict[str, str | None]:
        return {"by": self.by, "rule": self.rule}


BY_FORMAT = DecidedBy(FORMAT)
BY_KIND = DecidedBy(NOT_LINEAR)
