"""Mechanism: what a strategy needs to be differentially private."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache, partial
from logging import INFO
from typing import Literal, TypedDict, get_args

from flwr.serverapp import NeighboringRelation, PrivacyConfig, SamplingMethod

from flower_ext._flower import log
from flower_ext.core.errors import at_least, one_of, open_unit, positive, refuse, whole
from flower_ext.core.sampling import LEAST_SECRET, Guarantee, Sampler
from flower_ext.privacy.accounting.accountants import (
    Evaluations,
    GaussianAccountant,
    RoundAccountant,
)
from flower_ext.privacy.accounting.balls_in_bins import (
    BallsInBinsAccountant,
    best_in_bins,
    noise_multiplier_in_bins,
    target_in_bins,
)
from flower_ext.privacy.accounting.calibration import (
    epsilon_for,
    noise_multiplier_for,
    noise_multiplier_without_replacement,
)
from flower_ext.privacy.accounting.gaussian import gaussian_mu
from flower_ext.privacy.accounting.sampled import (
    SampledGaussianAccountant,
    WithoutReplacementAccountant,
)
from flower_ext.privacy.amplified_bands import best_bands
from flower_ext.privacy.clipping import Clipping, FlatClipping
from flower_ext.privacy.factorizations.banded import BandedToeplitz
from flower_ext.privacy.factorizations.factorization import Factorization, Identity
from flower_ext.privacy.factorizations.selection import Choice, best_mechanism
from flower_ext.privacy.factorizations.trees import TreeAggregation
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload
from flower_ext.privacy.private_evaluation import EvaluationSum, PrivateEvaluation

FactorizationName = Literal["best", "identity", "tree"]


class MechanismOptions(TypedDict, total=False):
    """Options that a strategy passes on to a :class:`Mechanism`, which documents them.

    They are all but the three numbers that plan the run.
    """

    clipping: float | Clipping
    noise_multiplier: float | None
    max_epsilon: float | None
    target_delta: float
    factorization: Factorization | FactorizationName
    memory: int
    workload: Workload
    amplified: bool
    simulated_cohort: int | None
    scales: Mapping[str, float] | None
    unprotected_metrics: bool
    evaluation: PrivateEvaluation | None
    seed: int | None


class Mechanism:
    r"""User-level differential privacy for any strategy of the pack.

    Every client's contribution, all its arrays and scalars as one vector, is clipped to
    an l2 norm; the contributions are added up; noise, correlated over the rounds by
    the factorization, is added to the sum; the noisy sum is divided by the *planned*
    cohort. What the strategy and its optimizer do with it is post-processing.

    Parameters
    ----------
    num_rounds : int
        Rounds that the noise is planned for; a run may be shorter, never longer.
    num_sampled_clients : int
        The planned cohort, and the divisor of every round, whoever replies.
    population_size : int
        Clients that may ever take part. A run that meets more ends.
    clipping : float or Clipping (default: 1.0)
        Flat l2 norm, or a :class:`~flower_ext.privacy.PerLayerClipping` or
        :class:`~flower_ext.privacy.AdaptiveClipping`.
    noise_multiplier : float, optional
        z, the standard deviation of the noise over (clipping norm x sensitivity of the
        whole run). The run is as private as one Gaussian release with
        :math:`\mu = 1 / z`. With ``amplified`` and independent noise it is the usual
        one of DP-SGD, standard deviation over clipping norm. 0 only clips, and protects
        nothing.
    max_epsilon : float, optional
        Without ``noise_multiplier``: the target. The run has the least noise that keeps
        it within (``max_epsilon``, ``target_delta``). With ``noise_multiplier``: the
        budget. The run stops before the round that would exceed it.
    target_delta : float (default: 1e-6)
        Should be below 1 / ``population_size``.
    factorization : Factorization or str (default: "best")
        ``best`` compares the mechanisms that fit ``memory`` and takes the one of least
        error, see :func:`~flower_ext.privacy.best_mechanism`; with ``amplified``
        independent noise, or bands for a ``CyclicPoissonSampler``, whose cycle
        :func:`~flower_ext.privacy.best_amplified` finds (of balls in bins, with
        ``max_epsilon``, :func:`~flower_ext.privacy.best_in_bins`); ``identity`` is
        independent noise, plain DP-FedAvg; ``tree`` is Honaker's tree estimator.
    memory : int (default: 4)
        Model-sized buffers that the server can spare, for ``best``.
    workload : Workload (default: plain averaging)
        The server's momentum and learning rates, for ``best``: noise is chosen so that
        there is least in its models. It has no part in what a client may learn.
    amplified : bool (default: False)
        Count on the cohorts being secret. Needs independent noise and a
        :class:`~flower_ext.core.sampling.PoissonSampler` with a probability or a
        :class:`~flower_ext.core.sampling.UniformSampler` (then all clients must be
        connected in every round), or a banded mechanism and a
        :class:`~flower_ext.core.sampling.CyclicPoissonSampler`, or any but trees and a
        :class:`~flower_ext.core.sampling.BallsInBinsSampler`; without a seed, which
        then comes from the operating system. See :attr:`hides_cohorts`.
    simulated_cohort : int, optional
        For research: clients really drawn in a round, fewer than planned. The noise of
        the planned cohort is scaled down by ``simulated_cohort / num_sampled_clients``
        and the sum divided by ``simulated_cohort``, so that the model moves as with
        the large cohort's noise. Epsilon is then that of the planned cohort and
        population. The simulation itself is not private: the sampler's limits are
        assumed, not enforced, any seed will do, and what the simulated clients replied
        is counted and reported.
    scales : Mapping[str, float], optional
        Factors applied before clipping, and taken back after the noise, to parts of the
        contribution (``"fisher"``) and scalars; of weights that depend on data
        (``"weight"``, or ``"weight-of-"`` and the part), and of counts (``"count-of-"``
        and the part). Large factors are for what is small and matters. They take the
        place of the strategy's own.
    unprotected_metrics : bool (default: False)
        Report averages of the clients' own metrics. They are computed from raw data
        without noise and no epsilon covers them; otherwise they are withheld, and
        clients are not asked to evaluate. Refused where cohorts must be secret: an
        average tells who is in it.
    evaluation : PrivateEvaluation, optional
        Clients' own metrics of evaluations, clipped and with noise, within the same
        epsilon: ``noise_multiplier`` and ``max_epsilon`` are those of models and
        evaluations together. With ``amplified`` for Poisson sampling only.
    seed : int, optional
        Secret seed of reproducible noise, for one run; by default noise comes from the
        operating system's cryptographic generator. Any other run with it, be it the
        same started anew without its checkpoint, repeats the noise, and the difference
        of the two is without. One that can be found by trying, below 2**96, is for
        research: ``settings()`` says that it protects nothing.

    Notes
    -----
    Guarantee. Unit: one client (node) with everything it ever sends. Relation: its
    contributions become zero, ``add-or-remove-one`` in Flower's vocabulary
    (``replace-one`` for amplification by cohorts of fixed size). The released values
    are the models and the strategy's metrics after every round, and the means of
    ``evaluation``. Error replies, replies
    that are dropped and empty cohorts only remove contributions from the sum: noise
    and divisor stay, so the guarantee does.

    A round that was asked for is released even if nothing arrived, since whether
    anything arrives may depend on data. A run ends early only where replies came and
    none could be read so far, as of a client that does not fit; with ``amplified`` not
    even there. With ``checkpoint`` a round is saved first and released then, and no
    other model is ever released in its place. ``start`` again goes on with the plan:
    releases are counted over all starts of a strategy, and cohorts, limits, noise and
    epsilon follow that count. Two strategies are two runs, whose epsilons add up; one
    that has begun cannot be copied.

    Not protected: who takes part, replies or fails, and how many bytes it sends where
    they are sparse, unless ``amplified``; the metrics of ``unprotected_metrics``; the
    server, which sees every contribution, and whoever watches its network, its clients'
    output or its clock; seeds and checkpoints, from which the noise can be removed.

    ``amplified`` counts on cohorts that only the server and the clients in them know.
    Numbers of replies, errors and messages, bytes and seconds are then neither in
    metrics nor in the log nor with the tracker, and no reply ends a run: try an app
    without ``amplified`` first.

    The first t rounds of an unamplified mechanism are themselves a Gaussian release,
    and epsilon is exact, or, where the sensitivity is bounded (trees), an upper bound;
    see :mod:`flower_ext.privacy.accounting.accountants`.

    References
    ----------
    Kairouz et al. 2021, arXiv 2103.00039 (DP-FTRL); Denisov et al. 2022, arXiv
    2202.08312 (matrix factorization, adaptivity); McMahan et al. 2018, arXiv
    1710.06963 (DP-FedAvg).

    Examples
    --------
    >>> mechanism = Mechanism(num_rounds=100, num_sampled_clients=20,
    ...                       population_size=1000, clipping=0.5, noise_multiplier=1.0)
    >>> mechanism.cohort
    20
    """

    def __init__(
        self,
        *,
        num_rounds: int,
        num_sampled_clients: int,
        population_size: int,
        clipping: float | Clipping = 1.0,
        noise_multiplier: float | None = None,
        max_epsilon: float | None = None,
        target_delta: float = 1e-6,
        factorization: Factorization | FactorizationName = "best",
        memory: int = 4,
        workload: Workload = PREFIX_SUMS,
        amplified: bool = False,
        simulated_cohort: int | None = None,
        scales: Mapping[str, float] | None = None,
        unprotected_metrics: bool = False,
        evaluation: PrivateEvaluation | None = None,
        seed: int | None = None,
    ) -> None:
        self.num_rounds = whole("num_rounds", num_rounds, 1)
        self.num_sampled_clients = whole("num_sampled_clients", num_sampled_clients, 1)
        self.population_size = whole("population_size", population_size, 1)
        if num_sampled_clients > population_size:
            refuse("num_sampled_clients", num_sampled_clients, "<= population_size")
        self.clipping = (
            clipping if isinstance(clipping, Clipping) else FlatClipping(clipping)
        )
        if noise_multiplier is None and max_epsilon is None:
            raise ValueError(
                "noise_multiplier=None and max_epsilon=None: one of them says how much "
                "noise there is"
            )
        if noise_multiplier is not None:
            at_least("noise_multiplier", noise_multiplier, 0)
        if max_epsilon is not None:
            positive("max_epsilon", max_epsilon)
        if noise_multiplier != 0 and math.isinf(self.clipping.clipping_norm):
            refuse(
                "clipping",
                math.inf,
                "finite",
                "noise protects only what is bounded; noise_multiplier=0 has no noise",
            )
        self.noise_multiplier = noise_multiplier
        self.max_epsilon = max_epsilon
        self.target_delta = open_unit("target_delta", target_delta)
        self.memory = whole("memory", memory, 0)
        if not isinstance(workload, Workload):
            refuse("workload", workload, "a Workload(momentum=..., learning_rates=...)")
        self.workload = workload.over(self.num_rounds)
        self.factorization = factorization
        if isinstance(factorization, Factorization):
            if factorization.rounds != num_rounds:
                refuse(
                    "factorization",
                    factorization,
                    f"planned for num_rounds={num_rounds}",
                )
        else:
            one_of("factorization", factorization, get_args(FactorizationName))
        for name, flag in (
            ("amplified", amplified),
            ("unprotected_metrics", unprotected_metrics),
        ):
            if not isinstance(flag, bool):
                refuse(name, flag, "True or False")
        if amplified and unprotected_metrics and simulated_cohort is None:
            refuse(
                "unprotected_metrics",
                True,
                "False with amplified=True",
                "averages over a cohort tell who is in it, and it must be secret",
            )
        self.amplified = amplified
        self.unprotected_metrics = unprotected_metrics
        if not isinstance(evaluation, PrivateEvaluation | None):
            refuse("evaluation", evaluation, "a PrivateEvaluation, or None")
        if evaluation is not None:
            evaluation.fit(num_rounds, num_sampled_clients, population_size)
            if unprotected_metrics:
                cause = "raw averages beside noisy ones"
                refuse("unprotected_metrics", True, "False with evaluation", cause)
        self.evaluation = evaluation
        if simulated_cohort is not None:
            whole("simulated_cohort", simulated_cohort, 1)
            if simulated_cohort > num_sampled_clients:
                refuse("simulated_cohort", simulated_cohort, "<= num_sampled_clients")
        self.simulated_cohort = simulated_cohort
        self.scales = {
            name: positive(f"scales[{name!r}]", scale)
            for name, scale in (scales or {}).items()
        }
        if seed is not None:
            whole("seed", seed, 0)
        self.seed = seed
        self._seed_is_taken = False

    @property
    def cohort(self) -> int:
        """Clients drawn in a round, and the divisor: planned, or simulated."""
        return self.simulated_cohort or self.num_sampled_clients

    @property
    def shrink(self) -> float:
        """Factor on the planned cohort's noise: 1, or less in a simulation."""
        return self.cohort / self.num_sampled_clients

    @property
    def is_private(self) -> bool:
        """Whether there is noise at all."""
        return self.noise_multiplier != 0

    @property
    def hides_cohorts(self) -> bool:
        """Whether whatever depends on a cohort is withheld: its size, its errors.

        True where epsilon counts on secret cohorts. Without noise, and in a simulation
        of the planned cohort, nothing is claimed of those that are drawn.
        """
        return self.amplified and self.is_private and self.simulated_cohort is None

    @property
    def has_weak_seed(self) -> bool:
        """Whether the noise has a seed that can be found by trying."""
        return self.seed is not None and self.seed < LEAST_SECRET

    def take_seed(self) -> None:
        """Refuse a second run in this process with the same secret seed.

        Raises
        ------
        ValueError
            If another strategy has it.
        """
        if self.seed is None or self.has_weak_seed:
            return
        if self._seed_is_taken:
            raise ValueError(
                "seed must be another one, or left out, for a second strategy: the "
                "difference of two runs with the same noise is without noise"
            )
        self._seed_is_taken = True

    def require_clients(self, sampler: Sampler) -> None:
        """Refuse a plan whose rounds must run short of clients and be mostly noise.

        Raises
        ------
        ValueError
            If the sampler's limits, or its probability, leave fewer clients of the
            population for a round than are planned.
        """
        guarantee, population = sampler.guarantee(), self.population_size
        draws = self.keeps_in_simulation(sampler)
        cohort = self.cohort if draws else self.num_sampled_clients
        expected = sampler.expected_size(cohort, population)
        if guarantee.kind in _INDEPENDENT:
            # Cohorts vary: half the plan on average is no mistake, only more noise.
            expected *= 2
        if expected < cohort:
            refuse(
                "num_sampled_clients",
                cohort,
                f"at most {expected:.4g}",
                f"that is what {type(sampler).__name__} with min_separation="
                f"{guarantee.min_separation} finds in a round among population_size="
                f"{population} clients; the rest would be noise",
            )
        most = guarantee.max_participations
        if most is not None and most * population < self.num_rounds * cohort:
            refuse(
                "max_participations",
                most,
                f">= {-(-self.num_rounds * cohort // population)}",
                f"{self.num_rounds} rounds of {cohort} of population_size="
                f"{population} clients; later rounds would be noise",
            )

    def keeps_in_simulation(self, sampler: Sampler) -> bool:
        """Return whether a sampler also draws the small cohorts of a simulation.

        The few clients there cannot keep the limits of the planned many, and a
        probability is that of the planned population.
        """
        return sampler.guarantee().kind in ("fixed-size", "unstated")

    def needs_all_nodes(self, sampler: Sampler) -> bool:
        """Return whether every client must be connected in every round."""
        fixed_size = sampler.guarantee().kind == "fixed-size"
        return self.amplified and self.simulated_cohort is None and fixed_size

    def choose(self, sampler: Sampler) -> Factorization:
        """Return the factorization for what a sampler promises."""
        chosen, (separation, most) = self.factorization, self.participation(sampler)
        # Bands beyond the separation overlap for one client: the sensitivity is then a
        # coarse bound, or the amplification wrong. Of bins all overlaps are counted.
        in_bins = self.amplified and sampler.guarantee().kind == "balls-in-bins"
        widest = separation if most > 1 and not in_bins else self.num_rounds
        if isinstance(chosen, BandedToeplitz) and chosen.bands > widest:
            refuse(
                "factorization",
                chosen,
                f"of at most {separation} bands",
                f"the sampler lets a client return after {separation} rounds: a "
                "MinSeparationSampler of as many rounds as bands",
            )
        if isinstance(chosen, Factorization):
            return chosen
        if chosen == "tree":
            return TreeAggregation(self.num_rounds)
        # Without noise nothing is correlated, and secret cohorts amplify every round's
        # noise alone, but for bins, which are drawn once for all rounds, and for turns,
        # between which there is room for bands.
        in_turns = self.amplified and sampler.guarantee().kind == "cyclic-poisson"
        if chosen == "best" and in_turns and self.is_private:
            plan = (self.num_rounds, separation, self.memory, self.workload)
            bands = _best_bands(*plan)
            log(INFO, "Mechanism chosen: %s of at most %d", bands.name, separation)
            return bands
        alone = not self.is_private or (self.amplified and not in_bins)
        if chosen == "identity" or alone:
            return Identity(self.num_rounds)
        problem = (self.num_rounds, separation, most, self.memory)
        best = _best(*problem, self.workload)
        if in_bins and self.noise_multiplier is None:
            return self._best_in_bins(best.factorization, separation)
        log(INFO, "Mechanism chosen: %s", best.reason)
        return best.factorization

    def _best_in_bins(self, first: Factorization, num_bins: int) -> Factorization:
        """Return the best of those that meet the target, now that it is known."""
        assert self.max_epsilon is not None
        chosen = best_in_bins(
            self.max_epsilon,
            self.target_delta,
            first=first,
            num_bins=num_bins,
            memory=self.memory,
            workload=self.workload,
        )
        log(INFO, "Mechanism chosen: %s, for balls in bins", chosen.name)
        return chosen

    def participation(self, sampler: Sampler) -> tuple[int, int]:
        """Return the least separation and most participations that are guaranteed."""
        guarantee = sampler.guarantee()
        separation, most = guarantee.min_separation, guarantee.max_participations
        possible = -(-self.num_rounds // separation)  # rounds 1, 1 + separation, ...
        return separation, possible if most is None else min(most, possible)

    def account(
        self, factorization: Factorization, sampler: Sampler
    ) -> RoundAccountant | None:
        """Return the accountant of a run, its noise that which meets the target.

        Raises
        ------
        ValueError
            If the sampler does not deliver what the accounting would count on.
        """
        if not self.is_private:
            return None
        if self.amplified:
            return self._amplified(factorization, sampler)
        noise, evaluations = self._noise(noise_multiplier_for), None
        if self.evaluation:
            noise, evaluations = self.evaluation.split(noise, self.num_rounds)
        # Any cohort will do: the noise is for the worst one within the limits.
        return GaussianAccountant(
            factorization,
            noise,
            *self.participation(sampler),
            self._config(SamplingMethod.NO_AMPLIFICATION),
            evaluations,
        )

    def evaluates(self, accountant: RoundAccountant | None) -> EvaluationSum | None:
        """Return what releases the evaluations of a run, if there are any."""
        if self.evaluation is None:
            return None
        planned = self.evaluation.num_sampled_clients or self.num_sampled_clients
        noise = 0.0
        if accountant is not None:
            if accountant.evaluations is None:  # without this they had no noise
                raise ValueError("evaluation needs an accountant that counts it")
            noise = accountant.evaluations.noise_multiplier
        return EvaluationSum(
            self.evaluation,
            planned=planned,
            cohort=max(1, round(planned * self.shrink)),
            noise_multiplier=noise,
            seed=self.seed,
        )

    def _amplified(
        self, factorization: Factorization, sampler: Sampler
    ) -> RoundAccountant:
        guarantee = sampler.guarantee()
        # In cohorts of fixed size, who trains because a client does not could tell of
        # it by what it has kept and now measures.
        if self.evaluation and guarantee.kind not in _INDEPENDENT:
            refuse(
                "evaluation",
                self.evaluation,
                f"left out with amplified=True and {type(sampler).__name__}",
                "it is proved for PoissonSampler(probability=...), "
                "CyclicPoissonSampler and BallsInBinsSampler",
            )
        if guarantee.kind == "balls-in-bins" and guarantee.can_be_secret:
            return self._in_bins(factorization, guarantee.min_separation)
        # Correlated noise spans rounds, and amplification needs rounds that are drawn
        # anew for a client; bands no wider than its turns are apart have both.
        cyclic = guarantee.kind == "cyclic-poisson"
        if not isinstance(factorization, BandedToeplitz if cyclic else Identity):
            wanted = "a BandedToeplitz" if cyclic else "identity"
            refuse("factorization", factorization, wanted, _CYCLIC)
        if guarantee.can_be_secret and guarantee.kind == "fixed-size":
            return self._without_replacement()
        if guarantee.can_be_secret and guarantee.probability:
            return self._poisson(factorization, guarantee, guarantee.probability)
        raise ValueError(
            "amplified=True needs a sampler whose guarantee() says how it draws, not "
            f"{type(sampler).__name__}: PoissonSampler(probability=...), "
            "UniformSampler, CyclicPoissonSampler or BallsInBinsSampler"
        )

    def _in_bins(self, factorization: Factorization, num_bins: int) -> RoundAccountant:
        # Flower has no word for it: no round is sampled by itself.
        config = self._config(SamplingMethod.NO_AMPLIFICATION)
        account = partial(
            BallsInBinsAccountant, factorization, num_bins=num_bins, config=config
        )

        spent = partial(
            target_in_bins,
            delta=self.target_delta,
            factorization=factorization,
            num_bins=num_bins,
        )
        calibrate = partial(
            noise_multiplier_in_bins, factorization=factorization, num_bins=num_bins
        )
        noise, evaluations = self._shared(calibrate, spent)
        return account(noise_multiplier=noise, evaluations=evaluations)

    def _poisson(
        self, factorization: Factorization, guarantee: Guarantee, probability: float
    ) -> RoundAccountant:
        cycle = guarantee.min_separation
        calibrate = partial(
            noise_multiplier_for,
            rounds=self.num_rounds,
            sampling_probability=probability,
            cycle=cycle,
        )
        spent = partial(
            epsilon_for,
            delta=self.target_delta,
            rounds=self.num_rounds,
            sampling_probability=probability,
            cycle=cycle,
        )
        noise, evaluations = self._shared(calibrate, spent)
        config = self._config(SamplingMethod.POISSON)
        if not isinstance(factorization, BandedToeplitz):
            return SampledGaussianAccountant(
                noise, self.num_rounds, probability, config, evaluations=evaluations
            )
        # Mean of a round in the smallest group.
        cohort = probability * (self.population_size // cycle)
        return SampledGaussianAccountant.cyclic(
            factorization, noise, cohort, config, cycle=cycle, evaluations=evaluations
        )

    def _shared(
        self, calibrate: Callable[..., float], spent: Callable[[float], float]
    ) -> tuple[float, Evaluations | None]:
        """Return the amplified noise multiplier, and the evaluations beside it."""
        if self.evaluation is None:
            return self._noise(calibrate), None
        epsilon, z, delta = self.max_epsilon, self.noise_multiplier, self.target_delta
        if z is not None:
            epsilon = spent(z)
        assert epsilon is not None
        if not 0 < epsilon < math.inf:
            cause = f"its epsilon={epsilon} at target_delta={delta} cannot be shared"
            refuse("noise_multiplier", z, "another one with evaluation", cause)
        mu = math.sqrt(self.evaluation.share) * gaussian_mu(epsilon, delta)
        evaluations = self.evaluation.beside(mu, self.num_rounds)
        return calibrate(epsilon, delta, beside=mu), evaluations

    def _without_replacement(self) -> RoundAccountant:
        noise = self._noise(
            partial(
                noise_multiplier_without_replacement,
                rounds=self.num_rounds,
                population=self.population_size,
                cohort=self.num_sampled_clients,
            )
        )
        return WithoutReplacementAccountant(
            noise,
            self.num_rounds,
            self.num_sampled_clients,
            self._config(SamplingMethod.WITHOUT_REPLACEMENT),
        )

    def _noise(self, calibrate: Callable[[float, float], float]) -> float:
        if self.noise_multiplier is not None:
            return self.noise_multiplier
        assert self.max_epsilon is not None
        return calibrate(self.max_epsilon, self.target_delta)

    def _config(self, sampling: SamplingMethod) -> PrivacyConfig:
        # In a cohort of fixed size somebody else takes the place of who is left out.
        replaced = sampling is SamplingMethod.WITHOUT_REPLACEMENT
        return PrivacyConfig(
            target_delta=self.target_delta,
            population_size=self.population_size,
            neighboring_relation=NeighboringRelation.REPLACE_ONE
            if replaced
            else NeighboringRelation.ADD_OR_REMOVE_ONE,
            sampling_method=sampling,
            max_epsilon=self.max_epsilon,
        )


@lru_cache(maxsize=32)
def _best(
    rounds: int, separation: int, most: int, memory: int, workload: Workload
) -> Choice:
    """Tune once for runs that are planned alike."""
    return best_mechanism(rounds, separation, most, memory=memory, workload=workload)


@lru_cache(maxsize=32)
def _best_bands(
    rounds: int, cycle: int, memory: int, workload: Workload
) -> BandedToeplitz:
    """Tune once for runs that are planned alike."""
    return best_bands(rounds, cycle, memory=memory, workload=workload)


# What draws each client whatever it does with the others.
_INDEPENDENT = {"poisson", "cyclic-poisson", "balls-in-bins"}
_CYCLIC = (
    "with amplified=True noise is independent, or banded under a CyclicPoissonSampler, "
    "or of any bands under a BallsInBinsSampler"
)
