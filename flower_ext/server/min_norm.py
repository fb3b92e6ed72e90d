r"""The common descent direction of several clients: the least convex combination.

.. math::
   \min_{a} \Big\| \sum_k a_k \Delta_k \Big\|^2 \;\text{s.t.}\; \sum_k a_k = 1,\;
   l_k \le a_k \le u_k

With bounds 0 and 1, the solution v has :math:`\langle v, \Delta_k\rangle \ge \|v\|^2`
for all k: a step along it lowers every client's loss, unless v = 0, where no direction
does (Désidéri 2012, "Multiple-gradient descent algorithm (MGDA) for multiobjective
optimization", Comptes Rendus Mathematique 350).
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from flower_ext.core.arrays import Lazy, can_move
from flower_ext.core.protocol import Reply, Round
from flower_ext.core.replies import NOT_FINITE, MalformedReply
from flower_ext.core.typing import Floats

Change = Mapping[str, Lazy]

# Of the mean squared length: where no two coordinates can gain more, it is solved.
_TOLERANCE = 1e-13
_STEPS = 20_000


def min_norm(gram: Floats, start: Floats, low: Floats, high: Floats) -> Floats:
    r"""Return the weights of the least combination of vectors, within bounds.

    By pairwise Frank-Wolfe steps with exact line search: weight goes from the vector
    with the largest inner product with the combination to that with the smallest, which
    keeps the sum and the bounds, and converges linearly (Lacoste-Julien and Jaggi 2015,
    "On the global linear convergence of Frank-Wolfe optimization variants", NeurIPS).

    Parameters
    ----------
    gram : ndarray of shape (vectors, vectors)
        Their inner products.
    start : ndarray of shape (vectors,)
        Weights of sum 1 within the bounds.
    low, high : ndarray of shape (vectors,)
        :math:`l \le u`.

    Examples
    --------
    >>> vectors = np.array([[2.0, 0.0], [0.0, 1.0]])
    >>> min_norm(vectors @ vectors.T, np.full(2, 0.5), np.zeros(2), np.ones(2))
    array([0.2, 0.8])
    """
    # Of any scale: lengths of 1e-30 are solved as well as those of 1.
    scale = float(np.trace(gram)) / len(gram)
    if not scale > 0:
        return start
    gram, weights = gram / scale, start.copy()
    products = gram @ weights
    for _ in range(_STEPS):
        up = int(np.argmin(np.where(weights < high, products, np.inf)))
        down = int(np.argmax(np.where(weights > low, products, -np.inf)))
        gain = products[down] - products[up]
        if gain <= _TOLERANCE:
            break
        curvature = gram[up, up] + gram[down, down] - 2 * gram[up, down]
        most = min(high[up] - weights[up], weights[down] - low[down])
        step = most if gain >= most * curvature else gain / curvature
        # On a bound exactly, or the next step would be one of nothing.
        fills, empties = (
            step == high[up] - weights[up],
            step == weights[down] - low[down],
        )
        weights[up] = high[up] if fills else weights[up] + step
        weights[down] = low[down] if empties else weights[down] - step
        products += step * (gram[:, up] - gram[:, down])
    return weights


def descent_weights(gram: Floats, prior: Floats, max_deviation: float = 1.0) -> Floats:
    r"""Return the weights of the least combination, around a prior.

    Parameters
    ----------
    gram : ndarray of shape (vectors, vectors)
        Inner products.
    prior : ndarray of shape (vectors,)
        Weights of sum 1.
    max_deviation : float
        :math:`\epsilon`: no weight is further from its prior. 0 is the prior, 1 is free
        (Hu, Shaloudegi, Zhang and Yu 2022, "Federated learning meets multi-objective
        optimization", equation 7).
    """
    low = np.maximum(prior - max_deviation, 0.0)
    high = np.minimum(prior + max_deviation, 1.0)
    return min_norm(gram, prior, low, high)


def changes_of(replies: Iterable[Reply], round: Round) -> list[tuple[Reply, Change]]:
    """Return the replies of clients that trained, with their changes.

    A client without examples has not moved: its change of 0 would be the least
    combination of all.

    Raises
    ------
    MalformedReply
        If the model cannot be moved by one of them.
    """
    found: list[tuple[Reply, Change]] = []
    for reply in replies:
        if reply.num_examples > 0:
            change = reply.delta(round)
            if not can_move(round.sent, change):
                problem = MalformedReply(NOT_FINITE)
                problem.client = reply.client
                raise problem
            found.append((reply, change))
    return found


def gram_of(changes: Sequence[Change], names: Iterable[str]) -> Floats:
    """Return the inner products of changes, over the arrays of some names."""
    gram = np.zeros((len(changes), len(changes)))
    for name in names:
        rows = _rows(changes, name)
        gram += rows @ rows.T
    return gram


def combination(
    changes: Sequence[Change], weights: Floats, names: Iterable[str]
) -> dict[str, Floats]:
    """Return the weighted sum of changes, in the order of the clients."""
    return {
        name: (weights @ _rows(changes, name)).reshape(changes[0][name].shape)
        for name in names
    }


def _rows(changes: Sequence[Change], name: str) -> Floats:
    """Return an array of all changes, one in each row."""
    rows = [np.asarray(x[name].numpy(), np.float64).reshape(-1) for x in changes]
    return np.stack(rows)
