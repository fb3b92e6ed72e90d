"""Noise from a target and target from a noise, with and without sampling."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import ModuleType
from typing import Protocol, cast

import numpy as np

from flower_ext.core.errors import (
    at_least,
    open_unit,
    positive,
    probability,
    refuse,
    whole,
)
from flower_ext.core.typing import Floats
from flower_ext.privacy.accounting.gaussian import gaussian_epsilon, gaussian_mu

INTERVAL = 1e-3
# Grid points in one standard deviation of the privacy loss of a round: epsilon is then
# less than 1% above that of a fine grid.
_POINTS = 8
# Grid points of a round's distribution at most: seconds, where its tail is long.
_MOST_POINTS = 100_000
# Standard deviations of the noise beyond which dp-accounting cuts the tail off.
_TAIL = 10.0
_LEAST_NOISE = 0.5


class LossDistribution(Protocol):
    """What is used of dp-accounting's privacy loss distribution."""

    def self_compose(self, num_times: int, /) -> LossDistribution:
        """Return the distribution of independent repetitions."""

    def compose(self, other: LossDistribution, /) -> LossDistribution:
        """Return the distribution of both; their grids must be the same."""

    def get_epsilon_for_delta(self, delta: float, /) -> float:
        """Return epsilon."""

    def get_delta_for_epsilon(self, epsilon: float, /) -> float:
        """Return delta."""


def _dp_accounting() -> ModuleType:
    try:
        import dp_accounting
        import dp_accounting.pld.pld_pmf
        import dp_accounting.pld.privacy_loss_distribution
    except ImportError as error:
        raise ImportError(
            "accounting for sampling needs dp-accounting: pip install 'flower-ext[dp]'"
        ) from error
    return cast("ModuleType", dp_accounting)


def grid(
    noise_multiplier: float, rate: float, group_size: int, interval: float
) -> float:
    """Return the interval of the grid that the privacy loss of one round needs.

    The loss is rounded up to the grid in every round anew. Its standard deviation is
    about q sqrt(exp((g/z)^2) - 1), for rate q, group size g and noise multiplier z. The
    grid must be much finer than that, or far more would be counted than was spent. With
    little noise, and a tiny rate or a large group, the largest losses are thousands of
    standard deviations away. There the grid is coarser than ``interval`` to stay in
    memory, and a little more is counted.
    """
    return common_grid([(noise_multiplier, rate, group_size)], interval)


def common_grid(rounds: Iterable[tuple[float, float, int]], interval: float) -> float:
    """Return the interval of the grid that rounds of several kinds need together.

    Losses compose on the same grid only.

    Parameters
    ----------
    rounds : iterable of (float, float, int)
        Noise multiplier, rate and group size of each kind.
    interval : float
        At most, where memory allows.
    """
    fine, coarse = interval, 0.0
    for noise_multiplier, rate, group_size in rounds:
        ratio = group_size / noise_multiplier
        spread = rate * math.sqrt(math.expm1(min(ratio**2, 50.0)))
        exponent = min(_TAIL * ratio + ratio**2 / 2, 700.0)
        largest = math.log1p(rate * math.expm1(exponent))
        fine, coarse = min(fine, spread / _POINTS), max(coarse, largest / _MOST_POINTS)
    return max(fine, coarse)


def loss_distribution(
    noise_multiplier: float, rate: float, group_size: int, interval: float
) -> LossDistribution:
    """Return the privacy loss of one round, always rounded up, on a fitting grid."""
    interval = grid(noise_multiplier, rate, group_size, interval)
    return loss_on_grid(noise_multiplier, rate, group_size, interval)


@lru_cache(maxsize=64)
def loss_on_grid(
    noise_multiplier: float, rate: float, group_size: int, interval: float
) -> LossDistribution:
    """Return the privacy loss of one round, always rounded up, on a grid."""
    pld = _dp_accounting().pld.privacy_loss_distribution
    # With rate 1 all G examples of a user are there: one Gaussian of G times the shift.
    if group_size == 1 or rate == 1:
        loss = pld.from_gaussian_mechanism(
            noise_multiplier / group_size,
            sampling_prob=rate,
            value_discretization_interval=interval,
        )
    else:
        loss = _examples_of_one(noise_multiplier, rate, group_size, interval)
    return cast("LossDistribution", loss)


def sampled_loss(
    count: int,
    noise_multiplier: float,
    rate: float,
    group_size: int,
    interval: float,
    beside: float = 0.0,
) -> LossDistribution:
    """Return the privacy loss of ``count`` releases, and of one Gaussian beside them.

    ``beside`` is mu of the latter, 0 for none.
    """
    kinds = [(noise_multiplier, rate, group_size)]
    if beside:
        kinds.append((1 / beside, 1.0, 1))
    interval = common_grid(kinds, interval)
    found = loss_on_grid(*kinds[0], interval).self_compose(count)
    return found.compose(loss_on_grid(*kinds[1], interval)) if beside else found


@lru_cache(maxsize=256)
def sampled_epsilon(
    count: int,
    delta: float,
    noise_multiplier: float,
    rate: float,
    group_size: int,
    interval: float,
    beside: float = 0.0,
) -> float:
    """Return epsilon of ``count`` releases: exact, or with sampling an upper bound.

    ``beside`` is mu of a Gaussian release beside them, 0 for none.
    """
    if rate == 1:  # Gaussian releases compose exactly: their mu^2 add up
        mu = math.sqrt(count) * group_size / noise_multiplier
        return gaussian_epsilon(math.hypot(mu, beside), delta)
    loss = sampled_loss(count, noise_multiplier, rate, group_size, interval, beside)
    return float(loss.get_epsilon_for_delta(delta))


def epsilon_for(
    noise_multiplier: float,
    delta: float,
    *,
    rounds: int = 1,
    sampling_probability: float = 1.0,
    group_size: int = 1,
    cycle: int = 1,
    interval: float = INTERVAL,
) -> float:
    """Return epsilon of a whole run.

    Parameters
    ----------
    noise_multiplier : float
        Noise over clipping norm and sensitivity, see the two accountants.
    delta : float
        In (0, 1).
    rounds : int
        1 for a mechanism that is a single release (matrix factorizations, whose
        sensitivity already covers all rounds); the number of rounds with sampling.
    sampling_probability, group_size, cycle, interval
        See `SampledGaussianAccountant`; their defaults mean no amplification.

    Examples
    --------
    >>> round(epsilon_for(1.0, delta=1e-6), 5)
    4.88655
    """
    open_unit("delta", delta)
    return sampled_epsilon(
        -(-whole("rounds", rounds, 1) // whole("cycle", cycle, 1)),
        delta,
        positive("noise_multiplier", noise_multiplier),
        probability("sampling_probability", sampling_probability),
        whole("group_size", group_size, 1),
        positive("interval", interval),
    )


def noise_multiplier_for(
    epsilon: float,
    delta: float,
    *,
    rounds: int = 1,
    sampling_probability: float = 1.0,
    group_size: int = 1,
    cycle: int = 1,
    interval: float = INTERVAL,
    beside: float = 0.0,
) -> float:
    """Return the smallest noise multiplier that meets a target, rounded up.

    Without sampling it is exact; with sampling within a relative 1e-4 above, and never
    sought below 0.25.

    Parameters
    ----------
    epsilon, delta : float
        The target; ``epsilon_for`` of the result is never above it.
    rounds, sampling_probability, group_size, cycle, interval
        See `epsilon_for`.
    beside : float
        mu of a Gaussian release that the target covers as well; 0 for none.

    Examples
    --------
    >>> round(noise_multiplier_for(4.88655, delta=1e-6), 4)
    1.0
    """
    positive("epsilon", epsilon)
    count = -(-whole("rounds", rounds, 1) // whole("cycle", cycle, 1))
    probability("sampling_probability", sampling_probability)
    whole("group_size", group_size, 1)
    mu = gaussian_mu(epsilon, delta)
    if at_least("beside", beside, 0):
        if beside >= mu:
            refuse("beside", beside, f"< {mu:.6g}", "that is all of epsilon")
        mu = math.sqrt(mu**2 - beside**2)
    # Sampling can only help.
    most = math.sqrt(count) * group_size
    high = most / mu * (1 + 1e-12)
    if sampling_probability == 1:
        return _gaussian_noise(high, most, beside, epsilon, delta)

    def spent(noise: float) -> float:
        return sampled_epsilon(
            count, delta, noise, sampling_probability, group_size, interval, beside
        )

    return least_noise_below(high, spent, epsilon, _LEAST_NOISE)


def _gaussian_noise(
    noise: float, shift: float, beside: float, epsilon: float, delta: float
) -> float:
    """Return a noise that keeps a promise to the last digit, from one that nearly does.

    The release moves by ``shift``; ``beside`` is as in `sampled_epsilon`.
    """
    while gaussian_epsilon(math.hypot(shift / noise, beside), delta) > epsilon:
        noise *= 1 + 1e-12
    return noise


def least_noise_below(
    high: float,
    spent: Callable[[float], float],
    epsilon: float,
    least: float,
    tolerance: float = 1e-4,
) -> float:
    """Return the least noise that meets a target, from one that meets it, or almost.

    Once one below ``least`` does, no smaller one is sought. See `least_noise`.
    """
    while (cost := spent(high)) > epsilon:  # a coarse grid may cost more than none
        high *= 1.1
        if high > 1e6:
            raise ValueError(
                f"epsilon={epsilon} cannot be resolved on this grid: ask for a larger "
                "one, or for a smaller interval"
            )
    # Bracket the noise from below; ``high`` always meets the target, so that the result
    # does.
    low = high / 2
    while (less := spent(low)) <= epsilon:
        low, high, cost = low / 2, low, less
        if high < least:  # sampling alone may meet a large delta
            return high
    return least_noise(spent, epsilon, (low, high), (less, cost), tolerance)


def least_noise(
    spent: Callable[[float], float],
    epsilon: float,
    between: tuple[float, float],
    costs: tuple[float, float],
    tolerance: float = 1e-4,
) -> float:
    """Return the least noise that meets a target, within a tolerance above.

    Parameters
    ----------
    spent : callable
        Epsilon of a noise, which falls with it.
    epsilon : float
        The target.
    between : tuple of float
        A noise that misses the target, and one that meets it.
    costs : tuple of float
        What these two spend.
    tolerance : float
        Relative.

    References
    ----------
    Oliveira and Takahashi 2020, "An enhancement of the bisection method average
    performance preserving minmax optimality" (ITP), ACM TOMS 47(1).
    """

    def excess(cost: float) -> float:
        # Too little noise may cost infinitely much.
        return math.log(min(max(cost, 1e-300), 1e300) / epsilon)

    # The logarithm of epsilon is almost a line in that of the noise.
    low, high = map(math.log, between)
    above, below = map(excess, costs)
    width, least = high - low, math.log1p(tolerance)
    most = math.ceil(math.log2(width / least)) + 1
    while high - low > least:
        middle, line = (low + high) / 2, low + (high - low) * above / (above - below)
        # A little towards the middle, so that the root is between it and the nearer
        # end, and never so far off that it would take longer than bisection.
        nudge = max(0.2 * (high - low) ** 2 / width, 0.4 * least)
        nudge = min(nudge, abs(middle - line))
        place = line + math.copysign(nudge, middle - line)
        reach = least / 2 * 2.0**most - (high - low) / 2
        place = min(max(place, middle - reach), middle + reach)
        most -= 1
        if (cost := spent(math.exp(place))) > epsilon:
            low, above = place, excess(cost)
        else:
            high, below = place, excess(cost)
    return math.exp(high)


# Several examples of one user --------------------------------------------------------


def _examples_of_one(
    noise_multiplier: float, rate: float, group_size: int, interval: float
) -> LossDistribution:
    r"""Return the privacy loss of one batch for a user of G examples, on a grid.

    Their number in a batch is Binomial(G, q), and each moves the sum by the clipping
    norm: a mixture of shifts (Charles et al. 2024, arXiv 2407.07737), P, against
    N(0, z^2), Q. The log of P / Q rises with the sum x, so that with x the root of
    :math:`\log P(x) / Q(x) = \epsilon`

    .. math:: H_{e^\epsilon}(P \| Q) = P(> x) - e^\epsilon Q(> x),

    and from Q to P with the other tails and :math:`-\epsilon`. The profiles are put on
    a grid from above (Doroshenko et al. 2022, arXiv 2207.04380).
    """
    from scipy.special import gammaln, log_ndtr  # type: ignore[import-untyped]

    pld = _dp_accounting().pld
    z, counts = noise_multiplier, np.arange(group_size + 1.0)
    ways = gammaln(group_size + 1) - gammaln(counts + 1) - gammaln(counts[::-1] + 1)
    logs = ways + counts * math.log(rate) + counts[::-1] * math.log1p(-rate)

    def loss_at(x: Floats) -> tuple[Floats, Floats]:
        terms = logs + (counts * x[:, None] - counts**2 / 2) / z**2
        top = terms.max(axis=1, keepdims=True)
        shares = np.exp(terms - top)
        total = shares.sum(axis=1)
        return top[:, 0] + np.log(total), (shares @ counts) / total / z**2

    def profile(epsilons: Floats, side: float) -> Floats:
        # Below the loss of a user who is not there nothing is ever lost.
        wanted = side * epsilons
        inside = wanted > logs[0]
        x = np.full(len(wanted), -np.inf)
        x[inside] = _root(loss_at, wanted[inside], logs, counts, z)
        user = np.exp(logs + log_ndtr(-side * (x[:, None] - counts) / z)).sum(axis=1)
        alone = np.exp(log_ndtr(-side * x / z))
        more, less = (user, alone) if side > 0 else (alone, user)
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(more - np.where(less > 0, np.exp(epsilons) * less, 0.0))

    ends, _ = loss_at(np.array([-_TAIL * z, _TAIL * z, group_size + _TAIL * z]))
    pmfs = []
    for side, low, high in ((1.0, ends[0], ends[2]), (-1.0, -ends[1], -ends[0])):
        places = np.arange(math.floor(low / interval), math.ceil(high / interval) + 1)
        blocks = np.array_split(
            places * interval, 1 + places.size * counts.size // 10**6
        )
        deltas = np.concatenate([profile(block, side) for block in blocks])
        # Where rounding lets a profile rise it is flat instead, from above.
        deltas = np.maximum.accumulate(np.clip(deltas, 0.0, 1.0)[::-1])[::-1]
        make = pld.pld_pmf.create_pmf_pessimistic_connect_dots
        pmfs.append(make(interval, places, deltas))
    found = pld.privacy_loss_distribution.PrivacyLossDistribution(*pmfs)
    return cast("LossDistribution", found)


def _root(
    loss_at: Callable[[Floats], tuple[Floats, Floats]],
    wanted: Floats,
    logs: Floats,
    counts: Floats,
    noise_multiplier: float,
) -> Floats:
    """Return where the loss of a mixture is what is wanted, by Newton's method.

    The loss is convex and at least that of each of its terms: from the least of their
    roots on, which is not below its own, every step goes down, and none too far.
    """
    own = (wanted[:, None] - logs[1:]) * noise_multiplier**2 / counts[1:]
    x = (own + counts[1:] / 2).min(axis=1)
    for _ in range(60):
        value, slope = loss_at(x)
        step = np.maximum(value - wanted, 0.0) / slope
        x = x - step
        if float(step.max(initial=0.0)) <= 1e-12 * noise_multiplier:
            break
    return np.asarray(x)


# Cohorts of a fixed size -------------------------------------------------------------


@lru_cache(maxsize=64)
def fixed_cohort_loss(noise_multiplier: float, rate: float) -> LossDistribution:
    r"""Return the privacy loss of one cohort of a fixed size, for replace-one.

    Of two clients that are exchanged each moves the sum by up to the clipping norm:
    without sampling the hockey-stick divergences are those of
    :math:`P = N(2 / z, 1)` from :math:`Q = N(0, 1)`. With a share :math:`\gamma` drawn
    without replacement they are at most

    .. math:: \delta(\epsilon) = \gamma H_{1 + (e^\epsilon - 1)/\gamma}(P \| Q), \qquad
       \delta(-\epsilon) = 1 - e^{-\epsilon} + e^{-\epsilon} \delta(\epsilon)

    for :math:`\epsilon \ge 0` (Balle, Barthe and Gaboardi 2018, "Privacy
    Amplification by Subsampling", arXiv 1807.01647); the second holds for every
    symmetric relation. The profile is convex in :math:`e^\epsilon`, so that a pair of
    distributions has it; that pair dominates each round, and its repetitions dominate
    all rounds (Zhu, Dong and Wang 2022, "Optimal Accounting of Differential Privacy via
    Characteristic Function", arXiv 2106.08567). It is put on a grid from above
    (Doroshenko et al. 2022, arXiv 2207.04380).
    """
    pld = _dp_accounting().pld
    shift = 2 / noise_multiplier
    interval = grid(noise_multiplier / 2, rate, 1, INTERVAL)
    largest = math.log1p(rate * math.expm1(min(_TAIL * shift + shift**2 / 2, 700.0)))
    places = np.arange(1, math.ceil(largest / interval) + 1)
    epsilons = np.asarray(places * interval, np.float64)
    positive_half = _fixed_cohort_deltas(shift, rate, epsilons)
    zero = _fixed_cohort_deltas(shift, rate, np.zeros(1))
    negative_half = -np.expm1(-epsilons) + np.exp(-epsilons) * positive_half
    deltas = np.concatenate([negative_half[::-1], zero, positive_half])
    rounded = np.concatenate([-places[::-1], [0], places])
    pmf = pld.pld_pmf.create_pmf_pessimistic_connect_dots(
        interval, rounded, np.clip(deltas, 0.0, 1.0)
    )
    loss = pld.privacy_loss_distribution.PrivacyLossDistribution(pmf)
    return cast("LossDistribution", loss)


def _fixed_cohort_deltas(shift: float, rate: float, epsilons: Floats) -> Floats:
    from scipy.special import log_ndtr

    # The divergence of two Gaussians, from logarithms: exp(inner) may be huge.
    inner = np.log1p(np.expm1(epsilons) / rate)
    first = np.exp(log_ndtr(shift / 2 - inner / shift))
    second = np.exp(inner + log_ndtr(-shift / 2 - inner / shift))
    return np.asarray(rate * np.maximum(first - second, 0.0))


@lru_cache(maxsize=256)
def fixed_cohort_epsilon(
    count: int, delta: float, noise_multiplier: float, population: int, cohort: int
) -> float:
    """Return an upper bound of epsilon of ``count`` cohorts of a fixed size."""
    if cohort == population:
        return gaussian_epsilon(2 * math.sqrt(count) / noise_multiplier, delta)
    loss = fixed_cohort_loss(noise_multiplier, cohort / population)
    return float(loss.self_compose(count).get_epsilon_for_delta(delta))


def noise_multiplier_without_replacement(
    epsilon: float, delta: float, *, rounds: int, population: int, cohort: int
) -> float:
    """Return the smallest noise multiplier that meets a target, rounded up.

    As `noise_multiplier_for`, for cohorts of exactly ``cohort`` clients out of
    ``population``, and the relation replace-one; never sought below 0.5.
    """
    mu = gaussian_mu(positive("epsilon", epsilon), open_unit("delta", delta))
    most = 2 * math.sqrt(rounds)
    high = most / mu * (1 + 1e-12)
    if cohort == population:
        return _gaussian_noise(high, most, 0.0, epsilon, delta)

    def spent(noise: float) -> float:
        return fixed_cohort_epsilon(rounds, delta, noise, population, cohort)

    return least_noise_below(high, spent, epsilon, 2 * _LEAST_NOISE)
