r"""Asynchronous runs: clients train at any time, and the model moves after so many.

The server keeps ``concurrency`` clients at work. Whoever is done hands in its
contribution, and another client begins with the model of that moment; as soon as
``buffer`` contributions have come in, the model moves by them. Nobody waits for the
slowest, whose contribution is to a model that has moved on: it is *stale* by the number
of updates in between, and counts the less for it (Nguyen, Malik, Zhan, Yousefpour,
Rabbat, Malek and Huba 2022, "Federated learning with buffered asynchronous
aggregation", AISTATS, arXiv 2106.06639: FedBuff).

::

    strategy.start(
        ..., asynchronous=Asynchronous(10, 100, clock=VirtualClock(Stragglers()))
    )
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from flower_ext.core.errors import (
    at_least,
    finite,
    positive,
    probability,
    refuse,
    whole,
)

Staleness = Callable[[int], float]
Seconds = Callable[[int, int], float]

# Streams of random numbers about clients, apart from each other's.
_LOG_NORMAL, _STRAGGLERS = 1, 2


def inverse_root(staleness: int) -> float:
    r"""Return :math:`1 / \sqrt{1 + \tau}`, the paper's weight of a contribution.

    Examples
    --------
    >>> [inverse_root(tau) for tau in (0, 3, 8)]
    [1.0, 0.5, 0.3333333333333333]
    """
    return 1.0 / math.sqrt(1 + staleness)


@dataclass(frozen=True)
class LogNormal:
    r"""Training times of clients of which some are fast and a few are very slow.

    A client takes :math:`m e^{\sigma z}` seconds every time, with a :math:`z` of its
    own from the standard normal distribution.

    Parameters
    ----------
    median : float (default: 1.0)
        :math:`m > 0`, in seconds.
    spread : float (default: 1.0)
        :math:`\sigma \ge 0`; 0 lets all take as long.
    seed : int (default: 0)
        Of the clients' times; a client's depend on seed and number only.

    Examples
    --------
    >>> LogNormal(median=2.0, spread=0.0)(client=7, task=1)
    2.0
    """

    median: float = 1.0
    spread: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive("median", self.median)
        at_least("spread", self.spread, 0, "0 lets all take as long")
        whole("seed", self.seed, 0)

    def __call__(self, client: int, task: int) -> float:
        """Return the seconds that a client takes."""
        rng = np.random.default_rng([self.seed, client, _LOG_NORMAL])
        return self.median * math.exp(self.spread * rng.standard_normal())


@dataclass(frozen=True)
class Stragglers:
    """Training times of clients that are alike, but for a few that are far slower.

    Parameters
    ----------
    seconds : float (default: 1.0)
        What most clients take.
    share : float (default: 0.1)
        Probability of a client to be slow, in (0, 1]; every client is or is not for
        the whole run.
    factor : float (default: 10.0)
        How many times as long those take.
    seed : int (default: 0)
        Of who is slow.

    Examples
    --------
    >>> times = [Stragglers()(client, task=1) for client in range(1000)]
    >>> sorted(set(times)), 70 < times.count(10.0) < 130
    ([1.0, 10.0], True)
    """

    seconds: float = 1.0
    share: float = 0.1
    factor: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        positive("seconds", self.seconds)
        probability("share", self.share, "of a client to be slow")
        positive("factor", self.factor)
        whole("seed", self.seed, 0)

    def __call__(self, client: int, task: int) -> float:
        """Return the seconds that a client takes."""
        rng = np.random.default_rng([self.seed, client, _STRAGGLERS])
        return self.seconds * (self.factor if rng.random() < self.share else 1.0)


@dataclass(frozen=True)
class VirtualClock:
    """Time as a simulation counts it: clients take as long as they are said to.

    Results do not depend on how fast this machine is, nor on which process is done
    first.

    Parameters
    ----------
    seconds : float or callable (default: 1.0)
        What every training takes; or ``(client, task) -> seconds``, of a client, by its
        place, and the number of its training, from 1. Such as :class:`LogNormal` or
        :class:`Stragglers`.
    """

    seconds: float | Seconds = 1.0

    def __post_init__(self) -> None:
        if not callable(self.seconds):
            cause = "or a function (client, task) -> seconds"
            positive("seconds", self.seconds, cause)

    def of(self, client: int, task: int) -> float:
        """Return the seconds that a client's training takes.

        Raises
        ------
        ValueError
            If they are not positive and finite.
        """
        if not callable(self.seconds):
            return float(self.seconds)
        found = self.seconds(client, task)
        return positive(f"seconds(client={client}, task={task})", found)


@dataclass(frozen=True)
class Asynchronous:
    r"""How clients take part that train at any time.

    Parameters
    ----------
    buffer : int
        Contributions of which an update is made, K in the paper; at most as many as
        there are clients. It may be larger than ``concurrency``.
    concurrency : int
        Clients that are at work at a time; at most as many as there are.
    staleness : callable (default: :func:`inverse_root`)
        ``int -> float``: the weight of a contribution to a model that was updated so
        many times since it was sent, 0 or more. ``lambda tau: 1.0`` lets all count
        alike.
    clock : VirtualClock, optional
        Simulated time. Without one clients take part as they are done, in real time:
        such a run is not reproducible.

    Notes
    -----
    With ``buffer = concurrency``, as large as the cohort, and clients that all take as
    long, it is the synchronous run, bit for bit.

    Each contribution is computed against the model that the client was sent, and added
    to the current one. The term of a client of staleness :math:`\tau` counts as
    :math:`s(\tau)` of a client in the sum, and the direction that the strategy makes of
    the sum is multiplied by the mean of all :math:`s(\tau)` in it: for clients of one
    size that is the paper's :math:`\frac1K\sum_i s(\tau_i)\Delta_i`.

    Who begins next is drawn by the strategy's sampler from the clients that are neither
    at work nor in the buffer, so that none counts twice in an update. A client that
    fails frees its place. Under the virtual clock what comes in at the same moment is
    taken in client order, before anybody else begins.
    """

    buffer: int
    concurrency: int
    staleness: Staleness = inverse_root
    clock: VirtualClock | None = None

    def __post_init__(self) -> None:
        whole("buffer", self.buffer, 1)
        whole("concurrency", self.concurrency, 1)
        if not callable(self.staleness):
            refuse("staleness", self.staleness, "a function of a number of updates")
        if not isinstance(self.clock, VirtualClock | None):
            refuse("clock", self.clock, "a VirtualClock, or None for real time")
        self.weight(0)

    def weight(self, staleness: int) -> float:
        """Return the weight of a contribution.

        Raises
        ------
        ValueError
            If it is negative or not finite.
        """
        name = f"staleness({staleness})"
        return at_least(name, finite(name, self.staleness(staleness)), 0)

    def settings(self) -> dict[str, object]:
        """Return what a resumed run must have in common with the saved one."""
        return {
            "buffer": self.buffer,
            "concurrency": self.concurrency,
            "staleness": self.staleness,
            "clock": self.clock.seconds if self.clock else "real time",
        }
