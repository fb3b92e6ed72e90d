"""Banded Toeplitz factorizations, tuned by gradient descent on the coefficients."""

import numpy as np

from flower_ext.core.errors import one_of, whole
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

_GRAM_ROUNDS = 2048


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

    def sensitivity(self, min_separation: int, max_participations: int) -> Sensitivity:
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
        # B = A diag(norms) C^-1, and only the last norms differ. Up to there B is that
        # of the plain Toeplitz matrix times one norm; after it row by row.
        full = float(self._norms[0])
        inverse = self.inverse_coefficients()
        errors *= full**2
        start = max(0, self.rounds - self.bands + 1)
        row = np.zeros(self.rounds)
        if start:
            row[:start] = full * self.decoder_coefficients()[start - 1 :: -1]
        for step in range(start, self.rounds):
            row[: step + 1] += self._norms[step] * inverse[step::-1]
            errors[step] = row @ row
        return errors

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


def optimize_bands(rounds: int, bands: int, *, objective: str = "rms") -> Floats:
    """Return the coefficients of the best banded Toeplitz C, with norm 1.

    Minimises log ||c||^2 + log sum_j w_j B_j^2 with B = 1 / ((1 - x) C), where w_j = 1
    for "max" (the last prefix is the worst) and 1 - j/n for "rms" (B_j is in n - j
    prefixes). It does so by L-BFGS with the exact gradient d B / d c_k = -x^k B / C.

    Parameters
    ----------
    rounds, bands : int
        Size of the problem; ``bands <= rounds``.
    objective : str
        ``"rms"`` or ``"max"``.
    """
    from scipy.optimize import minimize  # type: ignore[import-untyped]
    from scipy.signal import lfilter  # type: ignore[import-untyped]

    whole("bands", bands, 1)
    one_of("objective", objective, ("rms", "max"))
    if bands > whole("rounds", rounds, 1):
        raise ValueError(
            f"bands={bands} must be <= rounds={rounds}: a run has no longer memory"
        )
    weights = np.ones(rounds)
    if objective == "rms":
        weights -= np.arange(rounds) / rounds
    # Twice the rounds, so that a cyclic correlation does not wrap around.
    size = 1 << (2 * rounds - 1).bit_length()

    def loss(tail: Floats) -> tuple[float, Floats]:
        column = np.concatenate([[1.0], tail])
        with np.errstate(over="ignore", invalid="ignore"):
            decoder = lfilter([1.0], column, np.ones(rounds))
            error = float(weights @ decoder**2)
        if not error < 1e150:  # an unstable filter: let the line search back off
            return 1e3, np.zeros_like(tail)
        # sum_j w_j B_j (B / C)_{j-k} for every k at once: a correlation, by FFT.
        smooth = lfilter([1.0], column, decoder)
        weighted = np.fft.rfft(weights * decoder, size)
        lags = np.fft.irfft(weighted * np.conj(np.fft.rfft(smooth, size)), size)
        norm = float(column @ column)
        gradient = 2 * tail / norm - 2 * lags[1:bands] / error
        return float(np.log(norm) + np.log(error)), gradient

    start = SquareRootToeplitz(bands).coefficients[1:]
    if bands > 1:
        options: dict[str, float] = {"maxiter": 2000, "maxfun": 4000, "maxcor": 30}
        options |= {"ftol": 1e-15, "gtol": 1e-9}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", options=options)
        start = found.x
    column = np.concatenate([[1.0], start])
    return np.asarray(column / np.linalg.norm(column))
