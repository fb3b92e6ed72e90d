r"""Saddle points: duals, weights on the simplex, and how far a run is from one.

For :math:`\min_w \max_{\lambda \ge 0, \|\lambda\|_1 \le B} F(w) + \sum_a \lambda_a
(L_a(w) - \zeta_a)`, where clients descend in :math:`w` and the server ascends in
:math:`\lambda` (Agarwal, Beygelzimer, Dudik, Langford and Wallach 2018, "A Reductions
Approach to Fair Classification", ICML).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import at_least, positive, refuse
from flower_ext.core.protocol import Metrics
from flower_ext.core.schedules import Scheduled, value_in
from flower_ext.core.typing import Floats

# Of one step of theta, and of theta above the slack and below: whatever the losses
# were, a dual comes back within some tens of steps.
_STEP, _HIGH, _LOW = 5.0, 10.0, -40.0
# Steps of weights on the simplex, whose projection does not change further out.
_FAR = 1e100


def dual_weights(theta: Floats, dual_bound: float) -> Floats:
    r"""Return :math:`\lambda_a = B e^{\theta_a} / (1 + \sum_b e^{\theta_b})`.

    The 1 is the slack: all :math:`\lambda \ge 0` and their sum stays below :math:`B`
    (and reaches it where a large :math:`\theta` rounds the slack away).

    Examples
    --------
    >>> dual_weights(np.zeros(3), dual_bound=2.0)
    array([0.5, 0.5, 0.5])
    """
    top = max(0.0, float(np.max(theta, initial=0.0)))
    scaled = np.exp(theta - top)
    return np.asarray(dual_bound * scaled / (np.exp(-top) + scaled.sum()))


def dual_step(theta: Floats, step: Floats) -> Floats:
    r"""Return :math:`\theta` after an exponentiated gradient step, kept in bounds.

    A step of more than 5 counts as 5: the theory wants steps below 1, and one absurd
    loss must not decide all that follows. Where the largest :math:`\theta` would exceed
    10 all are lowered alike, which changes no ratio of two duals, and their sum by less
    than :math:`e^{-10}`; none falls below -40.

    Examples
    --------
    >>> dual_step(np.zeros(2), np.array([0.5, 1e300]))
    array([0.5, 5. ])
    >>> dual_step(np.array([9.0, 4.0]), np.array([3.0, 0.0]))
    array([10.,  2.])
    """
    theta = theta + np.clip(step, -_STEP, _STEP)
    return np.maximum(theta - max(0.0, float(theta.max()) - _HIGH), _LOW)


class Dual:
    r"""The dual variables :math:`\lambda` of a run, by exponentiated gradient.

    Parameters
    ----------
    size : int
        Number of constraints.
    bound : float
        :math:`B \ge 0`, bounds their sum.
    learning_rate : float or callable
        :math:`\eta_\theta > 0`, of each round, see :func:`dual_step`.
    """

    def __init__(self, size: int, bound: float, learning_rate: Scheduled) -> None:
        self.bound = at_least("dual_bound", bound, 0)
        self.learning_rate = learning_rate
        self.rate_in(1)
        self.theta = np.zeros(size)

    @property
    def weights(self) -> Floats:
        r"""The current :math:`\lambda`."""
        return dual_weights(self.theta, self.bound)

    def rate_in(self, server_round: int) -> float:
        """Return the learning rate of a round; a schedule may come down to 0."""
        if not callable(self.learning_rate):
            return positive("dual_learning_rate", self.learning_rate)
        name = f"dual_learning_rate({server_round})"
        return at_least(name, value_in(self.learning_rate, server_round), 0)

    def __str__(self) -> str:
        """Name the settings, for ``summary()``."""
        rate = self.learning_rate
        shown = repr(rate) if callable(rate) else f"{rate:g}"
        return f"bound {self.bound:g}, rate {shown}"

    def step(self, excess: Floats, server_round: int) -> None:
        r"""Ascend along :math:`L - \zeta`; what is NaN was not measured and stays."""
        rate = self.rate_in(server_round)
        self.theta = dual_step(self.theta, rate * np.nan_to_num(excess))

    def state_dict(self) -> dict[str, object]:
        r"""Return :math:`\theta`."""
        return {"theta": self.theta}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self.theta = np.array(state["theta"])


def project_to_simplex(point: Floats) -> Floats:
    r"""Return the nearest point with no coordinate below 0 and a sum of 1.

    It is :math:`\max(x - \tau, 0)` with the one :math:`\tau` for which that sums to 1,
    found from the sorted coordinates (Duchi, Shalev-Shwartz, Singer and Chandra 2008,
    "Efficient projections onto the l1-ball", ICML, figure 1).

    Examples
    --------
    >>> project_to_simplex(np.array([0.5, 0.5, 0.3, -9.0]))
    array([0.4, 0.4, 0.2, 0. ])
    """
    # All moved alike have the same projection; below the largest by 1 they are 0.
    point = np.maximum(point - point.max(), -2.0)
    falling = np.sort(point)[::-1]
    excess = np.cumsum(falling) - 1
    kept = np.flatnonzero(falling * np.arange(1, len(point) + 1) > excess)[-1]
    found = np.maximum(point - excess[kept] / (kept + 1), 0.0)
    return np.asarray(found / found.sum())


class SimplexWeights:
    r"""Weights that add up to 1, by projected gradient ascent on losses.

    They begin equal; what comes later begins with the mean of the weights.

    Parameters
    ----------
    name : str
        What the learning rate is called where it is refused.
    learning_rate : float
        :math:`\gamma \ge 0`.
    """

    def __init__(self, name: str, learning_rate: float) -> None:
        self.learning_rate = at_least(name, learning_rate, 0)
        self.weights: Floats = np.zeros(0)
        self.losses: Floats = np.zeros(0)

    def of(self, size: int) -> Floats:
        """Return the weights of so many."""
        old = len(self.weights)
        if size <= old:
            return self.weights[:size]
        new = np.full(size - old, 1 / size)
        return np.concatenate([self.weights * (old / size), new])

    def step(self, losses: Floats) -> None:
        r"""Take :math:`\lambda \leftarrow \mathrm{Proj}(\lambda + \gamma F)`.

        Where a loss is NaN, the last known one counts, or else the mean of the others.
        """
        known = np.full(losses.shape, np.nan)
        known[: len(self.losses)] = self.losses[: len(known)]
        self.losses = np.where(np.isnan(losses), known, losses)
        if np.isnan(self.losses).all():
            return
        filled = np.where(np.isnan(self.losses), np.nanmean(self.losses), self.losses)
        rise = np.clip(self.learning_rate * filled, -_FAR, _FAR)
        self.weights = project_to_simplex(self.of(len(losses)) + rise)

    def state_dict(self) -> dict[str, object]:
        """Return weights and losses."""
        return {"weights": self.weights, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self.weights = np.array(state["weights"])
        self.losses = np.array(state["losses"])


@dataclass
class DualityGap:
    r"""How far the average model may be from the optimum, for convex losses.

    With :math:`\mathcal L(w, \lambda) = F(w) + \sum_a\lambda_a(L_a(w) - \zeta_a)`, the
    :math:`T` models :math:`w_t` so far, duals :math:`\lambda_t` and gradients
    :math:`g_t = \nabla_w \mathcal L(w_t, \lambda_t)`, convexity gives, over all
    models of norm :math:`\le R`,

    .. math::
       \max_{\|\lambda\|_1 \le B} \mathcal L(\bar w, \lambda) \le
       \bar F + B \max(0, \max_a \bar L_a - \zeta_a), \qquad
       \min_w \mathcal L(w, \bar\lambda) \ge
       \tfrac 1T \sum_t (\mathcal L(w_t, \lambda_t) - \langle g_t, w_t\rangle)
       - R \|\bar g\|,

    the primal and the dual value (bars are means over the rounds). By weak duality the
    optimum under the bounds lies above the latter (Agarwal et al. 2018, Section 3,
    whose best response we bound instead of computing it). It certifies what clients
    report: losses, counts and gradients of all, none cut off at a bound of its own.
    """

    radius: float
    rounds: int = 0
    overall: float = 0.0
    excess: Floats = field(default_factory=lambda: np.zeros(0))
    constant: float = 0.0
    gradient: dict[str, Floats] = field(default_factory=dict)

    def after(
        self,
        overall: float,
        excess: Floats,
        dual: Floats,
        gradient: Mapping[str, Floats],
        model: Arrays,
    ) -> "DualityGap":
        r"""Return that after another :math:`F, L - \zeta, \lambda, g, w`."""
        slope = sum(
            float(np.vdot(array, model[name].astype(np.float64)))
            for name, array in gradient.items()
        )
        return DualityGap(
            self.radius,
            self.rounds + 1,
            self.overall + overall,
            excess + (self.excess if self.excess.size else 0.0),
            self.constant + overall + float(dual @ excess) - slope,
            {k: g + self.gradient.get(k, 0.0) for k, g in gradient.items()},
        )

    def values(self, dual_bound: float) -> tuple[float, float]:
        """Return the primal and the dual value."""
        squares = sum(float(np.vdot(g, g)) for g in self.gradient.values())
        worst = max(0.0, float(np.max(self.excess)))
        primal = self.overall + dual_bound * worst
        dual = self.constant - self.radius * math.sqrt(squares)
        return primal / self.rounds, dual / self.rounds

    def metrics(self, dual_bound: float) -> Metrics:
        """Return both values and the gap between them."""
        primal, dual = self.values(dual_bound)
        return {
            "primal-value": primal,
            "dual-value": dual,
            "duality-gap": primal - dual,
        }

    def state_dict(self) -> dict[str, object]:
        """Return all but the radius, which is a setting."""
        state = {k: x for k, x in vars(self).items() if k != "radius"}
        return {**state, "gradient": dict(self.gradient)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        vars(self).update({**state, "excess": np.array(state["excess"])})


def certificate(radius: float | None, *, noised: bool) -> DualityGap | None:
    """Return the duality gap before the first round, or None without a radius."""
    if radius is None:
        return None
    positive("certificate_radius", radius)
    if noised:
        cause = "what is noised certifies nothing"
        refuse("certificate_radius", radius, "left out", cause)
    return DualityGap(radius)
