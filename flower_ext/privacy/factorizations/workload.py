r"""What the server makes of the noisy sums: the matrix that noise is chosen for.

With :math:`x_t` what is added in round t (the noisy mean of the clients' changes), SGD
with momentum :math:`\mu` and learning rates :math:`\eta_t` moves the model by

.. math:: m_t = \mu m_{t-1} + x_t, \qquad w_t = w_{t-1} + \eta_t m_t,

so that the model after round t is :math:`w_0 + (A x)_t` with

.. math:: A_{tj} = \sum_{i=j}^{t} \eta_i \mu^{i-j}.

Without momentum and with constant rates A is the matrix of prefix sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flower_ext.core.errors import fraction, positive, refuse, yes_or_no
from flower_ext.core.schedules import Scheduled, value_in
from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.recurrences import Recurrence


@dataclass(frozen=True)
class Workload:
    r"""The server's SGD: momentum, and learning rates that may change with the rounds.

    It is public, and says which errors count: the noise in the model after each round.
    What a client may learn does not depend on it.

    Parameters
    ----------
    momentum : float (default: 0.0)
        :math:`\mu` in [0, 1]; 0 leaves prefix sums.
    nesterov : bool (default: False)
        The step is :math:`\eta_t (x_t + \mu m_t)` instead of :math:`\eta_t m_t`.
    learning_rates : float, callable or sequence (default: 1.0)
        A number, a schedule of :mod:`flower_ext.core.schedules` (rounds from 1), or
        one number for each planned round; none below 0. Only their ratios count: all
        are divided by the largest, so that errors are in units of it.

    References
    ----------
    Denisov et al. 2022, arXiv 2202.08312, Section 4 and Choquette-Choo et al. 2023,
    arXiv 2211.06530 (momentum and learning-rate cooldown as a workload).

    Examples
    --------
    >>> Workload(momentum=0.5).matrix(3)
    array([[1.  , 0.  , 0.  ],
           [1.5 , 1.  , 0.  ],
           [1.75, 1.5 , 1.  ]])
    >>> Workload(learning_rates=[1.0, 0.5]).matrix(2)
    array([[1. , 0. ],
           [1. , 0.5]])
    """

    momentum: float = 0.0
    nesterov: bool = False
    learning_rates: Scheduled | Sequence[float] = 1.0

    def __post_init__(self) -> None:
        fraction("momentum", self.momentum)
        yes_or_no("nesterov", self.nesterov)
        rates = self.learning_rates
        if isinstance(rates, int | float):
            positive("learning_rates", rates)
        elif not callable(rates):
            # A tuple of them, so that nobody changes what a noise was chosen for.
            object.__setattr__(self, "learning_rates", tuple(rates))

    def over(self, rounds: int) -> "Workload":
        """Return the same with its learning rates written out, so that it is hashable.

        Raises
        ------
        ValueError
            If there is not one learning rate >= 0 for each round, one of them above 0.
        """
        if self.learning_rates == 1.0:
            return self
        rates = self.rates(rounds)
        is_constant = bool(np.all(rates == 1.0))
        return replace(self, learning_rates=1.0 if is_constant else tuple(rates))

    def rates(self, rounds: int) -> Floats:
        """Return the learning rate of each round over the largest of them."""
        given = self.learning_rates
        if isinstance(given, Sequence):
            if len(given) != rounds:
                cause = "one for each planned round"
                refuse("len(learning_rates)", len(given), f"rounds={rounds}", cause)
            values = [float(value) for value in given]
        else:
            values = [float(value_in(given, t + 1)) for t in range(rounds)]
        rates = np.array(values)
        if not np.all(np.isfinite(rates) & (rates >= 0)) or not np.any(rates > 0):
            worst = rates[~(np.isfinite(rates) & (rates > 0))][0]
            cause = "and not all of them 0: a model that does not move has no noise"
            refuse("learning_rates", float(worst), "finite numbers >= 0", cause)
        return np.asarray(rates / rates.max())

    def is_steady(self, rounds: int) -> bool:
        """Return whether learning rates are constant: A is then a Toeplitz matrix."""
        return self.learning_rates == 1.0 or bool(np.all(self.rates(rounds) == 1.0))

    def is_prefix_sum(self, rounds: int) -> bool:
        """Return whether A is the matrix of prefix sums."""
        return self.momentum == 0 and self.is_steady(rounds)

    def steady(self) -> "Workload":
        """Return the same at a constant learning rate."""
        return replace(self, learning_rates=1.0)

    def velocities(self, added: Floats) -> Floats:
        """Return m_t of what is added in the rounds, along the first axis."""
        if self.momentum == 0:
            return added
        from scipy.signal import lfilter  # type: ignore[import-untyped]

        return np.asarray(lfilter([1.0], [1.0, -self.momentum], added, axis=0))

    def steps(self, added: Floats) -> Floats:
        """Return each round's step over its learning rate, along the first axis."""
        return self._step(added, self.velocities(added))

    def _step(self, added: Floats, velocity: Floats) -> Floats:
        return added + self.momentum * velocity if self.nesterov else velocity

    def models(self, added: Floats) -> Floats:
        """Return A times what is added in the rounds, along the first axis."""
        rates = self.rates(len(added)).reshape(-1, *[1] * (added.ndim - 1))
        return np.asarray(np.cumsum(rates * self.steps(added), axis=0))

    def matrix(self, rounds: int) -> Floats:
        """Return A, shape ``(rounds, rounds)``; for small ``rounds``."""
        return self.models(np.eye(rounds))

    def column(self, rounds: int) -> Floats:
        """Return the first column of A, shape ``(rounds,)``."""
        impulse = np.zeros(rounds)
        impulse[0] = 1.0
        return self.models(impulse)

    def toeplitz_errors(
        self, inverse: Floats, scales: Floats | None = None, start: int = 0
    ) -> Floats:
        """Return the squared norms of the rows of A diag(scales) R, in O(rounds^2).

        Parameters
        ----------
        inverse : NDArray
            First column of the lower-triangular Toeplitz matrix R, shape ``(rounds,)``.
        scales : NDArray, optional
            Of its rows, ones unless given; the same up to row ``start``.
        start : int
            The rows before are not computed row by row, and not returned.
        """
        rounds = len(inverse)
        scales = np.ones(rounds) if scales is None else scales
        rates = self.rates(rounds)
        velocity, model = np.zeros(rounds), np.zeros(rounds)
        if start:
            velocity[:start] = scales[0] * self.velocities(inverse)[start - 1 :: -1]
            model[:start] = scales[0] * self.models(inverse)[start - 1 :: -1]
        errors = np.empty(rounds - start)
        for t in range(start, rounds):
            added = scales[t] * inverse[t::-1]
            past = velocity[: t + 1]
            past *= self.momentum
            past += added
            model[: t + 1] += rates[t] * self._step(added, past)
            errors[t - start] = model[: t + 1] @ model[: t + 1]
        return errors

    def streamed_errors(self, noise: Recurrence, rounds: int) -> Floats:
        """Return the variance in the model after each round, of any noise that streams.

        What the noise keeps, the velocity and the model are linear in what was drawn.
        Their covariance goes from round to round; a round costs O(buffers^3).
        """
        rates, kept = self.rates(rounds), noise.buffers
        covariance = np.zeros((kept + 2, kept + 2))
        errors = np.empty(rounds)
        for t in range(rounds):
            draws = noise.draws(t)
            # Every column is a unit of what is kept, of velocity and model, or drawn.
            units = np.eye(kept + 2 + draws)
            buffers, fresh = units[:kept].copy(), units[kept + 2 :].copy()
            added = np.asarray(noise.advance(t, fresh, buffers), np.float64)
            velocity = self.momentum * units[kept] + added
            model = units[kept + 1] + rates[t] * self._step(added, velocity)
            change = np.vstack([buffers, velocity, model])
            old, new = change[:, : kept + 2], change[:, kept + 2 :]
            covariance = old @ covariance @ old.T + new @ new.T
            errors[t] = covariance[-1, -1]
        return errors


PREFIX_SUMS = Workload()


def require_steady(workload: Workload, rounds: int, name: str) -> None:
    """Refuse to tune what is only known how to tune at a constant learning rate.

    Raises
    ------
    ValueError
        If learning rates change.
    """
    if not workload.is_steady(rounds):
        refuse(
            "workload",
            workload,
            "one with a constant learning rate",
            f"{name} is tuned for its steady() form; only dense matrices and "
            "BandedToeplitz are tuned for learning rates that change",
        )
