"""Values that change from round to round: of an option, or of the configuration.

Wherever a number may be a schedule, it is a number, one of these, or any function of
the round, which is counted from 1. They hold no state: a run that is resumed finds the
value of its round again.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise

from flower_ext.core.errors import finite, fraction, refuse, whole

Scheduled = float | Callable[[int], float]


def value_in(schedule: Scheduled, server_round: int) -> float:
    """Return the value of a number, or of a schedule, in a round.

    Examples
    --------
    >>> value_in(0.1, 7), value_in(lambda server_round: 1 / server_round, 4)
    (0.1, 0.25)
    """
    return schedule(server_round) if callable(schedule) else schedule


@dataclass(frozen=True)
class Decay:
    """Exponential decay in steps: ``initial * rate ** ((server_round - 1) // every)``.

    Parameters
    ----------
    initial : float
        In the first ``every`` rounds.
    rate : float
        Factor of each step, between 0 and 1; 1 keeps the value.
    every : int (default: 1)
        Rounds between two steps; 1 decays in every round.

    Examples
    --------
    >>> [Decay(1.0, 0.5, every=2)(r) for r in (1, 2, 3, 5)]
    [1.0, 1.0, 0.5, 0.25]
    """

    initial: float
    rate: float
    every: int = 1

    def __post_init__(self) -> None:
        finite("initial", self.initial)
        fraction("rate", self.rate)
        whole("every", self.every, 1)

    def __call__(self, server_round: int) -> float:
        """Return the value of a round."""
        return self.initial * self.rate ** ((server_round - 1) // self.every)


@dataclass(frozen=True)
class _FromTo:
    """A value that goes from one to another in so many rounds, and stays there."""

    initial: float
    rounds: int
    final: float = 0.0

    def __post_init__(self) -> None:
        finite("initial", self.initial)
        whole("rounds", self.rounds, 1)
        finite("final", self.final)

    def done(self, server_round: int) -> float:
        """Return the share of the way that is done before a round."""
        return min((server_round - 1) / self.rounds, 1.0)


@dataclass(frozen=True)
class Linear(_FromTo):
    """A straight line from ``initial``, in round 1, to ``final``.

    Parameters
    ----------
    initial : float
        In round 1.
    rounds : int
        After so many rounds the value is ``final``, and stays.
    final : float (default: 0.0)
        Equal to ``initial`` it is a constant.

    Examples
    --------
    >>> [Linear(1.0, rounds=4)(r) for r in (1, 2, 4, 5, 6)]
    [1.0, 0.75, 0.25, 0.0, 0.0]
    """

    def __call__(self, server_round: int) -> float:
        """Return the value of a round."""
        done = self.done(server_round)
        return self.initial + (self.final - self.initial) * done


@dataclass(frozen=True)
class Cosine(_FromTo):
    r"""Half a cosine from ``initial``, in round 1, down to ``final``.

    :math:`\text{final} + (\text{initial} - \text{final})\,
    (1 + \cos(\pi (r - 1) / \text{rounds})) / 2` in round :math:`r`
    (Loshchilov and Hutter 2017, Eq. 5), without restarts.

    Parameters
    ----------
    initial : float
        In round 1.
    rounds : int
        After so many rounds the value is ``final``, and stays. In a run of that many
        rounds the last one still moves.
    final : float (default: 0.0)
        Equal to ``initial`` it is a constant.

    Examples
    --------
    >>> [round(Cosine(1.0, rounds=4)(r), 4) for r in (1, 2, 3, 4, 5, 6)]
    [1.0, 0.8536, 0.5, 0.1464, 0.0, 0.0]
    """

    def __call__(self, server_round: int) -> float:
        """Return the value of a round."""
        done = self.done(server_round)
        above = (1 + math.cos(math.pi * done)) / 2
        return self.final + (self.initial - self.final) * above


@dataclass(frozen=True)
class WarmUp:
    """Rounds that rise in even steps to what follows them.

    Round r of the first ``rounds`` has ``r / (rounds + 1)`` of the first value of
    ``after``, so that the step into ``after`` is as large as those before.

    Parameters
    ----------
    rounds : int
        0 gives back ``after``.
    after : float or callable
        Its round 1 is the one after the warm-up.

    Examples
    --------
    >>> [WarmUp(1, Decay(0.8, 0.5))(r) for r in (1, 2, 3)]
    [0.4, 0.8, 0.4]
    """

    rounds: int
    after: Scheduled

    def __post_init__(self) -> None:
        whole("rounds", self.rounds, 0)
        if not callable(self.after):
            finite("after", self.after)

    def __call__(self, server_round: int) -> float:
        """Return the value of a round."""
        if server_round > self.rounds:
            return value_in(self.after, server_round - self.rounds)
        return value_in(self.after, 1) * server_round / (self.rounds + 1)


@dataclass(frozen=True)
class Piecewise:
    """Values from given rounds on.

    Parameters
    ----------
    values : Mapping[int, float]
        The value of each round from which a new one counts, the first of them 1, in
        order. Integers stay integers.

    Examples
    --------
    >>> [Piecewise({1: 0.1, 10: 0.01})(r) for r in (1, 9, 10, 99)]
    [0.1, 0.1, 0.01, 0.01]
    """

    values: Mapping[int, float]

    def __post_init__(self) -> None:
        rounds = [whole("a round in values", r, 1) for r in self.values]
        if rounds[:1] != [1] or any(a >= b for a, b in pairwise(rounds)):
            refuse("rounds in values", rounds, "1 and then later ones, in order")
        for server_round, value in self.values.items():
            finite(f"values[{server_round}]", value)

    def __call__(self, server_round: int) -> float:
        """Return the value of a round."""
        begun = max(r for r in self.values if r <= server_round)
        return self.values[begun]
