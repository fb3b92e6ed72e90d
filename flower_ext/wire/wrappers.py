"""What may be put around codecs: error feedback, a description, a choice."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import is_
from typing import NamedTuple

import numpy as np
from flwr.app import ArrayRecord
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, all_finite, is_averaged
from flower_ext.core.errors import refuse
from flower_ext.wire.chain import Chain
from flower_ext.wire.codec import Codec, Sending, Stage, Written


@dataclass(frozen=True)
class _Around(Codec):
    """Writes and reads as the codec inside."""

    codec: Codec

    def __post_init__(self) -> None:
        if not isinstance(self.codec, Codec):
            refuse("codec", self.codec, "a codec", "an instance, not the class")

    @property
    def feedback(self) -> bool:  # type: ignore[override]
        """Whether the codec inside has it."""
        return self.codec.feedback

    @property
    def within_received(self) -> bool:  # type: ignore[override]
        """Whether the codec inside is."""
        return self.codec.within_received

    @property
    def described(self) -> bool:  # type: ignore[override]
        """Whether the codec inside is."""
        return self.codec.described

    @property
    def stages(self) -> tuple[type[Stage], ...]:
        """Those of the codec inside."""
        return self.codec.stages

    @property
    def accepted(self) -> frozenset[tuple[type[Stage], ...]]:
        """Those of the codec inside."""
        return self.codec.accepted

    @property
    def lossless(self) -> bool:
        """Whether the codec inside is."""
        return self.codec.lossless

    @property
    def unbiased(self) -> bool:
        """Whether the codec inside is."""
        return self.codec.unbiased

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Write as the codec inside does."""
        return self.codec.write(arrays, sending)

    def votes(self, arrays: Arrays, sending: Sending) -> dict[str, float]:
        """Return those of the codec inside."""
        return self.codec.votes(arrays, sending)


@dataclass(frozen=True)
class ErrorFeedback(_Around):
    """A codec of uploads whose losses are made up for in later rounds.

    A client adds what its upload left out, by choice or by rounding, to its next change
    (Seide et al. 2014, "1-bit stochastic gradient descent"); it keeps that in its own
    state. For clients that are asked often: what is left out ages. What is kept is
    thrown away where it is not finite, so that a client that diverged starts anew, and
    in another run.

    Parameters
    ----------
    codec : Codec
        How changes travel. It must leave out less than there is: the expected square of
        its error must be below that of what it encodes, as it is for all that choose,
        cut or round to nearest.

    Warnings
    --------
    Codecs that are right on average at few bits lose more than that, and
    what is left out grows without bound, by a factor in every round: ``EDEN`` below 0.8
    bits, unless it is told ``unbiased=False``; ``QSGD`` below 6 bits; a rescaled
    ``RandomK`` or ``Rows`` below a density of a half; ``UniversalCode`` with random
    rounding to steps above 2. Under ``TernGrad`` it grows to many times the change.
    They need no feedback.
    """

    feedback = True


@dataclass(frozen=True)
class Described(_Around):
    """A codec of downloads for apps that train in a loop of their own.

    Names and shapes of the arrays, which such an app keeps to itself, go along with
    each message: some hundred bytes for an adapter.

    Parameters
    ----------
    codec : Codec
        How models travel.
    """

    described = True


@dataclass(frozen=True, init=False)
class AnyOf(Codec):
    """A codec of uploads in whose place a client may take another of those named.

    The server reads what is coded as one of them, with any settings, and refuses all
    else. Clients take the first unless they choose, as those with the mod
    :func:`~flower_ext.client.encoding.upload` do.

    Parameters
    ----------
    *options : Stage or Chain
        What the server accepts.

    Examples
    --------
    >>> from flower_ext.wire import NF4, Exact
    >>> AnyOf(Exact(), NF4()).stages == Exact().stages
    True
    """

    options: tuple[Codec, ...]

    def __init__(self, *options: Codec) -> None:
        if not options or not all(isinstance(x, Stage | Chain) for x in options):
            cause = "put ErrorFeedback around the choice"
            bound = "at least one codec, each bare or a Chain"
            refuse("options", options, bound, cause)
        object.__setattr__(self, "options", options)

    @property
    def stages(self) -> tuple[type[Stage], ...]:
        """Those of the first."""
        return self.options[0].stages

    @property
    def accepted(self) -> frozenset[tuple[type[Stage], ...]]:
        """Those of all."""
        return frozenset(option.stages for option in self.options)

    @property
    def within_received(self) -> bool:  # type: ignore[override]
        """Whether any is."""
        return any(option.within_received for option in self.options)

    @property
    def lossless(self) -> bool:
        """Whether all are."""
        return all(option.lossless for option in self.options)

    @property
    def unbiased(self) -> bool:
        """Whether all are."""
        return all(option.unbiased for option in self.options)

    def at(self, server_round: int) -> "AnyOf":
        """Return the choice among the codecs of a round."""
        options = tuple(option.at(server_round) for option in self.options)
        return self if all(map(is_, options, self.options)) else AnyOf(*options)

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Write as the first does."""
        return self.options[0].write(arrays, sending)


class Sent(NamedTuple):
    """A client's upload, what it left out and keeps if there is feedback, its votes."""

    record: ArrayRecord
    residual: Arrays | None
    votes: dict[str, float]


def upload(
    codec: Codec,
    change: Mapping[str, NDArray],
    kept: Mapping[str, NDArray] | None,
    sending: Sending,
) -> Sent:
    """Encode a client's change, with what its earlier uploads left out.

    Parameters
    ----------
    codec : Codec
        As the server told.
    change : Mapping[str, ndarray]
        What training changed.
    kept : Mapping[str, ndarray] or None
        The residual of the upload before, if there was one.
    sending : Sending
        What the client knows.

    Returns
    -------
    Sent
        The residual is None without feedback, and where it is not finite: it would
        come back in every round.
    """
    change = dict(change)
    if codec.feedback and kept is not None:
        change |= {n: np.asarray(change[n] + x) for n, x in kept.items()}
    votes = codec.votes(change, sending)
    if not codec.feedback:
        return Sent(codec.encode(change, sending), None, votes)
    record = codec.encode(change, sending)
    sent = codec.decode(record, change, sending.began)
    with np.errstate(invalid="ignore"):
        floats = {n: x for n, x in change.items() if is_averaged(x)}
        left = {n: np.asarray(x - sent[n]) for n, x in floats.items()}
    return Sent(record, left if all_finite(left.values()) else None, votes)
