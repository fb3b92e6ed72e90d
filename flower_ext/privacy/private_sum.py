"""PrivateSum: a mechanism at work in one run, round after round."""

from __future__ import annotations

import copy
import math
import secrets
from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

import numpy as np

from flower_ext._flower import PrivacyBudgetExhausted
from flower_ext.core.arrays import Lazy, Term, is_averaged, norm, numpy_of, scale
from flower_ext.core.contribution import (
    COUNT_OF,
    WEIGHT,
    WEIGHT_OF,
    Contribution,
    Total,
)
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import Metrics, Phase
from flower_ext.core.replies import MalformedReply
from flower_ext.core.sampling import Sampler, UniformSampler
from flower_ext.core.typing import Floats
from flower_ext.privacy.accounting.sampled import WithoutReplacementAccountant
from flower_ext.privacy.clipping import (
    AdaptiveClipping,
    split_noise_multiplier,
    update_clipping_norm,
)
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.privacy.noise import NoiseStream
from flower_ext.privacy.noise import State as NoiseState
from flower_ext.wire.codec import Codec

_BIT = "within-clipping-norm"


class PrivateSum:
    """Clips contributions, makes their sum private, and counts what that cost.

    Parameters
    ----------
    mechanism : Mechanism
        What was planned.
    sampler : Sampler
        Its guarantee is what the noise is calibrated for.
    scales : Mapping[str, float]
        The strategy's factors for parts and scalars, applied before clipping and taken
        back after. Those of the mechanism take their place.

    Raises
    ------
    ValueError
        If mechanism and sampler do not fit together.
    """

    def __init__(
        self, mechanism: Mechanism, sampler: Sampler, scales: Mapping[str, float]
    ) -> None:
        if own := sorted(vars(sampler).keys() & {"sample", "generator", "guarantee"}):
            cause = "an object's own draws otherwise than its class guarantees"
            refuse(f"{type(sampler).__name__}'s {own}", "its own", "the class's", cause)
        self.mechanism = mechanism
        self.factorization = mechanism.choose(sampler)
        self.accountant = mechanism.account(self.factorization, sampler)
        self.evaluation = mechanism.evaluates(self.accountant)
        mechanism.require_clients(sampler)
        # Last, so that a plan that was refused has not used up the seed.
        mechanism.take_seed()
        if mechanism.hides_cohorts:
            sampler.keep_secret()
        simulated = mechanism.simulated_cohort is not None
        keeps = not simulated or mechanism.keeps_in_simulation(sampler)
        self.sampler = sampler if keeps else UniformSampler(sampler.seed)
        self.needs_all_nodes = mechanism.needs_all_nodes(sampler)
        self._fixed_size = isinstance(self.accountant, WithoutReplacementAccountant)
        # Contributions are clipped with the one; the other is what it becomes where the
        # noise restarts.
        self.clipping_norm = self._next_norm = mechanism.clipping.clipping_norm
        self.noise_std = self.accountant.noise_std if self.accountant else 0.0
        self._scales = {**scales, **mechanism.scales}
        self._variances = self.factorization.noise_variances()
        self._adaptive: AdaptiveClipping | None = None
        self._count_std = 0.0
        if isinstance(mechanism.clipping, AdaptiveClipping):
            self._plan_bits(mechanism.clipping)
        self._done = 0
        # What tells this run's saved state from that of another one; from round 1 on.
        self._run = ""
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._silent: dict[str, tuple[int, ...]] = {}
        self._stream: NoiseStream | None = None
        self._saved: NoiseState | None = None
        self._metrics: Metrics = {}

    def _plan_bits(self, adaptive: AdaptiveClipping) -> None:
        """Pay for the bits with a little more noise on everything else."""
        plan = self.factorization
        if plan.rounds > 1 and not any(map(plan.restarts_at, range(1, plan.rounds))):
            refuse(
                "clipping",
                adaptive,
                f"of a fixed norm with {plan.name}",
                "it never restarts, and noise for one norm cannot be mixed with noise "
                "for another; identity and TreeAggregation(restart_every=...) do",
            )
        self._adaptive = adaptive
        # In numbers of clients, as the class documents it.
        self._count_std = adaptive.clipped_count_stddev or max(
            self.mechanism.num_sampled_clients / 20, self.noise_std
        )
        if self.noise_std:
            self.noise_std = split_noise_multiplier(self.noise_std, self._count_std)

    def __getstate__(self) -> dict[str, object]:
        """Refuse to be copied where there is something to repeat.

        Raises
        ------
        ValueError
            If a round has begun: both would release the next one, and count one. If
            noise or secret cohorts are those of a given seed: both would have them.
        """
        plan = self.mechanism
        if self.accountant and (
            (plan.seed is not None and not plan.has_weak_seed)
            or self.sampler.has_own_secret
        ):
            raise ValueError(
                "a strategy with a secret seed cannot be copied or pickled: the seed "
                "is for one run. Leave it out, then each copy has its own"
            )
        if self.accountant and (self._shapes or self._done):
            raise ValueError(
                f"a strategy under a mechanism that has begun, with {self._done} "
                "releases, cannot be copied or pickled: the copy would release its "
                "next rounds a second time, uncounted. Make a new one; its epsilon "
                "adds to this one's"
            )
        return vars(self)

    # One round --------------------------------------------------------------------

    def number(self, server_round: int) -> int:
        """Return the number of the release that a round prepares, from 1.

        Noise, limits of participation and secret cohorts are planned by releases, not
        by rounds, which are counted anew in every ``start``.
        """
        return self._done + 1 if self.accountant else server_round

    def require_budget(self) -> None:
        """Raise ``PrivacyBudgetExhausted`` before a round that may not be released."""
        if self.accountant:
            self.accountant.require_budget()

    def require_number(self, number: int) -> None:
        """Refuse to release a round that no cohort was drawn for.

        Raises
        ------
        ValueError
            If the cohort was drawn for another release: its clients would be in both.
        """
        if self.accountant and number != self._done + 1:
            raise ValueError(
                f"release {self._done + 1} needs a cohort of its own, this one was "
                f"drawn for release {number}: configure_train comes before every "
                "aggregate_train"
            )

    def require_nodes(self, connected: int) -> None:
        """Refuse a round whose nodes are not those that the accounting counts on.

        Raises
        ------
        ValueError
            If not all clients are connected where amplification needs it.
        """
        plan = self.mechanism
        if self.needs_all_nodes and connected != plan.population_size:
            refuse(
                "population_size",
                plan.population_size,
                f"the {connected} connected nodes",
                "amplification by cohorts of fixed size needs all clients in reach; "
                "PoissonSampler does not",
            )

    def require_upload(self, codec: Codec) -> None:
        """Refuse uploads for which the accounting is not proved.

        Raises
        ------
        ValueError
            If clients that keep what they left out are drawn in cohorts of fixed size,
            which are to amplify.
        """
        # What one client keeps depends on the rounds that it was in. Poisson sampling
        # has no need to know: the coins of others are the same with and without the
        # client, and of its own past each round is a mixture, no worse than its worst
        # part. In a cohort of fixed size others are in because the client is not, so
        # that their residuals tell of it in every later round.
        if codec.feedback:
            self.require_no_memory("error feedback", codec)

    def require_no_memory(self, name: str, value: object) -> None:
        """Refuse what makes uploads depend on earlier rounds, see `require_upload`."""
        if self._fixed_size:
            refuse(
                name,
                value,
                "left out with amplified=True and cohorts of fixed size",
                "what others have kept tells in later rounds who was not in a cohort; "
                "PoissonSampler(probability=...) has no such bound on others",
            )

    def require_cohort(self, drawn: Collection[int]) -> None:
        """Refuse a cohort that is not of the size that its sampler has stated.

        Raises
        ------
        ValueError
            If amplification counts on that size.
        """
        size = self.mechanism.cohort
        if self.needs_all_nodes and not len(set(drawn)) == len(drawn) == size:
            raise ValueError(
                f"{type(self.sampler).__name__}'s cohort must be of {size} clients, as "
                "its guarantee() says: amplification counts on it"
            )

    def require_population(self, known: int) -> None:
        """Raise where more clients have been seen than were planned for.

        Raises
        ------
        PrivacyBudgetExhausted
            If a sampler that limits participation has met more than the population:
            some of them may be old ones that came back under another id.
        """
        population = self.mechanism.population_size
        if self.mechanism.simulated_cohort is None and known > population:
            raise PrivacyBudgetExhausted(
                f"population_size={population} must be >= {known}, the clients that "
                "have been connected so far: a client that came back under another id "
                "counts as a new one, and its limits are void"
            )

    def open(self, zero: Contribution) -> None:
        """Learn the layout of a contribution, before the first round.

        Raises
        ------
        ValueError
            If the noise of a saved run, or of the rounds before, does not fit this
            model, or a part or scalar has the name of something else.
        """
        _require_names(zero)
        shapes: dict[str, tuple[int, ...]] = {}
        silent: dict[str, tuple[int, ...]] = {}
        for key, piece in zero.layout().items():
            counts = key.startswith(COUNT_OF)  # whether of flags or of numbers
            if counts or isinstance(piece, Lazy) or is_averaged(piece):
                shapes[key] = piece.shape
            else:  # a counter: it cannot be noised, and is not released
                silent[key] = piece.shape
        if self._adaptive:
            shapes[_BIT] = ()
        # A rule that does not know all pieces says so now, not at the first reply.
        pieces = dict.fromkeys(shapes.keys() - {_BIT}, 0.0)
        self.mechanism.clipping.factors(pieces, self.clipping_norm)
        if self._shapes:
            if (shapes, silent) != (self._shapes, self._silent):
                raise ValueError(
                    "the model is not that of the rounds before, for which the noise "
                    "is planned: make a new strategy for another model"
                )
            return
        self._run = self._run or secrets.token_hex(16)
        self._shapes, self._silent = shapes, silent
        if self.noise_std:
            seed = self.mechanism.seed
            self._stream = NoiseStream(
                self.factorization, self._shapes, seed=seed, secure=seed is None
            )
            if self._saved:
                self._stream.load_state_dict(self._saved)

    def clip(self, term: Contribution) -> Contribution | None:
        """Return the clipped contribution, or None if it is not finite.

        Raises
        ------
        MalformedReply
            If it is not laid out as the strategy said in ``zero``: NumPy would stretch
            a small array over a large one after its norm was taken.
        ValueError
            If the strategy weighs its clients without having said so.
        """
        pieces = {
            key: piece
            for key, piece in term.carried().pieces()
            if key not in self._silent
        }
        if term.weight is not None and WEIGHT not in self._shapes:
            # A run that ends at a reply would tell a secret cohort.
            kind = MalformedReply if self.mechanism.hides_cohorts else ValueError
            raise kind(
                "a contribution has a weight, for which no noise is planned: a "
                "strategy whose weights depend on data says declares_weight = True"
            )
        if unknown := sorted(pieces.keys() - self._shapes.keys()):
            raise MalformedReply(
                f"the contribution has {unknown[:5]}, which the strategy's zero() has "
                "not: there is no noise for them"
            )
        for key, piece in pieces.items():
            if piece.shape != self._shapes[key]:
                raise MalformedReply(
                    f"{key!r} of the contribution has shape {piece.shape}, in the "
                    f"strategy's zero() it has {self._shapes[key]}"
                )
        norms = {key: self._scale(key) * norm([x]) for key, x in pieces.items()}
        # What is left out is zero: a rule sees the same pieces of every client.
        norms |= dict.fromkeys(self._shapes.keys() - norms.keys() - {_BIT}, 0.0)
        length = math.hypot(*norms.values())
        if not math.isfinite(length):
            return None
        factors = self.mechanism.clipping.factors(norms, self.clipping_norm)
        clipped = {key: scale(piece, factors[key]) for key, piece in pieces.items()}
        if self._adaptive:
            # Shifted, so that a client moves the sum of bits by 1/2 and not by 1.
            clipped[_BIT] = np.asarray(float(length <= self._next_norm) - 0.5)
        return _contribution(clipped)

    def clipper(self) -> PrivateSum:
        """Return what clips as this does in this round: without noise and its seed."""
        # It goes to workers, which neither count nor draw: their copy cannot release.
        bare = object.__new__(PrivateSum)
        vars(bare).update(vars(self))
        bare.mechanism = copy.copy(self.mechanism)
        bare.mechanism.seed = None
        bare.sampler = UniformSampler()
        bare.accountant = bare._stream = bare._saved = bare.evaluation = None
        return bare

    def release(self, total: Total) -> Total:
        """Return the sum of clipped contributions with this round's noise.

        ``weight`` and ``count`` of the result are the planned divisor, as if all had
        replied.
        """
        # Of one coordinate, in units of the clipping norm and before scales are undone.
        deviation = self.noise_std * math.sqrt(self._variances[self._done])
        noise = self._stream.next(self.noise_std) if self._stream else {}
        found, square = _pieces(total), 0.0
        for key, shape in self._shapes.items():
            value = found[key] if key in found else np.zeros(shape)
            if noise:
                factor = self._noise_factor(key)
                value += np.multiply(noise[key], factor, dtype=np.float64)
                square += float(np.sum(np.square(value))) / factor**2
                total.noise[key.partition("/")[0]] = deviation * factor
            _place(total, key, value)
        for key, shape in self._silent.items():
            _place(total, key, np.zeros(shape))
        total.weight, total.count = float(self.mechanism.cohort), self.mechanism.cohort
        self._metrics = self._count(square, deviation)
        if self._adaptive:
            self._adapt(self._adaptive, float(total.scalars.pop(_BIT)))
        return total

    def releases(self, phase: Phase) -> bool:
        """Return whether what comes of a phase is released with noise."""
        planned = phase == "train" or self.evaluation is not None
        return planned and self.accountant is not None

    def evaluates(self, server_round: int) -> bool:
        """Return whether clients are to evaluate the model of a round: each once."""
        number = self._released_in(server_round)
        return self.evaluation is not None and self.evaluation.is_due(number)

    def release_evaluation(
        self, server_round: int, metrics: Iterable[Mapping[str, float]]
    ) -> Metrics:
        """Return noisy means of what clients measured of the model of a round.

        Raises
        ------
        ValueError
            If no evaluation is planned there, or it is released already.
        """
        assert self.evaluation is not None
        return self.evaluation.release(self._released_in(server_round), metrics)

    def _released_in(self, server_round: int) -> int:
        """Return the number of the release that a round has made."""
        return self._done if self.accountant else server_round

    def metrics(self) -> Metrics:
        """Return what the last release may tell of itself; none of it is raw data.

        ``epsilon`` and ``delta`` are spent so far, by the planned cohort.
        ``noise-std`` is that of one coordinate of this round's mean, for the planned
        cohort. ``signal-to-noise`` is the norm of the released sum without its noise,
        over the expected norm of the noise, both as scaled for clipping; it is
        estimated from the release, and 0 where the noise hides it (for n coordinates
        below about (2/n)^(1/4)). In a simulation its signal is that of the simulated
        cohort, its noise that of the planned one.
        """
        return self._metrics

    def _scale(self, key: str) -> float:
        """Return the factor that is applied to a piece before clipping."""
        return self._scales.get(key.partition("/")[0], 1.0)

    def _noise_factor(self, key: str) -> float:
        """Return what the stream's noise is multiplied with for a piece."""
        if key == _BIT:
            # Noise of its own size: the stream's has noise_std.
            return self._count_std * self.mechanism.shrink / self.noise_std
        return self.clipping_norm * self.mechanism.shrink / self._scale(key)

    def _count(self, square: float, deviation: float) -> Metrics:
        """Count the release and describe it.

        ``square`` is its squared norm and ``deviation`` the standard deviation of its
        noise, both in units of the clipping norm.
        """
        plan = self.mechanism
        metrics: Metrics = {
            "clipping-norm": self.clipping_norm,
            "planned-cohort": plan.num_sampled_clients,
        }
        if plan.simulated_cohort is not None:
            metrics["simulated-cohort"] = plan.simulated_cohort
        if self.accountant:
            size = sum(math.prod(shape) for shape in self._shapes.values())
            # The squared norm is that of the signal plus size * deviation^2 on average.
            ratio = square / (size * deviation**2)
            self.accountant.advance()
            spent = self.accountant.get_privacy_spent()
            metrics |= {
                "epsilon": spent.epsilon,
                "delta": spent.delta,
                "noise-std": deviation * self.clipping_norm / plan.num_sampled_clients,
                "signal-to-noise": math.sqrt(max(0.0, ratio - 1)),
            }
        self._done += 1
        return metrics

    def _adapt(self, adaptive: AdaptiveClipping, bits: float) -> None:
        """Move the norm (Andrew et al. 2021, Alg. 1); it clips from a restart on."""
        # bits / cohort + 1/2 undoes the shift.
        self._next_norm = update_clipping_norm(
            self._next_norm,
            bits / self.mechanism.cohort + 0.5,
            target_quantile=adaptive.target_quantile,
            learning_rate=adaptive.clip_norm_lr,
        )
        if self.factorization.restarts_at(self._done):
            self.clipping_norm = self._next_norm

    # The run ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Return what a resumed run needs; it is as secret as the raw contributions."""
        return {
            "run": self._run,
            "done": self._done,
            "clipping-norm": self.clipping_norm,
            "next-clipping-norm": self._next_norm,
            "accountant": self.accountant.state_dict() if self.accountant else None,
            "noise": dict(self._stream.state_dict()) if self._stream else self._saved,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue a saved run.

        Raises
        ------
        ValueError
            If it was planned otherwise, or its noise is missing.
        """
        saved = cast("Mapping[str, Any]", state)
        counted = saved["run"], saved["done"]
        if self.accountant and self._done and counted != (self._run, self._done):
            raise ValueError(
                f"this strategy has made {self._done} releases that the saved run does "
                "not count: make a new strategy to continue it"
            )
        if bool(saved["accountant"]) != bool(self.accountant):
            raise ValueError(
                "the saved run had noise, or had none, other than this one"
            )
        if self.accountant:
            self.accountant.load_state_dict(saved["accountant"])
        if self.noise_std and saved["done"] and not saved["noise"]:
            raise ValueError(
                "the saved run's noise is missing: without it the noise of later "
                "rounds cannot be correlated with what was released"
            )
        self._run, self._done = saved["run"], saved["done"]
        if self.evaluation:
            # A round is saved before it is evaluated, and whether it has been is not
            # known: its means may have been seen.
            self.evaluation.skip(self._done)
        self.clipping_norm = saved["clipping-norm"]
        self._next_norm = saved["next-clipping-norm"]
        self._saved, self._stream = saved["noise"], None
        self._shapes, self._silent = {}, {}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        plan, accountant = self.mechanism, self.accountant
        cohort = (
            f"{plan.num_rounds} rounds, {plan.num_sampled_clients} of "
            f"{plan.population_size} clients"
        )
        if plan.simulated_cohort is not None:
            cohort += f", simulated with {plan.simulated_cohort}"
        described: dict[str, object] = {
            "Mechanism": f"{self.factorization.name}, {cohort}",
            "Clipping": plan.clipping,
        }
        if self.evaluation:
            described["Evaluation"] = self.evaluation.described()
        if accountant is None:
            return {**described, "Privacy": "none, there is no noise"}
        epsilon = accountant.epsilon_after(accountant.rounds, plan.target_delta)
        whose = "the planned cohort" if plan.simulated_cohort else "each client"
        privacy = (
            f"epsilon {epsilon:.4g} at delta {plan.target_delta:g} after all rounds, "
            f"for {whose}"
        )
        if accountant.caveat:
            privacy += f"; {accountant.caveat}"
        if plan.has_weak_seed:
            privacy += (
                "; none against whoever tries seeds: that of the noise is for research"
            )
        described |= {
            "Noise": f"{self.noise_std:.4g} x clipping norm",
            "Privacy": privacy,
        }
        if plan.hides_cohorts:
            described["Withheld"] = (
                "what tells the cohort: numbers of replies and errors, bytes, seconds"
            )
        return described


def _require_names(zero: Contribution) -> None:
    """Refuse names by which two pieces would be taken for one."""
    scalars, parts = set(zero.scalars), {*zero.arrays, *zero.counts, *zero.weights}
    cause = "under a mechanism it would be taken for another piece of the contribution"
    for name in scalars:
        if "/" in name or name in {WEIGHT, _BIT} or name.startswith(WEIGHT_OF):
            own = f"without '/', not {WEIGHT!r}, {_BIT!r} or {WEIGHT_OF!r}..."
            refuse("a scalar's name", name, own, cause)
    for name in parts:
        if "/" in name or name in scalars or name.startswith(COUNT_OF):
            own = f"without '/', no scalar's, not {COUNT_OF!r}..."
            refuse("a part's name", name, own, cause)
        if "" in zero.arrays.get(name, {}):
            refuse(f"an array's name in {name!r}", "", "not empty", cause)


def _pieces(total: Total) -> dict[str, Floats]:
    """Return arrays as ``part/name`` and scalars by name."""
    return {
        f"{part}/{name}": x
        for part, arrays in total.arrays.items()
        for name, x in arrays.items()
    } | total.scalars


def _contribution(pieces: Mapping[str, Term]) -> Contribution:
    """Undo `Contribution.pieces`."""
    arrays: dict[str, dict[str, Term]] = {}
    scalars = {}
    for key, piece in pieces.items():
        part, _, name = key.partition("/")
        if name:
            arrays.setdefault(part, {})[name] = piece
        else:
            scalars[key] = numpy_of(piece)
    return Contribution(arrays, scalars=scalars)


def _place(total: Total, key: str, value: Floats) -> None:
    """Set one piece of a sum."""
    part, _, name = key.partition("/")
    if name:
        total.arrays.setdefault(part, {})[name] = value
    else:
        total.scalars[key] = value
