"""Private evaluation: means of the clients' own metrics, with noise.

Without it a mechanism withholds what clients measure, since an average of raw losses is
not private. Here each client's metrics are clipped to bounds that are set beforehand,
added up with equal weights, and released with Gaussian noise, which is charged to the
budget of the run: models and evaluations together are as private as models alone would
be with the same epsilon.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from flower_ext.core.errors import finite, open_unit, positive, refuse, whole
from flower_ext.core.protocol import Metrics
from flower_ext.core.typing import Floats
from flower_ext.privacy.accounting.accountants import Evaluations
from flower_ext.privacy.noise import noise_of_step

NOISE_STD = "-noise-std"


@dataclass(frozen=True, kw_only=True)
class PrivateEvaluation:
    r"""Evaluation by clients under a mechanism: ``Mechanism(evaluation=...)``.

    After every ``every``-th round, ``num_sampled_clients`` are asked to evaluate the
    new model. A metric :math:`m` of client :math:`i` with range :math:`[a, b]` is
    clipped to it and centred; released is

    .. math:: \frac{a + b}{2} + \frac{1}{n} \Big( \sum_i \big(\operatorname{clip}(m_i)
       - \tfrac{a + b}{2}\big) + \tfrac{b - a}{2} \sqrt{k} \sigma \xi \Big)

    of each of the :math:`k` metrics, with the planned number :math:`n` of clients,
    standard normal :math:`\xi` and the noise multiplier :math:`\sigma`. It is beside
    the metric as ``accuracy-noise-std``. The mean may be outside of the range.

    Parameters
    ----------
    bounds : Mapping[str, float or (float, float)]
        The metrics that are released, as the clients name them, each with its range;
        one number :math:`b > 0` is the range from 0. What is beyond it is clipped, and
        the noise is proportional to it. Metrics without bounds are withheld.
    every : int (default: 1)
        Rounds from one evaluation to the next. The noise of each is proportional to the
        square root of their number.
    share : float (default: 0.1)
        In (0, 1): of :math:`\mu^2` of the run, the part that pays for the evaluations.
        The training's noise is larger by :math:`1 / \sqrt{1 - share}`, 5 % for 0.1.
        Where cohorts are secret that is about so: the evaluations get the part, and
        training the least noise that keeps epsilon.
    num_sampled_clients : int, optional
        Clients that are asked in an evaluation, and the divisor, whoever replies; by
        default as many as train in a round. The noise of a mean falls with it, so that
        it is best all that can be reached.

    Notes
    -----
    Guarantee. The mechanism's, for models and evaluations together: its unit, its
    relation (also what the client adds to every evaluation becomes zero), its epsilon.
    A client may be in all evaluations. With the metrics of a client centred, and
    divided by :math:`\sqrt{k} (b - a) / 2`, their l2 norm is at most 1, which is what
    it moves the sum by, and each evaluation is a Gaussian release of :math:`\mu =
    1 / \sigma`. Epsilon after a round covers the evaluation that follows it.

    A metric that a client does not report, or that is no single finite number, and all
    of a client without examples, is zero in the centred sum: in the mean it counts as
    the middle of the range. An evaluation that was asked for is released even if nobody
    replied. What else a strategy makes of evaluations (quantiles over clients, losses
    of groups) is withheld.

    References
    ----------
    Dwork and Roth 2014, "The Algorithmic Foundations of Differential Privacy", appendix
    A (the Gaussian mechanism); Dong, Roth and Su 2022, arXiv 1905.02383 (squares of
    :math:`\mu` add up); Kuo et al. 2023, arXiv 2212.08930 (what noisy
    evaluations do to the choice of hyper-parameters, with Laplace noise).

    Examples
    --------
    >>> from flower_ext.privacy import Mechanism
    >>> evaluation = PrivateEvaluation(
    ...     bounds={"accuracy": 1.0, "loss": 5.0}, every=10, num_sampled_clients=1000
    ... )
    >>> mechanism = Mechanism(num_rounds=100, num_sampled_clients=50, max_epsilon=4.0,
    ...                       population_size=2000, evaluation=evaluation)
    """

    bounds: Mapping[str, float | tuple[float, float]]
    every: int = 1
    share: float = 0.1
    num_sampled_clients: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.bounds, Mapping) or not self.bounds:
            cause = "the metrics of clients that are to be released"
            refuse("bounds", self.bounds, "such as {'accuracy': 1.0}", cause)
        for name in self.bounds:
            if not isinstance(name, str) or not name:
                refuse("a name in bounds", name, "a word, as clients report it")
            if name.endswith(NOISE_STD) and name.removesuffix(NOISE_STD) in self.bounds:
                cause = "so the noise is called"
                refuse("a name in bounds", name, f"without {NOISE_STD!r}", cause)
            self.range_of(name)
        whole("every", self.every, 1)
        open_unit("share", self.share)
        if self.num_sampled_clients is not None:
            whole("num_sampled_clients", self.num_sampled_clients, 1)

    def range_of(self, name: str) -> tuple[float, float]:
        """Return the least and the greatest value that counts of a metric."""
        bound, called = self.bounds[name], f"bounds[{name!r}]"
        if not isinstance(bound, tuple | list):
            return 0.0, positive(called, bound, "or a range, such as (-1.0, 1.0)")
        if len(bound) != 2:
            refuse(called, bound, "a number, or the two ends of a range")
        low, high = (finite(called, end) for end in bound)
        if not low < high:
            refuse(called, bound, "two numbers of which the first is less")
        return low, high

    def fit(
        self, num_rounds: int, num_sampled_clients: int, population_size: int
    ) -> None:
        """Refuse a plan that does not fit the mechanism's.

        Raises
        ------
        ValueError
            If nobody would ever evaluate, or more clients than there are.
        """
        if self.every > num_rounds:
            cause = "no round of the run would be evaluated"
            refuse("every", self.every, f"<= num_rounds={num_rounds}", cause)
        if (self.num_sampled_clients or num_sampled_clients) > population_size:
            bound = f"<= population_size={population_size}"
            refuse("evaluation.num_sampled_clients", self.num_sampled_clients, bound)

    def split(
        self, noise_multiplier: float, num_rounds: int
    ) -> tuple[float, Evaluations]:
        r"""Return the training's noise multiplier, and the evaluations with theirs.

        Together they are as private as one Gaussian release with
        ``noise_multiplier``: :math:`\mu^2 = (1 - share) / z^2 + share / z^2`.
        """
        # A hair more, so that no digit that is lost in between costs the last round.
        z = noise_multiplier * (1 + 1e-11)
        own = self.beside(math.sqrt(self.share) / z, num_rounds)
        return z / math.sqrt(1 - self.share), own

    def beside(self, mu: float, num_rounds: int) -> Evaluations:
        """Return the evaluations of a run that have ``mu`` together."""
        number = num_rounds // self.every
        return Evaluations(self.every, math.sqrt(number) / mu)


class EvaluationSum:
    """Clips the metrics of one run's evaluations, and releases each mean once.

    Parameters
    ----------
    plan : PrivateEvaluation
        What was planned.
    planned : int
        Clients of an evaluation, and the divisor.
    cohort : int
        Clients that are really asked: fewer in a simulation, whose noise is scaled down
        likewise.
    noise_multiplier : float
        Standard deviation of the noise over what a client moves the sum by; 0 has none,
        and protects nothing.
    seed : int or None
        The mechanism's.
    """

    def __init__(
        self,
        plan: PrivateEvaluation,
        *,
        planned: int,
        cohort: int,
        noise_multiplier: float,
        seed: int | None,
    ) -> None:
        self.plan = plan
        self.planned, self.cohort = planned, cohort
        self.noise_multiplier = noise_multiplier
        self._seed = seed
        low, high = np.array([plan.range_of(name) for name in plan.bounds]).T
        self._low, self._high = low, high
        self._middle = (low + high) / 2
        # What a metric's half range is in the vector of all, whose norm is at most 1.
        self._unit = (high - low) / 2 * math.sqrt(len(plan.bounds))
        self._released = 0

    @property
    def names(self) -> tuple[str, ...]:
        """The metrics that are released, and those that tell of their noise."""
        own = tuple(self.plan.bounds)
        return own + tuple(name + NOISE_STD for name in own)

    @property
    def noise_std(self) -> dict[str, float]:
        """Standard deviation of the noise in each mean."""
        found = self._unit * self.noise_multiplier / self.planned
        return dict(zip(self.plan.bounds, found.tolist(), strict=True))

    def is_due(self, number: int) -> bool:
        """Return whether the model of a release is to be evaluated, and was not yet."""
        new = number > self._released or not self.noise_multiplier
        return new and number > 0 and number % self.plan.every == 0

    def skip(self, number: int) -> None:
        """Release none of the first ``number`` evaluations: they may have been."""
        self._released = max(self._released, number)

    def clip(self, metrics: Mapping[str, float]) -> Floats:
        """Return what a client adds to the sum: a vector of l2 norm at most 1."""
        found = np.array([metrics.get(name, math.nan) for name in self.plan.bounds])
        centred = np.clip(found, self._low, self._high) - self._middle
        return np.asarray(np.nan_to_num(centred, nan=0.0) / self._unit)

    def release(self, number: int, metrics: Iterable[Mapping[str, float]]) -> Metrics:
        """Return the noisy mean of clients' metrics, and its noise.

        Parameters
        ----------
        number : int
            Of the release that is evaluated.
        metrics : iterable of Mapping[str, float]
            Of each client.

        Raises
        ------
        ValueError
            If it is not due: released already, or not planned.
        """
        if not self.is_due(number):
            raise ValueError(
                f"the evaluation of release {number} must be planned, and is released "
                f"once: every={self.plan.every}, the last was {self._released}"
            )
        self._released = number
        total = np.zeros(len(self.plan.bounds))
        for own in metrics:
            total += self.clip(own)
        if self.noise_multiplier:
            std = self.noise_multiplier * self.cohort / self.planned
            total += std * noise_of_step(len(total), self._seed, number)
        means = self._middle + self._unit * total / self.cohort
        found: Metrics = dict(zip(self.plan.bounds, means.tolist(), strict=True))
        return found | {name + NOISE_STD: x for name, x in self.noise_std.items()}

    def described(self) -> str:
        """Return the plan and its noise in words."""
        noise = ", ".join(f"{name} {x:.3g}" for name, x in self.noise_std.items())
        return f"{self.plan}, noise in the mean: {noise}; all else is withheld"
