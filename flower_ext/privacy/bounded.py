r"""Gaussian noise of which every coordinate stays in an interval.

Two ways to keep :math:`\theta + \mathcal N(0, s^2)` in :math:`[a, b]`: cut what is
outside to the nearer end (rectified), or draw until it is inside (truncated). Less of
the output speaks of :math:`\theta`. How much less depends on :math:`\theta`: that is
for the accounts of single instances, which know it.

Hu, Mahloujifar, Smith, Chaudhuri and Guo 2024, "Privacy amplification for the Gaussian
mechanism via bounded support", AISTATS, arXiv 2403.05598.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import log_ndtr  # type: ignore[import-untyped]

from flower_ext.core.errors import one_of, open_unit, positive, refuse
from flower_ext.core.typing import Floats

Kind = Literal["rectified", "truncated"]

#: Orders of Renyi divergences among which the least epsilon is sought.
ORDERS = tuple(1 + 0.1 * 1.3**x for x in range(34))


@dataclass(frozen=True)
class BoundedGaussian:
    r"""Noise whose outputs stay in an interval, coordinate by coordinate.

    With :math:`\alpha = (a - \theta) / s` and :math:`\beta = (b - \theta) / s`:

    =============  ===================================================================
    ``rectified``  :math:`\min(b, \max(a, \theta + s z))`: the ends have a mass of
                   :math:`\Phi(\alpha)` and :math:`1 - \Phi(\beta)`
    ``truncated``  :math:`\theta + s z` given that it is inside:
                   :math:`\varphi((y - \theta)/s) / (s\,(\Phi(\beta) - \Phi(\alpha)))`
    =============  ===================================================================

    Parameters
    ----------
    lower, upper : float
        The interval [a, b]; infinities are no bound, and with both it is the Gaussian.
    kind : {"rectified", "truncated"}
        What becomes of noise that leads outside. Means must be inside for the latter.

    Notes
    -----
    **Guarantee.** *Rectified* noise is what is made of the Gaussian's output without
    looking at the data again (post-processing): it is (epsilon, delta)-private with
    whatever the Gaussian is, for every pair of neighbours, and charged as such. *What
    it gains is for pairs that are known*: the divergences and the Fisher information
    below depend on the means, and so does any epsilon that is made of them.

    *Truncated* noise is no post-processing: how likely the interval was depends on the
    mean, and the ratio of two densities is not that of the Gaussians. It has no
    worst-case guarantee here, and ``DPSGD`` refuses it.

    The divergences of one pair are themselves made of the data. They are for the silo
    to look at; whoever publishes them gives away what the noise hides.

    Examples
    --------
    >>> noise = BoundedGaussian(-1.0, 1.0)
    >>> round(float(noise.fisher_information(0.0, 1.0)), 3)
    0.937
    >>> round(float(noise.renyi_divergence(4.0, 0.3, -0.2, 1.0)), 4)
    0.3874
    """

    lower: float
    upper: float
    kind: Kind = "rectified"

    def __post_init__(self) -> None:
        for name in ("lower", "upper"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                refuse(name, value, "a number")
        if not self.lower < self.upper:  # NaN as well
            refuse("lower", self.lower, f"< upper={self.upper}")
        one_of("kind", self.kind, get_args(Kind))

    @property
    def is_post_processing(self) -> bool:
        """Whether it is made of a Gaussian's output alone."""
        return self.kind == "rectified"

    def sample(
        self,
        means: ArrayLike,
        standard_deviation: float,
        generator: np.random.Generator,
    ) -> Floats:
        """Draw one output for each mean.

        Parameters
        ----------
        means : array_like
            Theta.
        standard_deviation : float
            s > 0, of the Gaussian before it is bounded.
        generator : numpy.random.Generator
            Source of randomness.
        """
        mean, s = self._checked(means, standard_deviation)
        if self.is_post_processing:
            noisy = mean + s * generator.standard_normal(mean.shape)
            return np.clip(noisy, self.lower, self.upper)
        from scipy.stats import truncnorm  # type: ignore[import-untyped]

        low, high = self._ends(mean, s)
        drawn = truncnorm.rvs(low, high, size=mean.shape, random_state=generator)
        # Rounding may lead out again.
        return np.clip(mean + s * np.asarray(drawn), self.lower, self.upper)

    def fisher_information(self, means: ArrayLike, standard_deviation: float) -> Floats:
        r"""Return what an output tells of its mean: :math:`1/s^2` without bounds.

        .. math::
           I_{rect} &= s^{-2} \Bigl[ Z - (\beta\varphi(\beta) - \alpha\varphi(\alpha))
           + \frac{\varphi(\alpha)^2}{\Phi(\alpha)}
           + \frac{\varphi(\beta)^2}{1 - \Phi(\beta)} \Bigr] \\
           I_{trunc} &= s^{-2} \Bigl[ 1 + \frac{\alpha\varphi(\alpha) -
           \beta\varphi(\beta)}{Z} - \Bigl(\frac{\varphi(\alpha) - \varphi(\beta)}{Z}
           \Bigr)^2 \Bigr], \qquad Z = \Phi(\beta) - \Phi(\alpha)
        """
        mean, s = self._checked(means, standard_deviation)
        low, high = self._ends(mean, s)
        mass = np.exp(_log_between(low, high))
        edges = _times_density(low) - _times_density(high)
        if self.is_post_processing:
            return np.asarray((mass + edges + _tail(low) + _tail(-high)) / s**2)
        slope = (np.exp(_log_density(low)) - np.exp(_log_density(high))) / mass
        return np.asarray(np.maximum(1 + edges / mass - slope**2, 0.0) / s**2)

    def renyi_divergence(
        self,
        order: float,
        means: ArrayLike,
        others: ArrayLike,
        standard_deviation: float,
    ) -> Floats:
        r"""Return the divergence of the outputs of two means, coordinate by coordinate.

        With :math:`m = A\theta_1 + (1-A)\theta_2`, tail masses :math:`P_{ia}, P_{ib}`,
        masses inside :math:`Z_i`, and

        .. math::
           G = e^{A(A-1)(\theta_1 - \theta_2)^2 / 2s^2}
           \bigl(\Phi(\tfrac{b-m}{s}) - \Phi(\tfrac{a-m}{s})\bigr), \qquad
           D_{rect} = \frac{\log(P_{1a}^A P_{2a}^{1-A} + P_{1b}^A P_{2b}^{1-A} + G)}
           {A - 1}, \qquad
           D_{trunc} = \frac{\log(Z_1^{-A} Z_2^{A-1} G)}{A - 1} .

        The second is the same integral of densities that are each divided by the mass
        inside. Without bounds both are :math:`A (\theta_1 - \theta_2)^2 / 2 s^2`.

        Parameters
        ----------
        order : float
            A > 1.
        means, others : array_like
            Theta of either output, of shapes that broadcast.
        standard_deviation : float
            s > 0.

        Returns
        -------
        ndarray
            In nats, at least 0. Independent coordinates add up.
        """
        if not order > 1:
            refuse("order", order, "> 1")
        one, s = self._checked(means, standard_deviation)
        two, _ = self._checked(others, standard_deviation)
        one, two = np.broadcast_arrays(one, two)
        gap = (one - two) / s
        ends = [self._ends(x, s) for x in (one, order * one + (1 - order) * two, two)]
        inside = order * (order - 1) * gap**2 / 2 + _log_between(*ends[1])
        (low, high), (other_low, other_high) = ends[0], ends[2]
        if self.is_post_processing:
            tails = [
                _weighted(order, log_ndtr(x), log_ndtr(y))
                for x, y in ((low, other_low), (-high, -other_high))
            ]
            log_moment = np.logaddexp(np.logaddexp(*tails), inside)
        else:
            masses = _log_between(low, high), _log_between(other_low, other_high)
            log_moment = inside - order * masses[0] + (order - 1) * masses[1]
        # Below 0 by rounding only.
        return np.asarray(np.maximum(log_moment / (order - 1), 0.0))

    def _checked(self, means: ArrayLike, deviation: float) -> tuple[Floats, float]:
        mean = np.asarray(means, np.float64)
        if not np.isfinite(mean).all():
            refuse("means", "an array with NaN or infinity", "finite")
        outside = (mean < self.lower) | (mean > self.upper)
        if not self.is_post_processing and outside.any():
            cause = "a truncated Gaussian far outside knows its nearer end only"
            bound = f"in [{self.lower:g}, {self.upper:g}]"
            refuse("means", float(mean[outside].flat[0]), bound, cause)
        return mean, positive("standard_deviation", deviation)

    def _ends(self, mean: Floats, s: float) -> tuple[Floats, Floats]:
        return (self.lower - mean) / s, (self.upper - mean) / s


def epsilon_of_divergences(
    divergences: Sequence[float], delta: float, orders: Sequence[float] = ORDERS
) -> float:
    r"""Return the least epsilon that Renyi divergences of several orders bound.

    :math:`D_A + \log\frac{A-1}{A} - \frac{\log\delta + \log A}{A - 1}`, the least over
    the orders A and at least 0 (Canonne, Kamath and Steinke 2020, "The discrete
    Gaussian for differential privacy", proposition 12).

    Examples
    --------
    >>> round(epsilon_of_divergences([x / 2 for x in ORDERS], 1e-5), 3)
    4.761
    """
    open_unit("delta", delta)
    found = math.inf
    for order, divergence in zip(orders, divergences, strict=True):
        paid = math.log(delta) + math.log(order)
        found = min(found, divergence + math.log1p(-1 / order) - paid / (order - 1))
    return max(found, 0.0)


def _log_density(x: Floats) -> Floats:
    return -(x**2) / 2 - math.log(2 * math.pi) / 2


def _times_density(x: Floats) -> Floats:
    """Return x times the standard normal density, 0 at infinity."""
    known = np.where(np.isfinite(x), x, 0.0)
    return np.asarray(known * np.exp(_log_density(known)))


def _tail(x: Floats) -> Floats:
    """Return the squared density over the mass below, 0 at minus infinity."""
    known = np.where(np.isneginf(x), 0.0, x)
    found = np.exp(2 * _log_density(known) - log_ndtr(known))
    return np.asarray(np.where(np.isneginf(x), 0.0, found))


def _log_between(low: Floats, high: Floats) -> Floats:
    """Return the logarithm of a standard normal's mass between two points."""
    # Both in the lower half, where the smaller of two tails is not lost beside 1.
    flip = low > -high
    low, high = np.where(flip, -high, low), np.where(flip, -low, high)
    with np.errstate(divide="ignore"):
        upper, lower = log_ndtr(high), log_ndtr(low)
        return np.asarray(upper + np.log1p(-np.exp(lower - upper)))


def _weighted(order: float, log_one: Floats, log_two: Floats) -> Floats:
    """Return ``A log p + (1 - A) log q``, of masses that may both be 0."""
    with np.errstate(invalid="ignore"):
        found = order * log_one + (1 - order) * log_two
    return np.asarray(np.where(np.isneginf(log_one), -np.inf, found))
