"""What a round is made of: what server and clients say to each other, and its words.

A :class:`Round` is what every hook of a strategy is told, a :class:`Reply` what one
client has said in it, a :class:`Payload` what clients are sent. The keys of records
that both sides know are here, too.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal, NoReturn, Protocol, TypeVar

import numpy as np
import numpy.typing as npt
from flwr.app import ArrayRecord, ConfigRecordValues, MetricRecordValues, RecordDict

from flower_ext.core.arrays import Arrays, Term, all_finite, subtract
from flower_ext.core.replies import (
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
# A record of a run that is saved: its name, and the round after which it was resumed.
RUN_KEY = "run"
RUN_NAME = "name"
RUN_RESUMED = "resumed-after"

# Records of ``context.state`` under such keys say what a client has spent. A checkpoint
# puts none of them back: what was charged after it was saved is spent all the same.
ACCOUNT_PREFIX = "account/"

# The server finds it in the reason of an error reply.
WRONG_HALF = "the strategy needs the client half"


class Decoder(Protocol):
    """What reads the change that clients have encoded."""

    def decode(self, record: ArrayRecord, like: Arrays) -> Arrays:
        """Return the change, laid out as ``like``; a wrong one is malformed."""


@dataclass(frozen=True)
class Round:
    """One round, as every hook of a strategy is told of it.

    Attributes
    ----------
    number : int
        From 1; counted anew in every ``start`` but a resumed one.
    sent : dict[str, ndarray]
        The model on the server, from which clients start.
    told : Mapping
        The configuration that clients are told, the user's own in it.
    phase : {"train", "evaluate"}
        What clients are asked for.
    population : int
        Clients that there are: connected nodes, or under a mechanism those planned.
    private : bool
        Whether a mechanism bounds and hides what each client contributes.
    cohort : sequence of int
        Clients that are asked, by their place; empty where a worker adds up.
    ties : dict[str, str]
        Further names of tensors, each with the first, as far as they are known.
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
    ties: Ties = field(default_factory=dict)
    upload: Decoder | None = None

    @cached_property
    def infinite(self) -> frozenset[str]:
        """The arrays of the model with infinities or NaN."""
        return frozenset(n for n, x in self.sent.items() if not all_finite([x]))


@dataclass(frozen=True)
class ReplyKeys:
    """Where in a reply a strategy looks for what.

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
    """What one client has replied.

    Whatever is read of it is checked: what is missing or in another form raises
    :class:`~flower_ext.core.replies.MalformedReply`, and the reply is left out.

    Attributes
    ----------
    content : RecordDict
        As the client sent it; not to be changed.
    client : int
        The client's place among the nodes, the same in every run.
    keys : ReplyKeys
        Where what is looked for.
    """

    content: RecordDict
    client: int
    keys: ReplyKeys = ReplyKeys()

    @property
    def num_examples(self) -> float:
        """The metric ``weighted_by_key``, by which FedAvg weighs."""
        return self.number(self.keys.weight)

    def model(self, round: Round, like: Arrays | None = None) -> Arrays:
        """Return the model that the client has trained.

        Parameters
        ----------
        round : Round
            In which it was trained.
        like : dict[str, ndarray], optional
            Names, shapes and kinds that it must have; by default those of the model.
        """
        key = array_key(self.content, self.keys.arrays, self.keys.others)
        return self._read(read_arrays, key, round.sent if like is None else like)

    def delta(self, round: Round) -> dict[str, Term]:
        """Return the client's model minus the model that it was sent.

        A tensor that the client has under several names counts under the first.
        """
        sent = round.sent
        if round.upload is not None:
            key = array_key(self.content, self.keys.arrays, self.keys.others)
            record = self.content.array_records.get(key)
            if record is None:
                self._refuse(f"no ArrayRecord {key!r} in the reply")
            decode = round.upload.decode
            return dict(self._read(lambda _: decode(record, sent)))
        new = self.model(round)
        # Under a mechanism no reply may say which of the model's arrays are one.
        tied = round.ties if round.private else read_ties(self.content, sent)
        return {
            name: subtract(
                x if name in tied else new[name], x, finite=name not in round.infinite
            )
            for name, x in sent.items()
        }

    def arrays(self, key: str, like: Arrays) -> Arrays:
        """Return the arrays under a key: those of ``like``, of its shapes and kinds."""
        return self._read(read_arrays, key, like)

    def has(self, key: str) -> bool:
        """Whether there is a record, or a metric, of that name."""
        return key in self.content or has_metric(self.content, key)

    def number(self, key: str, low: float = 0.0) -> float:
        """Return a metric that is a finite number, of float32 and at least ``low``."""
        return self._read(read_scalar, key, low)

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
        """Return a metric of ``size`` finite numbers, see :meth:`number`."""
        return np.array(self._read(read_vector, key, size, low))

    def _read(self, read: Callable[..., T], *how: object) -> T:
        """Read the content; whoever catches the error knows whose reply it is."""
        try:
            return read(self.content, *how)
        except MalformedReply as problem:
            problem.client = self.client
            raise

    def _refuse(self, reason: str) -> NoReturn:
        problem = MalformedReply(reason)
        problem.client = self.client
        raise problem


@dataclass(frozen=True)
class Payload:
    """What clients of one kind are sent.

    Parameters
    ----------
    arrays : dict[str, ndarray] or ArrayRecord
        In the place of the model; a record travels as it is.
    config : Mapping
        Told besides what :meth:`~flower_ext.server.strategy.RoundStrategy.tell` tells.
    beside : dict[str, dict[str, ndarray]]
        Further arrays, each group in a record under its own key.
    """

    arrays: Arrays | ArrayRecord
    config: Config = field(default_factory=dict)
    beside: Mapping[str, Arrays] = field(default_factory=dict)
