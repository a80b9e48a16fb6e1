"""What the user asked for, as one frozen record."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import FORMATS, GRANULARITIES, SCALE_RULES, Scheme
from run_ckpt.contract.layouts import LAYOUTS


@dataclass(frozen=True)
class Options:
    """Everything that decides the bytes of the result, the source apart.

    ``dialect`` and ``preset`` are None where they are to follow from format, layout and model.
    """

    format: str
    layout: str = "aiter"
    granularity: str = "tensor"
    scale_rule: str = "even"
    dialect: str | None = None
    preset: str | None = None
    recipe: Path | None = None
    ignore: tuple[str, ...] = ()
    calibration: Path | None = None
    allow_unaligned_k: bool = False

    def __post_init__(self) -> None:
        _check_choice("--format", self.format, FORMATS)
        _check_choice("--layout", self.layout, LAYOUTS)
        _check_choice("--granularity", self.granularity, GRANULARITIES)
        _check_choice("--scale-rule", self.scale_rule, SCALE_RULES)
        _check_choice("--dialect", self.dialect, (None, *DIALECTS))

    def scheme(self, weight_format: str) -> Scheme:
        """Return how a layer of ``weight_format`` is stored under these options."""
        return FORMATS[weight_format].scheme(self.layout, self.granularity)

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; files by their bare name."""
        values = asdict(self)
        values["ignore"] = list(self.ignore)
        for name in ("recipe", "calibration"):
            values[name] = values[name] and values[name].name
        return values


def _check_choice(option: str, value: str | None, choices: Iterable[str | None]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: unknown. Choose one of {', '.join(c for c in choices if c)}.")
