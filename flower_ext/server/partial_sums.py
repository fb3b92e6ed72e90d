r"""Partial sums: workers add up the contributions of the clients that they ran.

::

    worker:  reply -> term -> clipped term \
             reply -> term -> clipped term  > Total  --+
                                                       +-> merged in client order
    worker:  reply -> term -> clipped term  > Total  --+

One sum for each pack travels to the server, and the metrics of every client. The server
then needs the memory of a few models, however large the cohort is.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict

from flower_ext._flower import unchecked
from flower_ext.core.arrays import none_below_zero
from flower_ext.core.contribution import Contribution, Total
from flower_ext.core.protocol import Reply, ReplyKeys, Round
from flower_ext.core.replies import (
    LONG_INTEGERS,
    NOT_FINITE,
    MalformedReply,
    has_long_integers,
    unreadable,
)
from flower_ext.wire.traffic import Measured, measure_content


class Contributing(Protocol):
    """What a worker needs of a strategy."""

    #: Whether clients that have examples all weigh the same.
    equal_weights: bool

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return one client's term."""


class Version(NamedTuple):
    """The round whose model a client was sent, and how much its term counts."""

    round: Round
    factor: float = 1.0


@dataclass(frozen=True)
class Summand:
    """Makes the terms of replies: all that a worker needs to add them up.

    Attributes
    ----------
    strategy : Contributing
        The strategy, without the attributes whose names begin with ``_``.
    round : Round
        The round, without its cohort.
    places : Mapping[int, int]
        The place of every node that was asked; of all where cohorts are secret.
    keys : ReplyKeys
        Keys of the model's record and of the number of examples.
    shapes : dict[str, tuple]
        Shapes of a contribution's arrays and scalars, by the strategy's ``zero``.
    clip : callable or None
        Under a mechanism ``Contribution -> Contribution``; it returns None for a
        contribution that is not finite.
    versions : Mapping[int, Version]
        Of nodes that may have been sent the model of an earlier round.
    measure : callable, optional
        ``Contribution -> Contribution``, which adds what a server optimizer asks for.
    """

    strategy: Contributing
    round: Round
    places: Mapping[int, int]
    keys: ReplyKeys
    shapes: Mapping[str, tuple[int, ...]]
    clip: Callable[[Contribution], Contribution | None] | None
    versions: Mapping[int, Version] = field(default_factory=dict)
    measure: Callable[[Contribution], Contribution] | None = None

    def term(self, content: RecordDict, node: int, *, check: bool) -> Contribution:
        """Return the clipped term of a reply.

        Parameters
        ----------
        content : RecordDict
            Content of one client's reply.
        node : int
            The client's node.
        check : bool
            Whether to look for values that would spoil the model. Clipped terms cannot.

        Raises
        ------
        MalformedReply
            If the reply is to be left out.
        """
        reply = Reply(content, self.places[node], self.keys)
        version = self.versions.get(node, Version(self.round))
        try:
            plain = self._plain_weight(reply)
            term = self.strategy.contribution(reply, version.round)
            shapes = term.shapes()
        except MalformedReply:
            raise
        except Exception as error:  # no reply ends a run
            raise MalformedReply(unreadable(error)) from error
        for key in shapes.keys() & self.shapes.keys():
            if shapes[key] != self.shapes[key]:
                raise MalformedReply(
                    f"{key!r} of the contribution has shape {shapes[key]}, in the "
                    f"strategy's zero() it has {self.shapes[key]}"
                )
        self._require_counts_that_fit(term)
        if self.clip is None:
            term = self._measured(term.weighed(plain)).times(version.factor)
            if check and not term.can_move(self.round.sent):
                raise MalformedReply(NOT_FINITE)
            return term
        try:
            clipped = self.clip(term)
        except TypeError as error:  # complex numbers, objects
            raise MalformedReply(unreadable(error)) from error
        if clipped is None:
            raise MalformedReply(NOT_FINITE)
        return clipped

    def _measured(self, term: Contribution) -> Contribution:
        if self.measure is None:
            return term
        try:
            return self.measure(term)
        except TypeError as error:  # complex numbers, objects
            raise MalformedReply(unreadable(error)) from error

    def _require_counts_that_fit(self, term: Contribution) -> None:
        """Refuse counts that are negative, or that NumPy would stretch in the sum."""
        for part, counts in term.counts.items():
            arrays = term.arrays.get(part, {})
            for name, count in counts.items():
                known = self.shapes.get(f"{part}/{name}", ())
                shape = arrays[name].shape if name in arrays else known
                if count.shape not in ((), shape):
                    raise MalformedReply(
                        f"the counts of {name!r} have shape {count.shape}, must be () "
                        f"or that of the array, {shape}"
                    )
                if not none_below_zero([count]):
                    raise MalformedReply(f"the counts of {name!r} must be >= 0")

    def _plain_weight(self, reply: Reply) -> float:
        """Return the weight of a contribution that declares none."""
        examples = reply.num_examples  # read in any case: who does not say has none
        return float(examples > 0) if self.strategy.equal_weights else examples


@dataclass(frozen=True, eq=False)
class PackSum:
    """The sum of the terms of some clients, by their nodes."""

    total: Total
    clients: frozenset[int]


class Summed(Measured):
    """What is left of a reply once its arrays are in a sum.

    Attributes
    ----------
    problem : str
        Why it is in no sum, or empty.
    pack : PackSum or None
        The sum that it is in.
    """

    problem: str = ""
    pack: PackSum | None = None

    @property
    def metric_records(self) -> dict[str, MetricRecord]:  # type: ignore[override]
        """MetricRecords by key; Flower's own checks each again, for every client."""
        return {k: x for k, x in self.items() if isinstance(x, MetricRecord)}


class PartialSum:
    """Adds up the replies of a pack, one after the other."""

    def __init__(self, summand: Summand) -> None:
        self._summand = summand
        self.total = Total()

    def add(self, reply: RecordDict, node: int) -> Summed:
        """Add a node's term to the sum, unless it is unusable; return what is left."""
        rest = unchecked(
            Summed(), {k: x for k, x in reply.items() if not isinstance(x, ArrayRecord)}
        )
        rest.traffic = measure_content(reply)
        try:
            if has_long_integers(rest):  # the server leaves it out whatever its arrays
                raise MalformedReply(LONG_INTEGERS)
            term = self._summand.term(reply, node, check=True)
        except MalformedReply as problem:
            rest.problem = str(problem)
        else:
            self.total.add(term)
        return rest


@runtime_checkable
class Summable(Protocol):
    """A strategy whose replies may be added up elsewhere."""

    def summand(self) -> Summand | None:
        """Return what makes the terms of the round that was just configured."""


@runtime_checkable
class SummingGrid(Protocol):
    """A grid that can add replies up where they are made."""

    def send_and_sum(
        self, messages: Iterable[Message], summand: Summand, *, timeout: float | None
    ) -> Iterable[Message]:
        """Do as ``send_and_receive``; contents of replies may be :class:`Summed`."""
