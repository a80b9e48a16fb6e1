"""What a comparison found, as records with the figures of a row and as JSON."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import reduce
from operator import add
from statistics import median
from typing import Any

from torch import Tensor

from run_ckpt.contract.errors import UsageError
from run_ckpt.tools.compare.metrics import ErrorSums, TextSums
from run_ckpt.tools.compare.trajectory import Sample

PIPELINE_FIGURES = (
    *("snr", "snr_summed", "cosine", "mae", "rmse", "max_abs"),
    *("psnr", "psnr_worst", "ssim", "ssim_worst", "lpips"),
)
TEXT_FIGURES = ("perplexity", "perplexity_ratio", "kl", "kl_worst", "same_top")
HIGHER_IS_BETTER = {*("snr", "snr_summed", "cosine", "psnr", "psnr_worst", "ssim", "ssim_worst", "same_top")}


@dataclass(frozen=True)
class SampleErrors:
    """One sample of one result against BASE: the latents after each step, and the 8-bit frames."""

    sample: Sample
    steps: tuple[ErrorSums, ...]
    psnr_db: float
    ssim: float
    lpips: float | None


@dataclass(frozen=True)
class PipelineErrors:
    """All samples of one result. ``pictures``: the middle frame, uint8 [H, W, C], of the first samples."""

    name: str
    samples: tuple[SampleErrors, ...]
    pictures: tuple[Tensor, ...] = field(repr=False)

    @property
    def steps(self) -> tuple[ErrorSums, ...]:
        """Return the sums over all samples after each step."""
        return tuple(reduce(add, sums) for sums in zip(*(sample.steps for sample in self.samples), strict=True))

    @property
    def figures(self) -> dict[str, float]:
        """Return figure -> value: final latents, all samples together but for the median "snr"; then the frames."""
        last = self.steps[-1]
        figures = {
            "snr": self.median_snr_db(-1),
            "snr_summed": last.snr_db,
            "cosine": last.cosine,
            "mae": last.mae,
            "rmse": last.rmse,
            "max_abs": last.max_abs,
            "psnr": median(sample.psnr_db for sample in self.samples),
            "psnr_worst": min(sample.psnr_db for sample in self.samples),
            "ssim": median(sample.ssim for sample in self.samples),
            "ssim_worst": min(sample.ssim for sample in self.samples),
        }
        distances = [sample.lpips for sample in self.samples if sample.lpips is not None]
        return {**figures, "lpips": median(distances)} if distances else figures

    def median_snr_db(self, step: int) -> float:
        """Return the median of the samples' own SNR after a step: unlike the sum, no single sample carries it."""
        return median(sample.steps[step].snr_db for sample in self.samples)

    def to_json(self) -> dict[str, Any]:
        """Return all of it as JSON values; what is infinite, as nothing differs, is null."""
        steps = [
            {**_step_json(sums), "snr": _finite(self.median_snr_db(step)), "snr_summed": _finite(sums.snr_db)}
            for step, sums in enumerate(self.steps)
        ]
        samples = [
            {
                **asdict(sample.sample),
                "psnr": _finite(sample.psnr_db),
                "ssim": sample.ssim,
                "lpips": sample.lpips,
                "steps": [{**_step_json(sums), "snr": _finite(sums.snr_db)} for sums in sample.steps],
            }
            for sample in self.samples
        ]
        return {"name": self.name, "figures": _finite_values(self.figures), "steps": steps, "samples": samples}


@dataclass(frozen=True)
class TextErrors:
    """One language model against BASE, window by window."""

    name: str
    windows: tuple[TextSums, ...]

    @property
    def figures(self) -> dict[str, float]:
        """Return figure -> value: of all tokens together, "kl_worst" of the worst window; KL in nats."""
        total = reduce(add, self.windows)
        return {
            "perplexity": math.exp(total.nll / total.n),
            "perplexity_ratio": math.exp((total.nll - total.base_nll) / total.n),
            "kl": total.kl / total.n,
            "kl_worst": max(window.kl / window.n for window in self.windows),
            "same_top": total.n_same_top / total.n,
        }

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "figures": _finite_values(self.figures), "windows": [vars(w) for w in self.windows]}


@dataclass(frozen=True)
class Limit:
    """A bound on one figure: the least where larger is better, else the most."""

    figure: str
    value: float

    def fault(self, name: str, figures: Mapping[str, float]) -> str | None:
        """Return a sentence where ``name`` is beyond it."""
        found = figures[self.figure]
        if self.figure in HIGHER_IS_BETTER:
            return f"{name}: {self.figure} {found:.6g} is under {self.value:g}" if found < self.value else None
        return f"{name}: {self.figure} {found:.6g} is over {self.value:g}" if found > self.value else None


def measured_figures(*, of_text: bool, with_lpips: bool) -> tuple[str, ...]:
    """Return the figures that a comparison will have."""
    if of_text:
        return TEXT_FIGURES
    return PIPELINE_FIGURES if with_lpips else PIPELINE_FIGURES[:-1]


def parse_limits(figures: Sequence[str], fail_under: Sequence[str], fail_over: Sequence[str]) -> list[Limit]:
    """Return the limits of texts such as "psnr=30"; ``figures`` are those that will be measured.

    Raises UsageError for any other text, and for a figure that is bounded from the wrong side.
    """
    higher = [figure for figure in figures if figure in HIGHER_IS_BETTER]
    lower = [figure for figure in figures if figure not in HIGHER_IS_BETTER]
    limits = [_parse_limit("--fail-under", text, higher) for text in fail_under]
    return limits + [_parse_limit("--fail-over", text, lower) for text in fail_over]


def _parse_limit(option: str, text: str, figures: Sequence[str]) -> Limit:
    figure, _, number = text.partition("=")
    if figure not in figures:
        raise UsageError(f"{option} {text}: {figure!r} is none of {', '.join(figures)}.")
    try:
        return Limit(figure, float(number))
    except ValueError as error:
        raise UsageError(f"{option} {text}: {number!r} is no number. Write {figure}=0.5, say.") from error


def faults(results: Sequence[PipelineErrors | TextErrors], limits: Sequence[Limit]) -> list[str]:
    """Return a sentence for every figure that is beyond its limit."""
    found = (limit.fault(result.name, result.figures) for result in results for limit in limits)
    return [fault for fault in found if fault]


def _step_json(sums: ErrorSums) -> dict[str, float]:
    return {"cosine": sums.cosine, "mae": sums.mae, "rmse": sums.rmse, "max_abs": sums.max_abs}


def _finite_values(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {key: _finite(value) for key, value in figures.items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
