"""The policy's optimiser against brute force, and on models of real size."""

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from convert_ckpt.plan.policy import Assignment, Choice, curve, least_damage, least_size

CHOICES = st.lists(st.builds(Choice, st.just("x"), st.integers(0, 20), st.floats(0, 100)), min_size=1, max_size=3)


def brute_force(groups: list[list[Choice]], max_nbytes: int) -> float | None:
    """Return the least damage of all combinations that fit, None where none does."""
    sums = (
        (sum(choice.nbytes for choice in choices), math.fsum(choice.damage for choice in choices))
        for choices in itertools.product(*groups)
    )
    return min((damage for nbytes, damage in sums if nbytes <= max_nbytes), default=None)


def random_model(n_groups: int, seed: int) -> list[list[Choice]]:
    """Groups of 1 to 40 MB in BF16 that may be kept, FP8 or MXFP4, with damages over two orders of magnitude."""
    draw = random.Random(seed)
    groups = []
    for _ in range(n_groups):
        n, sensitivity = draw.randrange(500_000, 20_000_000, 4096), 10 ** draw.uniform(-1, 1)
        sizes = {"keep": 2 * n, "fp8": n, "mxfp4": n * 17 // 32}
        damages = {"keep": 0.0, "fp8": 7e-4 * sensitivity * draw.uniform(0.8, 1.2), "mxfp4": 1.2e-2 * sensitivity}
        groups.append([Choice(format_, sizes[format_], damages[format_]) for format_ in sizes])
    return groups


@settings(max_examples=300, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=6), st.integers(0, 80))
def test_no_combination_that_fits_does_less_damage(groups: list[list[Choice]], max_nbytes: int) -> None:
    expected = brute_force(groups, max_nbytes)
    if expected is None:
        with pytest.raises(ValueError, match="the smallest choices take"):
            least_damage(groups, max_nbytes)
        return
    found = least_damage(groups, max_nbytes)
    assert found.nbytes <= max_nbytes
    assert all(choice in group for choice, group in zip(found.choices, groups, strict=True))
    # Sums of other orders differ in the last bits.
    assert found.damage == pytest.approx(expected, rel=1e-12)
    assert found.lower_bound == pytest.approx(expected, rel=1e-12)


@settings(max_examples=200, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=6), st.floats(0, 300))
def test_no_combination_that_does_as_little_damage_is_smaller(groups: list[list[Choice]], max_damage: float) -> None:
    sums = [
        (sum(choice.nbytes for choice in choices), math.fsum(choice.damage for choice in choices))
        for choices in itertools.product(*groups)
    ]
    if any(abs(damage - max_damage) < 1e-9 for _, damage in sums):
        return  # sums of other orders differ in the last bits
    sizes = [nbytes for nbytes, damage in sums if damage <= max_damage]
    if not sizes:
        with pytest.raises(ValueError, match="allowed are"):
            least_size(groups, max_damage)
        return
    found = least_size(groups, max_damage)
    assert (found.nbytes, found.lower_bound) == (min(sizes), min(sizes))
    assert found.damage <= max_damage
    assert all(choice in group for choice, group in zip(found.choices, groups, strict=True))


@settings(max_examples=200, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=6), st.integers(0, 80), st.integers(1, 3))
def test_a_search_cut_short_states_a_bound_that_holds(
    groups: list[list[Choice]], max_nbytes: int, max_states: int
) -> None:
    expected = brute_force(groups, max_nbytes)
    if expected is None:
        return
    found = least_damage(groups, max_nbytes, max_states)
    assert found.nbytes <= max_nbytes
    slack = 1e-12 * max(1, expected)
    assert found.lower_bound - slack <= expected <= found.damage + slack


@settings(max_examples=200, deadline=None)
@given(st.lists(CHOICES, min_size=1, max_size=5))
def test_every_point_of_the_curve_is_the_best_for_its_size(groups: list[list[Choice]]) -> None:
    points = list(curve(groups))
    for point in points:
        assert point.damage == pytest.approx(brute_force(groups, point.nbytes), rel=1e-12)
    assert points[0].nbytes == sum(min(choice.nbytes for choice in group) for group in groups)
    assert points[-1].damage == pytest.approx(sum(min(choice.damage for choice in group) for group in groups))
    assert [point.nbytes for point in points] == sorted({point.nbytes for point in points})


@pytest.mark.parametrize("share", [0.55, 0.6, 0.75, 1.0, 1.5])
def test_five_hundred_groups_are_solved_exactly(share: float) -> None:
    groups = random_model(500, seed=3)
    max_nbytes = int(share * sum(group[1].nbytes for group in groups))
    found = least_damage(groups, max_nbytes)
    assert found.lower_bound == found.damage
    assert found.nbytes <= max_nbytes
    # The relaxed problem's last whole exchange is within the budget, and its next one is not.
    below, above = _neighbours(groups, max_nbytes)
    assert above.damage <= found.damage <= below.damage


def _neighbours(groups: list[list[Choice]], max_nbytes: int) -> tuple[Assignment, Assignment]:
    points = list(curve(groups))
    fits = [point for point in points if point.nbytes <= max_nbytes]
    return fits[-1], points[min(len(fits), len(points) - 1)]
