"""What samplers are, and the plain ones."""

import secrets
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, cast, get_args

import numpy as np

from flower_ext.core.errors import (
    one_of,
    probability,
    refuse,
    whole,
)
from flower_ext.core.nodes import NodeRegistry

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
STREAM: dict[Purpose, int] = {"train": 0, "evaluate": 1}
SECRET_BITS = 128
# Seeds below can be found by trying. Of 128 random bits one in 2**32 numbers is below.
LEAST_SECRET = 2**96


def require_probability(value: float) -> None:
    """Refuse what is no probability of one client in one round."""
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
            require_probability(self.probability)
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
        stream = 0 if self.same_for_evaluation else STREAM[purpose]
        return np.random.default_rng([self._own_seed(), server_round, stream])

    def _own_seed(self) -> int:
        """Return the seed; a secret one is drawn when it is first needed."""
        if self.seed is None:
            self.seed = secrets.randbits(SECRET_BITS)
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


class Recognising(Sampler):
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


class TooFewClients(RuntimeError):
    """Fewer clients may take part in a round than were asked for."""
