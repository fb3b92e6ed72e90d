"""Dense factorizations: the optimum among all matrices, for small numbers of rounds."""

from collections.abc import Callable
from typing import Self

import numpy as np

from flower_ext.core.errors import whole
from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.factorization import Factorization
from flower_ext.privacy.factorizations.participation import (
    Sensitivity,
    gram_sensitivity,
)
from flower_ext.privacy.factorizations.recurrences import HistoryRecurrence, Recurrence
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload


class DenseFactorization(Factorization):
    """A lower-triangular matrix C given entry by entry.

    Parameters
    ----------
    matrix : NDArray
        C, shape ``(rounds, rounds)``, lower-triangular, positive diagonal. np.tri(n)
        is output perturbation (noise on the sums themselves).
    """

    def __init__(self, matrix: Floats) -> None:
        matrix = np.array(matrix, dtype=np.float64)
        if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
            raise ValueError(f"matrix.shape={matrix.shape} must be (rounds, rounds)")
        super().__init__(len(matrix))
        if not np.all(np.isfinite(matrix)) or np.any(np.triu(matrix, 1)):
            raise ValueError(
                "matrix must be finite and lower-triangular: the noise of a round "
                "may not depend on later rounds"
            )
        if not np.all(np.diagonal(matrix) > 0):
            raise ValueError("matrix must have a positive diagonal: C is inverted")
        matrix.setflags(write=False)
        self._matrix = matrix
        row, column = np.nonzero(matrix)
        self.bands = int((row - column).max()) + 1

    @classmethod
    def optimize(
        cls,
        rounds: int,
        min_separation: int = 1,
        max_participations: int = 1,
        *,
        workload: Workload = PREFIX_SUMS,
    ) -> Self:
        """Minimise the root-mean-square loss; see `optimize_dense`."""
        problem = (rounds, min_separation, max_participations)
        return cls(optimize_dense(*problem, workload=workload))

    @property
    def name(self) -> str:
        """Name shown in tables."""
        return f"dense({self.bands} bands)"

    def sensitivity(self, min_separation: int, max_participations: int) -> Sensitivity:
        """Return the sensitivity: exact for one participation or few bands."""
        gram = self._matrix.T @ self._matrix
        return gram_sensitivity(gram, min_separation, max_participations)

    def row_errors(self, workload: Workload = PREFIX_SUMS) -> Floats:
        """Return the squared norms of the rows of B, or of A C^-1."""
        if workload.is_prefix_sum(self.rounds):
            return np.asarray((self.decoder_matrix() ** 2).sum(axis=1))
        return np.asarray((workload.models(self._inverse()) ** 2).sum(axis=1))

    def noise_variances(self) -> Floats:
        """Return the squared norms of the rows of C^-1."""
        return np.asarray((self._inverse() ** 2).sum(axis=1))

    def _inverse(self) -> Floats:
        from scipy.linalg import solve_triangular  # type: ignore[import-untyped]

        inverse = solve_triangular(self._matrix, np.eye(self.rounds), lower=True)
        return np.asarray(inverse)

    def strategy_matrix(self) -> Floats:
        """Return C."""
        return self._matrix

    def decoder_matrix(self) -> Floats:
        """Return A C^-1."""
        from scipy.linalg import solve_triangular

        ones = np.tri(self.rounds)
        return np.asarray(solve_triangular(self._matrix.T, ones.T, lower=False).T)

    def first(self, rounds: int) -> Self:
        """Return the leading block."""
        rounds = self._check_first(rounds)
        return type(self)(self._matrix[:rounds, :rounds])

    def recurrence(self) -> Recurrence:
        """Return forward substitution."""

        def row(step: int) -> Floats:
            low = max(0, step - self.bands + 1)
            return np.ascontiguousarray(self._matrix[step, low : step + 1][::-1])

        return HistoryRecurrence(self.bands - 1, row)

    def _parameters(self) -> tuple[Floats, ...]:
        return (self._matrix,)


def optimize_dense(
    rounds: int,
    min_separation: int = 1,
    max_participations: int = 1,
    *,
    workload: Workload = PREFIX_SUMS,
) -> Floats:
    """Return the C of least mean error for sensitivity fixed.

    With X = C^T C the squared loss is tr(A^T A X^-1) / n, convex in X. All columns of C
    have norm 1, diag X = 1. Where a client may take part more than once, rounds that it
    may share have orthogonal columns, X_ij = 0 for |i - j| >= b, so that the
    sensitivity is sqrt(k) for every pattern in Pi(b, k) (BandMF).

    Parameters
    ----------
    rounds : int
        At most 1,000; the cost is O(rounds^3) per step.
    min_separation, max_participations : int
        b and k.
    workload : Workload
        A, prefix sums unless given.

    References
    ----------
    Denisov et al. 2022, arXiv 2202.08312; Choquette-Choo et al., arXiv 2211.06530 and
    2306.08153.
    """
    whole("min_separation", min_separation, 1)
    whole("max_participations", max_participations, 1)
    if whole("rounds", rounds, 1) > 1000:
        raise ValueError(f"rounds={rounds} must be <= 1000: use banded Toeplitz or BLT")
    index = np.arange(rounds)
    lag = np.abs(np.subtract.outer(index, index))
    reach = min_separation if max_participations > 1 else rounds
    free = (lag > 0) & (lag < reach)
    if workload.is_prefix_sum(rounds):
        # A^T A / n: rounds i and j are both in the prefixes from the later one on.
        gram = np.minimum.outer(rounds - index, rounds - index) / rounds
    else:
        query = workload.matrix(rounds)
        gram = query.T @ query / rounds

    best = _minimize_trace(np.eye(rounds), gram, lambda x: np.where(free, x, 0.0))
    # X = C^T C with a lower-triangular C: the Cholesky factor from the last row up.
    flipped = np.linalg.cholesky(best[::-1, ::-1])
    matrix = np.ascontiguousarray(flipped[::-1, ::-1].T)
    matrix[lag >= reach] = 0.0  # what rounding left off the band
    return np.tril(matrix)


def _minimize_trace(
    start: Floats, gram: Floats, project: Callable[[Floats], Floats]
) -> Floats:
    """Minimise tr(gram X^-1) in the linear space of ``project`` by L-BFGS."""

    def evaluate(point: Floats) -> tuple[float, Floats]:
        try:
            root = np.linalg.cholesky(point)
        except np.linalg.LinAlgError:
            return np.inf, point  # no longer positive definite: a shorter step
        inverse = np.linalg.inv(root)
        inverse = inverse.T @ inverse
        middle = gram @ inverse
        return float(np.trace(middle)), -project(inverse @ middle)

    # What a step changes is in the linear space, so that iterates keep the constraints.
    point = start
    value, slope = evaluate(point)
    memory: list[tuple[Floats, Floats, float]] = []
    for _ in range(1000):
        direction = -_two_loop(slope, memory)
        decrease = float((direction * slope).sum())
        if -decrease < 1e-13 * value:
            break
        # Quasi-Newton steps have the right length; the first, plain gradient has none.
        step = 1.0 if memory else min(1.0, 0.1 / float(np.abs(direction).max()))
        for _ in range(50):
            trial = point + step * direction
            new_value, new_slope = evaluate(trial)
            # Sufficient decrease (Nocedal and Wright 2006, eq. 3.6a).
            if new_value <= value + 1e-4 * step * decrease:
                break
            step /= 2
        else:
            break
        moved, bent = trial - point, new_slope - slope
        curvature = float((moved * bent).sum())
        if curvature > 0:  # or the estimate would not be positive definite
            memory = [*memory[-19:], (moved, bent, curvature)]
        point, value, slope = trial, new_value, new_slope
    return point


def _two_loop(slope: Floats, memory: list[tuple[Floats, Floats, float]]) -> Floats:
    """Return the L-BFGS estimate of inverse Hessian times slope.

    Nocedal and Wright 2006, Algorithm 7.4 (two-loop recursion).
    """
    result = slope.copy()
    weights = []
    for moved, bent, curvature in reversed(memory):
        weight = float((moved * result).sum()) / curvature
        weights.append(weight)
        result -= weight * bent
    if memory:
        moved, bent, curvature = memory[-1]
        result *= curvature / float((bent * bent).sum())
    for (moved, bent, curvature), weight in zip(memory, reversed(weights), strict=True):
        result += (weight - float((bent * result).sum()) / curvature) * moved
    return result
