"""The trained example: sample digits from a transformer of examples/flux-digits, and read them."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import FluxTransformer2DModel
from diffusers.utils import logging
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.svm import SVC
from torch import Tensor

from run_ckpt import record_statistics

N_CLASSES = 10
IMAGE_SIZE = 8
N_STEPS = 20
BATCH_SIZE = 250

# What the model was trained with.
_GRID = IMAGE_SIZE // 2
_TEXT_SHAPE = (N_CLASSES, 2, 256)
_TEXT_SEED = 7
_PIXEL_MAX = 16


@dataclass(frozen=True)
class Request:
    """What to sample: one start noise float32 [B, 1, 8, 8] and one label int64 [B] for each image."""

    noise: Tensor
    labels: Tensor


def load_transformer(folder: Path) -> FluxTransformer2DModel:
    """Return the BF16 transformer of a checkpoint folder, in inference mode."""
    logging.disable_progress_bar()
    return FluxTransformer2DModel.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()


def make_request(n_samples: int, seed: int = 1) -> Request:
    """Return ``n_samples`` noises and the labels 0..9, repeating; equal seeds give equal requests."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n_samples, 1, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    return Request(noise, torch.arange(n_samples) % N_CLASSES)


@torch.inference_mode()
def sample(transformer: FluxTransformer2DModel, request: Request) -> Tensor:
    """Return the images float32 [B, 1, 8, 8], about -1 to 1, that 20 Euler steps make of the noises."""
    batches = zip(request.noise.split(BATCH_SIZE), request.labels.split(BATCH_SIZE), strict=True)
    return torch.cat([_sample_batch(transformer, noise, labels) for noise, labels in batches])


def calibrate(transformer: FluxTransformer2DModel, folder: Path, n_samples: int = 32, seed: int = 1000) -> None:
    """Record what goes into the linear layers, and what their errors do, while ``n_samples`` digits are sampled.

    A quarter of them is held out.
    """
    request = make_request(n_samples, seed)
    settings = {"n_samples": n_samples, "seed": seed}
    with record_statistics(transformer, folder, fisher=True, settings=settings) as recorder:
        for noise, labels in zip(request.noise.split(4), request.labels.split(4), strict=True):
            recorder.next_sample()
            sample(transformer, Request(noise, labels))


def _sample_batch(transformer: FluxTransformer2DModel, noise: Tensor, labels: Tensor) -> Tensor:
    text = torch.randn(_TEXT_SHAPE, generator=torch.Generator().manual_seed(_TEXT_SEED))[labels]
    conditions = {
        "encoder_hidden_states": text.bfloat16(),
        "pooled_projections": text.mean(dim=1).bfloat16(),
        "img_ids": _grid_ids(),
        "txt_ids": torch.zeros(text.shape[1], 3),
    }
    x = pack(noise)
    for step in range(N_STEPS):
        time = torch.full((len(x),), 1 - step / N_STEPS)
        velocity = transformer(hidden_states=x.bfloat16(), timestep=time, return_dict=False, **conditions)[0]
        x = x - velocity.float() / N_STEPS
    return unpack(x)


def _grid_ids() -> Tensor:
    """Return float32 [16, 3]: 0, row and column of each token."""
    row_and_column = torch.cartesian_prod(torch.arange(_GRID), torch.arange(_GRID))
    return torch.cat([torch.zeros(_GRID**2, 1), row_and_column], dim=1)


def pack(images: Tensor) -> Tensor:
    """Return tokens [B, 16, 4] of images [B, 1, 8, 8], one for each 2x2 square."""
    squares = images.reshape(-1, _GRID, 2, _GRID, 2)  # [B, row, in_row, column, in_column]
    return squares.permute(0, 1, 3, 2, 4).reshape(-1, _GRID**2, 4)


def unpack(tokens: Tensor) -> Tensor:
    """Return images [B, 1, 8, 8] of tokens [B, 16, 4]; the inverse of pack."""
    squares = tokens.reshape(-1, _GRID, _GRID, 2, 2)
    return squares.permute(0, 1, 3, 2, 4).reshape(-1, 1, IMAGE_SIZE, IMAGE_SIZE)


def to_pixels(images: Tensor) -> NDArray[np.float32]:
    """Return float32 [B, 8, 8] from 0 (paper) to 16 (ink), the range of scikit-learn's digits."""
    return ((images.clamp(-1, 1) + 1) * (_PIXEL_MAX / 2)).squeeze(1).numpy()


def fit_judge() -> SVC:
    """Return a support vector machine fitted on all 1797 handwritten digits of scikit-learn."""
    pixels, labels = load_digits(return_X_y=True)
    return SVC(gamma=0.001, C=10).fit(pixels, labels)


def share_read_correctly(judge: SVC, images: Tensor, labels: Tensor) -> float:
    """Return the share of images [B, 1, 8, 8] in which the judge reads the digit that was asked for."""
    return float(judge.score(to_pixels(images).reshape(len(images), -1), labels.numpy()))


def snr_db_by_sample(reference: Tensor, images: Tensor) -> Tensor:
    """Return 10 log10(sum reference^2 / sum (reference - images)^2) of each image, float64 [B]."""
    error = (images.double() - reference.double()).square().flatten(1).sum(1)
    return 10 * torch.log10(reference.double().square().flatten(1).sum(1) / error)


def snr_db(reference: Tensor, images: Tensor) -> float:
    """Return 10 log10(sum reference^2 / sum (reference - images)^2)."""
    error = (images.double() - reference.double()).square().sum()
    return float(10 * torch.log10(reference.double().square().sum() / error))
