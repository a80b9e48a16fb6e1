"""What a pipeline computes for a prompt: the latents of every step and the frames."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from run_ckpt.contract.errors import CheckpointError, UsageError
from run_ckpt.storage.files import read_small
from run_ckpt.tools.compare.metrics import PIXEL_MAX
from run_ckpt.tools.generate import run_pipeline


@dataclass(frozen=True)
class Sample:
    """One thing to generate."""

    prompt: str
    seed: int


def read_samples(prompts: Path, n_samples: int | None, seed: int) -> tuple[Sample, ...]:
    """Return ``n_samples`` samples, the lines of a text file in turn; the first has ``seed``, each next one more.

    n_samples: None for one of each line. Raises UsageError where the file has no line that is not blank.
    """
    lines = [line.strip() for line in read_small(prompts).decode(errors="replace").splitlines() if line.strip()]
    if not lines:
        raise UsageError(f"--prompts {prompts}: holds no prompt. Write one in each line.")
    return tuple(Sample(lines[n % len(lines)], seed + n) for n in range(n_samples or len(lines)))


@dataclass(frozen=True)
class Trajectory:
    """``latents`` float32 [steps, ...] after each step; ``frames`` uint8 [F, H, W, C], one for an image."""

    latents: Tensor
    frames: Tensor

    def save(self, path: Path) -> None:
        """Write it as a safetensors file."""
        save_file(vars(self), path)


def load_trajectory(path: Path) -> Trajectory:
    """Return what ``save`` wrote."""
    return Trajectory(**load_file(path))


def draw(pipeline: Any, sample: Sample, options: Mapping[str, Any], name: str) -> Trajectory:
    """Return the trajectory of a sample. Raises CheckpointError, naming ``name``, where latents are not finite."""
    latents: list[Tensor] = []
    # A copy: some schedulers go on in place.
    result = run_pipeline(
        pipeline,
        sample.prompt,
        sample.seed,
        {**options, "output_type": "np"},
        lambda step: latents.append(step.detach().to("cpu", torch.float32, copy=True)),
    )
    for number, step in enumerate(latents):
        if not step.isfinite().all():
            raise CheckpointError(
                f"{name}: the latents hold NaN or Inf after step {number + 1} of {sample.prompt!r}."
                " Try --dtype float32, or another --backend; run-ckpt verify tells whether the files are sound."
            )
    frames = result.frames[0] if hasattr(result, "frames") else result.images[:1]
    pixels = torch.from_numpy(np.clip(frames, 0, 1)).mul(PIXEL_MAX).round().to(torch.uint8)
    return Trajectory(torch.stack(latents), pixels.contiguous())
