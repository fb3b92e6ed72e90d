"""Worst-case participation patterns.

A pattern is a set of rounds in which one client takes part. With minimum
separation ``b`` and at most ``k`` participations, the allowed patterns are

    Pi(b, k) = { P : |P| <= k,  |i - j| >= b for all i != j in P }.

``b`` is the difference of round numbers: 1 allows every round, 2 every other one.
(Some published notebooks count the rounds *between* two participations, b - 1.)
"""

from dataclasses import dataclass

import numpy as np

from flower_ext.core.errors import whole
from flower_ext.core.typing import Floats


@dataclass(frozen=True)
class Sensitivity:
    """The l2 sensitivity of a release, in units of the clipping norm.

    Parameters
    ----------
    value : float
        The sensitivity, or a bound from above when ``exact`` is false.
    exact : bool
        Whether some allowed pattern and some clipped contributions attain it.
    how : str
        The theorem or the bound that was used, in words.
    """

    value: float
    exact: bool
    how: str

    def __float__(self) -> float:
        return self.value


def effective_participations(
    rounds: int, min_separation: int, max_participations: int
) -> int:
    """Return how often a client can really take part: min(k, ceil(n / b))."""
    whole("min_separation", min_separation, 1, "1 means every round is allowed")
    whole("max_participations", max_participations, 1)
    return min(max_participations, -(-rounds // min_separation))


def heaviest_pattern(
    values: Floats, min_separation: int, max_participations: int
) -> Floats:
    """Maximise a sum of non-negative values over all patterns.

    F_j(i), the most that j participations from round i on can reach, is
    max(x_i + F_{j-1}(i + b), F_j(i + 1)): one pass per participation.

    Parameters
    ----------
    values : NDArray
        Shape ``(..., rounds)``, non-negative.
    min_separation, max_participations : int
        The allowed patterns.

    Returns
    -------
    NDArray
        Shape ``(...)``: max over P in Pi(b, k) of sum over i in P of ``values[i]``.

    References
    ----------
    Choquette-Choo et al. 2023, arXiv 2306.08153, Algorithm 3.
    """
    rounds = values.shape[-1]
    count = effective_participations(rounds, min_separation, max_participations)
    shift = min(min_separation, rounds)
    best = np.zeros_like(values)
    for _ in range(count):
        # Take part in round i, the rest b rounds later at the soonest (nothing beyond
        # the end); or not in i: the largest from there on.
        later = np.zeros_like(values)
        later[..., : rounds - shift] = best[..., shift:]
        suffix = np.maximum.accumulate((values + later)[..., ::-1], axis=-1)
        best = suffix[..., ::-1]
    return np.asarray(best[..., 0])


def gram_sensitivity(
    gram: Floats, min_separation: int, max_participations: int
) -> Sensitivity:
    """Bound the sensitivity of C from G = C^T C.

    For contributions of norm at most 1, ||sum_{i in P} C_i x_i^T||^2 is at most
    sum_{i,j in P} |G_ij|. It is exact when there is a single participation, or when
    rounds that one client may share have orthogonal columns; otherwise rows and then
    columns are maximised apart, which can only overestimate (Choquette-Choo et al.
    2023, arXiv 2306.08153).
    """
    rounds = gram.shape[0]
    count = effective_participations(rounds, min_separation, max_participations)
    diagonal = np.ascontiguousarray(np.diagonal(gram))
    if count == 1:
        return Sensitivity(float(np.sqrt(diagonal.max())), True, "largest column norm")
    # Only entries that far from the diagonal belong to two rounds of one client.
    distance = np.abs(np.subtract.outer(np.arange(rounds), np.arange(rounds)))
    weights = np.abs(gram)
    shared = weights[distance >= min_separation]
    if not shared.size or float(shared.max()) <= 1e-12 * float(diagonal.max()):
        total = heaviest_pattern(diagonal, min_separation, count)
        # What rounding left off the band is added, so that the value stays a bound.
        rest = count * (count - 1) * float(shared.max(initial=0.0))
        return Sensitivity(
            float(np.sqrt(float(total) + rest)), True, "orthogonal columns"
        )
    # Entries that no pattern through round i can reach are left out of its row.
    weights[(distance > 0) & (distance < min_separation)] = 0.0
    rows = heaviest_pattern(weights, min_separation, count)
    total = heaviest_pattern(rows, min_separation, count)
    return Sensitivity(
        float(np.sqrt(float(total))),
        False,
        "upper bound: row-wise, then column-wise maximum of |C^T C|",
    )
