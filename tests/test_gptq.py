"""GPTQ's codes are those of the published algorithm; uncorrelated inputs give those of rounding to nearest."""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor

from convert_ckpt.methods.gptq import NotPositiveDefiniteError, Rounded, factorize, round_rows
from convert_ckpt.methods.grid import Grid
from run_ckpt.contract.codec import dequantize, expand_scales, quantize
from run_ckpt.contract.elements import decode_e2m1, decode_e8m0, encode_e2m1
from run_ckpt.contract.formats import CHANNEL_FP8, MX_BLOCK_SIZE, MXFP4, PLAIN_MXFP4, Scheme
from tests.bits import assert_bits_equal

SCHEMES = {"mxfp4": PLAIN_MXFP4, "fp8": CHANNEL_FP8}


@dataclass(frozen=True)
class Nearest:
    """A weight rounded to nearest by the contract: decoded float32 [N, K], and the grid of its values."""

    decoded: Tensor
    grid: Grid
    scale: Tensor


def nearest(weight: Tensor, scheme: Scheme) -> Nearest:
    """weight: float32 [N, K]."""
    N, K = weight.shape
    codes, scales = quantize(weight, scheme, "even")
    decoded = dequantize(codes, scales, scheme)
    scales = decode_e8m0(scales) if scheme.format == MXFP4 else scales
    columns = np.arange(K) // MX_BLOCK_SIZE if scheme.format == MXFP4 else np.zeros(K, np.int64)
    grid = Grid(scheme.format.element.name, np.ascontiguousarray(scales.T.numpy()), columns)
    return Nearest(decoded, grid, expand_scales(scales, scheme, N, K))


def round_to_grid(x: Tensor, scale: Tensor, scheme: Scheme) -> Tensor:
    """Return float64 values of the nearest codes of x float64 [N] under scale [N]."""
    if scheme.format == MXFP4:
        return decode_e2m1(encode_e2m1(x / scale)).double() * scale
    return (x / scale).clamp(-448, 448).float().to(torch.float8_e4m3fn).double() * scale


def published_gptq(weight: Tensor, scale: Tensor, hessian: Tensor, scheme: Scheme) -> Tensor:
    """Algorithm 1 of arXiv 2210.17323 with act-order, one column at a time, all in float64.

    The inverse is that of H + 0.01 mean(diag H), and its upper Cholesky factor says what later columns take over.
    """
    order = torch.argsort(hessian.diagonal(), descending=True, stable=True)
    w, scale, hessian = weight.double()[:, order], scale.double()[:, order], hessian.double()[order][:, order]
    hessian = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(order))
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    decoded = torch.empty_like(w)
    for k in range(len(order)):
        decoded[:, k] = round_to_grid(w[:, k], scale[:, k], scheme)
        error = (w[:, k] - decoded[:, k]) / upper[k, k]
        w[:, k + 1 :] -= error[:, None] * upper[k, k + 1 :]
    return decoded[:, torch.argsort(order)].float()


def make_weight(N: int, K: int) -> Tensor:
    return torch.randn(N, K, generator=torch.Generator().manual_seed(0)).mul(0.05).bfloat16().float()


def make_hessian(K: int, seed: int = 1) -> np.ndarray:
    """float32 [K, K] of inputs whose channels are correlated and of very different size."""
    rng = np.random.default_rng(7)
    mixing = np.eye(K) + rng.standard_normal((K, K)) / np.sqrt(K)
    sizes = np.exp(rng.standard_normal(K))
    x = np.random.default_rng(seed).standard_normal((4 * K, K)) @ mixing * sizes
    return (x.T @ x / len(x)).astype(np.float32)


def output_error(difference: Tensor, hessian: np.ndarray) -> float:
    d = difference.double().numpy()
    return float(np.einsum("nk,kl,nl->", d, hessian.astype(np.float64), d, optimize=True))


def run(weight: Tensor, grid: Grid, hessian: np.ndarray, held_out: np.ndarray) -> Rounded:
    return round_rows(weight.numpy(), grid, [factorize(hessian)], [held_out])


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize(("N", "K"), [(96, 320), (64, 32), (40, 160)], ids=str)
def test_codes_are_those_of_the_published_algorithm(scheme: Scheme, N: int, K: int) -> None:
    weight, hessian = make_weight(N, K), make_hessian(K)
    rounded = nearest(weight, scheme)
    expected = published_gptq(weight, rounded.scale, torch.from_numpy(hessian), scheme)
    actual = torch.from_numpy(run(weight, rounded.grid, hessian, hessian).decoded)
    # A value within float32's rounding of a tie may go the other way, and takes the rest of its row along.
    assert (actual == expected).double().mean() > 0.995
    assert output_error(actual - weight, hessian) == pytest.approx(output_error(expected - weight, hessian), rel=2e-3)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_uncorrelated_inputs_give_rounding_to_nearest_bit_for_bit(scheme: Scheme) -> None:
    weight = make_weight(64, 320)
    weight[0, :8] = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 0.25, -0.25, 0.75, -0.75])
    expected = nearest(weight, scheme)
    actual = run(weight, expected.grid, np.eye(320, dtype=np.float32), make_hessian(320))
    assert_bits_equal(torch.from_numpy(actual.decoded), expected.decoded)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
def test_errors_are_measured_by_the_held_out_hessian(scheme: Scheme) -> None:
    weight, held_out = make_weight(96, 640), make_hessian(640, seed=2)
    rounded = nearest(weight, scheme)
    result = run(weight, rounded.grid, make_hessian(640), held_out)
    decoded = torch.from_numpy(result.decoded)
    assert result.output_error == pytest.approx(output_error(decoded - weight, held_out), rel=1e-4)
    assert result.nearest_error == pytest.approx(output_error(rounded.decoded - weight, held_out), rel=1e-4)
    assert result.signal == pytest.approx(output_error(weight, held_out), rel=1e-4)
    assert result.squared_error == pytest.approx((decoded - weight).double().square().sum().item(), rel=1e-6)
    assert result.largest_error == (decoded - weight).abs().max()
    assert result.output_error < 0.6 * result.nearest_error


def test_blocks_of_columns_are_rounded_as_layers_of_their_own() -> None:
    weight, hessians = make_weight(64, 160), [make_hessian(96), make_hessian(64)]
    whole = nearest(weight, PLAIN_MXFP4)
    together = round_rows(weight.numpy(), whole.grid, [factorize(hessian) for hessian in hessians], hessians)
    parts = [weight[:, :96], weight[:, 96:]]
    apart = [run(part, nearest(part, PLAIN_MXFP4).grid, *[h] * 2) for part, h in zip(parts, hessians, strict=True)]
    np.testing.assert_array_equal(together.decoded, np.concatenate([part.decoded for part in apart], axis=1))
    assert together.output_error == pytest.approx(sum(part.output_error for part in apart))


def test_dead_channels_are_rounded_to_nearest_and_change_nothing_else() -> None:
    weight, hessian = make_weight(64, 96), make_hessian(96)
    dead = np.zeros((96, 96), np.float32)
    alive = np.r_[0:40, 60:96]
    dead[np.ix_(alive, alive)] = hessian[np.ix_(alive, alive)]
    rounded = nearest(weight, CHANNEL_FP8)
    actual = run(weight, rounded.grid, dead, hessian).decoded
    np.testing.assert_array_equal(actual[:, 40:60], rounded.decoded[:, 40:60])
    assert (actual[:, alive] != rounded.decoded.numpy()[:, alive]).any()


def test_a_hessian_of_few_rows_is_damped() -> None:
    x = np.random.default_rng(0).standard_normal((5, 256)).astype(np.float32)
    assert factorize(x.T @ x / 5).damping == 0.01


def test_what_is_slightly_indefinite_is_damped_more() -> None:
    hessian = make_hessian(64)
    hessian -= np.eye(64, dtype=np.float32) * np.float32(0.05 * hessian.diagonal().mean())
    lowest = np.linalg.eigvalsh(hessian.astype(np.float64))[0] / hessian.diagonal().mean()
    assert -0.1 < lowest < -0.01
    assert factorize(hessian).damping == 0.1


def test_an_indefinite_hessian_is_refused() -> None:
    hessian = np.eye(64, dtype=np.float32)
    hessian[0, 1] = hessian[1, 0] = 5
    with pytest.raises(NotPositiveDefiniteError):
        factorize(hessian)


def test_the_factor_is_that_of_the_sorted_hessian() -> None:
    hessian = make_hessian(300)
    factor = factorize(hessian)
    lower = np.tril(factor.lower.astype(np.float64), -1) + np.eye(300)
    damped = hessian[factor.order][:, factor.order] + 0.01 * hessian.diagonal().mean() * np.eye(300)
    # What is left after dividing by L on both sides is the diagonal matrix of the pivots.
    pivots = np.linalg.solve(lower, np.linalg.solve(lower, damped).T)
    off_diagonal = pivots - np.diag(pivots.diagonal())
    assert np.abs(off_diagonal).max() < 1e-4 * pivots.diagonal().min()
    assert (np.diff(hessian.diagonal()[factor.order]) >= 0).all()
