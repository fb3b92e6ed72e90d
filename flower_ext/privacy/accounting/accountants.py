"""Accountants that speak Flower's vocabulary.

They read as `flwr.serverapp.PrivacyAccountant` does. They do not compose independent
events, since these cannot express correlated noise, but count the rounds of one planned
mechanism: `advance` after every release, `require_budget` before it.

Guarantee. Unit: one client with everything it ever sends (for ``group_size > 1``: one
user with at most that many examples). Relation: its contributions become zero, Flower's
``add-or-remove-one``. A round that nobody answered, or whose replies were dropped, is
a release like any other as long as its noise is added. The bound is over the worst
contributions, so that dropouts and errors never cost more than what is counted here. A
round in which nothing is released at all (no model, no metric) is not counted; then
neither the noise stream nor the clock of the minimum separation may move.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flower_ext.core.errors import positive, whole
from flower_ext.privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon
from flower_ext.privacy.factorizations.factorization import Factorization
from flower_ext.privacy.factorizations.participation import Sensitivity

if TYPE_CHECKING:
    from flwr.serverapp import PrivacyConfig, PrivacySpent

_SCHEMA = 1


@dataclass(frozen=True)
class Evaluations:
    """Evaluations after some of the rounds: Gaussian releases beside the models.

    Parameters
    ----------
    every : int
        Rounds from one to the next; the first follows the round of that number.
    noise_multiplier : float
        Standard deviation of the noise over the l2 norm by which a client moves one.
        Each client may be in all of them.
    """

    every: int
    noise_multiplier: float

    def __post_init__(self) -> None:
        whole("every", self.every, 1)
        positive("noise_multiplier", self.noise_multiplier)

    def mu_after(self, rounds: int) -> float:
        """Return mu of all that follow the first ``rounds`` rounds."""
        return math.sqrt(rounds // self.every) / self.noise_multiplier

    def described(self) -> dict[str, str | int | float]:
        """Return what a checkpoint must agree with."""
        return {
            "evaluated-every": self.every,
            "evaluation-noise-multiplier": self.noise_multiplier,
        }


class RoundAccountant(ABC):
    """Privacy spent by the first rounds of one planned mechanism.

    Parameters
    ----------
    config : flwr.serverapp.PrivacyConfig
        Target delta, population, sampling method, optional largest epsilon.
    rounds : int
        Planned rounds.
    evaluations : Evaluations, optional
        Private evaluations, each of which is counted with the round that it follows.

    Warns
    -----
    UserWarning
        If the target delta is not below 1 / population.
    """

    _method = ""
    _sampling = ""

    def __init__(
        self,
        config: PrivacyConfig,
        rounds: int,
        evaluations: Evaluations | None = None,
    ) -> None:
        self.evaluations = evaluations
        self._config = config
        self._rounds = whole("rounds", rounds, 1)
        self._done = 0
        if config.sampling_method.value != self._sampling:
            raise ValueError(
                f"config.sampling_method={config.sampling_method.value!r} must be "
                f"{self._sampling!r} for {type(self).__name__}: the accounting must "
                "be what the sampler does"
            )
        if config.target_delta >= 1 / config.population_size:
            warnings.warn(
                f"target_delta={config.target_delta} should be < 1 / population_size="
                f"{1 / config.population_size:.3g}: publishing one whole client would "
                "satisfy it",
                stacklevel=3,
            )

    @property
    def caveat(self) -> str:
        """What is said beside an epsilon that does not hold for certain."""
        return ""

    @property
    @abstractmethod
    def noise_std(self) -> float:
        """Standard deviation of Z in units of the clipping norm."""

    @abstractmethod
    def epsilon_after(self, rounds: int, delta: float) -> float:
        """Return epsilon of the first ``rounds`` rounds."""

    @abstractmethod
    def delta_after(self, rounds: int, epsilon: float) -> float:
        """Return delta of the first ``rounds`` rounds."""

    @abstractmethod
    def _mechanism(self) -> dict[str, str | int | float]:
        """Return what a checkpoint must agree with."""

    def _evaluated(self, rounds: int) -> float:
        """Return mu of the evaluations in the first ``rounds`` rounds."""
        return self.evaluations.mu_after(rounds) if self.evaluations else 0.0

    @property
    def config(self) -> PrivacyConfig:
        """The privacy configuration."""
        return self._config

    @property
    def rounds(self) -> int:
        """Planned rounds."""
        return self._rounds

    @property
    def num_releases(self) -> int:
        """Rounds released so far."""
        return self._done

    def get_epsilon(self, delta: float) -> float:
        """Return epsilon spent so far at ``delta``."""
        return self.epsilon_after(self._done, delta)

    def get_delta(self, epsilon: float) -> float:
        """Return delta spent so far at ``epsilon``."""
        return self.delta_after(self._done, epsilon)

    def get_privacy_spent(self, delta: float | None = None) -> PrivacySpent:
        """Return what is spent so far, at the target delta unless another is given."""
        from flwr.serverapp import PrivacySpent

        delta = self._config.target_delta if delta is None else delta
        return PrivacySpent(
            epsilon=self.get_epsilon(delta),
            delta=delta,
            num_releases=self._done,
            accounting_method=self._method,
        )

    def require_budget(self, count: int = 1) -> None:
        """Raise before a release that the budget does not cover.

        Raises
        ------
        flwr.serverapp.exception.PrivacyBudgetExhausted
            If ``count`` more rounds exceed ``config.max_epsilon`` or the plan.
        """
        from flower_ext._flower import PrivacyBudgetExhausted

        if self._done + whole("count", count, 1) > self._rounds:
            raise PrivacyBudgetExhausted(
                f"round {self._done + count} is after the {self._rounds} planned "
                "rounds: plan the mechanism for the whole run"
            )
        limit, delta = self._config.max_epsilon, self._config.target_delta
        after = self._done + count
        # Not "epsilon > limit": NaN must count as exceeding.
        if limit is not None and not self.epsilon_after(after, delta) <= limit:
            raise PrivacyBudgetExhausted(
                f"round {after} would exceed max_epsilon={limit} at delta={delta}: "
                f"{self.get_epsilon(delta):.6g} is spent after {self._done} rounds"
            )

    def advance(self, count: int = 1) -> None:
        """Count ``count`` releases."""
        self._done = self._ahead(count)

    def state_dict(self) -> dict[str, object]:
        """Return the JSON-serializable state."""
        return {
            "schema": _SCHEMA,
            "accountant": type(self).__name__,
            "mechanism": self._mechanism()
            | (self.evaluations.described() if self.evaluations else {}),
            "target-delta": self._config.target_delta,
            "population-size": self._config.population_size,
            "rounds": self._rounds,
            "releases": self._done,
        }

    def load_state_dict(self, state: dict[str, object]) -> None:
        """Continue counting; a state of another mechanism or plan is refused."""
        # What the accountant itself would save now is what the checkpoint must say.
        expected = self.state_dict()
        for key, value in expected.items():
            # Releases are the progress; everything else is the plan.
            if key != "releases" and state.get(key) != value:
                raise ValueError(
                    f"state[{key!r}]={state.get(key)!r} must be {value!r}: the "
                    "checkpoint was made with another mechanism"
                )
        releases = whole("state['releases']", state.get("releases"), 0)
        if releases > self._rounds:
            raise ValueError(f"state['releases']={releases} must be <= {self._rounds}")
        self._done = releases

    def _ahead(self, count: int) -> int:
        """Return the number of rounds after ``count`` more."""
        return self._check_rounds(self._done + whole("count", count, 1))

    def _check_rounds(self, rounds: int) -> int:
        """Return ``rounds`` if it is within the plan."""
        if whole("rounds", rounds, 0) > self._rounds:
            raise ValueError(
                f"rounds={rounds} must be <= {self._rounds}, the planned rounds: plan "
                "the mechanism for the whole run"
            )
        return rounds


class GaussianAccountant(RoundAccountant):
    """Accounting of a mechanism that is one Gaussian release over all rounds.

    The first t rounds are themselves a Gaussian release with

        mu_t = sensitivity(first t rows of C) / (noise_multiplier * sensitivity(C)),

    at most mu = 1 / noise_multiplier at the end. Evaluations are further rows of the
    same release, and their mu^2 is added. Epsilon is exact where the sensitivity is
    (``sensitivity.exact``), else, for trees among others, an upper bound. Valid for
    adaptively chosen contributions, because C is lower-triangular.

    Parameters
    ----------
    factorization : Factorization
        The mechanism.
    noise_multiplier : float
        Standard deviation of the noise over (clipping norm x sensitivity), > 0. What
        some papers call noise multiplier, the standard deviation over the clipping norm
        alone, is ``noise_std`` here.
    min_separation, max_participations : int
        What the sampler enforces for every client.
    config : flwr.serverapp.PrivacyConfig
        With sampling method ``no-amplification``.
    evaluations : Evaluations, optional
        See :class:`RoundAccountant`.

    References
    ----------
    Denisov et al. 2022, arXiv 2202.08312 (adaptivity); Balle and Wang 2018 (epsilon).
    """

    _sampling = "no-amplification"

    def __init__(
        self,
        factorization: Factorization,
        noise_multiplier: float,
        min_separation: int,
        max_participations: int,
        config: PrivacyConfig,
        evaluations: Evaluations | None = None,
    ) -> None:
        super().__init__(config, factorization.rounds, evaluations)
        self.factorization = factorization
        self.noise_multiplier = positive(
            "noise_multiplier", noise_multiplier, "a run without noise has no privacy"
        )
        self.min_separation = whole("min_separation", min_separation, 1)
        self.max_participations = whole("max_participations", max_participations, 1)
        self.sensitivity: Sensitivity = factorization.sensitivity(
            min_separation, max_participations
        )
        exact = self.sensitivity.exact
        self._method = "gaussian-exact" if exact else "gaussian-upper-bound"
        # Nothing and everything need no sensitivity of a part.
        self._mu: dict[int, float] = {0: 0.0, self.rounds: 1 / self.noise_multiplier}

    @property
    def noise_std(self) -> float:
        """Standard deviation of Z in units of the clipping norm."""
        return self.noise_multiplier * self.sensitivity.value

    def mu_after(self, rounds: int) -> float:
        """Return mu of the first ``rounds`` rounds."""
        rounds = self._check_rounds(rounds)
        return math.hypot(self._trained(rounds), self._evaluated(rounds))

    def _trained(self, rounds: int) -> float:
        """Return mu of the models of the first ``rounds`` rounds."""
        if rounds not in self._mu:
            part = self.factorization.first(rounds).sensitivity(
                self.min_separation, self.max_participations
            )
            # Where sensitivities are bounds, that of a part may be the larger one. The
            # whole release bounds it.
            ratio = min(1.0, part.value / self.sensitivity.value)
            self._mu[rounds] = ratio / self.noise_multiplier
        return self._mu[rounds]

    def epsilon_after(self, rounds: int, delta: float) -> float:
        """Return epsilon of the first ``rounds`` rounds, or an upper bound of it."""
        return gaussian_epsilon(self.mu_after(rounds), delta)

    def delta_after(self, rounds: int, epsilon: float) -> float:
        """Return delta of the first ``rounds`` rounds, or an upper bound of it."""
        return gaussian_delta(self.mu_after(rounds), epsilon)

    def _mechanism(self) -> dict[str, str | int | float]:
        return {
            "factorization": self.factorization.fingerprint(),
            "noise-multiplier": self.noise_multiplier,
            "min-separation": self.min_separation,
            "max-participations": self.max_participations,
        }
