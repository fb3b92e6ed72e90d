"""Rounds of LoRA adapters that are added up as products, whatever their ranks."""

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Unpack, cast

import numpy as np
from flwr.app import ArrayRecord
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, from_record, largest, numpy_of, to_record
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import positive, refuse, whole, yes_or_no
from flower_ext.core.lora import (
    RANK_KEY,
    SCALING_KEY,
    Pair,
    Product,
    add_to_base,
    require_adapter,
    scaling,
    sum_of_products,
)
from flower_ext.core.protocol import Metrics, Payload, Reply, Round
from flower_ext.core.replies import NOT_FINITE, MalformedReply
from flower_ext.core.typing import Floats
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import SGD
from flower_ext.server.options import RoundOptions
from flower_ext.server.strategy import RoundStrategy

# No product may move a weight further, as no change may move any model.
_LARGEST_CHANGE = 1e18


class _Replacing(SGD):
    """The step to a new adapter, whose coordinates are others than the last one's."""

    keeps_coordinates = False


@dataclass(frozen=True)
class Trained:
    """The adapter of a layer as one client has trained it.

    Attributes
    ----------
    share : float
        Its weight in the mean, p_k.
    scaling : float
        What its product is scaled by, s_k.
    a, b : ndarray of float64
        The factors, (rank, in) and (out, rank).
    """

    share: float
    scaling: float
    a: Floats
    b: Floats


def mean_product(trained: Sequence[Trained]) -> Product:
    r"""Return :math:`\sum_k p_k s_k B_k A_k`, in factors."""
    return sum_of_products((t.share * t.scaling, t.b, t.a) for t in trained)


@dataclass(frozen=True)
class Layer:
    """What becomes of a layer: its new adapter, and what is added to its base.

    Attributes
    ----------
    a, b : ndarray of float64
        In the shapes that they have at the server.
    base : Product, optional
        With the scaling in it.
    sizes : tuple of float
        Squared norms of a part and of the whole, whose quotient over all layers is the
        metric :attr:`LoRAStrategy.metric`, before its root is taken.
    """

    a: Floats
    b: Floats
    base: Product | None = None
    sizes: tuple[float, float] = (0.0, 0.0)


@dataclass
class _Outcome:
    """What the last ``aggregate`` found, which ``finish`` makes the state."""

    base: Arrays = field(default_factory=dict)
    metrics: Metrics = field(default_factory=dict)


class LoRAStrategy(RoundStrategy):
    r"""The base of strategies that aggregate LoRA adapters by their products.

    What is not of an adapter, such as a head, is averaged as FedAvg does. The server
    works layer by layer: of a round it holds the clients' factors, which it was sent,
    and one layer's decomposition.

    Parameters
    ----------
    lora_alpha : float
        That of the clients' ``LoraConfig``, of any rank. Clients whose adapters are
        scaled otherwise refuse.
    use_rslora : bool (default: False)
        Likewise; products are scaled by :math:`\alpha/\sqrt r` and not by
        :math:`\alpha/r`.
    ranks : sequence of int, optional
        Ranks of clients that differ, at most that of the initial model; by default all
        have that.
    rank_of : callable, optional
        ``client -> its rank``, where the client is its place among the nodes (in a
        simulation its partition); by default ``ranks[client % len(ranks)]``.
    mechanism, server_optimizer
        Refused: nothing of this is shown for noisy sums, or for steps of other lengths.
    *flowers, **options
        Sampler, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.RoundOptions`.

    Raises
    ------
    ValueError
        When a round begins: if the initial model has no adapter that is made of whole
        pairs of matrices, all of one rank.
    """

    #: Name of a metric of a round, see :attr:`Layer.sizes`.
    metric: ClassVar[str]
    #: Why there is no mechanism.
    no_mechanism: ClassVar[str]
    drop_in = DropIn(
        fill_in=(
            "a model with adapters of LoRA, and an app made with client_app and the\n"
            "client half: it makes models of the rank that is told, and changes their\n"
            "base"
        ),
        arguments=lambda num_clients: {"lora_alpha": 8},
        written="lora_alpha=8",
    )
    #: Whether coordinates of the adapter mean the same after a round.
    keeps_coordinates: ClassVar[bool] = False

    def __init__(
        self,
        *flowers: object,
        lora_alpha: float,
        use_rslora: bool = False,
        ranks: Sequence[int] = (),
        rank_of: Callable[[int], int] | None = None,
        mechanism: Mechanism | None = None,
        **options: Unpack[RoundOptions],
    ) -> None:
        if mechanism is not None:
            refuse("mechanism", mechanism, "left out", self.no_mechanism)
        if (optimizer := options.get("server_optimizer")) is not None:
            cause = "a step of another length than 1 would not be to the exact mean"
            refuse("server_optimizer", optimizer, "left out", cause)
        step = SGD() if self.keeps_coordinates else _Replacing()
        options["server_optimizer"] = step
        super().__init__(*flowers, **options)
        self.lora_alpha = positive("lora_alpha", lora_alpha)
        self.use_rslora = yes_or_no("use_rslora", use_rslora)
        self.ranks = tuple(whole("ranks", rank, 1) for rank in ranks)
        if rank_of is not None and not self.ranks:
            refuse("rank_of", rank_of, "left out without ranks")
        self.rank_of = rank_of
        self._base: Arrays = {}
        self._found = _Outcome()

    # What a strategy says ---------------------------------------------------------

    def begin(self, rank: int, round: Round) -> Arrays:
        """Return what clients of a rank begin with: adapter, head and all else."""
        return round.sent

    def sends(self, rank: int, round: Round) -> Arrays:
        """Return what of it travels; clients know the rest."""
        return self.begin(rank, round)

    @abstractmethod
    def combine(self, a: NDArray, b: NDArray, trained: Sequence[Trained]) -> Layer:
        """Return what becomes of a layer.

        Parameters
        ----------
        a, b : ndarray
            The server's factors.
        trained : sequence of Trained
            Those of the clients; their shares add up to 1.
        """

    def scaling_of(self, rank: int) -> float:
        """Return what products of a rank are scaled by."""
        return scaling(self.lora_alpha, rank, use_rslora=self.use_rslora)

    # The round --------------------------------------------------------------------

    def layers(self, sent: Arrays) -> tuple[list[Pair], int]:
        """Return the adapter of a model, and its rank."""
        found, rank = require_adapter(sent)
        if any(own > rank for own in self.ranks):
            cause = "the server's adapter holds no more"
            refuse("ranks", self.ranks, f"<= {rank}, as of initial_arrays", cause)
        return found, rank

    def variant(self, client: int, round: Round) -> int:
        """Return a client's rank."""
        if not self.ranks:
            return self.layers(round.sent)[1]
        if self.rank_of is None:
            return self.ranks[client % len(self.ranks)]
        rank = self.rank_of(client)
        if rank not in self.ranks:
            refuse(f"rank_of({client})", rank, f"one of ranks={self.ranks}")
        return rank

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Send a rank's adapter, and what the base has changed by since the start."""
        self.layers(round.sent)
        rank = cast(int, variant)
        told = {RANK_KEY: rank, SCALING_KEY: self.scaling_of(rank)}
        sent = self.sends(rank, round)
        return Payload({**sent, **self._base} if self._base else sent, told)

    def aggregate(self, round: Round, replies: Sequence[Reply]) -> Arrays:
        """Return the way to the new adapter, and to the mean of all else."""
        self._found = _Outcome(self._base)
        begun = {
            rank: self.begin(rank, round)
            for rank in {self.variant(reply.client, round) for reply in replies}
        }
        read = [_Read(self, reply, round, begun) for reply in replies]
        mass = sum(client.weight for client in read)
        if mass <= 0:
            return {}
        pairs, _ = self.layers(round.sent)
        of_pairs = {name for pair in pairs for name in (pair.a, pair.b)}
        total = Total()
        for client in read:
            rest = {n: x for n, x in client.change.items() if n not in of_pairs}
            total.add(Contribution({DELTA: rest}, weight=client.weight))
        direction = total.mean()
        sizes = np.zeros(2)
        for pair in pairs:
            a, b = round.sent[pair.a], round.sent[pair.b]
            new = self.combine(a, b, [client.trained(pair, mass) for client in read])
            direction[pair.a], direction[pair.b] = new.a - a, new.b - b
            sizes += new.sizes
            if new.base is not None:
                self._grow(pair.layer, new.base, b)
        part, all_of_it = np.sqrt(sizes)
        self._found.metrics[self.metric] = float(part / all_of_it) if part else 0.0
        return {name: direction[name] for name in round.sent}

    def _grow(self, layer: str, more: Product, like: NDArray) -> None:
        """Add to the base, in what ``finish`` takes over."""
        kept = {
            name: x
            for name, x in self._found.base.items()
            if name.rpartition(".")[0] != layer
        }
        new = add_to_base(self._found.base, layer, more, like.dtype)
        self._found.base = {**kept, **new}

    def finish(self, round: Round, replies: Sequence[Reply]) -> Metrics:
        """Take over the change of the base that ``aggregate`` found."""
        self._base = self._found.base
        return self._found.metrics

    def whole(self, arrays: ArrayRecord) -> ArrayRecord:
        """Return a model with what its base has changed by, to evaluate or save it.

        Parameters
        ----------
        arrays : ArrayRecord
            The model of the last round: what ``evaluate_fn`` is given, or the result of
            a run. Of an earlier one the change of the base is not known any more.
        """
        return to_record({**from_record(arrays), **self._base})

    # The run ----------------------------------------------------------------------

    def state_dict(self) -> dict[str, object]:
        """Add the change of the base."""
        return {**super().state_dict(), "base": dict(self._base)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the change of the base."""
        super().load_state_dict(state)
        self._base = dict(cast(Arrays, state["base"]))

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        described = super().settings()
        del described["Server optimizer"]
        return {
            "LoRA": f"alpha={self.lora_alpha:g}" + ", rsLoRA" * self.use_rslora,
            "Ranks": self.ranks or "that of the model",
            **described,
        }


class _Read:
    """A reply to be added up: its weight, and its change."""

    def __init__(
        self,
        strategy: LoRAStrategy,
        reply: Reply,
        round: Round,
        begun: Mapping[int, Arrays],
    ) -> None:
        rank = strategy.variant(reply.client, round)
        self.weight = reply.num_examples
        self._scaling, self._rank = strategy.scaling_of(rank), rank
        self._start = begun[rank]
        self._client = reply.client
        self.change = reply.change(round, self._start).arrays

    def trained(self, pair: Pair, mass: float) -> Trained:
        a, b = (
            self._start[name].astype(np.float64) + numpy_of(self.change[name])
            for name in (pair.a, pair.b)
        )
        size = largest(a) * largest(b) * self._rank * self._scaling
        if not size <= _LARGEST_CHANGE:
            problem = MalformedReply(NOT_FINITE)
            problem.client = self._client
            raise problem
        return Trained(self.weight / mass, self._scaling, a, b)
