"""The search for BLT parameters: a smooth, always feasible, closed-form loss.

Everything is in log theta and log thetahat: both are close to 1 where runs are long,
and their differences would lose all digits.
"""

import itertools
from collections.abc import Callable, Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from flower_ext.core.errors import one_of, whole
from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.participation import effective_participations
from flower_ext.privacy.factorizations.workload import (
    PREFIX_SUMS,
    Workload,
    require_steady,
)

Complexes = NDArray[np.complex128]

MAX_BUFFERS = 8
_SINGLE = 128  # participations that are counted one by one


def _interlace(logits: Complexes) -> tuple[Complexes, Complexes]:
    """Map ``(..., 2 d)`` free numbers to log theta and log thetahat, ``(..., d)``."""
    # log of a sigmoid is -log1p(exp(-x)); each root is the one before times a sigmoid.
    chain = -np.cumsum(np.log1p(np.exp(-logits)), axis=-1)
    return chain[..., 0::2], chain[..., 1::2]


def _residues(roots: Complexes, others: Complexes) -> Complexes:
    """Return prod_j (r_i - s_j) / prod_{j != i} (r_i - r_j) from the logs of r, s.

    With roots theta and others thetahat they are omega (Dvijotham et al. 2024, arXiv
    2404.16706, Lemma 5.2).
    """

    def differences(right: Complexes) -> Complexes:
        # r - s = -r (s / r - 1)
        values = np.expm1(right[..., None, :] - roots[..., :, None])
        return np.asarray(-np.exp(roots)[..., :, None] * values)

    eye = np.eye(roots.shape[-1], dtype=bool)
    within = np.where(eye, 1.0, differences(roots))
    return np.asarray(np.prod(differences(others) / within, axis=-1))


def _geometric(log_ratio: Complexes, count: int | Floats) -> Complexes:
    """Return sum_{j < count} ratio^j for 0 < ratio <= 1."""
    one = log_ratio == 0  # 0 / 0 in the closed form
    safe = np.where(one, -1.0, log_ratio)
    return np.where(one, count, np.expm1(count * safe) / np.expm1(safe))


def _ramp(log_ratio: Complexes, count: int) -> Complexes:
    """Return sum_{j < count} (count - j) ratio^j for 0 < ratio <= 1.

    Near 1 the closed form cancels; there the binomial series
    sum_m C(count + 1, m + 2) (ratio - 1)^m is short.
    """
    gap = -np.expm1(log_ratio)
    near = count * np.abs(gap) < 0.5
    term = np.full_like(gap, count * (count + 1) / 2)
    series = term.copy()
    step = np.where(near, -gap, 0.0)
    for m in range(16):
        term = term * step * (count - 1 - m) / (m + 3)
        series = series + term
    safe = np.where(near, 0.5, gap)
    closed = (count - (1 - safe) * _geometric(log_ratio, count)) / safe
    return np.where(near, series, closed)


@lru_cache(maxsize=64)
def _participations(count: int) -> tuple[Floats, Floats]:
    """Return numbers 1, 2, ..., count of participations, and weights of all but it.

    What happens between them is smooth in their number: beyond 128 every doubling is
    an integral, by the Gauss-Legendre rule.
    """
    few = min(count, _SINGLE)
    numbers, weights = [np.arange(1.0, few)], [np.ones(few - 1)]
    nodes, shares = np.polynomial.legendre.leggauss(12)
    while few < count:
        end = min(2 * few, count)
        # Each whole number stands for the half before and after it.
        numbers.append((few + end - 1) / 2 + (end - few) / 2 * nodes)
        weights.append((end - few) / 2 * shares)
        few = end
    return np.concatenate([*numbers, [float(count)]]), np.concatenate(weights)


def _log_loss(
    logits: Complexes,
    rounds: int,
    separation: int,
    count: int,
    objective: str,
    workload: Workload = PREFIX_SUMS,
) -> Complexes:
    """Return the log of the squared loss at ``(batch, 2 d)`` points.

    Every step is analytic, so that an imaginary increment of 1e-30 reads off the exact
    derivative (complex step; Squire and Trapp 1998). The cost is that of up to 128
    participations, and of a few more for every doubling, whatever ``rounds``.
    """
    theta, theta_hat = _interlace(logits)
    omega = _residues(theta, theta_hat)
    # Sensitivity of the pattern 0, b, 2b, ..., the worst where c never rises. Let s be
    # the sum of these columns of C. Participations m = 0..count-1 split the rounds into
    # segments; inside segment m, s_{mb + r} = sum_i omega_i g_{m,i} theta_i^{r-1} for
    # r >= 1, with g_{m,i} = sum_{l <= m} theta_i^{b l}. For one participation this is
    # Lemma 5.3 of Dvijotham et al.
    most, times = _participations(count)
    g = _geometric(separation * theta[..., None, :], most[:, None])
    pairs = theta[..., :, None] + theta[..., None, :]
    weight = omega[..., None, :] * g
    last = rounds - (count - 1) * separation
    spread = weight[..., :-1, :] * times[:, None]
    full = np.swapaxes(spread, -1, -2) @ weight[..., :-1, :]
    tail = weight[..., -1, :, None] * weight[..., -1, None, :]
    inside = full * _geometric(pairs, separation - 1)
    inside = inside + tail * _geometric(pairs, last - 1)
    before = omega * np.exp((separation - 1) * theta)
    starts = 1 + (g[..., :-1, :] @ before[..., None])[..., 0]
    sensitivity = 1 + (starts**2 * times).sum(-1) + inside.sum((-1, -2))
    # Error: B_j = a + sum_i beta_i thetahat_i^j, where the constant is one more
    # geometric series, of ratio 1. The sum of squares is a double sum of such series
    # (compare Lemma 5.4 there).
    beta = _residues(theta_hat, theta) / np.expm1(theta_hat)
    constant = np.prod(np.expm1(theta) / np.expm1(theta_hat), axis=-1)
    beta = np.concatenate([constant[..., None], beta], axis=-1)
    bases = np.concatenate([np.zeros_like(theta[..., :1]), theta_hat], axis=-1)
    if workload.momentum:
        beta, bases = _with_momentum(beta, bases, workload)
    products = bases[..., :, None] + bases[..., None, :]
    sums = (
        _geometric(products, rounds)
        if objective == "max"
        else _ramp(products, rounds) / rounds
    )
    error = (beta[..., :, None] * beta[..., None, :] * sums).sum((-1, -2))
    return np.asarray(np.log(sensitivity) + np.log(error))


def _with_momentum(
    beta: Complexes, bases: Complexes, workload: Workload
) -> tuple[Complexes, Complexes]:
    """Return weights and log bases of B's sum of geometric series after momentum.

    Each series r^j becomes sum_l mu^{j-l} r^l = (r^{j+1} - mu^{j+1}) / (r - mu): its
    own, and one more of ratio mu. A root close to mu costs digits, which the search
    can spare: at a relative gap of 1e-4 half of them are left.
    """
    # With the constant's own ratio, 1, the two would be one.
    momentum = min(workload.momentum, 0.999)
    ratio = np.exp(bases) / momentum
    passed = beta / (ratio - 1)
    own, other = passed * ratio, -passed.sum(-1, keepdims=True)
    if workload.nesterov:
        own, other = beta + momentum * own, momentum * other
    log_momentum = np.full_like(bases[..., :1], np.log(momentum))
    return (
        np.concatenate([own, other], axis=-1),
        np.concatenate([bases, log_momentum], axis=-1),
    )


def optimize_buffers(
    rounds: int,
    min_separation: int = 1,
    max_participations: int = 1,
    *,
    buffers: int = 4,
    objective: str = "rms",
    workload: Workload = PREFIX_SUMS,
) -> tuple[Floats, Floats]:
    """Minimise sensitivity times error over BLT parameters.

    theta and thetahat are cumulative products of sigmoids, so that every point is
    feasible (interlaced) and L-BFGS needs no penalties. Buffers are added one by one:
    each size starts from the best of the size below with a new pair at several places,
    and from a logarithmic grid; the best of all sizes is kept, so that more buffers
    never do worse. The optimum is local.

    Parameters
    ----------
    rounds : int
        Planned rounds; the cost of the search does not depend on it.
    min_separation, max_participations : int
        Participation that the sensitivity is for.
    buffers : int
        1 to 8; 3 or 4 come within a fraction of a percent of more.
    objective : str
        ``"rms"`` or ``"max"``.
    workload : Workload
        What the error is of, prefix sums unless given; with momentum, at a constant
        learning rate. Of each size never worse for it than what is best for prefix
        sums.

    Returns
    -------
    tuple of NDArray
        ``buffer_decay`` and ``output_scale``, shape ``(<= buffers,)``.
    """
    whole("rounds", rounds, 1)
    if whole("buffers", buffers, 1) > MAX_BUFFERS:
        raise ValueError(
            f"buffers={buffers} must be <= {MAX_BUFFERS}: more gain nothing and are "
            "numerically unstable"
        )
    one_of("objective", objective, ("rms", "max"))
    require_steady(workload, rounds, "a BLT")
    count = effective_participations(rounds, min_separation, max_participations)
    problem = (rounds, min(min_separation, rounds), count, objective)
    *_, best = itertools.islice(grow_buffers(*problem, workload), buffers)
    return best


def grow_buffers(
    rounds: int,
    separation: int,
    count: int,
    objective: str,
    workload: Workload = PREFIX_SUMS,
) -> Iterator[tuple[Floats, Floats]]:
    """Yield the best parameters of 1, 2, ... buffers until another one gains nothing.

    ``count`` is the number of participations that fit into the rounds.
    """
    for point in _grow(rounds, separation, count, objective, workload):
        theta, theta_hat = _interlace(point.astype(np.complex128))
        yield np.exp(theta.real), _residues(theta, theta_hat).real


def _grow(
    rounds: int, separation: int, count: int, objective: str, workload: Workload
) -> Iterator[Floats]:
    """Yield the logits of `grow_buffers`."""
    known: Iterator[Floats] = iter(())
    if not workload.is_prefix_sum(rounds):
        known = _grow(rounds, separation, count, objective, PREFIX_SUMS)

    def loss(point: Floats) -> tuple[float, Floats]:
        # One copy of the point for each coordinate, with a tiny imaginary step in it.
        batch = np.repeat(point[None, :].astype(np.complex128), len(point), axis=0)
        batch += 1e-30j * np.eye(len(point))
        with np.errstate(all="ignore"):
            value = _log_loss(batch, rounds, separation, count, objective, workload)
        if not np.all(np.isfinite(value)):
            return 1e3, np.zeros_like(point)
        return float(value[0].real), value.imag / 1e-30

    best, best_value = np.empty(0), np.inf
    for size in range(1, MAX_BUFFERS + 1):
        starts = _starts(best, size, (separation, rounds))
        starts += itertools.islice(known, 1)
        value, point = min((_descend(loss, x) for x in starts), key=lambda r: r[0])
        if value > best_value - 1e-9:  # the new pair of roots has cancelled out
            return
        best_value, best = _descend(loss, point, polish=True)
        yield best


def _starts(previous: Floats, size: int, horizons: tuple[int, ...]) -> list[Floats]:
    """Return starting points for ``size`` buffers.

    They are built on the gaps 1 - theta_1 < 1 - thetahat_1 < 1 - theta_2 < ...
    """
    chains = [
        np.geomspace(0.25 / max(horizon, 2), 0.5, 2 * size) for horizon in set(horizons)
    ]
    if size > 1:
        # The best of the size below, with a new pair in every gap between its roots.
        gaps = 1 - np.cumprod(1 / (1 + np.exp(-previous)))
        edges = np.concatenate([[min(1e-6, gaps[0] / 2)], gaps, [1 - 1e-6]])
        for slot, (low, high) in enumerate(itertools.pairwise(edges)):
            pair = np.geomspace(low, high, 4)[1:3]
            chains.append(np.insert(gaps, slot, pair))
    starts = []
    for gaps in chains:
        # Back to the logits of `_interlace`: the ratio of neighbouring roots.
        chain = 1 - gaps
        ratio = chain / np.concatenate([[1.0], chain[:-1]])
        starts.append(np.log(ratio) - np.log1p(-np.minimum(ratio, 1 - 1e-11)))
    return starts


def _descend(
    loss: Callable[[Floats], tuple[float, Floats]],
    start: Floats,
    *,
    polish: bool = False,
) -> tuple[float, Floats]:
    """Run L-BFGS in a box that keeps neighbouring roots apart."""
    from scipy.optimize import minimize  # type: ignore[import-untyped]

    found = minimize(
        loss,
        np.clip(start, -25, 25),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-25.0, 25.0)] * len(start),
        options={
            "maxiter": 500 if polish else 100,
            "maxcor": 20,
            "ftol": 1e-14 if polish else 1e-9,
            "gtol": 1e-8,
        },
    )
    return float(found.fun), np.asarray(found.x)
