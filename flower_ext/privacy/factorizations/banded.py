"""Banded Toeplitz factorizations, tuned by gradient descent on the coefficients."""

from collections.abc import Callable

import numpy as np

from flower_ext.core.errors import one_of, refuse, whole
from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.factorization import Factorization
from flower_ext.privacy.factorizations.participation import (
    Sensitivity,
    effective_participations,
    gram_sensitivity,
    heaviest_pattern,
)
from flower_ext.privacy.factorizations.recurrences import HistoryRecurrence, Recurrence
from flower_ext.privacy.factorizations.toeplitz import (
    SquareRootToeplitz,
    Toeplitz,
    toeplitz_matrix,
    toeplitz_sensitivity,
)
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload

_GRAM_ROUNDS = 2048
# Of the noise in the models, when it is tuned for learning rates that change.
_COLUMNS = 128


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
            # Numbers of a column that the end of the run leaves.
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
        workload: Workload = PREFIX_SUMS,
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
        workload : Workload
            What the error is of, prefix sums unless given. Never worse for it than
            the coefficients for prefix sums, without normalised columns.
        """
        column = optimize_bands(rounds, bands, objective=objective, workload=workload)
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

    def sensitivity(self, min_separation: int, max_participations: int) -> Sensitivity:
        """Return the sensitivity; with normalised columns and more bands a bound."""
        if not self.normalize_columns:
            return super().sensitivity(min_separation, max_participations)
        return _scaled_sensitivity(
            self._column, self._norms, min_separation, max_participations
        )

    def row_errors(self, workload: Workload = PREFIX_SUMS) -> Floats:
        """Return the errors; normalised columns change the last ``bands - 1``."""
        if not self.normalize_columns:
            return super().row_errors(workload)
        # A diag(norms) C^-1, of which only the last norms differ. Up to there it is a
        # plain Toeplitz matrix times one norm, if A is one; after it row by row.
        inverse = self.inverse_coefficients()
        if not workload.is_steady(self.rounds):
            return workload.toeplitz_errors(inverse, self._norms)
        start = max(0, self.rounds - self.bands + 1)
        last = workload.toeplitz_errors(inverse, self._norms, start)
        before = super().row_errors(workload)[:start] * self._norms[0] ** 2
        return np.concatenate([before, last])

    def noise_variances(self) -> Floats:
        """Return the variances; row t of C^-1 is scaled by the norm of column t."""
        return np.asarray(super().noise_variances() * self._norms**2)

    def strategy_matrix(self) -> Floats:
        """Return C."""
        return super().strategy_matrix() / self._norms

    def decoder_matrix(self) -> Floats:
        """Return B."""
        inverse = toeplitz_matrix(self.inverse_coefficients(), self.rounds)
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
    # Columns of one client overlap: by their products, or for long runs more coarsely.
    if count > 1 and len(column) > min_separation and rounds > _GRAM_ROUNDS:
        plain = toeplitz_sensitivity(column, rounds, min_separation, count)
        how = "upper bound: plain columns over the smallest norm"
        return Sensitivity(plain.value / float(norms.min()), False, how)
    if count > 1 and len(column) > min_separation:
        matrix = toeplitz_matrix(column, rounds) / norms
        return gram_sensitivity(matrix.T @ matrix, min_separation, max_participations)
    height = np.minimum(rounds - np.arange(rounds), len(column))
    energy = np.cumsum(column**2)[height - 1] / norms**2
    total = heaviest_pattern(energy, min_separation, max_participations)
    return Sensitivity(float(np.sqrt(float(total))), True, "orthogonal columns")


def optimize_bands(
    rounds: int,
    bands: int,
    *,
    objective: str = "rms",
    workload: Workload = PREFIX_SUMS,
) -> Floats:
    """Return the coefficients of the best banded Toeplitz C, with norm 1.

    Minimises log ||c||^2 + log sum_j w_j B_j^2 with B = A / C, for prefix sums
    1 / ((1 - x) C), where w_j = 1 for "max" (the last model is the worst) and 1 - j/n
    for "rms" (B_j is in n - j models). It does so by L-BFGS with the exact gradient
    d B / d c_k = -x^k B / C.

    At learning rates that change, where A is no polynomial, the steps' noise is the
    filter, and what some 128 columns of it make of the models stands for all.

    Parameters
    ----------
    rounds, bands : int
        Size of the problem; ``bands <= rounds``.
    objective : str
        ``"rms"`` or ``"max"``.
    workload : Workload
        A. With learning rates that change for "rms" only.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped]
    from scipy.signal import lfilter  # type: ignore[import-untyped]

    whole("bands", bands, 1)
    one_of("objective", objective, ("rms", "max"))
    if bands > whole("rounds", rounds, 1):
        raise ValueError(
            f"bands={bands} must be <= rounds={rounds}: a run has no longer memory"
        )
    impulse, measure = _measure(rounds, objective, workload)
    # Twice the rounds, so that a cyclic correlation does not wrap around.
    size = 1 << (2 * rounds - 1).bit_length()

    def loss(tail: Floats) -> tuple[float, Floats]:
        column = np.concatenate([[1.0], tail])
        with np.errstate(over="ignore", invalid="ignore"):
            decoder = lfilter([1.0], column, impulse)
            error, slope = measure(decoder)
        if not error < 1e150:  # an unstable filter: let the line search back off
            return 1e3, np.zeros_like(tail)
        # sum_j slope_j (B / C)_{j-k} for every k at once: a correlation, by FFT.
        smooth = lfilter([1.0], column, decoder)
        weighted = np.fft.rfft(slope, size)
        lags = np.fft.irfft(weighted * np.conj(np.fft.rfft(smooth, size)), size)
        norm = float(column @ column)
        gradient = 2 * tail / norm - 2 * lags[1:bands] / error
        return float(np.log(norm) + np.log(error)), gradient

    start = SquareRootToeplitz(bands).coefficients[1:]
    if not workload.is_prefix_sum(rounds):
        # From the optimum for prefix sums down, so that none is worse than that.
        column = optimize_bands(rounds, bands, objective=objective)
        start = column[1:] / column[0]
    if bands > 1:
        options: dict[str, float] = {"maxiter": 2000, "maxfun": 4000, "maxcor": 30}
        options |= {"ftol": 1e-15, "gtol": 1e-9}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        start = found.x
    column = np.concatenate([[1.0], start])
    return np.asarray(column / np.linalg.norm(column))


def _measure(
    rounds: int, objective: str, workload: Workload
) -> tuple[Floats, Callable[[Floats], tuple[float, Floats]]]:
    """Return what C filters, and the error of the result with half its gradient."""
    weights = np.ones(rounds)
    if objective == "rms":
        weights -= np.arange(rounds) / rounds
    if workload.is_steady(rounds):
        return workload.column(rounds), lambda b: (
            float(weights @ b**2),
            weights * b,
        )
    if objective == "max":
        cause = "which model is the worst is not known with learning rates that change"
        refuse("objective", objective, "'rms'", cause)
    rates = workload.rates(rounds)
    edges = np.linspace(0, rounds, min(rounds, _COLUMNS) + 1)
    middles = ((edges[:-1] + edges[1:]) / 2).astype(int)

    def of_columns(steps: Floats) -> tuple[float, Floats]:
        # Column j of A C^-1: at rate_t every step adds what came t - j rounds before.
        error, slope = 0.0, np.zeros(rounds)
        for column, width in zip(middles, np.diff(edges), strict=True):
            models = np.cumsum(rates[column:] * steps[: rounds - column])
            error += width * float(models @ models)
            later = np.cumsum(models[::-1])[::-1]
            slope[: rounds - column] += width * rates[column:] * later
        return error, slope

    impulse = np.zeros(rounds)
    impulse[0] = 1.0
    return workload.steps(impulse), of_columns
