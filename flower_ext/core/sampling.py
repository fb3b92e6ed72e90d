"""Cohort samplers: which of the available clients take part in a round.

Flower's own options say how many clients take part (``fraction_train``,
``min_train_nodes``); the sampler decides how they are drawn. It draws from a generator
that is derived from its seed, the round and the purpose, so that a cohort depends on
nothing else: not on earlier rounds, not on the global random state, not on whether the
run was resumed. Samplers that limit how often a client takes part also remember who
did. Under a mechanism the round is the number of the release, which is not counted anew
when a strategy is started again.

For privacy accounting a sampler states what it guarantees of every client, see
:class:`Guarantee`. What it states, it enforces.
"""

import hashlib
import math
import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from logging import INFO, WARNING
from typing import ClassVar, Literal, cast, get_args

import numpy as np

from flower_ext._flower import log
from flower_ext.core.errors import (
    at_least,
    finite,
    one_of,
    probability,
    refuse,
    whole,
    yes_or_no,
)
from flower_ext.core.nodes import NodeRegistry
from flower_ext.core.participation import gain

Purpose = Literal["train", "evaluate"]
WhenShort = Literal["smaller", "wait", "stop"]
SamplingKind = Literal[
    "fixed-size",
    "poisson",
    "cyclic-poisson",
    "balls-in-bins",
    "limited",
    "all",
    "unstated",
]
_STREAM: dict[Purpose, int] = {"train": 0, "evaluate": 1}
_SECRET_BITS = 128
# Seeds below can be found by trying. Of 128 random bits one in 2**32 numbers is below.
LEAST_SECRET = 2**96


def _require_probability(value: float) -> None:
    probability("probability", value, "of one client in one round")


@dataclass(frozen=True, kw_only=True)
class Guarantee:
    """What a sampler guarantees of how every client is drawn for training.

    Accountants count on this and on nothing else of a sampler. The default states
    nothing: any client in any round, and no amplification.

    Parameters
    ----------
    kind : str (default: "unstated")
        ``fixed-size``: exactly as many as asked for, uniformly without replacement from
        all clients. ``poisson``: each client on its own with ``probability``.
        ``cyclic-poisson``: the same, for the one of ``min_separation`` fixed groups
        whose turn it is. ``balls-in-bins``: each client in one of ``min_separation``
        bins, drawn once, independently and uniformly, and in all rounds of its bin,
        which take turns; in no other. ``limited``: any draw within the limits below.
        ``all``: every client in every round. ``unstated``: any draw at all.
    probability : float, optional
        In (0, 1], of a client in one round (of its turn); None where it is not fixed.
    min_separation : int (default: 1)
        Least difference of the numbers of two rounds with the same client.
    max_participations : int, optional
        Most rounds of one client; None is every round that the separation allows.
    can_be_secret : bool (default: False)
        Whether all chance comes from the seed, as :meth:`Sampler.generator` has it, so
        that nobody without it knows who is drawn. Amplification needs it.
    """

    kind: SamplingKind = "unstated"
    probability: float | None = None
    min_separation: int = 1
    max_participations: int | None = None
    can_be_secret: bool = False

    def __post_init__(self) -> None:
        kind = one_of("kind", self.kind, get_args(SamplingKind))
        if self.probability is not None:
            _require_probability(self.probability)
            if kind not in ("poisson", "cyclic-poisson"):
                refuse("probability", self.probability, f"None for kind={kind!r}")
        elif kind == "cyclic-poisson":
            refuse("probability", None, f"given for kind={kind!r}")
        whole("min_separation", self.min_separation, 1)
        if self.max_participations is not None:
            whole("max_participations", self.max_participations, 1)
        is_limited = self.min_separation > 1 or self.max_participations is not None
        if is_limited and kind not in ("limited", "cyclic-poisson", "balls-in-bins"):
            refuse("kind", kind, "'limited' where participation is")


class Sampler(ABC):
    """Draws the cohort of a round.

    A subclass that draws in its own way overrides :meth:`sample`, and
    :meth:`guarantee` where a mechanism may count on how it does. What a class
    guarantees is not inherited: a subclass may draw otherwise, and states its own.

    Parameters
    ----------
    seed : int, optional
        Same seed, same clients: same cohorts; 0 if not given. Where cohorts must be
        secret it is best not given, see :meth:`keep_secret`, and is for one run.
    same_for_evaluation : bool (default: False)
        Draw the evaluation's cohort as the training's of the same round: with equal
        fractions, the clients that trained evaluate.
    """

    #: Whether its cohorts are secret, and with them its seed.
    is_secret: bool = False
    #: What to do with fewer clients than asked for.
    when_short: WhenShort = "smaller"
    #: Whether it chooses by what clients report, which :meth:`hear` is told.
    hears: ClassVar[bool] = False

    def __init__(
        self, seed: int | None = None, *, same_for_evaluation: bool = False
    ) -> None:
        self._given = seed is not None
        self._is_taken = False
        self.seed: int | None = 0 if seed is None else whole("seed", seed, 0)
        self.same_for_evaluation = same_for_evaluation

    def __init_subclass__(cls) -> None:
        """Take back the guarantee of the class above, unless this one states its own.

        It cannot be seen from outside whether a method that was overridden, here or in
        a mixin, still draws as was guaranteed.
        """
        super().__init_subclass__()
        if "guarantee" not in vars(cls):
            cls.guarantee = Sampler.guarantee  # type: ignore[method-assign]

    @abstractmethod
    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Draw about ``size`` of ``clients`` and return them in their given order."""

    def eligible(self, clients: Sequence[int], purpose: Purpose) -> Sequence[int]:
        """Return those of all clients that may be drawn at all; here all of them.

        Asynchronous runs draw from those of them that are free.
        """
        return clients

    def hear(  # noqa: B027 (most samplers do not listen)
        self, reports: Mapping[int, Mapping[str, float]], purpose: Purpose
    ) -> None:
        """Take note of what clients report; told where :attr:`hears` says so.

        Parameters
        ----------
        reports : Mapping[int, Mapping[str, float]]
            The finite metrics of each client that has answered, by what
            :meth:`sample` knows it by.
        purpose : {"train", "evaluate"}
            What the clients were asked for.
        """

    def guarantee(self) -> Guarantee:
        """Return what accountants may count on; here nothing.

        Where a subclass draws as the class above it, it says so:
        ``return super().guarantee()``.
        """
        return Guarantee()

    def expected_size(self, size: int, population: int) -> float:
        """Return how many clients a round has if all of ``population`` are there.

        It is the mean over many rounds; ``size`` is how many are asked for.
        """
        return min(size, population / self.guarantee().min_separation)

    @property
    def num_known(self) -> int:
        """How many different clients it has seen, as far as it tells them apart."""
        return 0

    @property
    def has_own_secret(self) -> bool:
        """Whether its cohorts are secret and come from a seed that was given."""
        return self.is_secret and self._given

    def take_seed(self) -> None:
        """Refuse a second run in this process with the same secret cohorts.

        Raises
        ------
        ValueError
            If another strategy has it.
        """
        if self._given and self._is_taken:
            raise ValueError(
                "the seed of a sampler must be another one, or left out, for a second "
                "strategy: epsilons of two runs with the same secret cohorts do not "
                "add up"
            )
        self._is_taken = True

    def keep_secret(self) -> None:
        """Draw cohorts that nobody can guess, as amplification needs it.

        A seed that was not given is drawn from the operating system, with 128 bits,
        when the first cohort is. It is in :meth:`state_dict` and nowhere else.

        Raises
        ------
        ValueError
            If a seed was given that can be found by trying.
        """
        if not self._given:
            self.seed = None
        elif self.seed is None or self.seed < LEAST_SECRET:
            refuse(
                "sampler.seed",
                self.seed,
                "left out with amplified=True, or secrets.randbits(128)",
                "cohorts must be secret, and whoever tries all seeds finds this one",
            )
        self.is_secret = True

    def generator(self, server_round: int, purpose: Purpose) -> np.random.Generator:
        """Return the random stream of one round and purpose."""
        # From the round itself and not from the last draw: a resumed run draws the
        # same.
        stream = 0 if self.same_for_evaluation else _STREAM[purpose]
        return np.random.default_rng([self._own_seed(), server_round, stream])

    def _own_seed(self) -> int:
        """Return the seed; a secret one is drawn when it is first needed."""
        if self.seed is None:
            self.seed = secrets.randbits(_SECRET_BITS)
        return self.seed

    def settings(self) -> dict[str, str | int | float]:
        """Return what a resumed run must have in common with the saved one."""
        return {
            "kind": type(self).__name__,
            "seed": "secret" if self.seed is None or self.is_secret else self.seed,
            "same-for-evaluation": self.same_for_evaluation,
        }

    def state_dict(self) -> dict[str, object]:
        """Return settings and memory; a secret seed is part of it."""
        state: dict[str, object] = {**self.settings()}
        if self.is_secret and self.seed is not None:
            state["secret-seed"] = [str(self.seed)]
        return state

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Check that a saved run drew its cohorts as this sampler does."""
        own = self.settings()
        saved = {k: v for k, v in state.items() if isinstance(v, str | int | float)}
        if saved != own:
            raise ValueError(
                f"the saved run sampled with {saved}, this one with {own}: a resumed "
                "run needs the same sampler"
            )
        if self.is_secret:
            seeds = cast("list[str]", state.get("secret-seed", []))
            seed = int(seeds[0]) if seeds else None
            if self._given and seed != self.seed:
                raise ValueError(
                    "the saved run sampled with another secret seed: leave it out to "
                    "go on with the saved one"
                )
            self.seed = seed


class UniformSampler(Sampler):
    """``size`` clients, or all if there are fewer, uniformly without replacement."""

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Draw ``size`` clients."""
        chosen = self.generator(server_round, purpose).choice(
            len(clients), min(size, len(clients)), replace=False
        )
        # In the clients' order, in which contributions are added up later.
        return [clients[i] for i in sorted(chosen.tolist())]

    def guarantee(self) -> Guarantee:
        """Return that cohorts have a fixed size."""
        return Guarantee(kind="fixed-size", can_be_secret=True)


class HeldOutSampler(UniformSampler):
    """Trains the first clients only, to measure what the model is worth to others.

    It guarantees nothing: amplification is by cohorts of all clients.

    Parameters
    ----------
    seed, same_for_evaluation
        See :class:`Sampler`; evaluation draws from all clients unless it is the same.
    num_training_clients : int
        How many, in the order of the clients.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        num_training_clients: int,
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        self.num_training_clients = whole(
            "num_training_clients", num_training_clients, 1
        )

    def settings(self) -> dict[str, str | int | float]:
        """Return what a resumed run must have in common with the saved one."""
        number = {"num-training-clients": self.num_training_clients}
        return {**super().settings(), **number}

    def expected_size(self, size: int, population: int) -> float:
        """Return the training clients, where they are fewer."""
        return min(size, population, self.num_training_clients)

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Draw ``size`` clients."""
        clients = self.eligible(clients, purpose)
        return super().sample(clients, size, server_round, purpose)

    def eligible(self, clients: Sequence[int], purpose: Purpose) -> Sequence[int]:
        """Return the training clients, but for an evaluation."""
        if purpose == "train" or self.same_for_evaluation:
            return clients[: self.num_training_clients]
        return clients


class PoissonSampler(Sampler):
    """Every client on its own with the same probability.

    The cohort varies in size and may be empty; without privacy, a round of nobody
    keeps the model. This is the sampling that privacy amplification by Poisson
    sampling assumes: then give the probability, and no seed.

    Parameters
    ----------
    seed, same_for_evaluation
        See :class:`Sampler`.
    probability : float, optional
        In (0, 1], whatever the number of clients that are connected; by default
        ``size / len(clients)``.
    """

    def __init__(
        self,
        seed: int | None = None,
        *,
        probability: float | None = None,
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        if probability is not None:
            _require_probability(probability)
        self.probability = probability

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Toss one coin per client."""
        # The probability is promised for training. Evaluation asks for a number of
        # clients, which is size / len(clients) without dividing by zero.
        draws = self.generator(server_round, purpose).random(len(clients))
        if self.probability is None or purpose == "evaluate":
            chosen = draws * len(clients) < size
        else:
            chosen = draws < self.probability
        return [client for client, take in zip(clients, chosen, strict=True) if take]

    def guarantee(self) -> Guarantee:
        """Return the probability, if it is given."""
        return Guarantee(
            kind="poisson", probability=self.probability, can_be_secret=True
        )

    def settings(self) -> dict[str, str | int | float]:
        """Add the probability."""
        return {**super().settings(), "probability": self.probability or "size"}

    def expected_size(self, size: int, population: int) -> float:
        """Return probability times population."""
        return size if self.probability is None else self.probability * population


class _Recognising(Sampler):
    """Tells clients apart over the rounds, whatever ids they have."""

    def __init__(
        self, seed: int | None = None, *, same_for_evaluation: bool = False
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        self._registry = NodeRegistry()

    @property
    def num_known(self) -> int:
        """How many different clients it has seen."""
        return len(self._registry)

    def state_dict(self) -> dict[str, object]:
        """Add which clients it has seen, in which order."""
        return {**super().state_dict(), **self._registry.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over who was seen."""
        super().load_state_dict(state)
        self._registry.load_state_dict(state)


class CyclicPoissonSampler(_Recognising):
    """Clients take turns in groups; in its turn each is sampled on its own.

    A client belongs to one of ``cycle`` groups for the whole run, by the order in
    which clients were first seen; round t samples from group t mod ``cycle``, each
    client with the same probability (Choquette-Choo et al. 2023, arXiv 2306.08153).

    Parameters
    ----------
    probability : float
        In (0, 1], of a client in its turn.
    cycle : int
        Number of groups; at least the number of bands of the mechanism.
    seed, same_for_evaluation
        See :class:`Sampler`.
    """

    def __init__(
        self,
        probability: float,
        cycle: int,
        seed: int | None = None,
        *,
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        _require_probability(probability)
        self.probability = probability
        self.cycle = whole("cycle", cycle, 1)

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Toss one coin for each client whose turn it is."""
        # Groups by the numbers in which clients were first seen: who connects or leaves
        # in between does not move others to another group.
        numbers = self._registry.number(clients)
        draws = self.generator(server_round, purpose).random(len(clients))
        if purpose == "evaluate":
            chosen = [d * len(clients) < size for d in draws]
        else:
            turn = server_round % self.cycle
            chosen = [
                numbers[client] % self.cycle == turn and d < self.probability
                for client, d in zip(clients, draws, strict=True)
            ]
        return [client for client, take in zip(clients, chosen, strict=True) if take]

    def guarantee(self) -> Guarantee:
        """Return the probability of a client in its turn, and how rare turns are."""
        return Guarantee(
            kind="cyclic-poisson",
            probability=self.probability,
            min_separation=self.cycle,
            can_be_secret=True,
        )

    def expected_size(self, size: int, population: int) -> float:
        """Return the probability times a group of the population."""
        return self.probability * population / self.cycle

    def settings(self) -> dict[str, str | int | float]:
        """Add probability and cycle."""
        return {
            **super().settings(),
            "probability": self.probability,
            "cycle": self.cycle,
        }


class BallsInBinsSampler(_Recognising):
    """Each client is put into a bin once and for all; the bins take turns.

    A client's bin is one of ``num_bins``, uniformly at random and whatever those of
    others are; round t trains all clients of bin t mod ``num_bins``. A client waits
    exactly ``num_bins`` rounds, as noise that is correlated over rounds likes it, and
    its bin is secret, which amplifies (Choquette-Choo et al. 2024, arXiv 2410.06266,
    "balls-in-bins batching"; Chua et al. 2024, arXiv 2412.16802).

    Parameters
    ----------
    num_bins : int
        At least 1, which trains everybody in every round. A round has population /
        ``num_bins`` clients on average, whatever number is asked for.
    seed, same_for_evaluation
        See :class:`Sampler`; evaluation draws from all clients unless it is the same.

    Notes
    -----
    A bin is a keyed hash (BLAKE2b, the key is the seed) of the number in which a client
    was first seen, so that those who connect later have theirs from the start, too. To
    whoever does not know the seed, bins are then as good as drawn independently; that
    the hash is pseudorandom is the only assumption. Numbers are in the checkpoint, as
    for :class:`CyclicPoissonSampler`: a client that comes back under a new id has a
    second bin.

    Examples
    --------
    >>> sampler = BallsInBinsSampler(num_bins=3, seed=1)
    >>> rounds = [sampler.sample(range(6), 2, t, "train") for t in range(6)]
    >>> rounds[:3] == rounds[3:], sorted(sum(rounds[:3], []))
    (True, [0, 1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        num_bins: int,
        seed: int | None = None,
        *,
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        self.num_bins = whole("num_bins", num_bins, 1)
        # The bins of those seen so far, by number, and the seed that they are from.
        self._bins: tuple[int, list[int]] = (-1, [])

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return the clients in the bin whose turn it is."""
        numbers = self._registry.number(clients)
        if purpose == "evaluate" and not self.same_for_evaluation:
            draws = self.generator(server_round, purpose).random(len(clients))
            chosen = (draws * len(clients) < size).tolist()
        else:
            turn, bins = server_round % self.num_bins, self._known_bins()
            chosen = [bins[numbers[client]] == turn for client in clients]
        return [client for client, take in zip(clients, chosen, strict=True) if take]

    def _known_bins(self) -> list[int]:
        """Return the bins of all clients that were seen, by number."""
        seed = self._own_seed()
        if self._bins[0] != seed:  # drawn, or loaded, since
            self._bins = seed, []
        bins = self._bins[1]
        # The key of BLAKE2b is at most 64 bytes; seeds of any size are hashed to it.
        key = hashlib.blake2b(str(seed).encode()).digest()
        for number in range(len(bins), self.num_known):
            digest = hashlib.blake2b(str(number).encode(), key=key, digest_size=16)
            bins.append(int.from_bytes(digest.digest(), "big") % self.num_bins)
        return bins

    def guarantee(self) -> Guarantee:
        """Return that bins are drawn once, and how rare turns are."""
        return Guarantee(
            kind="balls-in-bins", min_separation=self.num_bins, can_be_secret=True
        )

    def expected_size(self, size: int, population: int) -> float:
        """Return a bin's share of the population."""
        return population / self.num_bins

    def settings(self) -> dict[str, str | int | float]:
        """Add the number of bins."""
        return {**super().settings(), "num-bins": self.num_bins}


class AllClients(Sampler):
    """Every available client, whatever the size asked for."""

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return all clients."""
        return list(clients)

    def guarantee(self) -> Guarantee:
        """Return that nobody is left out."""
        return Guarantee(kind="all")


class TooFewClients(RuntimeError):
    """Fewer clients may take part in a round than were asked for."""


class MinSeparationSampler(_Recognising):
    """Uniform, but no client too often, and none too soon again.

    A client that took part in round t is not drawn again before round
    t + ``min_separation``, and never more than ``max_participations`` times. This is
    what correlated noise is calibrated for. Being drawn counts, whether or not the
    client replies.

    Parameters
    ----------
    min_separation : int
        Least difference of the numbers of two rounds with the same client; 1 allows
        every round. At most population / cohort, or rounds run short of clients, which
        a mechanism refuses.
    max_participations : int, optional
        Most rounds of one client; by default what the separation allows. Where it is
        hardly more than rounds x cohort / population, the last rounds may be short.
    seed, same_for_evaluation
        See :class:`Sampler`.
    when_short : str (default: "smaller")
        With fewer eligible clients than asked for: ``smaller`` takes all of them, or
        nobody if there are none; ``wait`` waits until others connect; ``stop`` ends the
        run.

    Notes
    -----
    Clients are nodes, recognised by their id, or in a simulation by their partition:
    see :class:`~flower_ext.core.nodes.NodeRegistry`. That several nodes belong to one
    person cannot be seen, and a node that comes back under a new id counts as a new
    client.
    """

    def __init__(
        self,
        min_separation: int,
        max_participations: int | None = None,
        seed: int | None = None,
        *,
        when_short: WhenShort = "smaller",
        same_for_evaluation: bool = False,
    ) -> None:
        super().__init__(seed, same_for_evaluation=same_for_evaluation)
        self.min_separation = whole("min_separation", min_separation, 1)
        if max_participations is not None:
            whole("max_participations", max_participations, 1)
        self.max_participations = max_participations
        one_of("when_short", when_short, get_args(WhenShort))
        self.when_short = when_short
        self._last: dict[int, int] = {}
        self._times: dict[int, int] = {}

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Draw ``size`` of the eligible clients, and remember them.

        Raises
        ------
        TooFewClients
            If there are fewer and ``when_short`` is not ``smaller``.
        """
        if purpose == "evaluate":
            eligible = list(clients)
        else:
            # Rounds that go backwards are those of a second run: the limits would be
            # counted across both.
            latest = max(self._last.values(), default=0)
            if server_round < latest:
                refuse(
                    "server_round",
                    server_round,
                    f">= {latest}, for which clients were drawn before",
                    "a sampler that limits participation is for one run: make another",
                )
            numbers = self._registry.number(clients)
            eligible = [c for c in clients if self._may(numbers[c], server_round)]
            if len(eligible) < size and self.when_short != "smaller":
                raise TooFewClients(
                    f"round {server_round} needs {size} clients, {len(eligible)} of "
                    f"the {len(clients)} connected may take part: the others did so "
                    f"less than min_separation={self.min_separation} rounds ago, or "
                    f"max_participations={self.max_participations} times"
                )
        drawn = self.generator(server_round, purpose).choice(
            len(eligible), min(size, len(eligible)), replace=False
        )
        cohort = [eligible[i] for i in sorted(drawn.tolist())]
        # Being drawn counts: whether a client replies may depend on its data.
        if purpose == "train":
            for client in cohort:
                number = numbers[client]
                self._last[number] = server_round
                self._times[number] = self._times.get(number, 0) + 1
        return cohort

    def guarantee(self) -> Guarantee:
        """Return the limits."""
        return Guarantee(
            kind="limited",
            min_separation=self.min_separation,
            max_participations=self.max_participations,
        )

    def _may(self, number: int, server_round: int) -> bool:
        last = self._last.get(number)
        rested = last is None or server_round - last >= self.min_separation
        most = self.max_participations
        return rested and (most is None or self._times.get(number, 0) < most)

    def settings(self) -> dict[str, str | int | float]:
        """Add the limits."""
        return {
            **super().settings(),
            "min-separation": self.min_separation,
            "max-participations": self.max_participations or "any",
        }

    def state_dict(self) -> dict[str, object]:
        """Add who took part, when last and how often."""
        return {
            **super().state_dict(),
            "last": [[k, v] for k, v in self._last.items()],
            "times": [[k, v] for k, v in self._times.items()],
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over who took part."""
        super().load_state_dict(state)
        pairs = cast("Mapping[str, list[tuple[int, int]]]", state)
        self._last = dict(pairs["last"])
        self._times = dict(pairs["times"])


class _Choosing(_Recognising):
    """Leaves out of the cohorts of another sampler those who do not take part."""

    hears = True

    def __init__(self, sampler: Sampler | None, metric: str, purpose: Purpose) -> None:
        if not isinstance(sampler, Sampler | None):
            refuse("sampler", sampler, "a Sampler", "an instance, not the class")
        if sampler is not None and sampler.hears:
            refuse("sampler", type(sampler).__name__, "one that hears no reports")
        self.of = UniformSampler() if sampler is None else sampler
        super().__init__(self.of.seed, same_for_evaluation=self.of.same_for_evaluation)
        self.metric = metric
        self.purpose: Purpose = one_of("purpose", purpose, get_args(Purpose))  # type: ignore[assignment]
        self._warned = False

    def expected_size(self, size: int, population: int) -> float:
        """Return the size of a cohort while everybody takes part."""
        return self.of.expected_size(size, population)

    def guarantee(self) -> Guarantee:
        """Return no limit but those of the other sampler; who is drawn is no secret."""
        of = self.of.guarantee()
        return Guarantee(
            kind="limited",
            min_separation=of.min_separation,
            max_participations=of.max_participations,
        )

    def _read(
        self, reports: Mapping[int, Mapping[str, float]], *names: str
    ) -> dict[int, list[float]]:
        """Return metrics of those who report all of them, by the clients' numbers."""
        found = {
            client: [report[name] for name in names]
            for client, report in reports.items()
            if all(name in report for name in names)
        }
        if reports and not found and not self._warned:
            self._warned = True
            known = sorted(next(iter(reports.values())))
            kind = type(self).__name__
            log(WARNING, "%s: no client reports %s, but %s", kind, names, known)
        numbers = self._registry.number(list(found))
        return {numbers[client]: values for client, values in found.items()}

    def settings(self) -> dict[str, str | int | float]:
        """Add the metric, and the settings of the other sampler."""
        own = {"metric": self.metric, "purpose": self.purpose}
        of = {f"of-{key}": x for key, x in self.of.settings().items()}
        return {**super().settings(), **own, **of}

    def state_dict(self) -> dict[str, object]:
        """Add the state of the other sampler."""
        return {**super().state_dict(), "of": self.of.state_dict()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the state of both."""
        super().load_state_dict(state)
        self.of.load_state_dict(cast("Mapping[str, object]", state["of"]))


class ConvergedClients(_Choosing):
    """Asks those clients no more whose metric has come to rest.

    A client whose last ``window`` reports of a metric lie within ``tolerance`` of each
    other has converged: it is neither asked to train nor to evaluate again, in this
    run, so that it causes no further message. Its place in a cohort stays empty: a
    cohort is that of another sampler, less those who have stopped. Once all have, the
    run ends after the round, and the log says so.

    Parameters
    ----------
    sampler : Sampler, optional
        What draws the cohorts; :class:`UniformSampler` by default.
    metric : str (default: "loss")
        What clients report, a number.
    window : int (default: 5)
        How many reports of a client in a row, at least 2.
    tolerance : float (default: 0.01)
        At least 0: most that the largest of them exceeds the smallest.
    purpose : {"evaluate", "train"} (default: "evaluate")
        Whether the metrics are those of evaluations or of trainings. A client that is
        never asked to evaluate reports none: with a ``fraction_evaluate`` of 0 nobody
        ever stops.

    Notes
    -----
    The defaults are those of FedFitTech (a baseline of early stopping in federated
    activity recognition), where a client compares its validation scores and answers
    without a model; here the server compares them and does not ask. A client that comes
    to rest far from where others would bring it stays there: a wider window, or a
    tighter tolerance, costs messages and waits. Metrics of evaluations are means over
    those who are still asked; an ``evaluate_fn`` of the server is of all.

    **Privacy.** Whom it asks depends on what clients say of their data, and who is
    asked shows it. Under a mechanism it is refused. So are asynchronous runs, whose
    places are filled one by one.

    Examples
    --------
    >>> sampler = ConvergedClients(metric="accuracy", window=2)
    >>> for accuracy in (0.8, 0.805):
    ...     sampler.hear({0: {"accuracy": accuracy}, 1: {"accuracy": 0.1}}, "evaluate")
    >>> sampler.sample(range(3), 3, 1, "train")
    [2]
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        *,
        metric: str = "loss",
        window: int = 5,
        tolerance: float = 0.01,
        purpose: Purpose = "evaluate",
    ) -> None:
        super().__init__(sampler, metric, purpose)
        self.window = whole("window", window, 2)
        self.tolerance = at_least("tolerance", tolerance, 0)
        self._last: dict[int, list[float]] = {}
        self._stopped: set[int] = set()

    @property
    def num_stopped(self) -> int:
        """How many clients are not asked any more."""
        return len(self._stopped)

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return the other sampler's cohort, less those who have stopped.

        Raises
        ------
        TooFewClients
            If all clients have, which ends the run.
        """
        numbers = self._registry.number(clients)
        if clients and self._stopped >= set(numbers.values()) and purpose == "train":
            raise TooFewClients(
                f"all {len(clients)} clients have converged: the last {self.window} "
                f"values of {self.metric!r} of each are within {self.tolerance:g}"
            )
        cohort = self.of.sample(clients, size, server_round, purpose)
        return [client for client in cohort if numbers[client] not in self._stopped]

    def hear(
        self, reports: Mapping[int, Mapping[str, float]], purpose: Purpose
    ) -> None:
        """See who has come to rest."""
        if purpose != self.purpose:
            return
        most = self.tolerance * (1 + 1e-9)  # 0.81 - 0.80 is more than 0.01
        for number, (value,) in self._read(reports, self.metric).items():
            last = [*self._last.get(number, []), value][-self.window :]
            self._last[number] = last
            if len(last) == self.window and max(last) - min(last) <= most:
                self._stopped.add(number)
                log(INFO, "A client has converged, %s so far", len(self._stopped))

    def guarantee(self) -> Guarantee:
        """Return the limits of the other sampler."""
        return super().guarantee()

    def settings(self) -> dict[str, str | int | float]:
        """Add window and tolerance."""
        own = {"window": self.window, "tolerance": self.tolerance}
        return {**super().settings(), **own}

    def state_dict(self) -> dict[str, object]:
        """Add the last reports of every client, and who has stopped."""
        last = [[number, *values] for number, values in self._last.items()]
        own = {"last": last, "stopped": sorted(self._stopped)}
        return {**super().state_dict(), **own}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over who has stopped."""
        super().load_state_dict(state)
        saved = cast("Mapping[str, list[list[float]]]", state)
        self._last = {int(number): values for number, *values in saved["last"]}
        self._stopped = set(cast("list[int]", state["stopped"]))


class ParticipationGame(_Choosing):
    r"""Trains those clients only to whom the common model is worth its price.

    After each evaluation a client compares the metric of the common model on its own
    data with what it has alone, less its cost, and opts in or out of training:

    .. math:: \text{inside} \iff a_i - L_i - c_i + p_i \ge 0.

    All are asked to evaluate, so that those outside may come back. A cohort is that of
    another sampler, less those outside. Before its first report a client is inside,
    unless its cost is infinite.

    Parameters
    ----------
    sampler : Sampler, optional
        What draws the cohorts; :class:`UniformSampler` by default.
    local : float, sequence of float or str
        :math:`L_i`: one number for all clients, one for each in their order, or the
        name of a metric that they report with the other, such as ``accuracy`` beside
        ``received-accuracy`` of personal models.
    costs : float or sequence of float (default: 0.0)
        :math:`c_i \ge 0`, in units of the metric; infinity never takes part.
    payments : float or sequence of float (default: 0.0)
        :math:`p_i \ge 0`, what a client is paid for being inside, in the same units:
        see :class:`~flower_ext.core.participation.NetworkGame` for the smallest that
        make an equilibrium.
    metric : str (default: "accuracy")
        :math:`a_i`, which clients report.
    larger_is_better : bool (default: True)
        False for a loss, whose signs are turned.

    Notes
    -----
    If all are outside no messages ask for training, the model stays and the log says
    so; a client comes back if a later evaluation tells it to.

    That clients compare the common model with their own is from the abstract of the
    paper (arXiv 2302.08533). What exactly they compare, and that they answer at once
    after each evaluation, is ours.

    **Privacy.** As :class:`ConvergedClients`: refused under a mechanism, and in
    asynchronous runs.

    Examples
    --------
    >>> game = ParticipationGame(local=0.6, costs=[0.0, 0.2], metric="accuracy")
    >>> game.hear({0: {"accuracy": 0.7}, 1: {"accuracy": 0.7}}, "evaluate")
    >>> game.sample(range(2), 2, 1, "train"), game.sample(range(2), 2, 1, "evaluate")
    ([0], [0, 1])
    """

    def __init__(
        self,
        sampler: Sampler | None = None,
        *,
        local: float | Sequence[float] | str,
        costs: float | Sequence[float] = 0.0,
        payments: float | Sequence[float] = 0.0,
        metric: str = "accuracy",
        larger_is_better: bool = True,
    ) -> None:
        super().__init__(sampler, metric, "evaluate")
        self.local = local if isinstance(local, str) else _numbers("local", local)
        self.costs = _numbers("costs", costs, 0)
        self.payments = _numbers("payments", payments, 0)
        if math.inf in self.payments:
            refuse("payments", payments, "finite")
        yes_or_no("larger_is_better", larger_is_better)
        self.larger_is_better = larger_is_better
        self._outside: set[int] = set()
        self._known: set[int] = set()
        self._is_empty = False

    @property
    def num_outside(self) -> int:
        """How many of the clients that it has seen do not take part."""
        return len(self._outside)

    def sample(
        self, clients: Sequence[int], size: int, server_round: int, purpose: Purpose
    ) -> list[int]:
        """Return the other sampler's cohort, for training less those outside."""
        numbers = self._registry.number(clients)
        for number in set(numbers.values()) - self._known:
            self._known.add(number)
            if _of(self.costs, number, "costs") == math.inf:
                self._outside.add(number)
        cohort = self.of.sample(clients, size, server_round, purpose)
        if purpose == "evaluate":
            return cohort
        was_empty = self._is_empty
        self._is_empty = self._outside >= set(numbers.values())
        if clients and self._is_empty and not was_empty:
            log(WARNING, "Nobody takes part: no client gains by it. The model is kept")
        return [client for client in cohort if numbers[client] not in self._outside]

    def hear(
        self, reports: Mapping[int, Mapping[str, float]], purpose: Purpose
    ) -> None:
        """Let those who report opt in or out."""
        if purpose != self.purpose:
            return
        names = (
            [self.metric, self.local] if isinstance(self.local, str) else [self.metric]
        )
        for number, (common, *told) in self._read(reports, *names).items():
            own_local = told[0] if told else _of(self.local, number, "local")
            gained = gain(
                common,
                own_local,
                _of(self.costs, number, "costs"),
                _of(self.payments, number, "payments"),
                sign=1.0 if self.larger_is_better else -1.0,
            )
            self._known.add(number)
            if gained >= 0:
                self._outside.discard(number)
            else:
                self._outside.add(number)

    def guarantee(self) -> Guarantee:
        """Return the limits of the other sampler."""
        return super().guarantee()

    def settings(self) -> dict[str, str | int | float]:
        """Add what clients compare."""
        own = {
            name: str(getattr(self, name)) for name in ("local", "costs", "payments")
        }
        return {**super().settings(), **own, "larger-is-better": self.larger_is_better}

    def state_dict(self) -> dict[str, object]:
        """Add who is outside."""
        own = {"outside": sorted(self._outside), "known": sorted(self._known)}
        return {**super().state_dict(), **own, "empty": [self._is_empty]}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over who is outside."""
        super().load_state_dict(state)
        self._outside = set(cast("list[int]", state["outside"]))
        self._known = set(cast("list[int]", state["known"]))
        (self._is_empty,) = cast("list[bool]", state["empty"])


def _numbers(
    name: str, value: float | Sequence[float], low: float = -math.inf
) -> tuple[float, ...]:
    """Require a number, or one for each client."""
    many = value if isinstance(value, Sequence) else [value]
    if isinstance(value, str) or not many:
        refuse(name, value, "a number, or one for each client")
    return tuple(
        at_least(name, x, low, allow_inf=True) if low == 0 else finite(name, x)
        for x in many
    )


def _of(values: tuple[float, ...] | str, number: int, name: str) -> float:
    """Return a client's own number, or that of all."""
    assert not isinstance(values, str)
    if len(values) == 1:
        return values[0]
    if number >= len(values):
        refuse(f"len({name})", len(values), f"> {number}: one for each client, or one")
    return values[number]
