"""What every factorization of the prefix-sum matrix promises.

Let A be the lower-triangular matrix of ones (rounds x rounds), and A = B C. Row t of X
is the sum of clipped contributions of round t, so that A X are its prefix sums. The
server releases C X + Z with independent noise Z. Everything after that is
post-processing: above all B (C X + Z) = A X + B Z, prefix sums with correlated noise.
In units of the clipping norm and for Z of standard deviation 1:

* sensitivity: max over allowed patterns P of || sum_{i in P} C[:, i] ||;
* ``row_errors``: err_i = || B[i, :] ||^2, the variance of prefix sum i;
* max loss = sensitivity * sqrt(max_i err_i),
  root-mean-square loss = sensitivity * sqrt(mean_i err_i).

Both losses do not depend on the scale of C. They are the noise of a prefix sum when the
whole run is as private as one Gaussian release with mu = 1.

Where the server does not add up, but moves with momentum or learning rates that change,
errors are those of its models, of the rows of A C^-1 for its
:class:`~flower_ext.privacy.Workload` A. C, what is released and its sensitivity are the
same.
"""

import hashlib
from abc import ABC, abstractmethod
from typing import Self

import numpy as np

from flower_ext.core.errors import whole
from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.participation import (
    Sensitivity,
    effective_participations,
)
from flower_ext.privacy.factorizations.recurrences import (
    IndependentRecurrence,
    Recurrence,
)
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload


class Factorization(ABC):
    """A = B C for a planned number of rounds.

    Parameters
    ----------
    rounds : int
        Planned rounds n; a run may be shorter, never longer.

    Notes
    -----
    Guarantee. Privacy unit: one client with everything it ever sends. Neighbouring
    relation: all contributions of one client are replaced by zero. Contributions must
    be clipped to the same norm in every round, and the server must enforce the
    participation limits. Because C is lower-triangular (or a tree read as it fills),
    the guarantee holds for contributions that depend on earlier releases (Denisov et
    al. 2022). Not protected: the number of rounds, who takes part, and anything a
    client sends outside the clipped contribution.
    """

    def __init__(self, rounds: int) -> None:
        self.rounds = whole("rounds", rounds, 1)

    @property
    @abstractmethod
    def name(self) -> str:
        """Name with its main parameters, as it is shown in tables."""

    @property
    def memory(self) -> int:
        """Model-sized buffers that the noise stream keeps between rounds."""
        return self.recurrence().buffers

    @abstractmethod
    def sensitivity(self, min_separation: int, max_participations: int) -> Sensitivity:
        """Return the sensitivity of the whole release.

        Parameters
        ----------
        min_separation : int
            Least difference of the numbers of two rounds with the same client; 1
            allows every round.
        max_participations : int
            Most rounds that one client takes part in.
        """

    @abstractmethod
    def row_errors(self, workload: Workload = PREFIX_SUMS) -> Floats:
        """Return err_i = ||B[i, :]||^2 of every prefix sum, shape ``(rounds,)``.

        Of another workload A the rows are those of A C^-1.
        """

    @abstractmethod
    def noise_variances(self) -> Floats:
        """Return the variance of every coordinate of each round's noise.

            v_t = ||B[t, :] - B[t-1, :]||^2,  which is ||C^-1[t, :]||^2 for a square C

        The stream of a round with standard deviation s has variance s^2 v_t: the noise
        in the update of that round alone, where `row_errors` is that of the sum so far.

        Returns
        -------
        NDArray
            Shape ``(rounds,)``, for Z of unit variance.
        """

    @abstractmethod
    def strategy_matrix(self) -> Floats:
        """Return C, shape ``(released rows, rounds)``; for small ``rounds``."""

    @abstractmethod
    def decoder_matrix(self) -> Floats:
        """Return B, shape ``(rounds, released rows)``; for small ``rounds``."""

    @abstractmethod
    def first(self, rounds: int) -> "Factorization":
        """Return what the first ``rounds`` rounds alone have released.

        It is the Gaussian mechanism that an accountant needs for "spent so far".
        """

    @abstractmethod
    def recurrence(self) -> Recurrence:
        """Return the streaming form of the noise."""

    @abstractmethod
    def _parameters(self) -> tuple[Floats, ...]:
        """Return the numbers that define the factorization besides ``rounds``."""

    def restarts_at(self, step: int) -> bool:
        """Return whether no noise before round ``step`` (from 0) is used again."""
        return step == 0

    def fingerprint(self) -> str:
        """Return a digest that differs when the mechanism differs."""
        # The numbers themselves, not their repr: the same on every machine.
        digest = hashlib.sha256(f"{self.name}|{self.rounds}".encode())
        for array in self._parameters():
            digest.update(np.ascontiguousarray(array, dtype="<f8").tobytes())
        return digest.hexdigest()[:32]

    def max_error(self, workload: Workload = PREFIX_SUMS) -> float:
        """Return sqrt(max_i err_i): the noise of the worst prefix sum, or model."""
        return float(np.sqrt(self.row_errors(workload).max()))

    def rms_error(self, workload: Workload = PREFIX_SUMS) -> float:
        """Return sqrt(mean_i err_i): the root-mean-square noise of them."""
        return float(np.sqrt(self.row_errors(workload).mean()))

    def max_loss(
        self,
        min_separation: int,
        max_participations: int,
        workload: Workload = PREFIX_SUMS,
    ) -> float:
        """Return sensitivity times `max_error`."""
        sensitivity = self.sensitivity(min_separation, max_participations)
        return sensitivity.value * self.max_error(workload)

    def rms_loss(
        self,
        min_separation: int,
        max_participations: int,
        workload: Workload = PREFIX_SUMS,
    ) -> float:
        """Return sensitivity times `rms_error`."""
        sensitivity = self.sensitivity(min_separation, max_participations)
        return sensitivity.value * self.rms_error(workload)

    def _check_first(self, rounds: int) -> int:
        """Return ``rounds`` if the plan covers it."""
        if whole("rounds", rounds, 1) > self.rounds:
            raise ValueError(
                f"rounds={rounds} must be <= {self.rounds}, the planned rounds of "
                f"{self.name}: plan the mechanism for the whole run"
            )
        return int(rounds)

    def __repr__(self) -> str:
        return f"<{self.name}, {self.rounds} rounds>"


class Identity(Factorization):
    """Independent noise in every round: C = I, plain DP-FedAvg.

    err_i = i + 1, sensitivity = sqrt(min(k, ceil(n / b))).

    Examples
    --------
    >>> Identity(64).max_loss(min_separation=16, max_participations=4)
    16.0
    """

    @property
    def name(self) -> str:
        """Name shown in tables."""
        return "identity"

    def sensitivity(self, min_separation: int, max_participations: int) -> Sensitivity:
        """Return the square root of the number of participations (exact)."""
        count = effective_participations(
            self.rounds, min_separation, max_participations
        )
        return Sensitivity(float(np.sqrt(count)), True, "orthogonal columns")

    def row_errors(self, workload: Workload = PREFIX_SUMS) -> Floats:
        """Return 1, 2, ..., n; of another workload the squared norms of its rows."""
        if workload.is_prefix_sum(self.rounds):
            return np.arange(1.0, self.rounds + 1)
        if workload.is_steady(self.rounds):
            return np.asarray(np.cumsum(workload.column(self.rounds) ** 2))
        return workload.streamed_errors(self.recurrence(), self.rounds)

    def noise_variances(self) -> Floats:
        """Return ones."""
        return np.ones(self.rounds)

    def strategy_matrix(self) -> Floats:
        """Return the identity matrix."""
        return np.eye(self.rounds)

    def decoder_matrix(self) -> Floats:
        """Return A."""
        return np.tri(self.rounds)

    def first(self, rounds: int) -> Self:
        """Return the same for fewer rounds."""
        return type(self)(self._check_first(rounds))

    def recurrence(self) -> Recurrence:
        """Return fresh noise."""
        return IndependentRecurrence()

    def restarts_at(self, step: int) -> bool:
        """Return True: every round stands alone."""
        del step
        return True

    def _parameters(self) -> tuple[Floats, ...]:
        return ()
