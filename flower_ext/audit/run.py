r"""Auditing a run, to see whether it leaks more than its accountant says.

    report = audit(lambda run: AdditiveStrategy(mechanism=Mechanism(...)))
    print(report)

Every client of an in-process run is a canary: its contribution is a direction of its
own, far above the clipping norm, and a fair coin decides whether it is really sent. The
strategy draws its cohorts, clips, adds up and adds noise as it always does; the audit
looks at the noisy sums that are released and asks which canaries are in them.
"""

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Literal, get_args

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from numpy.typing import NDArray

from flower_ext.audit.bounds import (
    Counts,
    epsilon_one_run,
    one_run_guesses,
    refuted_noise,
    shift_ratio,
    split_counts,
)
from flower_ext.audit.canaries import (
    Canaries,
    binned_scores,
    learned_whitening,
    matched_scores,
    sampled_scores,
    whitening,
)
from flower_ext.core.arrays import Lazy, from_record, is_averaged
from flower_ext.core.contribution import Contribution, Total
from flower_ext.core.errors import one_of, open_unit, refuse, whole
from flower_ext.core.protocol import Reply, Round
from flower_ext.core.typing import Floats
from flower_ext.privacy.accounting.accountants import (
    GaussianAccountant,
    RoundAccountant,
)
from flower_ext.privacy.accounting.balls_in_bins import BallsInBinsAccountant
from flower_ext.privacy.accounting.calibration import epsilon_for, loss_distribution
from flower_ext.privacy.accounting.gaussian import gaussian_epsilon
from flower_ext.privacy.accounting.sampled import (
    SampledGaussianAccountant,
    WithoutReplacementAccountant,
)
from flower_ext.privacy.private_sum import PrivateSum
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.simulation.local import LocalGrid

Method = Literal["auto", "gaussian", "trade-off", "counts", "one-run"]

CANARY = "canary"
_LOUDNESS = 100.0  # clipping norms; a clip that is forgotten is heard
_INTERVAL = 1e-2  # coarse privacy loss: rounded up, it refutes less
_GHOSTS = 20  # directions that nobody sends, per round
_PARAMETERS = 4  # of the default model, per direction


@dataclass(frozen=True)
class AuditReport:
    """What an audit found.

    Parameters
    ----------
    epsilon_lower_bound : float
        The run is not (this, ``delta``)-private, with probability ``confidence``.
    epsilon_claimed : float
        What the accountant says was spent.
    delta, confidence : float
        Of both, and of the bound.
    method : str
        How the bound was found, see `audit`.
    seen, unseen : int
        Canaries that were sent and that were held out, over all runs.
    most_participations : int
        Most rounds in which one canary took part.
    """

    epsilon_lower_bound: float
    epsilon_claimed: float
    delta: float
    confidence: float
    method: str
    seen: int
    unseen: int
    most_participations: int

    @property
    def violated(self) -> bool:
        """Whether the claim is refuted; what is not refuted is not proved."""
        return self.epsilon_lower_bound > self.epsilon_claimed

    def __str__(self) -> str:
        verdict = "VIOLATED" if self.violated else "consistent"
        return (
            f"{verdict}: epsilon >= {self.epsilon_lower_bound:.4g} with confidence "
            f"{self.confidence:g}, claimed {self.epsilon_claimed:.4g}, at delta "
            f"{self.delta:g} ({self.method}; {self.seen} canaries seen, {self.unseen} "
            f"unseen, up to {self.most_participations} rounds each)"
        )


def audit(
    strategy_factory: Callable[[int], AdditiveStrategy],
    *,
    arrays: ArrayRecord | None = None,
    clients: int | None = None,
    runs: int = 1,
    method: Method = "auto",
    confidence: float = 0.99,
    seed: int = 0,
) -> AuditReport:
    r"""Bound epsilon of a strategy's mechanism from below, by attacking it.

    Parameters
    ----------
    strategy_factory : Callable
        Given the number of the run, from 0, returns a new strategy with a
        ``mechanism`` with noise, sampler and all. Without a ``seed`` of the
        mechanism, or with one that depends on the number, runs are independent.
    arrays : ArrayRecord, optional
        The model, with at least as many parameters as there are clients, and better 20
        more for each round, on which the noise is learned; by default one array of four
        times as many.
    clients : int, optional
        Nodes, all of them canaries; by default the mechanism's population. More give
        tighter bounds: with m canaries the relative error of ``gaussian`` is about
        1 / (mu sqrt(m / 2)).
    runs : int
        Runs whose canaries are put together.
    method : str
        * ``gaussian``: score by the matched filter, bound mu by the shift of the scores
          of seen canaries, and epsilon by that of a Gaussian release. Close to the true
          epsilon; for noise that is Gaussian and not amplified. Two filters are tried,
          one for the noise that is claimed, one learned from the noise that there is.
        * ``trade-off``: score by the likelihood ratio with the rounds of a canary
          secret, count right and wrong (Clopper-Pearson, at a threshold chosen on half
          of the canaries), find the least noise whose whole trade-off between the two
          errors is refuted, and return the epsilon of that noise. For mechanisms
          amplified by Poisson sampling.
        * ``counts``: Clopper-Pearson at a threshold chosen on half of the canaries.
          Nothing is assumed but that scores are independent; it cannot show more than
          about log(canaries / 20).
        * ``one-run``: Steinke et al.; not even independence is assumed.
        * ``auto``: ``gaussian`` without amplification, ``trade-off`` with Poisson
          sampling, ``counts`` for cohorts of a fixed size, whose published analysis is
          so loose that little can be refuted, and for balls in bins.
    confidence : float
        Probability that the bound holds; a correct mechanism is called violated with
        probability at most 1 - ``confidence``.
    seed : int
        Of the canaries' directions and coins.

    Returns
    -------
    AuditReport
        Print it, or assert ``not report.violated``.

    Raises
    ------
    ValueError
        If nothing is claimed: no mechanism, no noise, or a simulated cohort.

    Notes
    -----
    The attack knows who takes part, unless the accounting counts on cohorts being
    secret. It covers what happens between a client's contribution and the release:
    cohorts, clipping, sum and noise. Not covered: what the strategy does with the
    raw replies elsewhere, metrics of clients, the bits of adaptive clipping, and
    whether the generator of the noise can be guessed.

    References
    ----------
    Andrew et al. 2023, arXiv 2302.03098 (canary clients, one shot); Nasr et al. 2023,
    arXiv 2302.07956; Steinke, Nasr, Jagielski 2023, arXiv 2305.08846.
    """
    whole("runs", runs, 1)
    whole("seed", seed, 0)
    one_of("method", method, get_args(Method))
    open_unit("confidence", confidence)
    found = []
    for number in range(runs):
        with _quiet():
            run = _CanaryRun(strategy_factory(number), clients, arrays, [seed, number])
            run.play()
        found.append(run)
    accountant = found[0].accountant
    delta = found[0].private.mechanism.target_delta
    if method == "auto":
        method = "counts"
        if isinstance(accountant, GaussianAccountant):
            method = "gaussian"
        elif isinstance(accountant, SampledGaussianAccountant):
            method = "trade-off"
    scored = [run.scores() for run in found]
    scores, strengths, included = map(np.concatenate, zip(*scored, strict=True))
    if method == "gaussian":
        if not isinstance(accountant, GaussianAccountant):
            refuse("method", method, "another one", "amplified by sampling")
        each = 1 - (1 - confidence) / 2  # two attacks
        heard = np.where(included, strengths, 0.0)
        mu = shift_ratio(scores, heard, each) * float(heard.max())
        bound = _gaussian_epsilon(max(mu, _learned_mu(found, each)), delta)
    elif method == "one-run":
        guesses = len(scores)
        correct = one_run_guesses(scores, included, guesses)
        bound = epsilon_one_run(correct, guesses, guesses, delta, confidence)
    else:
        halves = scores[included], scores[~included]
        if method == "counts":
            value = partial(Counts.epsilon, delta=delta, confidence=confidence)
            bound = value(split_counts(*halves, value, seed=seed))
        else:
            value = partial(Counts.mu, confidence=confidence)
            counts = split_counts(*halves, value, seed=seed)
            bound = _trade_off_epsilon(accountant, counts, delta, confidence)
    return AuditReport(
        epsilon_lower_bound=bound,
        epsilon_claimed=max(run.accountant.get_epsilon(delta) for run in found),
        delta=delta,
        confidence=confidence,
        method=method,
        seen=int(included.sum()),
        unseen=int((~included).sum()),
        most_participations=max(int(run.took_part().sum(0).max()) for run in found),
    )


def _learned_mu(runs: list["_CanaryRun"], confidence: float) -> float:
    """Return what the best attack on the noise that there is shows of mu.

    Noise that is repeated, missing in a round or wrongly correlated does not show in
    the attack on the noise that is claimed. Its covariance is learned on directions
    that nobody sent; judged are the quarter of the canaries whose patterns it exposes
    most, by the root mean square of their strengths, since these are learned too.
    """
    ghosts = np.concatenate([run.ghosts() for run in runs], axis=1)
    if ghosts.shape[1] < 4 * len(ghosts):
        return 0.0
    whiten = learned_whitening(ghosts)
    scored = [run.scores(whiten) for run in runs]
    scores, strengths, included = map(np.concatenate, zip(*scored, strict=True))
    kept = strengths >= np.quantile(strengths, 0.75)
    scores, strengths, included = scores[kept], strengths[kept], included[kept]
    if included.sum() < 3:
        return 0.0
    level = math.sqrt(float(np.mean(strengths[included] ** 2)))
    return shift_ratio(scores, np.where(included, strengths, 0.0), confidence) * level


def _gaussian_epsilon(mu: float, delta: float) -> float:
    return gaussian_epsilon(mu, delta) if math.isfinite(mu) else math.inf


def _trade_off_epsilon(
    accountant: RoundAccountant, counts: Counts, delta: float, confidence: float
) -> float:
    """Return epsilon of the same mechanism with the least noise that is refuted."""
    if isinstance(accountant, GaussianAccountant):
        return _gaussian_epsilon(counts.mu(confidence), delta)
    if not isinstance(accountant, SampledGaussianAccountant):
        refuse(
            "method",
            "trade-off",
            "counts or one-run",
            "cohorts are of a fixed size, or balls in bins",
        )
    rate, cycle = accountant.sampling_probability, accountant.cycle
    rounds = accountant.num_releases

    def deltas(noise: float, epsilons: Floats) -> Floats:
        one = loss_distribution(noise, rate, 1, _INTERVAL)
        loss = one.self_compose(-(-rounds // cycle))
        return np.array([loss.get_delta_for_epsilon(float(e)) for e in epsilons])

    noise = refuted_noise(counts, deltas, accountant.noise_multiplier, confidence)
    if math.isinf(noise):
        return 0.0
    return epsilon_for(
        noise, delta, rounds=rounds, sampling_probability=rate, cycle=cycle
    )


class _CanaryRun:
    """One run of a strategy in which every client is a canary.

    Parameters
    ----------
    strategy : AdditiveStrategy
        Taken over: its contributions are replaced and its noisy sums read.
    clients : int or None
        Number of nodes.
    arrays : ArrayRecord or None
        The model.
    seed : list of int
        Of directions and coins.
    """

    def __init__(
        self,
        strategy: AdditiveStrategy,
        clients: int | None,
        arrays: ArrayRecord | None,
        seed: list[int],
    ) -> None:
        private = strategy.private_sum
        if private is None or private.accountant is None:
            raise ValueError(
                "the strategy must have a mechanism with noise: nothing is claimed"
            )
        plan = private.mechanism
        if plan.simulated_cohort is not None:
            refuse(
                "simulated_cohort",
                plan.simulated_cohort,
                "None",
                "the claim is about the planned cohort, not the simulated one",
            )
        self.private: PrivateSum = private
        self.accountant: RoundAccountant = private.accountant
        self._replaced = isinstance(self.accountant, WithoutReplacementAccountant)
        self._scales = {**strategy.scales, **plan.scales}
        count = plan.population_size
        if clients is not None:
            count = whole("clients", clients, 2)
        if arrays is None:
            size = _PARAMETERS * (count + _GHOSTS * plan.num_rounds)
            arrays = ArrayRecord({"w": Array(np.zeros(size, np.float32))})
        self._arrays = arrays
        generator = np.random.default_rng([*seed, 1])
        self.included = generator.random(count) < 0.5
        self._seed = int(generator.integers(2**31))
        self._canaries: Canaries | None = None
        self._loudness = _LOUDNESS * private.clipping_norm
        self._present: list[int] = []
        self._cohorts: list[list[int]] = []
        self._releases: list[Floats] = []
        self._norms: list[float] = []
        self._strategy = strategy
        self._release = private.release
        strategy.contribution = self._contribute  # type: ignore[method-assign]
        private.release = self._listen  # type: ignore[method-assign]
        strategy.fraction_evaluate = 0.0
        # There may be more canaries than clients are planned for.
        private.require_population = lambda known: None  # type: ignore[method-assign]

    def play(self) -> None:
        """Run all planned rounds, or as many as the budget allows."""
        grid = LocalGrid(_echo(self._strategy), len(self.included))
        rounds = self.private.mechanism.num_rounds
        self._strategy.start(grid, self._arrays, num_rounds=rounds)

    def _contribute(self, reply: Reply, round: Round) -> Contribution:
        """Return a canary's direction, or nothing if it is held out."""
        index = reply.whole(CANARY, len(self.included))
        self._present.append(index)
        zero = self._strategy.zero(round.sent).carried()
        loudness = self._loudness
        if not self.included[index]:
            if not self._replaced:
                return zero
            loudness = -loudness
        direction = self._known.direction(index)
        pieces = {
            key: value * (loudness / self._scale(key))
            for key, value in direction.items()
        }
        arrays = {
            part: {
                name: pieces.get(f"{part}/{name}", value)
                for name, value in named.items()
            }
            for part, named in zero.arrays.items()
        }
        scalars = {name: pieces[name] for name in zero.scalars}
        return Contribution(arrays, scalars=scalars)

    def _listen(self, total: Total) -> Total:
        """Project the noisy sums on the canaries before the strategy uses them."""
        total = self._release(total)
        pieces: dict[str, Floats] = {
            f"{part}/{name}": value * self._scale(part)
            for part, named in total.arrays.items()
            for name, value in named.items()
        }
        pieces |= {k: x * self._scale(k) for k, x in total.scalars.items()}
        self._norms.append(float(self.private.metrics()["clipping-norm"]))  # type: ignore[arg-type]
        self._releases.append(self._known.project(pieces))
        self._cohorts.append(self._present)
        self._present = []
        return total

    @property
    def _known(self) -> Canaries:
        """The canaries, made for the layout of a contribution."""
        if self._canaries is None:
            zero = self._strategy.zero(from_record(self._arrays))
            shapes = {
                key: piece.shape
                for key, piece in zero.layout().items()
                if isinstance(piece, Lazy) or is_averaged(piece)
            }
            size, count = sum(map(prod, shapes.values())), len(self.included)
            if size < count:
                refuse("clients", count, f"<= {size} parameters")
            count = min(size, count + _GHOSTS * self.private.mechanism.num_rounds)
            self._canaries = Canaries(shapes, count, seed=self._seed)
        return self._canaries

    def _scale(self, key: str) -> float:
        return self._scales.get(key.partition("/")[0], 1.0)

    def took_part(self) -> NDArray[np.bool_]:
        """Return who was in which round, shape ``(rounds, canaries)``."""
        part = np.zeros((len(self._cohorts), len(self.included)), np.bool_)
        for row, cohort in zip(part, self._cohorts, strict=True):
            row[cohort] = True
        return part

    def _projections(self) -> Floats:
        """Return the releases in units of the clipping norm."""
        norms = np.array(self._norms)[:, None]
        return np.asarray(np.array(self._releases) / norms)

    def ghosts(self) -> Floats:
        """Return the projections on directions that nobody sent."""
        return self._projections()[:, len(self.included) :]

    def scores(
        self, whiten: Floats | None = None
    ) -> tuple[Floats, Floats, NDArray[np.bool_]]:
        """Return scores, strengths and coins of the canaries that could be there."""
        releases = self._projections()[:, : len(self.included)]
        if whiten is None:
            plan = self.private.factorization.first(len(releases))
            whiten = whitening(plan, self.private.noise_std)
        accountant = self.accountant
        if isinstance(accountant, GaussianAccountant):
            part = self.took_part()
            scores, strengths = matched_scores(whiten, releases, part)
            drawn = part.any(axis=0)  # whoever never was says nothing
            return scores[drawn], strengths[drawn], self.included[drawn]
        if isinstance(accountant, BallsInBinsAccountant):
            scores = binned_scores(whiten, releases, accountant.num_bins)
            return scores, np.zeros_like(scores), self.included
        rounds = np.arange(1, len(releases) + 1)
        clients = np.arange(len(self.included))
        if isinstance(accountant, SampledGaussianAccountant):
            turn = np.equal.outer(rounds % accountant.cycle, clients % accountant.cycle)
            chance = turn * accountant.sampling_probability
        elif isinstance(accountant, WithoutReplacementAccountant):
            share = accountant.cohort / accountant.config.population_size
            chance = np.full(releases.shape, share)
        else:
            refuse("accountant", accountant, "one of flower_ext.privacy")
        scores = sampled_scores(whiten, releases, chance, replaced=self._replaced)
        return scores, np.zeros_like(scores), self.included


def _echo(strategy: AdditiveStrategy) -> ClientApp:
    """Return a client that sends nothing but its number."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["partition-id"])
        metrics = MetricRecord({CANARY: number, strategy.weighted_by_key: 1})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Flower's log of every round to itself."""
    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
