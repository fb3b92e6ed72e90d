r"""Toeplitz factorizations: C[i, j] = c_{i-j}, so that a run is one filter.

| c0             |         C(x) = c_0 + c_1 x + c_2 x^2 + ...
C = | c1 c0          |         B(x) = 1 / ((1 - x) C(x))
| c2 c1 c0       |         err_i = sum_{j<=i} B_j^2
|  0 c2 c1 c0    |  (3 bands)
"""

from abc import abstractmethod
from typing import Self

import numpy as np

from flower_ext.core.errors import whole
from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.factorization import Factorization
from flower_ext.privacy.factorizations.participation import (
    Sensitivity,
    effective_participations,
)
from flower_ext.privacy.factorizations.recurrences import HistoryRecurrence, Recurrence
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload


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
    # Columns are one column, moved down and cut at the end: the first is the largest.
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
    # The sum of the columns 0, b, 2b, ...
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


class ToeplitzFactorization(Factorization):
    """Base of the factorizations whose C is a lower-triangular Toeplitz matrix."""

    @property
    @abstractmethod
    def coefficients(self) -> Floats:
        """First column of C, read-only; trailing zeros may be left out."""

    @abstractmethod
    def decoder_coefficients(self) -> Floats:
        """Return the first column of B, shape ``(rounds,)``."""

    def inverse_coefficients(self) -> Floats:
        """Return the first column of C^-1, shape ``(rounds,)``."""
        # B = A C^-1, and multiplying with A is summing up.
        return np.diff(self.decoder_coefficients(), prepend=0.0)

    def sensitivity(self, min_separation: int, max_participations: int) -> Sensitivity:
        """Return the sensitivity, see `toeplitz_sensitivity`."""
        return toeplitz_sensitivity(
            self.coefficients, self.rounds, min_separation, max_participations
        )

    def row_errors(self, workload: Workload = PREFIX_SUMS) -> Floats:
        """Return the running sums of the squared coefficients of B.

        At learning rates that change A C^-1 is no Toeplitz matrix, and it takes
        O(rounds^2).
        """
        if workload.is_prefix_sum(self.rounds):
            return np.asarray(np.cumsum(self.decoder_coefficients() ** 2))
        inverse = self.inverse_coefficients()
        if workload.is_steady(self.rounds):
            return np.asarray(np.cumsum(workload.models(inverse) ** 2))
        return workload.toeplitz_errors(inverse)

    def noise_variances(self) -> Floats:
        """Return the running sums of the squared coefficients of C^-1."""
        return np.asarray(np.cumsum(self.inverse_coefficients() ** 2))

    def strategy_matrix(self) -> Floats:
        """Return C."""
        return toeplitz_matrix(self.coefficients, self.rounds)

    def decoder_matrix(self) -> Floats:
        """Return B."""
        return toeplitz_matrix(self.decoder_coefficients(), self.rounds)


class Toeplitz(ToeplitzFactorization):
    """A Toeplitz factorization of given coefficients.

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

        # Dividing ones, the coefficients of 1 / (1 - x), by C(x) is a recursive filter.
        return np.asarray(lfilter([1.0], self._column, np.ones(self.rounds)))

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

    Among Toeplitz factorizations it has the lowest max loss for a single participation,
    about 1 + ln(n) / pi. Its noise needs all past rounds.

    References
    ----------
    Fichtenberger, Henzinger, Upadhyay 2022; Dvijotham et al. 2024.
    """

    def __init__(self, rounds: int) -> None:
        index = np.arange(1, whole("rounds", rounds, 1))
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
