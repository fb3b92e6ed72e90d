r"""Toeplitz factorizations: C[i, j] = c_{i-j}, so that a run is one filter.

| c0             |         C(x) = c_0 + c_1 x + c_2 x^2 + ...
C = | c1 c0          |         B(x) = 1 / ((1 - x) C(x))
| c2 c1 c0       |         err_i = sum_{j<=i} B_j^2
|  0 c2 c1 c0    |  (3 bands)
"""

from typing import Self

import numpy as np
from numpy.typing import NDArray

from flower_ext.privacy._checks import one_of, positive_int
from flower_ext.privacy.factorizations import Factorization
from flower_ext.privacy.participation import (
    Sensitivity,
    effective_participations,
    gram_sensitivity,
    heaviest_pattern,
)
from flower_ext.privacy.recurrences import HistoryRecurrence, Recurrence

Floats = NDArray[np.float64]


def toeplitz_matrix(coefficients: Floats, rounds: int) -> Floats:
    """Return the lower-triangular Toeplitz matrix of the first column given."""
    column = np.zeros(rounds)
    column[: min(rounds, len(coefficients))] = coefficients[:rounds]
    lag = np.subtract.outer(np.arange(rounds), np.arange(rounds))
    return np.where(lag >= 0, column[np.maximum(lag, 0)], 0.0)


def toeplitz_sensitivity(
    coefficients: Floats, rounds: int, min_separation: int, max_participations: int
) -> Sensitivity:
    """Sensitivity of a lower-triangular Toeplitz matrix, in O(n k).

    For c_0 >= c_1 >= ... >= 0 the worst pattern is {0, b, 2b, ...} (Kalinin and
    Lampert, arXiv 2405.13763, Theorem 2); so it is when columns that one client may
    touch do not overlap (bands <= b). Else the non-increasing envelope
    max_{l >= j} |c_l| of the coefficients gives an upper bound.
    """
    count = effective_participations(rounds, min_separation, max_participations)
    column = np.asarray(coefficients[:rounds], dtype=np.float64)
    if count == 1 or len(column) <= min_separation:
        how = "largest column norm" if count == 1 else "orthogonal columns (bands <= b)"
        starts = np.arange(count) * min_separation
        energy = np.cumsum(column**2)
        heights = np.minimum(rounds - starts, len(column))
        return Sensitivity(float(np.sqrt(energy[heights - 1].sum())), True, how)
    exact = bool(column[-1] >= 0 and np.all(np.diff(column) <= 0))
    if not exact:
        column = np.maximum.accumulate(np.abs(column)[::-1])[::-1]
    total = np.zeros(rounds)
    for start in range(0, count * min_separation, min_separation):
        stop = min(rounds, start + len(column))
        total[start:stop] += column[: stop - start]
    return Sensitivity(
        float(np.sqrt(total @ total)),
        exact,
        "non-increasing Toeplitz: pattern 0, b, 2b, ..."
        if exact
        else "upper bound: non-increasing envelope of the coefficients",
    )


class Toeplitz(Factorization):
    """Base of the Toeplitz factorizations.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    coefficients : NDArray
        First column of C, at most ``rounds`` numbers; the rest is zero.
    """

    def __init__(self, rounds: int, coefficients: Floats) -> None:
        super().__init__(rounds)
        column = np.array(coefficients, dtype=np.float64)
        if column.ndim != 1 or not 1 <= len(column) <= self.rounds:
            raise ValueError(
                f"coefficients.shape={column.shape} must be 1 to rounds={rounds} "
                "numbers: more bands than rounds"
            )
        if not np.all(np.isfinite(column)) or not column[0] > 0:
            raise ValueError(
                f"coefficients[0]={column[0]} must be > 0 and all finite: C must be "
                "invertible"
            )
        column.setflags(write=False)
        self._column = column

    @property
    def name(self) -> str:
        """Name shown in tables."""
        return f"Toeplitz({len(self._column)} bands)"

    @property
    def coefficients(self) -> Floats:
        """First column of C without trailing zeros (read-only)."""
        return self._column

    def decoder_coefficients(self) -> Floats:
        """Return the first column of B, shape ``(rounds,)``."""
        from scipy.signal import lfilter  # type: ignore[import-untyped]

        return np.asarray(lfilter([1.0], self._column, np.ones(self.rounds)))

    def sensitivity(
        self, min_separation: int, max_participations: int
    ) -> Sensitivity:
        """Return the sensitivity, see `toeplitz_sensitivity`."""
        return toeplitz_sensitivity(
            self._column, self.rounds, min_separation, max_participations
        )

    def row_errors(self) -> Floats:
        """Return the running sums of the squared coefficients of B."""
        return np.asarray(np.cumsum(self.decoder_coefficients() ** 2))

    def strategy_matrix(self) -> Floats:
        """Return C."""
        return toeplitz_matrix(self._column, self.rounds)

    def decoder_matrix(self) -> Floats:
        """Return B."""
        return toeplitz_matrix(self.decoder_coefficients(), self.rounds)

    def first(self, rounds: int) -> Factorization:
        """Return the leading rows: a Toeplitz matrix of the same coefficients."""
        rounds = self._check_first(rounds)
        return Toeplitz(rounds, self._column[:rounds])

    def recurrence(self) -> Recurrence:
        """Return forward substitution over the bands."""
        return HistoryRecurrence(len(self._column) - 1, lambda step: self._column)

    def _parameters(self) -> tuple[Floats, ...]:
        return (self._column,)


class SquareRootToeplitz(Toeplitz):
    """The square root of A: C = B, with c_j = c_{j-1} (2j - 1) / (2j).

    Lowest max loss among Toeplitz factorizations for a single participation, about
    1 + ln(n) / pi, but the noise needs all past rounds.

    References
    ----------
    Fichtenberger, Henzinger, Upadhyay 2022; Dvijotham et al. 2024.
    """

    def __init__(self, rounds: int) -> None:
        index = np.arange(1, positive_int("rounds", rounds))
        ratio = (2 * index - 1) / (2 * index)
        super().__init__(rounds, np.concatenate([[1.0], np.cumprod(ratio)]))

    @property
    def name(self) -> str:
        """Name shown in tables."""
        return "square root"

    def decoder_coefficients(self) -> Floats:
        """Return the coefficients of C: both factors are the same."""
        return self._column

    def first(self, rounds: int) -> Self:
        """Return the square root for fewer rounds."""
        return type(self)(self._check_first(rounds))


class BandedToeplitz(Toeplitz):
    """A few bands only; with ``bands <= min_separation`` participations do not add up.

    sensitivity = sqrt(k) ||c|| then, so that the best coefficients do not depend on k.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    coefficients : NDArray
        c_0, ..., c_{bands-1}.
    normalize_columns : bool
        Divide column j of C by its norm, so that the last columns, which the end of
        the run cuts, use the sensitivity they are allowed. The sensitivity with
        ``bands <= min_separation`` stays, the error falls.

    References
    ----------
    Choquette-Choo et al., "(Amplified) Banded Matrix Factorization", arXiv 2306.08153
    (column normalisation: Algorithm 9).
    """

    def __init__(
        self, rounds: int, coefficients: Floats, *, normalize_columns: bool = False
    ) -> None:
        super().__init__(rounds, coefficients)
        self.normalize_columns = normalize_columns
        self._norms = np.ones(self.rounds)
        if normalize_columns:
            energy = np.cumsum(self._column**2)
            height = np.minimum(self.rounds - np.arange(self.rounds), self.bands)
            self._norms = np.sqrt(energy[height - 1])

    @classmethod
    def optimize(
        cls,
        rounds: int,
        bands: int,
        *,
        objective: str = "rms",
        normalize_columns: bool = False,
    ) -> "BandedToeplitz":
        """Minimise ||c||^2 times the max or mean error over the coefficients.

        Parameters
        ----------
        rounds, bands : int
            1 band is independent noise; memory is ``bands - 1`` models.
        objective : str
            ``"rms"`` or ``"max"``.
        normalize_columns : bool
            See the class; the coefficients are optimised without it.
        """
        column = optimize_bands(rounds, bands, objective=objective)
        return cls(rounds, column, normalize_columns=normalize_columns)

    @property
    def bands(self) -> int:
        """Number of non-zero diagonals of C."""
        return len(self._column)

    @property
    def name(self) -> str:
        """Name shown in tables."""
        suffix = ", columns normalised" if self.normalize_columns else ""
        return f"banded({self.bands}{suffix})"

    def sensitivity(
        self, min_separation: int, max_participations: int
    ) -> Sensitivity:
        """Return the sensitivity; with normalised columns and more bands a bound."""
        if not self.normalize_columns:
            return super().sensitivity(min_separation, max_participations)
        return _scaled_sensitivity(
            self._column, self._norms, min_separation, max_participations
        )

    def row_errors(self) -> Floats:
        """Return the errors; normalised columns change the last ``bands - 1``."""
        errors = super().row_errors()
        if not self.normalize_columns:
            return errors
        # B = A diag(norms) C^-1: add up the rows of C^-1 that have another norm.
        full = float(self._norms[0])
        inverse = np.diff(self.decoder_coefficients(), prepend=0.0)
        errors *= full**2
        start = max(0, self.rounds - self.bands + 1)
        row = np.zeros(self.rounds)
        if start:
            row[:start] = full * self.decoder_coefficients()[start - 1 :: -1]
        for step in range(start, self.rounds):
            row[: step + 1] += self._norms[step] * inverse[step::-1]
            errors[step] = row @ row
        return errors

    def strategy_matrix(self) -> Floats:
        """Return C."""
        return super().strategy_matrix() / self._norms

    def decoder_matrix(self) -> Floats:
        """Return B."""
        inverse = toeplitz_matrix(
            np.diff(self.decoder_coefficients(), prepend=0.0), self.rounds
        )
        return np.asarray(np.cumsum(self._norms[:, None] * inverse, axis=0))

    def first(self, rounds: int) -> Factorization:
        """Return the leading rows; normalised columns keep the norms of the plan."""
        rounds = self._check_first(rounds)
        if rounds == self.rounds:
            return self
        part = BandedToeplitz(rounds, self._column[:rounds])
        if self.normalize_columns:
            part.normalize_columns = True
            part._norms = self._norms[:rounds]
        return part

    def recurrence(self) -> Recurrence:
        """Return forward substitution over the bands."""

        def row(step: int) -> Floats:
            past = min(step + 1, self.bands)
            columns = step - np.arange(past)
            return self._column[:past] / self._norms[columns]

        return HistoryRecurrence(self.bands - 1, row)

    def _parameters(self) -> tuple[Floats, ...]:
        return (self._column, self._norms)


def _scaled_sensitivity(
    column: Floats, norms: Floats, min_separation: int, max_participations: int
) -> Sensitivity:
    """Sensitivity of C diag(norms)^-1 for a Toeplitz C."""
    rounds = len(norms)
    count = effective_participations(rounds, min_separation, max_participations)
    if count > 1 and len(column) > min_separation:
        matrix = toeplitz_matrix(column, rounds) / norms
        return gram_sensitivity(matrix.T @ matrix, min_separation, max_participations)
    height = np.minimum(rounds - np.arange(rounds), len(column))
    energy = np.cumsum(column**2)[height - 1] / norms**2
    total = heaviest_pattern(energy, min_separation, max_participations)
    return Sensitivity(float(np.sqrt(float(total))), True, "orthogonal columns")


def optimize_bands(rounds: int, bands: int, *, objective: str = "rms") -> Floats:
    """Return the coefficients of the best banded Toeplitz C, with norm 1.

    Minimises log ||c||^2 + log sum_j w_j B_j^2 with B = 1 / ((1 - x) C), where w_j = 1
    for "max" (the last prefix is the worst) and 1 - j/n for "rms", by L-BFGS with the
    exact gradient d B / d c_k = -x^k B / C.

    Parameters
    ----------
    rounds, bands : int
        Size of the problem; ``bands <= rounds``.
    objective : str
        ``"rms"`` or ``"max"``.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped]
    from scipy.signal import lfilter

    positive_int("bands", bands)
    one_of("objective", objective, ("rms", "max"))
    if bands > positive_int("rounds", rounds):
        raise ValueError(
            f"bands={bands} must be <= rounds={rounds}: a run has no longer memory"
        )
    weights = np.ones(rounds)
    if objective == "rms":
        weights -= np.arange(rounds) / rounds
    size = 1 << (2 * rounds - 1).bit_length()

    def loss(tail: Floats) -> tuple[float, Floats]:
        column = np.concatenate([[1.0], tail])
        with np.errstate(over="ignore", invalid="ignore"):
            decoder = lfilter([1.0], column, np.ones(rounds))
            error = float(weights @ decoder**2)
        if not error < 1e150:  # an unstable filter: let the line search back off
            return 1e3, np.zeros_like(tail)
        smooth = lfilter([1.0], column, decoder)
        weighted = np.fft.rfft(weights * decoder, size)
        lags = np.fft.irfft(weighted * np.conj(np.fft.rfft(smooth, size)), size)
        norm = float(column @ column)
        gradient = 2 * tail / norm - 2 * lags[1:bands] / error
        return float(np.log(norm) + np.log(error)), gradient

    start = SquareRootToeplitz(bands).coefficients[1:]
    if bands > 1:
        options = {"maxiter": 2000, "maxfun": 4000, "maxcor": 30}
        options |= {"ftol": 1e-15, "gtol": 1e-9}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        start = found.x
    column = np.concatenate([[1.0], start])
    return np.asarray(column / np.linalg.norm(column))
