"""Which format each group of layers gets: the least damage that fits a size, and a bound on the best there is.

A multiple-choice knapsack: one choice for each group; sizes add up, damages add up. If a group could be split
between two choices, sorting would solve it (Sinha and Zoltners 1979), which bounds what is left to decide. Partial
results that are dominated, or that can't become better than the best one known, are dropped; the rest is searched.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

# Partial results that are kept at once; hundreds of groups need far fewer.
_MAX_STATES = 10_000


@dataclass(frozen=True)
class Choice:
    """One way to store a group: its bytes, and the damage it does, in a unit that all groups share."""

    format: str
    nbytes: float
    damage: float


@dataclass(frozen=True)
class Assignment:
    """One choice for each group, in their order.

    ``lower_bound``: no assignment of the same size or less has less damage. Where that is ``damage``, none is better.
    """

    choices: tuple[Choice, ...]
    lower_bound: float

    @property
    def nbytes(self) -> float:
        return sum(choice.nbytes for choice in self.choices)

    @property
    def damage(self) -> float:
        return _total_damage(self.choices)


def least_damage(groups: Sequence[Sequence[Choice]], max_nbytes: float, max_states: int = _MAX_STATES) -> Assignment:
    """Return the choice of each group with the least damage in at most ``max_nbytes``, all groups together.

    The best there is, unless more than ``max_states`` partial results had to be kept; ``lower_bound`` tells.
    Raises ValueError where even the smallest choices take more.
    """
    useful = [_undominated(group) for group in groups]
    # Those with most to gain first, so that little is left to bound.
    order = sorted(range(len(groups)), key=lambda i: useful[i][-1].damage - useful[i][0].damage)
    states = [_State(0, 0.0)]
    best = _complete(states[0], [useful[i] for i in order], max_nbytes)
    dropped = math.inf
    for n, i in enumerate(order, start=1):
        rest = [useful[j] for j in order[n:]]
        relaxed = _Relaxation(rest)
        reached = _undominated(state.add(choice) for state in states for choice in useful[i])
        bounds = {state: state.damage + relaxed.least_damage(max_nbytes - state.nbytes) for state in reached}
        promising = sorted((state for state in reached if bounds[state] < best.damage), key=bounds.__getitem__)
        if promising:
            best = min(best, _complete(promising[0], rest, max_nbytes), key=lambda state: state.damage)
        dropped = min([dropped, *(bounds[state] for state in promising[max_states:])])
        states = promising[:max_states]
    chosen = dict(zip(order, best.choices(), strict=True))
    choices = tuple(chosen[i] for i in range(len(groups)))
    return Assignment(choices, min(_total_damage(choices), dropped))


def least_size(groups: Sequence[Sequence[Choice]], max_damage: float) -> Assignment:
    """Return the choice of each group with the fewest bytes that does at most ``max_damage``, all groups together.

    Its ``lower_bound`` is on the bytes. Raises ValueError where even the largest choices do more.
    """
    # The same problem with bytes and damage changed about.
    mirrored = least_damage([[_mirror(choice) for choice in group] for group in groups], max_damage)
    return Assignment(tuple(map(_mirror, mirrored.choices)), mirrored.lower_bound)


def curve(groups: Sequence[Sequence[Choice]]) -> Iterator[Assignment]:
    """Yield assignments from the smallest to the one with the least damage, each the best for its size.

    One group changes from each to the next, always the one that gains most for a byte.
    """
    useful = [_undominated(group) for group in groups]
    chosen = [choices[0] for choices in useful]
    yield Assignment(tuple(chosen), _total_damage(chosen))
    for exchange in _exchanges(useful):
        chosen[exchange.group] = exchange.after
        yield Assignment(tuple(chosen), _total_damage(chosen))


def _mirror(choice: Choice) -> Choice:
    return Choice(choice.format, choice.damage, choice.nbytes)


@dataclass(frozen=True, eq=False)
class _State:
    """Choices for the first groups: the last of them, and the state without it. None, None: no group yet."""

    nbytes: float
    damage: float
    choice: Choice | None = None
    before: "_State | None" = None

    def add(self, choice: Choice) -> "_State":
        return _State(self.nbytes + choice.nbytes, self.damage + choice.damage, choice, self)

    def choices(self) -> list[Choice]:
        """Return the choices, the first group's first."""
        found = []
        state: _State | None = self
        while state and state.choice:
            found.append(state.choice)
            state = state.before
        return found[::-1]


@dataclass(frozen=True)
class _Exchange:
    """A group's next larger choice instead of the one before."""

    group: int
    before: Choice
    after: Choice

    @property
    def nbytes(self) -> float:
        return self.after.nbytes - self.before.nbytes

    @property
    def gain(self) -> float:
        return self.before.damage - self.after.damage

    @property
    def gain_per_byte(self) -> float:
        return self.gain / self.nbytes


class _Relaxation:
    """Groups that may be split between two choices: the least damage they do, for any size."""

    def __init__(self, groups: Sequence[Sequence[Choice]]):
        self._nbytes = sum(choices[0].nbytes for choices in groups)
        self._damage = math.fsum(choices[0].damage for choices in groups)
        self._exchanges = _exchanges(groups)
        self._spent = list(accumulate((exchange.nbytes for exchange in self._exchanges), initial=0))
        self._gained = list(accumulate((exchange.gain for exchange in self._exchanges), initial=0.0))

    def least_damage(self, max_nbytes: float) -> float:
        """Return it for at most ``max_nbytes``; infinite where even the smallest choices take more."""
        spare = max_nbytes - self._nbytes
        if spare < 0:
            return math.inf
        n_whole = bisect_right(self._spent, spare) - 1
        split = self._exchanges[n_whole : n_whole + 1]
        part = sum(exchange.gain_per_byte * (spare - self._spent[n_whole]) for exchange in split)
        return self._damage - self._gained[n_whole] - part


def _complete(state: _State, groups: Sequence[Sequence[Choice]], max_nbytes: float) -> _State:
    """Return the state with a choice for each further group: exchanges by gain, as far as there is room for them.

    Raises ValueError where there is no room for the smallest.
    """
    chosen = [choices[0] for choices in groups]
    spare = max_nbytes - state.nbytes - sum(choice.nbytes for choice in chosen)
    if spare < 0:
        raise ValueError(f"the smallest choices take {max_nbytes - spare}, allowed are {max_nbytes}")
    for exchange in _exchanges(groups):
        if exchange.before is chosen[exchange.group] and exchange.nbytes <= spare:
            chosen[exchange.group] = exchange.after
            spare -= exchange.nbytes
    for choice in chosen:
        state = state.add(choice)
    return state


def _exchanges(groups: Sequence[Sequence[Choice]]) -> list[_Exchange]:
    """Return all exchanges along the lower convex hull of each group, those that gain most for a byte first."""
    exchanges = []
    for number, choices in enumerate(groups):
        hull: list[_Exchange] = []
        for choice in choices[1:]:
            step = _Exchange(number, hull[-1].after if hull else choices[0], choice)
            while hull and hull[-1].gain_per_byte <= step.gain_per_byte:
                step = _Exchange(number, hull.pop().before, choice)
            hull.append(step)
        exchanges += hull
    return sorted(exchanges, key=lambda exchange: -exchange.gain_per_byte)


_Sized = TypeVar("_Sized", Choice, _State)


def _total_damage(choices: Iterable[Choice]) -> float:
    # The same in every order.
    return math.fsum(choice.damage for choice in choices)


def _undominated(options: Iterable[_Sized]) -> list[_Sized]:
    """Return, by rising size, those that have less damage than every smaller one."""
    kept: list[_Sized] = []
    for option in sorted(options, key=lambda option: (option.nbytes, option.damage)):
        if not kept or option.damage < kept[-1].damage:
            kept.append(option)
    return kept
