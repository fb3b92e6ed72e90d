"""Exact (epsilon, delta) of one Gaussian release.

mu is the sensitivity of the release over the standard deviation of its noise. A matrix
mechanism is ONE Gaussian release over all its rounds, so these formulas are all that
its accounting needs. Neighbouring relation: one client's contributions become zero.
"""

import math

from flower_ext.core.errors import at_least, open_unit, positive


def _log_ndtr(value: float) -> float:
    """Return the log of the standard normal distribution function."""
    from scipy.special import log_ndtr  # type: ignore[import-untyped]

    return float(log_ndtr(value))


def gaussian_delta(mu: float, epsilon: float) -> float:
    """Return the smallest delta of a Gaussian release.

        delta = Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu)

    Parameters
    ----------
    mu : float
        Sensitivity over noise, >= 0; 0 releases nothing.
    epsilon : float
        >= 0.

    References
    ----------
    Balle and Wang 2018, arXiv 1805.06530, Theorem 8.
    """
    at_least("mu", mu, 0)
    at_least("epsilon", epsilon, 0)
    if mu == 0:
        return 0.0
    # In logarithms, since e^eps overflows where Phi vanishes; expm1 keeps the digits of
    # two terms that are almost the same.
    upper = _log_ndtr(mu / 2 - epsilon / mu)
    lower = epsilon + _log_ndtr(-mu / 2 - epsilon / mu)
    return max(0.0, -math.exp(upper) * math.expm1(min(0.0, lower - upper)))


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Return the smallest epsilon of a Gaussian release, rounded up by 1e-13 of it.

    Parameters
    ----------
    mu : float
        Sensitivity over noise, >= 0.
    delta : float
        In (0, 1).

    Examples
    --------
    >>> round(gaussian_epsilon(mu=1.0, delta=1e-6), 5)
    4.88655
    """
    open_unit("delta", delta)
    if gaussian_delta(mu, 0.0) <= delta:
        return 0.0
    # Delta falls with epsilon: double until it is met, then bisect. The upper end
    # always meets it, and is returned.
    low, high = 0.0, 1.0
    while gaussian_delta(mu, high) > delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:  # neighbouring floats
            break
        if gaussian_delta(mu, middle) > delta:
            low = middle
        else:
            high = middle
    return high


def gaussian_mu(epsilon: float, delta: float) -> float:
    """Return the largest mu that is (epsilon, delta)-private, rounded down."""
    positive("epsilon", epsilon)
    open_unit("delta", delta)
    # Delta rises with mu: the same search, of which the lower end is returned.
    low, high = 0.0, 1.0
    while gaussian_delta(high, epsilon) <= delta:
        low, high = high, 2 * high
    while high - low > 1e-13 * high:
        middle = (low + high) / 2
        if not low < middle < high:
            break
        if gaussian_delta(middle, epsilon) <= delta:
            low = middle
        else:
            high = middle
    return low
