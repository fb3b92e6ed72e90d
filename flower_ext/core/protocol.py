"""What server and clients say to each other in a round, and under which keys.

Every hook of a strategy is told the :class:`Round`. A :class:`Payload` is what clients
are sent, a :class:`Reply` what one client answers. The keys of records that both sides
must know are here as well.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import inf
from typing import Literal, NamedTuple, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    ConfigRecordValues,
    MetricRecordValues,
    RecordDict,
)

from flower_ext.core.arrays import (
    Arrays,
    Lazy,
    all_finite,
    is_averaged,
    is_parameter,
    largest,
    subtract,
)
from flower_ext.core.errors import refuse
from flower_ext.core.replies import (
    NOT_FINITE,
    MalformedReply,
    array_key,
    has_metric,
    read_arrays,
    read_scalar,
    read_vector,
)
from flower_ext.core.ties import Ties, read_ties

T = TypeVar("T")

Metrics = dict[str, MetricRecordValues]
Config = Mapping[str, ConfigRecordValues]
Phase = Literal["train", "evaluate"]

ARRAYS_KEY = "arrays"
CONFIG_KEY = "config"
METRICS_KEY = "metrics"
CLIENT_HALF_KEY = "client-half"
# Which of the server's models it is that came alone, where the server has several.
MODEL_NUMBER_KEY = "model-number"
# Which strategy's state it is that a client keeps the other half of.
STATE_KEY = "state-of"
# A record of a run that is saved: its name, and the round after which it was resumed.
RUN_KEY = "run"
RUN_NAME = "name"
RUN_RESUMED = "resumed-after"
# In that record, of a run whose clients begin anew: what they keep is of this run only.
RUN_CLIENTS = "clients-of"

# Records of ``context.state`` under such keys say what a client has spent. A checkpoint
# puts none of them back: what was charged after it was saved is spent all the same.
ACCOUNT_PREFIX = "account/"

# Metrics of the received model, beside those of the personal one that is evaluated.
RECEIVED = "received-"
# Whether a client has kept anything from its trainings, where its half needs that.
HAS_STATE = "has-personal-state"

# Part of a client's error: the server recognises by it that the app lacks a half.
WRONG_HALF = "the strategy needs the client half"


class Change(NamedTuple):
    """What a client's training changed, as far as the server is told.

    Attributes
    ----------
    arrays : dict[str, Lazy]
        Trained minus received; zero where nothing was sent.
    masks : dict[str, ndarray of bool] or None
        The coordinates that were sent; None if all were.
    """

    arrays: Mapping[str, Lazy]
    masks: Mapping[str, npt.NDArray[np.bool_]] | None = None


class Decoder(Protocol):
    """Reads the change that a client has encoded."""

    def decode(self, record: ArrayRecord, start: Arrays) -> Change:
        """Return the change from the arrays that a client started from.

        Raises
        ------
        MalformedReply
            If it cannot be read.
        """


@dataclass(frozen=True)
class Round:
    """One round, as every hook of a strategy is told of it.

    Attributes
    ----------
    number : int
        Number of the round, from 1. Every ``start`` counts from 1 again, unless it
        resumes a saved run.
    sent : dict[str, ndarray]
        The server's model, from which clients start.
    told : Mapping
        The configuration that clients are told, the user's own included.
    phase : {"train", "evaluate"}
        What clients are asked to do.
    population : int
        Number of clients: the connected nodes, or those that a mechanism plans with.
    private : bool
        Whether a mechanism bounds and hides what each client contributes.
    cohort : sequence of int
        Places of the clients that are asked; empty in a worker, which is not told, and
        where a mechanism counts on secret cohorts.
    trained : frozenset of int
        Places of the clients that have been asked to train so far, in this run and
        those that it continues; empty where ``cohort`` is.
    answered : frozenset of int
        Those of them that have answered, and so have kept what their half keeps; empty
        where ``cohort`` is.
    answered_before : frozenset of int
        Those of them that have answered in the round before, and so have what they were
        sent in it; empty where ``cohort`` is.
    ties : dict[str, str]
        Further names of tied tensors with the first name of each, where known.
    upload : Decoder, optional
        Reads the changes of clients that were asked to encode them.
    """

    number: int
    sent: Arrays
    told: Config = field(default_factory=dict)
    phase: Phase = "train"
    population: int = 0
    private: bool = False
    cohort: Sequence[int] = ()
    trained: frozenset[int] = frozenset()
    answered: frozenset[int] = frozenset()
    answered_before: frozenset[int] = frozenset()
    ties: Ties = field(default_factory=dict)
    upload: Decoder | None = None

    @property
    def floats(self) -> Arrays:
        """The arrays of the model that hold real numbers."""
        return {name: x for name, x in self.sent.items() if is_averaged(x)}

    @property
    def parameters(self) -> Arrays:
        """The arrays that are trained: not BatchNorm's running statistics."""
        return {name: x for name, x in self.sent.items() if is_parameter(name, x)}

    @cached_property
    def largest(self) -> Mapping[str, float]:
        """The size of the largest number in each float array; inf beside a NaN, too."""
        return {name: largest(x) for name, x in self.floats.items()}

    @property
    def infinite(self) -> frozenset[str]:
        """The arrays of the model with infinities or NaN."""
        return frozenset(n for n, size in self.largest.items() if size == inf)


@dataclass(frozen=True)
class ReplyKeys:
    """The keys under which a strategy finds things in a reply.

    Parameters
    ----------
    arrays : str
        Key of the model's record.
    weight : str
        Metric with the number of examples, ``weighted_by_key``.
    others : tuple of str
        Keys of array records that are not the model.
    """

    arrays: str = ARRAYS_KEY
    weight: str = "num-examples"
    others: tuple[str, ...] = ()


@dataclass(frozen=True)
class Reply:
    """The reply of one client, read with checks.

    Anything that is missing or in another form than asked for raises
    :class:`~flower_ext.core.replies.MalformedReply`, and the reply is left out.

    Attributes
    ----------
    content : RecordDict
        As the client sent it; not to be changed.
    client : int
        The client's place among the nodes, the same in every run.
    keys : ReplyKeys
        Keys of the model's record and of the number of examples.
    finite : bool
        Whether a decoded change that is not finite is refused when it is read.
    """

    content: RecordDict
    client: int
    keys: ReplyKeys = ReplyKeys()
    finite: bool = False

    @property
    def num_examples(self) -> float:
        """The metric ``weighted_by_key``, by which FedAvg weighs."""
        return self.number(self.keys.weight)

    def require_examples(self) -> None:
        """Require the number of examples: who does not say it has no weight."""
        self.number(self.keys.weight)

    def model(self, round: Round, like: Arrays | None = None) -> Arrays:
        """Return the model that the client has trained, if that is what travels.

        Parameters
        ----------
        round : Round
            The round in which it was trained.
        like : dict[str, ndarray], optional
            Names, shapes and kinds of numbers that it must have; by default those of
            the model that was sent.
        """
        key = array_key(self.content, self.keys.arrays, self.keys.others)
        if round.upload is not None:
            self._refuse("its change travels, encoded: delta() and change() read it")
        return self._read(read_arrays, key, round.sent if like is None else like)

    def delta(self, round: Round) -> dict[str, Lazy]:
        """Return the client's model minus the model that it was sent.

        The change of a tied tensor counts under its first name, and is 0 under the
        others. The arrays are computed while they are added up; ``.numpy()`` makes one.
        """
        return dict(self.change(round).arrays)

    def change(self, round: Round, start: Arrays | None = None) -> Change:
        """Return the change with what of it was sent, see :meth:`delta`.

        Parameters
        ----------
        round : Round
            In which it was trained.
        start : dict[str, ndarray], optional
            What the client was sent under these names, and started from; by default the
            model.
        """
        sent = round.sent if start is None else start
        if round.upload is not None:
            key = array_key(self.content, self.keys.arrays, self.keys.others)
            record = self.content.array_records.get(key)
            if record is None:
                self._refuse(f"no ArrayRecord {key!r} in the reply")
            decode = round.upload.decode
            found = self._read(lambda _: decode(record, sent))
            if self.finite and not all_finite(found.arrays.values()):
                self._refuse(NOT_FINITE)
            return found
        new = self.model(round, sent)
        # Under a mechanism no reply may decide which arrays are tied: that would depend
        # on who replied.
        tied = round.ties if round.private else read_ties(self.content, sent)
        return Change(
            {
                name: subtract(
                    x if name in tied else new[name],
                    x,
                    largest=round.largest.get(name, inf) if start is None else inf,
                )
                for name, x in sent.items()
            }
        )

    def arrays(self, key: str, like: Arrays) -> Arrays:
        """Return the arrays under a key, with the names and shapes of ``like``."""
        return self._read(read_arrays, key, like)

    def has(self, key: str) -> bool:
        """Whether there is a record, or a metric, of that name."""
        return key in self.content or has_metric(self.content, key)

    def number(self, key: str, low: float = 0.0) -> float:
        """Return a metric: a number of at least ``low`` that a float32 can hold."""
        return self._read(read_scalar, key, low)

    def numbers(self) -> dict[str, float]:
        """Return all metrics that are single finite numbers; malformed is none."""
        return {
            name: float(value)
            for record in self.content.metric_records.values()
            for name, value in record.items()
            if isinstance(value, int | float) and abs(value) <= sys.float_info.max
        }

    def share(self, key: str, high: float = 1.0) -> float:
        """Return a metric from 0 to ``high``."""
        found = self.number(key)
        if found > high:
            self._refuse(f"metric {key!r}={found} must be <= {high:g}")
        return found

    def whole(self, key: str, below: int) -> int:
        """Return a metric that is a whole number from 0 to ``below - 1``."""
        found = self.number(key)
        if found != int(found) or found >= below:
            self._refuse(f"metric {key!r}={found} must be a whole number < {below}")
        return int(found)

    def vector(self, key: str, size: int, low: float = 0.0) -> npt.NDArray[np.float64]:
        """Return a metric of ``size`` numbers, each as in :meth:`number`."""
        return np.array(self._read(read_vector, key, size, low))

    def _read(self, read: Callable[..., T], *how: object) -> T:
        """Read the content, and note in an error whose reply it is."""
        try:
            return read(self.content, *how)
        except MalformedReply as problem:
            problem.client = self.client
            raise

    def _refuse(self, reason: str) -> NoReturn:
        problem = MalformedReply(reason)
        problem.client = self.client
        raise problem


def weighted_mean(replies: Iterable[Reply], key: str, weight: str) -> float | None:
    """Return the mean of a metric, weighted by another, over replies that have both."""
    total = weighed = 0.0
    for reply in replies:
        try:
            value = reply.number(key, low=-sys.float_info.max)
            share = reply.number(weight)
        except MalformedReply:  # it has none, or one that is not finite
            continue
        total += share
        weighed += share * value
    return weighed / total if total else None


def means_by_kind(rows: Iterable[tuple[str, Mapping[str, float]]]) -> dict[str, float]:
    """Return the mean of each metric over the clients of a kind, each counted once.

    Parameters
    ----------
    rows : iterable of (str, Mapping[str, float])
        A client's kind, and its metrics.

    Examples
    --------
    >>> means_by_kind([("seen", {"loss": 1.0}), ("seen", {"loss": 3.0}), ("new", {})])
    {'loss-seen': 2.0}
    """
    values: dict[str, list[float]] = {}
    for kind, metrics in rows:
        for name, value in metrics.items():
            values.setdefault(f"{name}-{kind}", []).append(value)
    return {name: sum(found) / len(found) for name, found in values.items()}


def model_in(content: RecordDict, others: Iterable[str] = ()) -> ArrayRecord:
    """Return the model in a message; keys in ``others`` are not it."""
    return content.array_records[array_key(content, ARRAYS_KEY, others)]


def told(content: RecordDict) -> ConfigRecord:
    """Return what the strategy tells, in a message that asks for a client half.

    Raises
    ------
    ValueError
        If it asks for none: it is of another strategy.
    """
    configs = [x for x in content.config_records.values() if CLIENT_HALF_KEY in x]
    if not configs:
        bound = f"with a configuration that has {CLIENT_HALF_KEY!r}"
        refuse("message", sorted(content), bound, "is the strategy that of the lines?")
    return configs[0]


@dataclass(frozen=True)
class Payload:
    """What the clients of one variant are sent.

    Parameters
    ----------
    arrays : dict[str, ndarray] or ArrayRecord
        What clients receive as the model; a record travels as it is.
    config : Mapping
        Settings for this variant, beside those of
        :meth:`~flower_ext.server.strategy.RoundStrategy.tell`.
    beside : dict[str, dict[str, ndarray]]
        Further groups of arrays, each in a record under its own key.
    """

    arrays: Arrays | ArrayRecord
    config: Config = field(default_factory=dict)
    beside: Mapping[str, Arrays] = field(default_factory=dict)
