"""Accounting with privacy amplified by sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

from flower_ext.core.errors import (
    at_least,
    open_unit,
    positive,
    probability,
    refuse,
    whole,
)
from flower_ext.privacy.accounting.accountants import Evaluations, RoundAccountant
from flower_ext.privacy.accounting.calibration import (
    INTERVAL,
    fixed_cohort_epsilon,
    fixed_cohort_loss,
    sampled_epsilon,
    sampled_loss,
)
from flower_ext.privacy.factorizations.banded import BandedToeplitz

if TYPE_CHECKING:
    from flwr.serverapp import PrivacyConfig


class SampledGaussianAccountant(RoundAccountant):
    """Privacy amplified by Poisson sampling, by privacy loss distributions.

    Every unit enters every round independently with ``sampling_probability``; nothing
    else may decide who takes part. Epsilon is an upper bound: the privacy loss of a
    round is rounded up to a grid. It is at most about 1% above that of a fine grid, but
    some 10% for a small epsilon with q below 1e-4 and a noise multiplier below 1.

    * Clients are sampled (DP-FedAvg, or user-level sampling, ULS): ``group_size=1``.
    * Examples are sampled, at most G of one user (example-level sampling, ELS):
      ``group_size=G``. The user's sensitivity in a round is Binomial(G, q), and the
      release a mixture of Gaussians.
    * Clients take turns under a banded mechanism (cyclic Poisson): ``cycle`` = number
      of bands or more, see `cyclic`.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the clipping norm of one unit (one client,
        or one example for ELS) times the largest column norm of C (1 for independent
        noise).
    rounds : int
        Planned rounds.
    sampling_probability : float
        q in (0, 1], given the client's turn in the cycle.
    config : flwr.serverapp.PrivacyConfig
        With sampling method ``poisson``.
    group_size : int
        G, most examples of one user; 1 for client-level sampling.
    cycle : int
        Rounds between two chances of the same client; 1 for no cycle.
    interval : float
        Coarsest grid of the privacy loss; smaller is tighter and slower, up to 100,000
        points a round.
    evaluations : Evaluations, optional
        See :class:`RoundAccountant`. They are not amplified, whoever evaluates: given
        what was released before, and the coins of all others, an evaluation with the
        client in it, or a mixture of that and one without, is no further from one
        without than the Gaussian that it is charged as.
        Under bands a turn is released over several rounds, and evaluations in between
        may tell of it: with every sequence of a client's coins in the place of a bin,
        the product of two shifts is at most that of the turns' columns plus mu^2, and
        the proof of `flower_ext.privacy.accounting.balls_in_bins` holds.

    References
    ----------
    Charles et al. 2024, arXiv 2407.07737 (ELS, ULS); Choquette-Choo et al.,
    arXiv 2306.08153 (cyclic Poisson); dp-accounting for the distributions.
    """

    _method = "pld"
    _sampling = "poisson"

    def __init__(
        self,
        noise_multiplier: float,
        rounds: int,
        sampling_probability: float,
        config: PrivacyConfig,
        *,
        group_size: int = 1,
        cycle: int = 1,
        interval: float = INTERVAL,
        evaluations: Evaluations | None = None,
    ) -> None:
        super().__init__(config, rounds, evaluations)
        self.noise_multiplier = positive("noise_multiplier", noise_multiplier)
        self.sampling_probability = probability(
            "sampling_probability", sampling_probability, "cohort / population"
        )
        self.group_size = whole("group_size", group_size, 1)
        self.cycle = whole("cycle", cycle, 1)
        self.interval = positive("interval", interval)
        self._column_norm = 1.0
        self._factorization = "identity"

    @property
    def noise_std(self) -> float:
        """Standard deviation of Z in units of the clipping norm."""
        return self.noise_multiplier * self._column_norm

    @classmethod
    def cyclic(
        cls,
        factorization: BandedToeplitz,
        noise_multiplier: float,
        cohort: float,
        config: PrivacyConfig,
        *,
        cycle: int | None = None,
        interval: float = INTERVAL,
        evaluations: Evaluations | None = None,
    ) -> Self:
        """Account for a banded mechanism with cyclic Poisson sampling.

        Clients are split once into ``cycle`` groups, before and independently of the
        data; round t samples from group t mod cycle with q = cohort cycle / population.
        A client has at most ceil(rounds / cycle) turns, and its columns of C do not
        overlap: the release is as private as that many Poisson-sampled Gaussians
        (Choquette-Choo et al. 2023, arXiv 2306.08153, Algorithm 2 and Theorem 4).

        Parameters
        ----------
        factorization : BandedToeplitz
            With ``bands <= cycle``.
        noise_multiplier : float
            Standard deviation over (clipping norm x largest column norm).
        cohort : float
            Expected clients per round.
        config : flwr.serverapp.PrivacyConfig
            Its population is split into groups of equal size.
        cycle : int, optional
            The number of bands unless given.
        interval : float
            Coarsest grid of the privacy loss.
        evaluations : Evaluations, optional
            See :class:`SampledGaussianAccountant`.
        """
        cycle = factorization.bands if cycle is None else whole("cycle", cycle, 1)
        if cycle < factorization.bands:
            raise ValueError(
                f"cycle={cycle} must be >= bands={factorization.bands}: fewer bands, "
                "or clients that wait longer"
            )
        groups = config.population_size // cycle
        if groups < 1:
            raise ValueError(
                f"cycle={cycle} must be <= population_size={config.population_size}"
            )
        accountant = cls(
            noise_multiplier,
            factorization.rounds,
            probability(
                "sampling_probability",
                positive("cohort", cohort) / groups,
                "the cohort must fit into one group of population // cycle clients",
            ),
            config,
            cycle=cycle,
            interval=interval,
            evaluations=evaluations,
        )
        # One turn moves the release by a column of C, at most the largest.
        accountant._column_norm = factorization.sensitivity(1, 1).value
        accountant._factorization = factorization.fingerprint()
        return accountant

    def epsilon_after(self, rounds: int, delta: float) -> float:
        """Return an upper bound of epsilon of the first ``rounds`` rounds."""
        open_unit("delta", delta)
        # Turns of the client that had the most.
        count = -(-self._check_rounds(rounds) // self.cycle)
        if not count:
            return 0.0
        beside = self._evaluated(rounds)
        return sampled_epsilon(count, delta, *self._setting(), beside)

    def delta_after(self, rounds: int, epsilon: float) -> float:
        """Return an upper bound of delta of the first ``rounds`` rounds."""
        at_least("epsilon", epsilon, 0)
        count = -(-self._check_rounds(rounds) // self.cycle)
        if not count:
            return 0.0
        loss = sampled_loss(count, *self._setting(), self._evaluated(rounds))
        return float(loss.get_delta_for_epsilon(epsilon))

    def _setting(self) -> tuple[float, float, int, float]:
        return (
            self.noise_multiplier,
            self.sampling_probability,
            self.group_size,
            self.interval,
        )

    def _mechanism(self) -> dict[str, str | int | float]:
        return {
            "factorization": self._factorization,
            "noise-multiplier": self.noise_multiplier,
            "sampling-probability": self.sampling_probability,
            "group-size": self.group_size,
            "cycle": self.cycle,
            "interval": self.interval,
        }


class WithoutReplacementAccountant(RoundAccountant):
    """Privacy amplified by cohorts of a fixed size, drawn from the whole population.

    The relation is Flower's ``replace-one``: one client is exchanged for any other, so
    that the sum changes by up to twice the clipping norm. Epsilon is an upper bound by
    privacy loss distributions, see
    :func:`~flower_ext.privacy.accounting.calibration.fixed_cohort_loss`; of one round
    it is exact but for the grid where any two sums may be exchanged.

    Rounds compose if what clients send depends on earlier ones through what was
    released alone: others are in a cohort because one is not, so that what they keep
    would tell of it. A mechanism refuses what says that it keeps something
    (``ClientHalf.sends_kept``, error feedback, evaluations); of trainers and optimizers
    of the clients' own it is assumed.

    Parameters
    ----------
    noise_multiplier : float
        Standard deviation of the noise over the clipping norm.
    rounds : int
        Planned rounds.
    cohort : int
        Clients in every round, drawn uniformly from ``config.population_size``.
    config : flwr.serverapp.PrivacyConfig
        With sampling method ``without-replacement`` and relation ``replace-one``.

    References
    ----------
    Balle, Barthe, Gaboardi 2018, arXiv 1807.01647; Zhu, Dong, Wang 2022, arXiv
    2106.08567; repetitions by dp-accounting.
    """

    _method = "pld"
    _sampling = "without-replacement"

    def __init__(
        self, noise_multiplier: float, rounds: int, cohort: int, config: PrivacyConfig
    ) -> None:
        super().__init__(config, rounds)
        self.noise_multiplier = positive("noise_multiplier", noise_multiplier)
        self.cohort = whole("cohort", cohort, 1)
        if cohort > config.population_size:
            refuse("cohort", cohort, f"<= population_size={config.population_size}")

    @property
    def noise_std(self) -> float:
        """Standard deviation of the noise in units of the clipping norm."""
        return self.noise_multiplier

    def epsilon_after(self, rounds: int, delta: float) -> float:
        """Return an upper bound of epsilon of the first ``rounds`` rounds."""
        open_unit("delta", delta)
        count = self._check_rounds(rounds)
        if not count:
            return 0.0
        population = self.config.population_size
        return fixed_cohort_epsilon(
            count, delta, self.noise_multiplier, population, self.cohort
        )

    def delta_after(self, rounds: int, epsilon: float) -> float:
        """Return an upper bound of delta of the first ``rounds`` rounds."""
        at_least("epsilon", epsilon, 0)
        count = self._check_rounds(rounds)
        if not count:
            return 0.0
        rate = self.cohort / self.config.population_size
        loss = fixed_cohort_loss(self.noise_multiplier, rate)
        return float(loss.self_compose(count).get_delta_for_epsilon(epsilon))

    def _mechanism(self) -> dict[str, str | int | float]:
        return {"noise-multiplier": self.noise_multiplier, "cohort": self.cohort}
