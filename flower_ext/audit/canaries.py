r"""Canaries: known vectors that an audit puts into a run, and the test for them.

A canary is a client whose contribution is a direction of its own, with the clipping
norm as its length. In units of the clipping norm the release is

    x_t + s (C^-1 Z)_t,   and a canary in the rounds P adds u in each of them.

Multiplied by C the noise is white, and the canary is the matrix (C e_P) u^T. The most
powerful test for a known signal in white noise is the inner product with it,

    score = <C x, (C e_P) u^T> / (s ||C e_P||)  ~  N(mu_P, 1),  mu_P = ||C e_P|| / s,

and N(0, 1) if the canary was held out. mu_P reaches sensitivity / s = 1 / noise
multiplier for the worst pattern: nothing is lost against the exact guarantee.
"""

from collections.abc import Mapping
from math import prod

import numpy as np
from numpy.typing import NDArray

from flower_ext.core.errors import positive, refuse, whole
from flower_ext.core.typing import AnyFloats, Floats
from flower_ext.privacy.factorizations.factorization import Factorization


class Canaries:
    """Random orthogonal directions, cheap at any size.

    Every parameter belongs to one canary, drawn at random, with a random sign; a
    direction has unit norm. Directions do not overlap, so that the canaries of a run do
    not disturb each other, and one pass over a vector projects it on all of them.

    Parameters
    ----------
    shapes : Mapping[str, tuple[int, ...]]
        Names and shapes of the contribution's arrays.
    count : int
        Number of canaries, at most that of the parameters.
    seed : int
        Seed of the directions, which need not be secret.

    Examples
    --------
    >>> canaries = Canaries({"w": (6,)}, 3, seed=0)
    >>> canaries.project(canaries.direction(1)).round(12)
    array([0., 1., 0.])
    """

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], count: int, *, seed: int
    ) -> None:
        self._shapes = dict(shapes)
        size = sum(prod(shape) for shape in self._shapes.values())
        self.count = whole("count", count, 1)
        if count > size:
            refuse("count", count, f"<= {size} parameters", "directions are orthogonal")
        generator = np.random.default_rng([whole("seed", seed, 0), 0])
        # Shares as equal as can be; every entry of a direction is +-1 / sqrt(its
        # share).
        owner = np.arange(size, dtype=np.int32) % count
        generator.shuffle(owner)
        self._owner = owner
        sign = generator.integers(0, 2, size, dtype=np.int8) * 2 - 1
        self._weight = (sign / np.sqrt(np.bincount(owner))[owner]).astype(np.float64)

    def direction(self, index: int) -> dict[str, Floats]:
        """Return the unit vector of one canary, array by array."""
        flat = np.where(self._owner == index, self._weight, 0.0)
        arrays, low = {}, 0
        for name, shape in self._shapes.items():
            arrays[name] = flat[low : low + prod(shape)].reshape(shape)
            low += prod(shape)
        return arrays

    def project(self, arrays: Mapping[str, AnyFloats]) -> Floats:
        """Return the inner products of all canaries with a vector."""
        flat = np.concatenate([np.ravel(arrays[name]) for name in self._shapes])
        products = np.bincount(self._owner, flat * self._weight, minlength=self.count)
        return np.asarray(products, np.float64)


def whitening(factorization: Factorization, noise_std: float) -> Floats:
    """Return W that makes the noise of all rounds white, of unit variance.

    It is C / s; for a tree, whose C is not square, the inverse of the Cholesky factor
    of the covariance s^2 D D^T, with D the differences of the rows of B.

    Parameters
    ----------
    factorization : Factorization
        The mechanism that is claimed, for as many rounds as were run.
    noise_std : float
        s: claimed standard deviation of Z over the clipping norm.

    Returns
    -------
    NDArray
        Shape ``(rounds, rounds)``, dense: for up to a few thousand rounds.
    """
    positive("noise_std", noise_std)
    strategy = factorization.strategy_matrix()
    if strategy.shape[0] == strategy.shape[1]:
        return strategy / noise_std
    # One release is the difference of two estimates of the running sum.
    differences = np.diff(factorization.decoder_matrix(), axis=0, prepend=0.0)
    return _inverse_root(noise_std**2 * differences @ differences.T)


def learned_whitening(noise: Floats) -> Floats:
    """Return W for the noise that there is, not for the one that is claimed.

    Parameters
    ----------
    noise : NDArray
        Projections of all rounds on directions that nobody sent, shape ``(rounds,
        directions)``, with several times as many directions as rounds.
    """
    # Far below the noise; it keeps the root defined if the rounds are linearly
    # dependent.
    covariance = noise @ noise.T / noise.shape[1]
    ridge = 1e-9 * float(np.trace(covariance)) / len(covariance)
    return _inverse_root(covariance + ridge * np.eye(len(covariance)))


def _inverse_root(covariance: Floats) -> Floats:
    from scipy.linalg import solve_triangular  # type: ignore[import-untyped]

    root = np.linalg.cholesky(covariance)
    return np.asarray(solve_triangular(root, np.eye(len(root)), lower=True))


def matched_scores(
    whiten: Floats,
    projections: Floats,
    took_part: NDArray[np.bool_],
) -> tuple[Floats, Floats]:
    """Return the score and the strength mu_P of every canary.

    Parameters
    ----------
    whiten : NDArray
        `whitening` or `learned_whitening`.
    projections : NDArray
        Inner products of every round's noisy sum with every canary, in units of the
        clipping norm, shape ``(rounds, canaries)``.
    took_part : NDArray
        Whether each canary was asked in each round, of the same shape. The score of a
        canary that never was is 0.
    """
    if took_part.shape != projections.shape:
        refuse("took_part.shape", took_part.shape, f"{projections.shape}")
    # C e_P of each canary over s, and its norm mu_P, see the module.
    signal = whiten @ took_part.astype(np.float64)
    norms = np.linalg.norm(signal, axis=0)
    products = (signal * (whiten @ projections)).sum(axis=0)
    scores = np.divide(products, norms, out=np.zeros_like(norms), where=norms > 0)
    return scores, norms


def sampled_scores(
    whiten: Floats,
    projections: Floats,
    chance: Floats,
    *,
    replaced: bool = False,
) -> Floats:
    """Return the log likelihood ratio when the rounds of a canary are secret.

    For white noise, and rounds whose signals do not overlap, no score is more powerful:

        sum_t l_t(score_t),   l_t(x) = log(1 - q_t + q_t exp(mu_t x - mu_t^2 / 2)).

    Parameters
    ----------
    whiten, projections
        See `matched_scores`.
    chance : NDArray
        q: probability of each canary to be drawn in each round, shape ``(rounds,
        canaries)``; 0 in rounds in which it has no turn.
    replaced : bool
        Whether held-out canaries send the opposite instead of nothing, the attack on
        replace-one: then it is l_t(score_t) - l_t(-score_t).
    """
    # As if each round were the canary's only one: its column of C is the whole signal.
    strength = np.linalg.norm(whiten, axis=0)[:, None]
    single = (whiten.T @ whiten @ projections) / strength
    with np.errstate(divide="ignore"):  # the log of a chance of 0 is -inf, as it should
        away, there = np.log1p(-chance), np.log(chance)

    def log_ratio(values: Floats) -> Floats:
        found = np.logaddexp(away, there + strength * values - strength**2 / 2)
        return np.asarray(found.sum(axis=0))

    return log_ratio(single) - log_ratio(-single) if replaced else log_ratio(single)


def binned_scores(whiten: Floats, projections: Floats, num_bins: int) -> Floats:
    """Return the log likelihood ratio when the bin of a canary is secret.

    The signal of a canary in bin i is the sum of the columns of its rounds, m_i / s,

        log mean_i exp(<m_i, C x> / s^2 - ||m_i||^2 / (2 s^2)),

    and no score is more powerful, whether these overlap or not.

    Parameters
    ----------
    whiten, projections
        See `matched_scores`.
    num_bins : int
        Bins that take turns; those whose turn never came have no signal.
    """
    from scipy.special import logsumexp  # type: ignore[import-untyped]

    signals = [whiten[:, turn::num_bins].sum(axis=1) for turn in range(num_bins)]
    stacked = np.array(signals)
    strength = np.sum(stacked**2, axis=1)[:, None]
    exponents = stacked @ (whiten @ projections) - strength / 2
    return np.asarray(logsumexp(exponents, axis=0) - np.log(num_bins))
