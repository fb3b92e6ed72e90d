r"""Optimal transport between few clients and few models, with an entropy.

.. math::
   \min_{\Gamma \ge 0} \langle \Gamma, C\rangle + \epsilon \sum_{ij} \Gamma_{ij}
   (\log \Gamma_{ij} - 1) \;\text{s.t.}\; \Gamma 1 = a,\; \Gamma^T 1 = b
"""

import numpy as np

from flower_ext.core.errors import positive, refuse
from flower_ext.core.typing import Floats

# Levels of the entropy, and iterations at all but the last and at the last.
_LEVELS, _FIRST, _LAST = 8, 50, 1000
_ENOUGH = 1e-13


def transport(
    cost: Floats, rows: Floats, columns: Floats, regularization: float
) -> Floats:
    r"""Return the plan :math:`\Gamma`, of the shape of the cost.

    By Sinkhorn's iterations on logarithms, which neither overflow nor vanish however
    small :math:`\epsilon` is (Cuturi 2013, "Sinkhorn distances", NeurIPS; Peyré and
    Cuturi 2019, "Computational optimal transport", section 4.4). Where they have not
    converged, the plan is brought to its marginals by the rounding of Altschuler, Weed
    and Rigollet 2017 (NeurIPS, algorithm 2).

    Parameters
    ----------
    cost : ndarray of shape (n, m)
        Finite, of any sign.
    rows, columns : ndarray of shape (n,) and (m,)
        Marginals a and b: not negative, and of one sum.
    regularization : float
        :math:`\epsilon > 0`, in units of the cost.

    Raises
    ------
    ValueError
        If something in the cost is not finite, or the marginals do not add up.

    Examples
    --------
    >>> plan = transport(1 - np.eye(2), np.ones(2), np.ones(2), 0.01)
    >>> np.round(plan, 6)
    array([[1., 0.],
           [0., 1.]])
    """
    positive("regularization", regularization)
    _require_balanced(cost, rows, columns)
    plan = np.zeros(cost.shape)
    some = np.ix_(rows > 0, columns > 0)
    if plan[some].size:
        plan[some] = _solve(
            cost[some], rows[rows > 0], columns[columns > 0], regularization
        )
    return plan


def _solve(cost: Floats, rows: Floats, columns: Floats, final: float) -> Floats:
    """Return the plan where all marginals are positive."""
    log_rows, log_columns = np.log(rows), np.log(columns)
    # From a large entropy down to that asked for: each begins near its solution.
    levels = np.geomspace(max(float(np.ptp(cost)), final), final, _LEVELS)
    dual = np.zeros(len(columns))
    for epsilon in levels:
        kernel, g = -cost / epsilon, dual / epsilon
        for _ in range(_LAST if epsilon == levels[-1] else _FIRST):
            f = log_rows - _log_sum(kernel + g, 1)
            new = log_columns - _log_sum(kernel + f[:, None], 0)
            moved, g = float(np.max(np.abs(new - g))), new
            if moved < _ENOUGH:
                break
        dual = g * epsilon
    return _rounded(np.exp(kernel + f[:, None] + g), rows, columns)


def _log_sum(x: Floats, axis: int) -> Floats:
    """Return the logarithm of sums of exponentials, none of which overflows."""
    top = x.max(axis)
    return np.asarray(
        top + np.log(np.exp(x - np.expand_dims(top, axis)).sum(axis)), np.float64
    )


def _require_balanced(cost: Floats, rows: Floats, columns: Floats) -> None:
    if not np.all(np.isfinite(cost)):
        refuse("cost", cost.tolist(), "finite", "a model that diverged")
    for name, marginal, size in zip(
        ("rows", "columns"), (rows, columns), cost.shape, strict=True
    ):
        ok = marginal.shape == (size,) and np.all(np.isfinite(marginal))
        if not ok or np.any(marginal < 0):
            refuse(name, marginal.tolist(), f"{size} finite numbers >= 0")
    left, right = float(rows.sum()), float(columns.sum())
    if not left > 0 or abs(left - right) > 1e-9 * left:
        refuse("columns", columns.tolist(), f"of the sum of the rows, {left:g} > 0")


def _rounded(plan: Floats, rows: Floats, columns: Floats) -> Floats:
    """Return the plan with its marginals as exact as they can be."""
    plan = plan * np.minimum(1.0, rows / plan.sum(1))[:, None]
    plan = plan * np.minimum(1.0, columns / plan.sum(0))
    left, right = rows - plan.sum(1), columns - plan.sum(0)
    lacking = float(np.abs(left).sum())
    return plan if lacking == 0 else plan + np.outer(left, right) / lacking
