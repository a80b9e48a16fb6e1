"""What the user asked for, as one frozen record."""

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from run_ckpt.contract.dialects.table import DIALECTS
from run_ckpt.contract.display import shown
from run_ckpt.contract.errors import UsageError
from run_ckpt.contract.formats import FORMATS, GRANULARITIES, SCALE_RULES, Scheme
from run_ckpt.contract.layouts import LAYOUTS
from run_ckpt.contract.manifest import GPTQ, METHODS
from run_ckpt.contract.targets import TARGETS
from run_ckpt.storage.units import parse_nbytes


@dataclass(frozen=True)
class Options:
    """Everything that decides the bytes of the result, the source aside. Raises UsageError for unknown values."""

    format: str
    """Format of the linear layers' weights, "mxfp4", "nvfp4", "mxfp8" or "fp8"; a recipe may give layers their own."""

    target: str | None = None
    """Who will run it, such as "sglang": decides what else is left open. None: what is usual for the model."""

    layout: str | None = None
    """Byte order of MXFP4 weights and scales: "aiter", shuffled for AITER's kernels, or "plain", row-major.

    None: what the target reads, "aiter" where none was asked for."""

    granularity: str | None = None
    """What shares an FP8 scale: a "tensor", a "channel" (row), or a "block" of 128 x 128.

    None: what the target reads; where none was asked for "tensor", in a mixture of experts "channel"."""

    scale_rule: str | None = None
    """How MXFP4 picks the power of two for a block of 32: "even" (AITER's), "floor" (OCP MX v1.0), "roundup", "mse".

    None: "even". MXFP8 knows "roundup", which it takes by default, and "floor"."""

    dialect: str | None = None
    """Whose names and config keys are written, such as "quark". None: by format, layout and model."""

    preset: str | None = None
    """What is known of the model's layers, such as "flux1". None: by the class in config.json."""

    recipe: Path | None = None
    """TOML file of rules that decide layer by layer, before the preset's."""

    ignore: tuple[str, ...] = ()
    """Patterns of modules to keep as they are; * stands for any characters."""

    calibration: Path | None = None
    """Folder of statistics (run-ckpt calibrate), or a file with the largest value of each input.

    That is ModelOpt's backbone.pt, or safetensors with an <layer>.input_amax for each layer."""

    method: str | None = None
    """How codes are chosen: "rtn", the nearest, or "gptq". None: gptq where the statistics have correlations."""

    static: bool = False
    """Give FP8 layers a static activation scale, by --calibration, or as a source that is quantized already has it; a
    calibration file of ranges does so anyway."""

    fold: bool = False
    """Smooth the layers' inputs by their statistics, where folding that into the layer before is exact."""

    allow_unaligned_k: bool = False
    """Quantize to shuffled MXFP4 also where K is a multiple of 64 but not of 256, for which AITER tunes no kernel."""

    swap_weight_nibbles: bool = False
    """Let SGLang swap the two codes of each NVFP4 byte at load (dialect modelopt; the bytes stay the same)."""

    max_size: int | str | None = None
    """Bytes, or a size such as "4GB", that all shards may take: layers get the formats that fit and do least damage.

    ``format`` is the smallest; the others are those that it may be raised to, and staying as it is."""

    min_sqnr: float | None = None
    """Signal-to-noise ratio in dB to be reached in the fewest bytes; the plan says of what it is."""

    sensitivities: Path | None = None
    """TOML or JSON file of measured damages (plan/sensitivities.py), instead of predicting them."""

    keep_first: int = 0
    """Keep the linear layers of so many blocks at the start of each stack of blocks as they are."""

    keep_last: int = 0
    """The same at the end of each stack."""

    shard_size: int | str | None = None
    """Bytes, or a size such as "5GB", of the tensors in an output file at most; what belongs to a layer stays together.

    None: a file for each of the source."""

    def __post_init__(self) -> None:
        _check_choice("--format", self.format, FORMATS)
        _check_choice("--target", self.target, (None, *TARGETS))
        _check_choice("--layout", self.layout, (None, *LAYOUTS))
        _check_choice("--granularity", self.granularity, (None, *GRANULARITIES))
        _check_choice("--scale-rule", self.scale_rule, (None, *SCALE_RULES))
        _check_choice("--dialect", self.dialect, (None, *DIALECTS))
        _check_choice("--method", self.method, (None, *METHODS))
        self._check_budget()
        if self.max_shard_nbytes is not None and self.max_shard_nbytes < 1:
            raise UsageError(f"--shard-size {self.shard_size}: not a size. Write 5GB, say.")
        if not self.calibration and (self.fold or self.method == GPTQ):
            asked = "--fold" if self.fold else f"--method {GPTQ}"
            raise UsageError(f"{asked}: needs --calibration DIR, the statistics that run-ckpt calibrate records.")
        if (self.method == GPTQ or self.fold) and not self.has_statistics:
            asked = "--fold" if self.fold else f"--method {GPTQ}"
            raise UsageError(f"{asked}: {self.calibration} is a file of ranges. Give a folder of statistics.")

    def _check_budget(self) -> None:
        if self.max_size is not None and self.min_sqnr is not None:
            raise UsageError("--max-size, --min-sqnr: one of them decides what the other becomes. Give either.")
        if self.max_nbytes is not None and self.max_nbytes < 1:
            raise UsageError(f"--max-size {self.max_size}: not a size. Write 4GB, say.")
        if self.min_sqnr is not None and not math.isfinite(self.min_sqnr):
            raise UsageError(f"--min-sqnr {self.min_sqnr}: not a number of dB.")
        if self.sensitivities and not self.has_budget:
            raise UsageError("--sensitivities: decides nothing without --max-size SIZE or --min-sqnr DB.")
        for option, count in (("--keep-first", self.keep_first), ("--keep-last", self.keep_last)):
            if count < 0:
                raise UsageError(f"{option} {count}: not a number of blocks.")

    @property
    def has_budget(self) -> bool:
        """True where formats are chosen layer by layer."""
        return self.max_size is not None or self.min_sqnr is not None

    @property
    def max_shard_nbytes(self) -> int | None:
        """``shard_size`` in bytes."""
        return parse_nbytes(self.shard_size) if isinstance(self.shard_size, str) else self.shard_size

    @property
    def max_nbytes(self) -> int | None:
        """``max_size`` in bytes."""
        return parse_nbytes(self.max_size) if isinstance(self.max_size, str) else self.max_size

    @property
    def budget(self) -> str:
        """What was asked for, in the words of the command."""
        return f"--max-size {self.max_size}" if self.max_size is not None else f"--min-sqnr {self.min_sqnr:g}"

    @property
    def has_statistics(self) -> bool:
        """True where --calibration is a folder of statistics, not a file of ranges."""
        return self.calibration is not None and self.calibration.is_dir()

    @property
    def has_static_scales(self) -> bool:
        """True where layers get an input_scale; a file of ranges is good for nothing else."""
        return self.static or (self.calibration is not None and not self.has_statistics)

    def scheme(self, weight_format: str) -> Scheme:
        """Return how a layer of ``weight_format`` is stored; what is open is the format's first choice."""
        return FORMATS[weight_format].scheme(self.layout or "", self.granularity or "")

    def to_json(self) -> dict[str, Any]:
        """Return the options as JSON values; files by their bare name."""
        values = asdict(self)
        values["scale_rule"] = self.scale_rule or SCALE_RULES[0]
        values["ignore"] = list(self.ignore)
        for name in ("recipe", "calibration", "sensitivities"):
            values[name] = values[name] and shown(values[name].name)
        return values


def _check_choice(option: str, value: str | None, choices: Iterable[str | None]) -> None:
    if value not in choices:
        raise UsageError(f"{option} {value}: unknown. Choose one of {', '.join(c for c in choices if c)}.")
