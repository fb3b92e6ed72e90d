r"""Banded inverse square root: noise that is a short moving average.

Where :class:`~flower_ext.privacy.BandedToeplitz` has few diagonals in C, here C^-1 has
few: with z_t fresh in every round, the noise of round t is

.. math:: \hat z_t = \sum_{j<p} r_j z_{t-j}, \qquad
   r_0 = 1, \quad r_j = r_{j-1} (j - 3/2) / j,

the first p coefficients of :math:`(1 - x)^{1/2}`, the inverse of the square root of the
prefix sums (Kalinin, McKenna, Upadhyay and Lampert 2025, "Back to Square Roots: An
Optimal Bound on the Matrix Factorization Error for Multi-Epoch Differentially Private
SGD", arXiv:2505.12128). C itself, :math:`c = 1 / r(x)`, has all diagonals, so that the
participations of a client add up.
"""

from typing import Self

import numpy as np

from flower_ext.core.errors import one_of, refuse, whole
from flower_ext.core.typing import AnyFloats, Floats
from flower_ext.privacy.factorizations.participation import effective_participations
from flower_ext.privacy.factorizations.recurrences import Recurrence
from flower_ext.privacy.factorizations.toeplitz import ToeplitzFactorization
from flower_ext.privacy.factorizations.workload import (
    PREFIX_SUMS,
    Workload,
    require_steady,
)

_SHARES = np.linspace(0, 1, 21)


class BISR(ToeplitzFactorization):
    r"""Banded inverse square root, or another C^-1 of few bands.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    bands : int
        p, from 1 to ``rounds``; memory is ``bands - 1`` models. 1 is independent noise,
        ``rounds`` is :class:`~flower_ext.privacy.SquareRootToeplitz`.
    taps : NDArray, optional
        :math:`r_1, \dots, r_{p-1}` in the place of the square root's, none above 0 and
        of a sum of at least -1; see :meth:`optimize`.

    Notes
    -----
    With the square root's taps the coefficients of C never rise: they are those of the
    square root up to p, and then each is :math:`\sum_j -r_j c_{t-j}`, whose difference
    to the one before is the same sum of differences. So the sensitivity is exact for
    any number of participations; for other taps it is where they do not rise either.

    Examples
    --------
    >>> BISR(4, bands=3).decoder_matrix()[-1]
    array([0.375, 0.375, 0.5  , 1.   ])
    """

    def __init__(self, rounds: int, bands: int, taps: Floats | None = None) -> None:
        super().__init__(rounds)
        whole("bands", bands, 1)
        if bands > rounds:
            refuse("bands", bands, f"<= rounds={rounds}", "a run has no longer memory")
        if taps is None:
            index = np.arange(1, bands)
            own = np.cumprod((index - 1.5) / index)
        else:
            own = np.array(taps, dtype=np.float64)
        self._is_root = taps is None
        if own.shape != (bands - 1,) or not np.all(np.isfinite(own)):
            refuse("taps", own, f"bands - 1 = {bands - 1} finite numbers")
        if np.any(own > 0) or own.sum() < -1 - 1e-12:
            cause = "else coefficients of C change sign, or grow"
            refuse("taps", own, "at most 0, with a sum of at least -1", cause)
        self._taps = np.concatenate([[1.0], own])
        self._taps.setflags(write=False)
        from scipy.signal import lfilter  # type: ignore[import-untyped]

        impulse = np.zeros(self.rounds)
        impulse[0] = 1.0
        self._column = np.asarray(lfilter([1.0], self._taps, impulse))
        self._column.setflags(write=False)

    @classmethod
    def optimize(
        cls,
        rounds: int,
        bands: int,
        min_separation: int = 1,
        max_participations: int = 1,
        *,
        objective: str = "rms",
        workload: Workload = PREFIX_SUMS,
    ) -> Self:
        r"""Minimise sensitivity times the root-mean-square or the largest error.

        Over the taps, from those of the square root on, by L-BFGS with the exact
        gradient: of :math:`\|s\|^2` for the sum s of columns 0, b, 2b, ... of C it is
        :math:`\partial s / \partial r_j = -x^j s / r(x)`. The result is never worse
        than the square root's taps, or independent noise.

        Parameters
        ----------
        rounds, bands : int
            Size of the problem.
        min_separation, max_participations : int
            b and k, see :meth:`sensitivity`.
        objective : str
            ``"rms"`` or ``"max"``.
        workload : Workload
            What the error is of, prefix sums unless given; with momentum, at a constant
            learning rate. Never worse for it than the taps for prefix sums.
        """
        one_of("objective", objective, ("rms", "max"))
        require_steady(workload, rounds, "BISR")
        root = cls(rounds, bands)
        if bands == 1:
            return root
        problem = (min_separation, max_participations)
        known = [root]
        if not workload.is_prefix_sum(rounds):
            known.append(cls.optimize(rounds, bands, *problem, objective=objective))
        best = _best_taps(root, *problem, objective, workload)

        def loss(candidate: Self) -> float:
            error = candidate.rms_loss if objective == "rms" else candidate.max_loss
            return error(*problem, workload)

        # Where coefficients of C rise, the sensitivity is a bound, and taps on the way
        # to ones with which they do not may have less.
        safe = (root.inverse_coefficients()[1:bands], np.zeros(bands - 1))
        tried = (cls(rounds, bands, x + t * (best - x)) for x in safe for t in _SHARES)
        return min(*known, *tried, key=loss)

    @property
    def bands(self) -> int:
        """Number of non-zero diagonals of C^-1."""
        return len(self._taps)

    @property
    def name(self) -> str:
        """Name shown in tables."""
        return f"BISR({self.bands})" if self._is_root else f"BandInv({self.bands})"

    @property
    def coefficients(self) -> Floats:
        """First column of C, shape ``(rounds,)`` (read-only)."""
        return self._column

    def inverse_coefficients(self) -> Floats:
        """Return the first column of C^-1, shape ``(rounds,)``."""
        return np.pad(self._taps, (0, self.rounds - self.bands))

    def decoder_coefficients(self) -> Floats:
        """Return the first column of B, shape ``(rounds,)``."""
        return np.asarray(np.cumsum(self.inverse_coefficients()))

    def first(self, rounds: int) -> Self:
        """Return the same taps for fewer rounds."""
        rounds = self._check_first(rounds)
        bands = min(self.bands, rounds)
        return type(self)(rounds, bands, None if self._is_root else self._taps[1:bands])

    def recurrence(self) -> Recurrence:
        """Return the moving average."""
        return MovingAverage(self._taps)

    def _parameters(self) -> tuple[Floats, ...]:
        return (self._taps,)


class MovingAverage(Recurrence):
    """A weighted sum of the fresh noise of this round and of those before.

    Parameters
    ----------
    taps : NDArray
        r_0, r_1, ...: the weights of this round, the one before, and so on.
    """

    def __init__(self, taps: Floats) -> None:
        super().__init__(len(taps) - 1)
        self._taps = [float(tap) for tap in taps]

    def advance(self, step: int, fresh: Floats, state: AnyFloats) -> AnyFloats:
        """Add up; a ring buffer holds the fresh noise of past rounds."""
        new: Floats = fresh[0]
        out: Floats = self._taps[0] * new
        product = np.empty_like(out)
        for lag in range(1, min(step, self.buffers) + 1):
            # In float64, whatever the buffers are kept in.
            old = state[(step - lag) % self.buffers]
            np.multiply(old, self._taps[lag], out=product, dtype=np.float64)
            out += product
        if self.buffers:
            state[step % self.buffers] = new
        return out


def _best_taps(
    root: BISR,
    min_separation: int,
    max_participations: int,
    objective: str,
    workload: Workload,
) -> Floats:
    """Return r_1, ..., r_{p-1} of least loss, see :meth:`BISR.optimize`."""
    from scipy.optimize import minimize  # type: ignore[import-untyped]
    from scipy.signal import lfilter

    rounds, bands = root.rounds, root.bands
    count = effective_participations(rounds, min_separation, max_participations)
    weights = np.ones(rounds)
    if objective == "rms":
        weights -= np.arange(rounds) / rounds
    comb = np.zeros(rounds)
    comb[np.arange(count) * min_separation] = 1.0

    def loss(tail: Floats) -> tuple[float, Floats]:
        taps = np.concatenate([[1.0], tail])
        with np.errstate(over="ignore", invalid="ignore"):
            columns = lfilter([1.0], taps, comb)
            energy = float(columns @ columns)
            if not energy < 1e150:  # let the line search back off
                return 1e3, np.zeros_like(tail)
            smooth = lfilter([1.0], taps, columns)
        decoder = workload.models(np.pad(taps, (0, rounds - bands)))
        error = float(weights @ decoder**2)
        # sum over j >= k of w_j A_{j-k} B_j, for every k
        after = workload.models((weights * decoder)[::-1])[::-1]
        lags = np.array([columns[k:] @ smooth[: rounds - k] for k in range(1, bands)])
        gradient = -2 * lags / energy + 2 * after[1:bands] / error
        return float(np.log(energy) + np.log(error)), gradient

    found = minimize(
        loss,
        root.inverse_coefficients()[1:bands],
        jac=True,
        method="L-BFGS-B",
        bounds=[(-1.0, 0.0)] * (bands - 1),
        options={"maxiter": 2000, "ftol": 1e-14, "gtol": 1e-9},
    )
    taps: Floats = np.minimum(found.x, 0.0)
    return taps if taps.sum() >= -1 else taps / -taps.sum()
