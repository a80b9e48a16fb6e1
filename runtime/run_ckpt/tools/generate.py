"""`run-ckpt generate`: an ordinary diffusers pipeline with converted transformers in place of its own."""

import inspect
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from run_ckpt.contract.errors import CheckpointError, UsageError, first_line
from run_ckpt.loading.linear import QuantizedLinear
from run_ckpt.loading.load import describe_backends, load_quantized
from run_ckpt.progress import Progress
from run_ckpt.storage.atomic import check_file, write_durably
from run_ckpt.storage.units import format_nbytes
from run_ckpt.tools.memory import peak_nbytes, tensor_nbytes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4", ".gif")


@dataclass(frozen=True)
class Request:
    """What to generate: options that are None are left to the pipeline."""

    prompt: str
    output: Path
    seed: int = 0
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Placement:
    """Where and how models run: ``dtype`` is of what is not quantized, ``backend`` of what is (None: the first).

    ``activations``: what that multiplies its inputs in, None for its own way.
    """

    device: str
    dtype: torch.dtype
    backend: str | None = None
    activations: str | None = None


def load_transformers(
    paths: Mapping[str, Path], placement: Placement, progress: Progress, say: Callable[[str], None]
) -> dict[str, nn.Module]:
    """Return component name -> the model of its converted folder."""
    loaded = {}
    for name, path in paths.items():
        started = time.perf_counter()
        model = load_quantized(path, **vars(placement), progress=progress)
        linears = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
        say(
            f"loaded {name} ({type(model).__name__}) from {path}: {describe_backends(linears)},"
            f" {format_nbytes(tensor_nbytes(model))}, {time.perf_counter() - started:.1f} s"
        )
        loaded[name] = model
    return loaded


def load_pipeline(base: str, loaded: Mapping[str, nn.Module], placement: Placement, say: Callable[[str], None]) -> Any:
    """Return the diffusers pipeline of ``base`` (folder or Hub repo).

    loaded: component name -> the model to use; ``base``'s own weights of these are never read.
    """
    from diffusers import DiffusionPipeline

    try:
        with warnings.catch_warnings():
            # diffusers 0.42 would have it called dtype, which 0.37 does not know.
            warnings.filterwarnings("ignore", "`torch_dtype` is deprecated", FutureWarning)
            pipeline = DiffusionPipeline.from_pretrained(base, torch_dtype=placement.dtype, **loaded)
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:  # of a model_index.json that is none
        raise CheckpointError(
            f"--model-path {base}: no pipeline that diffusers can load ({first_line(error)})."
        ) from error
    pipeline.to(placement.device)
    others = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and name not in loaded]
    say(f"loaded {type(pipeline).__name__} from {base}: {', '.join(others)}")
    return pipeline


def generate(pipeline: Any, request: Request, device: str, say: Callable[[str], None]) -> None:
    """Run the pipeline and write its first image or video to ``request.output``; say time per step and memory.

    Raises UsageError, before anything runs, for an output that is neither image nor video.
    """
    check_output(request.output)
    marks: list[float] = []
    started = time.perf_counter()
    result = run_pipeline(
        pipeline, request.prompt, request.seed, request.options, lambda _: marks.append(time.perf_counter())
    )
    seconds = time.perf_counter() - started
    with TemporaryDirectory(prefix="run-ckpt-") as scratch:
        file = Path(scratch) / request.output.name
        write_media(result, file, say)
        write_durably(request.output, file.read_bytes())
    steps = [after - before for before, after in pairwise(marks)]
    per_step = f"{sorted(steps)[len(steps) // 2]:.3f} s a step (median), " if steps else ""
    say(f"wrote {request.output}: {per_step}{seconds:.1f} s in all, peak memory {format_nbytes(peak_nbytes(device))}")


def run_pipeline(
    pipeline: Any, prompt: str, seed: int, options: Mapping[str, Any], on_step: Callable[[torch.Tensor], object]
) -> Any:
    """Return what the pipeline makes of ``prompt``; options that are None are left out.

    on_step: gets the latents after each denoising step. Raises UsageError for an option the pipeline does not have.
    """

    def callback(_pipeline: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step(tensors["latents"])
        return tensors

    given = {key: value for key, value in options.items() if value is not None}
    unknown = {*given, "callback_on_step_end"} - inspect.signature(pipeline.__call__).parameters.keys()
    if unknown:
        raise UsageError(f"{type(pipeline).__name__}: has no {', '.join(sorted(unknown))}. Leave that option out.")
    # On the CPU, so that every device starts from the same noise.
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipeline(prompt=prompt, generator=generator, callback_on_step_end=callback, **given)


def check_output(path: Path) -> None:
    """Raise UsageError unless the name says image or video; and as check_file does."""
    if path.suffix.lower() not in IMAGE_SUFFIXES + VIDEO_SUFFIXES:
        known = ", ".join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)
        raise UsageError(f"--output {path}: the name must end in one of {known}.")
    check_file(path)


def write_media(result: Any, path: Path, say: Callable[[str], None]) -> None:
    """Write the first image, or the frames of the first video, of a pipeline's result."""
    frames = result.frames[0] if hasattr(result, "frames") else [result.images[0]]
    if path.suffix.lower() in IMAGE_SUFFIXES:
        if len(frames) > 1:
            say(f"a video of {len(frames)} frames, but {path.name} is an image: the first frame is written")
        from diffusers.image_processor import VaeImageProcessor

        first = frames[0]
        image = first if hasattr(first, "save") else VaeImageProcessor.numpy_to_pil(first)[0]
        image.save(path)
        return
    from diffusers.utils import export_to_gif, export_to_video

    (export_to_gif if path.suffix.lower() == ".gif" else export_to_video)(list(frames), str(path))
