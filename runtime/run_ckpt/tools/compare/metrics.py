"""How far one tensor, picture or distribution is from its reference: pure functions of tensors."""

import math
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from run_ckpt.contract.errors import UsageError
from run_ckpt.extras import require_packages

PIXEL_MAX = 255


@dataclass(frozen=True)
class ErrorSums:
    """Sums over the elements of a reference r and of x, which is compared with it; d = x - r.

    They add up: the sums of two samples together are those of each added, so every figure below can be
    had for one sample and for all of them.
    """

    n: int
    reference_squares: float
    squares: float
    products: float
    difference_squares: float
    absolute_difference: float
    max_abs: float

    def __add__(self, other: "ErrorSums") -> "ErrorSums":
        return ErrorSums(
            self.n + other.n,
            self.reference_squares + other.reference_squares,
            self.squares + other.squares,
            self.products + other.products,
            self.difference_squares + other.difference_squares,
            self.absolute_difference + other.absolute_difference,
            max(self.max_abs, other.max_abs),
        )

    @property
    def cosine(self) -> float:
        """Return r . x / (|r| |x|); 1 where both are zero."""
        lengths = math.sqrt(self.reference_squares * self.squares)
        return self.products / lengths if lengths else float(self.reference_squares == self.squares)

    @property
    def mae(self) -> float:
        """Return the mean of |d|."""
        return self.absolute_difference / self.n

    @property
    def rmse(self) -> float:
        """Return the root of the mean of d^2."""
        return math.sqrt(self.difference_squares / self.n)

    @property
    def snr_db(self) -> float:
        """Return 10 log10(sum r^2 / sum d^2); infinite where nothing differs."""
        return _decibels(self.reference_squares, self.difference_squares)


def sum_errors(reference: Tensor, other: Tensor) -> ErrorSums:
    """Return the sums over two tensors of one shape, taken in float64."""
    r, x = reference.double().flatten(), other.double().flatten()
    difference = x - r
    return ErrorSums(
        n=r.numel(),
        reference_squares=float(r.square().sum()),
        squares=float(x.square().sum()),
        products=float((r * x).sum()),
        difference_squares=float(difference.square().sum()),
        absolute_difference=float(difference.abs().sum()),
        max_abs=float(difference.abs().max()),
    )


def check_packages(*, with_lpips: bool) -> None:
    """Raise MissingPackageError for what ssim and lpips lack, UsageError unless AlexNet's weights can be had."""
    require_packages("run-ckpt compare", "torchmetrics", "PIL", *["torchvision"] * with_lpips)
    if with_lpips:
        blank = torch.zeros(1, 64, 64, 3, dtype=torch.uint8)
        try:
            lpips(blank, blank)
        except OSError as error:
            raise UsageError(f"--lpips: torchvision can't fetch AlexNet's weights ({error}). Leave it out.") from error


def psnr_db(reference: Tensor, other: Tensor) -> float:
    """Return 10 log10(255^2 / mean d^2) of uint8 frames [F, H, W, C], all frames together; infinite if equal."""
    mean_square = float((other.double() - reference.double()).square().mean())
    return _decibels(PIXEL_MAX**2, mean_square)


def ssim(reference: Tensor, other: Tensor) -> float:
    """Return the structural similarity of uint8 frames [F, H, W, C], the mean of the frames; 1 if equal.

    Gaussian window of 11 pixels, sigma 1.5, on each channel. Source: Wang et al. 2004, torchmetrics.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure as measure

    # One frame at a time, as it holds ten times a frame; in float64, as it takes variances as differences of squares.
    pairs = zip(_channels_first(reference), _channels_first(other), strict=True)
    values = [float(cast(Tensor, measure(x[None].double(), r[None].double(), data_range=1.0))) for r, x in pairs]
    return sum(values) / len(values)


def lpips(reference: Tensor, other: Tensor) -> float:
    """Return the learned perceptual distance of uint8 frames [F, H, W, C], the mean of the frames; 0 if equal.

    With AlexNet, whose weights torchvision downloads once. Source: Zhang et al. 2018, torchmetrics.
    """
    from torchmetrics.functional.image import learned_perceptual_image_patch_similarity as measure

    pairs = zip(_channels_first(reference), _channels_first(other), strict=True)
    values = [float(measure(x[None], r[None], net_type="alex", normalize=True)) for r, x in pairs]
    return sum(values) / len(values)


@dataclass(frozen=True)
class TextSums:
    """Sums over predicted tokens: of -log p(token) by BASE and by the model, of KL(BASE || model), of equal guesses."""

    n: int
    base_nll: float
    nll: float
    kl: float
    n_same_top: int

    def __add__(self, other: "TextSums") -> "TextSums":
        return TextSums(
            self.n + other.n,
            self.base_nll + other.base_nll,
            self.nll + other.nll,
            self.kl + other.kl,
            self.n_same_top + other.n_same_top,
        )


def sum_text_errors(base_logits: Tensor, logits: Tensor, tokens: Tensor) -> TextSums:
    """Return the sums over the tokens int64 [T] that logits [T, vocabulary] predict, in float32 and nats."""
    base, ours = (F.log_softmax(each.float(), dim=-1) for each in (base_logits, logits))
    kl = F.kl_div(ours, base, reduction="none", log_target=True).sum(-1)
    nll = [-each.gather(-1, tokens[:, None]).double().sum() for each in (base, ours)]
    same_top = (base.argmax(-1) == ours.argmax(-1)).sum()
    return TextSums(len(tokens), float(nll[0]), float(nll[1]), float(kl.double().sum()), int(same_top))


def _channels_first(frames: Tensor) -> Tensor:
    """uint8 [F, H, W, C] -> float32 [F, C, H, W] from 0 to 1."""
    return frames.permute(0, 3, 1, 2).float() / PIXEL_MAX


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if signal and noise else (math.inf if not noise else -math.inf)
