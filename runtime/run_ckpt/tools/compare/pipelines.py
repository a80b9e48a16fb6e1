"""Run the same prompts and seeds through BASE and each result, and measure how far they part."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from run_ckpt.contract.errors import UsageError
from run_ckpt.progress import Progress
from run_ckpt.storage.components import find_components
from run_ckpt.tools.compare.figures import PipelineErrors, SampleErrors
from run_ckpt.tools.compare.metrics import check_packages, lpips, psnr_db, ssim, sum_errors
from run_ckpt.tools.compare.trajectory import Sample, Trajectory, draw, load_trajectory
from run_ckpt.tools.generate import Placement, load_pipeline, load_transformers

# As many columns as a screen shows.
_N_PICTURES = 8


@dataclass(frozen=True)
class Request:
    """What to draw with each: ``options`` go to the pipeline, those that are None are left to it."""

    samples: tuple[Sample, ...]
    options: Mapping[str, Any]
    with_lpips: bool = False


@dataclass(frozen=True)
class PipelineComparison:
    """BASE and the results. ``pictures`` are BASE's, as those of PipelineErrors."""

    base: str
    results: tuple[PipelineErrors, ...]
    pictures: tuple[Tensor, ...] = field(repr=False)

    @property
    def title(self) -> str:
        return f"{len(self.results[0].samples)} samples against {self.base}"

    def to_json(self) -> dict[str, Any]:
        return {"base": self.base, "results": [result.to_json() for result in self.results]}


def compare_pipelines(
    base: str,
    outputs: Sequence[Path],
    request: Request,
    placement: Placement,
    *,
    progress: Progress,
    say: Callable[[str], None],
) -> PipelineComparison:
    """Return how far each of ``outputs`` is from ``base`` on the same samples.

    One transformer is in memory at a time; BASE's trajectories wait in temporary files. Raises UsageError for
    options that the pipeline does not have, CheckpointError for what can't be loaded or is not finite.
    """
    check_packages(with_lpips=request.with_lpips)
    pipeline = load_pipeline(base, {}, placement, say)
    replaced = {output: _transformers(pipeline, output) for output in outputs}
    with TemporaryDirectory(prefix="run-ckpt-compare-") as folder:
        paths = {sample: Path(folder) / f"{n}.safetensors" for n, sample in enumerate(request.samples)}
        started = time.perf_counter()
        for sample, path in paths.items():
            draw(pipeline, sample, request.options, base).save(path)
        _say_drawn(say, len(paths), base, started)
        results = []
        for output, transformers in replaced.items():
            _replace(pipeline, transformers, placement, progress, say)
            started = time.perf_counter()
            results.append(_compare_all(pipeline, str(output), paths, request))
            _say_drawn(say, len(paths), str(output), started)
        pictures = [_picture(load_trajectory(path)) for path in list(paths.values())[:_N_PICTURES]]
    return PipelineComparison(base, tuple(results), tuple(pictures))


def _transformers(pipeline: Any, output: Path) -> dict[str, Path]:
    """Return component of the pipeline -> its converted folder. Raises UsageError where there is none."""
    found = {name or "transformer": path for name, path in find_components(output).items()}
    foreign = sorted(found.keys() - pipeline.components.keys())
    if foreign:
        raise UsageError(
            f"{output}: {', '.join(foreign)} is no component of {type(pipeline).__name__}. For a language model give"
            " --text FILE instead of --prompts."
        )
    return found


def _replace(
    pipeline: Any, paths: Mapping[str, Path], placement: Placement, progress: Progress, say: Callable[[str], None]
) -> None:
    """Free the pipeline's transformers, then load the converted ones in their place."""
    pipeline.register_modules(**dict.fromkeys(paths))
    gc.collect()
    pipeline.register_modules(**load_transformers(paths, placement, progress, say))


def _compare_all(pipeline: Any, name: str, paths: Mapping[Sample, Path], request: Request) -> PipelineErrors:
    errors: list[SampleErrors] = []
    pictures: list[Tensor] = []
    for sample, path in paths.items():
        drawn = draw(pipeline, sample, request.options, name)
        errors.append(_compare(load_trajectory(path), drawn, sample, request.with_lpips))
        pictures += [_picture(drawn)] * (len(pictures) < _N_PICTURES)
    return PipelineErrors(name, tuple(errors), tuple(pictures))


def _compare(base: Trajectory, drawn: Trajectory, sample: Sample, with_lpips: bool) -> SampleErrors:
    return SampleErrors(
        sample,
        tuple(sum_errors(r, x) for r, x in zip(base.latents, drawn.latents, strict=True)),
        psnr_db(base.frames, drawn.frames),
        ssim(base.frames, drawn.frames),
        lpips(base.frames, drawn.frames) if with_lpips else None,
    )


def _picture(trajectory: Trajectory) -> Tensor:
    return trajectory.frames[len(trajectory.frames) // 2]


def _say_drawn(say: Callable[[str], None], n_samples: int, name: str, started: float) -> None:
    say(f"drew {n_samples} samples with {name} in {time.perf_counter() - started:.1f} s")
