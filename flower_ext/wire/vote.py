"""Codecs that clients vote on: which of several loses least for its bytes.

Mitchell, Ballé, Charles and Konečný 2022 (arXiv:2201.02664) let every client evaluate
distortion and rate of a few steps of its quantiser, and send a vote for the best, with
which the server chooses the step of the next round. Here the options are any codecs.
"""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from operator import is_

import numpy as np

from flower_ext.core.arrays import Arrays, is_averaged
from flower_ext.core.errors import at_least, refuse, whole
from flower_ext.wire.chain import Chain
from flower_ext.wire.codec import PAYLOAD, Codec, Sending, Stage, Written

#: Metrics of a client's vote, each followed by the number of its option.
VOTE = "codec-vote-"


@dataclass(frozen=True, init=False)
class Voted(Codec):
    r"""One of several codecs of uploads, on which the clients vote.

    With their upload, clients tell the option :math:`i` with the least
    :math:`D_i + \lambda R_i`: the squared error of the change relative to its square,
    and the bits a number of all that travels. :class:`~flower_ext.CodecVote` counts the
    votes, and makes this codec.

    Parameters
    ----------
    *options : Stage or Chain
        The codecs.
    tradeoff : float
        :math:`\lambda`: what a bit a number is worth. 0 votes for the least error.
    chosen : int or callable (default: 0)
        The number of the option that is used, from 0, or ``server_round -> number``.
    """

    options: tuple[Codec, ...]
    tradeoff: float
    chosen: int | Callable[[int], int] = 0

    def __init__(
        self,
        *options: Codec,
        tradeoff: float,
        chosen: int | Callable[[int], int] = 0,
    ) -> None:
        if not options or not all(isinstance(x, Stage | Chain) for x in options):
            cause = "put ErrorFeedback or Described around the vote"
            refuse(
                "options", options, "at least one codec, each bare or a Chain", cause
            )
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "tradeoff", at_least("tradeoff", tradeoff, 0))
        object.__setattr__(self, "chosen", chosen)
        number = chosen(1) if callable(chosen) else chosen
        if whole("chosen", number, 0) >= len(options):
            refuse("chosen", number, f"< {len(options)}, the number of options")

    @property
    def now(self) -> Codec:
        """The option that is used."""
        return self.options[self.chosen(1) if callable(self.chosen) else self.chosen]

    @property
    def stages(self) -> tuple[type[Stage], ...]:
        """Those of the option."""
        return self.now.stages

    @property
    def within_received(self) -> bool:  # type: ignore[override]
        """Whether any option is."""
        return any(option.within_received for option in self.options)

    @property
    def lossless(self) -> bool:
        """Whether the option is."""
        return self.now.lossless

    @property
    def unbiased(self) -> bool:
        """Whether the option is."""
        return self.now.unbiased

    def at(self, server_round: int) -> "Voted":
        """Return the codec of a round: its options, and which of them is used."""
        options = tuple(option.at(server_round) for option in self.options)
        chosen = self.chosen(server_round) if callable(self.chosen) else self.chosen
        if chosen is self.chosen and all(map(is_, options, self.options)):
            return self
        return Voted(*options, tradeoff=self.tradeoff, chosen=chosen)

    def write(self, arrays: Arrays, sending: Sending) -> Written:
        """Write as the option does."""
        return self.now.write(arrays, sending)

    def votes(self, arrays: Arrays, sending: Sending) -> dict[str, float]:
        """Return 1 for the best option and 0 for the others; all 0 abstains."""
        best = best_option(self.options, self.tradeoff, arrays, sending)
        return {VOTE + str(i): float(i == best) for i in range(len(self.options))}


def best_option(
    options: Sequence[Codec],
    tradeoff: float,
    arrays: Arrays,
    sending: Sending | None = None,
) -> int | None:
    """Return the number of the codec with the least distortion plus rate.

    Parameters
    ----------
    options : sequence of Codec
        At least one. Of equally good ones the first is best.
    tradeoff : float
        What a bit a number is worth, in squared errors relative to the square.
    arrays : dict[str, ndarray]
        What is to be encoded.
    sending : Sending, optional
        Its generator stays as it is; all options have the same draws.

    Returns
    -------
    int or None
        None if all is zero, or anything not finite: the error has no measure.

    Examples
    --------
    >>> from flower_ext.wire import UniversalCode
    >>> x = {"w": np.random.default_rng(0).laplace(size=10_000)}
    >>> steps = [UniversalCode(step) for step in (0.25, 0.5, 1, 2, 5)]
    >>> [best_option(steps, tradeoff, x) for tradeoff in (0, 0.0343, 0.124, 2.61)]
    [0, 1, 2, 4]
    """
    if not options:
        refuse("options", options, "at least one codec")
    sending = sending or Sending()
    square = _square(x for x in arrays.values() if is_averaged(x))
    if not 0 < square < math.inf:
        return None
    scores = []
    for option in options:
        draws = copy.deepcopy(sending.generator)
        record = option.encode(arrays, replace(sending, generator=draws))
        found = option.decode(record, arrays, sending.began)
        with np.errstate(over="ignore"):
            left = _square(
                x - found[name] for name, x in arrays.items() if is_averaged(x)
            )
        bits = 8 * len(record[PAYLOAD].data) / sum(x.size for x in arrays.values())
        scores.append(left / square + tradeoff * bits)
    return int(np.argmin(scores))


def _square(arrays: Iterable[np.ndarray]) -> float:
    """Return the sum of the squares of all values."""
    wide = (x.astype(np.float64, copy=False).reshape(-1) for x in arrays)
    with np.errstate(over="ignore", invalid="ignore"):
        return math.fsum(float(np.dot(x, x)) for x in wide)
