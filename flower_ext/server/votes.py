"""The vote of clients on the codec of their next upload."""

import math
from collections.abc import Mapping
from logging import WARNING
from typing import cast

from flower_ext._flower import log
from flower_ext.core.errors import refuse, whole
from flower_ext.server.callbacks import Callback
from flower_ext.server.finished import FinishedRound, RunInfo
from flower_ext.wire.codec import Codec
from flower_ext.wire.vote import VOTE, Voted

_NO_VOTES = (
    "no vote was counted, since not all replies have %s: the codec stays. The strategy "
    "needs upload=vote.codec, and a train_metrics_aggr_fn of your own must return them"
)


class CodecVote(Callback):
    r"""Lets clients vote on which codec all of them use for their next upload.

    After training, each client tries all options on its change and votes for the one
    with the least :math:`D + \lambda R`: its squared error, relative to the square of
    the change, and its bits a number (Mitchell et al. 2022, arXiv:2201.02664). The
    option of most votes is that of the next round. A vote is a metric of the reply and
    weighs as the others do, by number of examples, so that only its sum is needed;
    clients whose change is zero or not finite abstain. The metrics of a round have each
    option's share, as ``codec-vote-0`` and so on.

    Parameters
    ----------
    *options : Codec
        Codecs of uploads, such as :class:`~flower_ext.wire.UniversalCode` with a few
        steps. Each is tried by each client in every round.
    tradeoff : float
        :math:`\lambda`: what a bit a number is worth. 0 votes for the least error.
    first : int (default: 0)
        The number of the option of the first round, from 0.

    Notes
    -----
    Its :attr:`codec` is the strategy's ``upload``, or within it, and the vote itself
    one of the callbacks; without the latter the first option stays. Votes are refused
    under a mechanism that withholds metrics: they depend on the clients' data. Clients
    with DP-SGD may vote, since all that they look at is private already.

    With the tradeoffs that go with the paper, these steps of a ``UniversalCode`` are
    about the best for values with a Laplace distribution::

        step        0.25     0.5     1      2      5
        tradeoff    0.00809  0.0343  0.124  0.396  2.61

    Examples
    --------
    >>> from flower_ext import AdditiveStrategy
    >>> from flower_ext.wire import UniversalCode
    >>> steps = (0.25, 0.5, 1, 2, 5)
    >>> vote = CodecVote(*map(UniversalCode, steps), tradeoff=0.124, first=2)
    >>> strategy = AdditiveStrategy(upload=vote.codec)  # .start(..., callbacks=[vote])
    """

    def __init__(self, *options: Codec, tradeoff: float, first: int = 0) -> None:
        self.first = self.option = whole("first", first, 0)
        #: The codec of uploads, with the option of each round.
        self._told = False  # that there were replies without votes
        self.codec = Voted(*options, tradeoff=tradeoff, chosen=self)

    def __call__(self, server_round: int) -> int:
        """Return the number of the option of the round that is about to begin."""
        return self.option

    def __repr__(self) -> str:
        """Return what stays: a checkpoint compares it."""
        return f"{type(self).__name__}(first={self.first})"

    def begin(self, run: RunInfo) -> str | None:
        """Start with the first option, unless the run is continued."""
        if run.withheld:
            refuse(
                "callbacks",
                self,
                "left out under a mechanism that withholds metrics",
                "votes depend on the clients' data and have no noise; "
                "upload=UniversalCode(step) has a fixed step or a schedule",
            )
        if not run.restored:
            self.option = self.first
        return None

    def round(self, this: FinishedRound) -> str | None:
        """Count the votes: of equally many the first option wins; of none it stays."""
        metrics: Mapping[str, object] = this.train or {}
        names = [VOTE + str(number) for number in range(len(self.codec.options))]
        missing = [name for name in names if name not in metrics]
        if missing:
            # One reply may lack them, and no reply ends a run.
            if metrics.get("num-replies") and not self._told:
                log(WARNING, _NO_VOTES, missing)
                self._told = True
            return None
        votes = [float(cast(float, metrics[name])) for name in names]
        if all(map(math.isfinite, votes)) and max(votes) > 0:
            self.option = votes.index(max(votes))
        return None

    def state_dict(self) -> dict[str, object]:
        """Return the option of the next round."""
        return {"option": self.option}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue with it."""
        self.option = int(cast(int, state["option"]))
