"""The four scale rules, on every bfloat16 amax there is, against their definitions in exact arithmetic."""

from fractions import Fraction
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor

from run_ckpt.contract.formats import E4M3
from run_ckpt.contract.scale_rules import choose_scale_codes
from tests.bits import assert_bits_equal

N_FINITE = 0x7F80  # 32640 bfloat16 patterns from +0 to the largest finite value
LARGEST_CODE = 254
# OCP MX v1.0: the magnitudes of E2M1, in halves.
E2M1_HALVES = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int64)
# Lanes reach this many binades below amax, so that mse's sums are exact in float64 and in int64.
LANE_BINADES = 12


@cache
def every_amax() -> Tensor:
    """bfloat16 [32640]: every finite non-negative value, rising."""
    return torch.arange(N_FINITE, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


@cache
def blocks_with(lanes: str) -> Tensor:
    """float32 [32640, 32] with the amax of every_amax() at a random lane and sign; the others zero or smaller."""
    rng = np.random.default_rng(0)
    amax_bits = np.arange(N_FINITE, dtype=np.int64)[:, None]
    lowest = np.maximum(amax_bits - LANE_BINADES * 128, 0) if lanes == "random" else amax_bits * 0
    highest = amax_bits if lanes == "random" else lowest
    bits = rng.integers(lowest, highest + 1, (N_FINITE, 32))
    bits[np.arange(N_FINITE), rng.integers(0, 32, N_FINITE)] = amax_bits[:, 0]
    bits |= rng.integers(0, 2, bits.shape) << 15
    return torch.from_numpy(bits.astype(np.uint16).view(np.int16)).view(torch.bfloat16).float()


def floor_log2(value: Fraction) -> int:
    """The largest e with 2^e <= value, exactly."""
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def clamp_code(exponent: int) -> int:
    return min(max(exponent + 127, 0), LARGEST_CODE)


def floor_code(amax: Fraction) -> int:
    """OCP MX v1.0, 6.3: 2^floor(log2 amax) over E2M1's largest power of two, 4."""
    return clamp_code(floor_log2(amax) - 2) if amax else 0


def even_code(amax: Fraction) -> int:
    """As floor, but amax counts as the next power of two from 1.75 times a power of two on (Quark's even_round)."""
    if not amax:
        return 0
    exponent = floor_log2(amax)
    exponent += amax >= Fraction(7, 4) * Fraction(2) ** exponent
    # 2^128 is beyond float32, and AITER's Triton quantizer then writes the largest code.
    return LARGEST_CODE if exponent == 128 else clamp_code(exponent - 2)


def roundup_code(amax: Fraction) -> int:
    """The smallest power of two that is at least amax / 6; below 2^-126 AITER takes 2^-126."""
    if not amax:
        return 0
    quotient = amax / 6
    exponent = floor_log2(quotient)
    exponent += quotient > Fraction(2) ** exponent
    return clamp_code(max(exponent, -126))


DEFINITIONS = {"floor": floor_code, "even": even_code, "roundup": roundup_code}


@cache
def defined_codes(rule: str) -> Tensor:
    """uint8 [32640]: the rule's code of every amax, by Fractions."""
    amaxes = (Fraction(value) for value in every_amax().double().tolist())
    return torch.tensor([DEFINITIONS[rule](amax) for amax in amaxes], dtype=torch.uint8)


def exact_errors(blocks: Tensor, codes: np.ndarray) -> np.ndarray:
    """int64 [n]: sum of squared distances to the nearest E2M1 value at scale 2^(code - 127), in units that
    depend on the block alone."""
    magnitude = blocks.abs().double().numpy()
    exponent = np.frexp(magnitude.max(-1))[1] - 1
    unit = np.maximum(exponent - 7 - LANE_BINADES, -133)[:, None]  # bfloat16 has 8 bits, and none below 2^-133
    lanes = np.ldexp(magnitude, -unit).astype(np.int64)
    half_step = np.int64(1) << (codes[:, None].astype(np.int64) - 128 - unit)
    distances = np.abs(lanes[..., None] - E2M1_HALVES * half_step[..., None]).min(-1)
    return (distances**2).sum(-1)


@pytest.mark.parametrize("lanes", ["zeros", "random"])
@pytest.mark.parametrize("rule", DEFINITIONS)
def test_code_of_every_bf16_amax_is_that_of_the_definition(rule: str, lanes: str) -> None:
    assert_bits_equal(choose_scale_codes(blocks_with(lanes), rule), defined_codes(rule))


@pytest.mark.parametrize("rule", ["even", "floor", "roundup", "mse"])
def test_code_does_not_depend_on_signs(rule: str) -> None:
    blocks = blocks_with("random")
    assert_bits_equal(choose_scale_codes(-blocks, rule), choose_scale_codes(blocks, rule))


@pytest.mark.parametrize("rule", ["even", "floor", "roundup", "mse"])
def test_block_of_zeros_gets_code_0(rule: str) -> None:
    blocks = torch.tensor([[0.0] * 32, [-0.0] * 32])
    assert choose_scale_codes(blocks, rule).tolist() == [0, 0]


def test_roundup_never_saturates() -> None:
    blocks = blocks_with("random")
    scale = np.ldexp(1.0, choose_scale_codes(blocks, "roundup").numpy().astype(np.int64) - 127)
    assert (every_amax().double().numpy() <= 6 * scale).all()


@pytest.mark.parametrize("lanes", ["zeros", "random"])
def test_mse_takes_the_better_of_floor_and_the_next_code_and_the_lower_on_a_tie(lanes: str) -> None:
    blocks = blocks_with(lanes)
    low = defined_codes("floor").numpy()
    high = low + 1  # floor never reaches 254 on a finite amax
    better = np.where(exact_errors(blocks, high) < exact_errors(blocks, low), high, low)
    assert_bits_equal(choose_scale_codes(blocks, "mse"), torch.from_numpy(better))


def test_mse_meets_ties_and_both_codes_on_this_data() -> None:
    blocks = blocks_with("random")
    low = defined_codes("floor").numpy()
    differences = np.sign(exact_errors(blocks, low + 1) - exact_errors(blocks, low))
    assert set(differences.tolist()) == {-1, 0, 1}


@pytest.mark.parametrize(
    ("value", "code"),
    [
        # 1.75 * 2^k as float32 rounds up; one step below it, which bfloat16 can't hold, does not.
        (1.75, 127 + 1 - 2),
        (float(np.nextafter(np.float32(1.75), np.float32(0))), 127 - 2),
    ],
    ids=["at-1.75", "just-below-1.75"],
)
def test_even_reads_all_bits_of_a_float32_amax(value: float, code: int) -> None:
    assert choose_scale_codes(torch.full((1, 32), value), "even").tolist() == [code]


@pytest.mark.parametrize(
    ("value", "code"),
    [(6.0, 127), (float(np.nextafter(np.float32(6), np.float32(9))), 128)],
    ids=["at-6", "just-above-6"],
)
def test_roundup_reads_all_bits_of_a_float32_amax(value: float, code: int) -> None:
    assert choose_scale_codes(torch.full((1, 32), value), "roundup").tolist() == [code]


def test_e4m3_codes_by_floor_and_roundup_are_those_of_the_definitions() -> None:
    # OCP MX v1.0, 6.3, with 2^8 as E4M3's largest power of two; and the least 2^k with amax <= 448 * 2^k, where
    # rounding up to the smallest normal float32 leaves code 0 to zero alone.
    amax = [Fraction(value) for value in every_amax().double().tolist()]
    floors = [clamp_code(floor_log2(a) - 8) if a else 0 for a in amax]
    ups = [max(1, clamp_code(-floor_log2(448 / a))) if a / 448 >= Fraction(2) ** -150 else 0 for a in amax[1:]]
    blocks = blocks_with("random")
    assert choose_scale_codes(blocks, "floor", E4M3).tolist() == floors
    assert choose_scale_codes(blocks, "roundup", E4M3).tolist() == [0, *ups]
