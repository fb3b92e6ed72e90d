"""What personal models are worth, over the clients: Motley's metrics.

Wu, Li, Charles, Xiao, Liu, Xu and Smith 2022, "Motley: benchmarking heterogeneity and
personalization in federated learning", arXiv 2206.09262.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from logging import WARNING
from typing import ClassVar

import numpy as np

from flower_ext._flower import log
from flower_ext.core.protocol import (
    HAS_STATE,
    RECEIVED,
    Metrics,
    Reply,
    Round,
    means_by_kind,
)
from flower_ext.server.additive import AdditiveStrategy

# Metrics whose names end so are the better the smaller; of others, the larger.
_COSTS = ("loss", "error", "perplexity", "mse", "mae", "rmse")
_SHARES = {"p10": 10, "p50": 50, "p90": 90}


def spread(rows: Iterable[tuple[str, Mapping[str, float]]]) -> Metrics:
    """Return how metrics are spread over the clients of each kind.

    Parameters
    ----------
    rows : iterable of (str, Mapping[str, float])
        A client's kind, such as ``"seen"`` or ``"unseen"``, and its metrics; those of
        the model that it received begin with ``received-``.

    Returns
    -------
    dict[str, float]
        For a metric ``accuracy`` and the kind ``seen``: ``accuracy-seen``, the mean
        over the clients, each of which counts once; ``accuracy-seen-p10``, ``-p50`` and
        ``-p90``, quantiles; ``accuracy-seen-std``; ``accuracy-seen-hurt``, where
        clients report ``received-accuracy`` too, the share of those that do worse with
        a model of their own than with the received one.

    Notes
    -----
    Smaller is better where a name ends in ``loss``, ``error``, ``perplexity``, ``mse``,
    ``mae`` or ``rmse``; larger in all others.

    Examples
    --------
    >>> found = spread([("seen", {"loss": 1.0, "received-loss": 2.0}),
    ...                 ("seen", {"loss": 3.0, "received-loss": 2.0})])
    >>> found["loss-seen"], found["loss-seen-p50"], found["loss-seen-hurt"]
    (2.0, 2.0, 0.5)
    """
    rows = list(rows)
    values: dict[str, list[float]] = {}
    hurt: dict[str, list[bool]] = {}
    for kind, metrics in rows:
        for name, own in metrics.items():
            values.setdefault(f"{name}-{kind}", []).append(own)
            if name.startswith(RECEIVED):
                name = name.removeprefix(RECEIVED)
                # A metric of a model that diverged is no number, and is not there.
                ours, theirs = metrics.get(name, math.nan), own
                good = ours <= theirs if name.endswith(_COSTS) else ours >= theirs
                hurt.setdefault(f"{name}-{kind}", []).append(not good)
    found: Metrics = {**means_by_kind(rows)}
    for name, column in values.items():
        for suffix, share in _SHARES.items():
            found[f"{name}-{suffix}"] = float(np.percentile(column, share))
        found[f"{name}-std"] = statistics.pstdev(column)
    for name, worse_off in hurt.items():
        found[f"{name}-hurt"] = sum(worse_off) / len(worse_off)
    return found


class PersonalStrategy(AdditiveStrategy):
    """Federated averaging whose clients end up with models of their own.

    Against :class:`~flower_ext.AdditiveStrategy` it reports of an evaluation, beside
    the means, how the clients' metrics are spread and whom personal models hurt, see
    :func:`spread`. *Seen* clients are those that have been asked to train so far, all
    others are *unseen*; where a mechanism counts on secret cohorts nobody may know, and
    the spread is over *all*.

    Notes
    -----
    Under a mechanism clients' metrics are withheld, and these with them; a
    :class:`~flower_ext.privacy.PrivateEvaluation` releases means only.

    Where all seen clients say in an evaluation that they have kept nothing, though
    their half needs it (:attr:`~flower_ext.client.half.ClientHalf.keeps`), the log
    says so, once.
    """

    #: Metrics of an evaluation that are no property of a client's model.
    not_spread: ClassVar[tuple[str, ...]] = ()
    _said = False

    def measured(
        self, replies: Sequence[Reply], round: Round
    ) -> list[tuple[str, dict[str, float]]]:
        """Return each client's kind and metrics, as :func:`spread` wants them."""
        self._require_states(replies, round)
        left_out = {self.weighted_by_key, HAS_STATE}
        left_out |= {*self.not_spread, *self.consumed_metrics}
        return [
            (
                _kind(reply.client, round),
                {k: x for k, x in reply.numbers().items() if k not in left_out},
            )
            for reply in replies
        ]

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the spread of the clients' metrics."""
        return spread(self.measured(replies, round))

    def _require_states(self, replies: Sequence[Reply], round: Round) -> None:
        """Say once if clients that should have kept something have kept nothing."""
        half = self.client_half
        if half is None or not half.keeps or self._said:
            return
        seen = [r.numbers() for r in replies if r.client in round.trained]
        # Where metrics are withheld, as under DPSGD, so is this.
        told = [
            own.get(HAS_STATE) for own in seen if own.keys() - {self.weighted_by_key}
        ]
        if told and not any(told):
            self._said = True
            if None in told:
                cause = (
                    f"they do not say so ({HAS_STATE!r} is no metric of theirs): a "
                    "training loop of one's own needs the lines that `python -m "
                    "flower_ext.check` names, without which this is FedAvg"
                )
            else:
                cause = (
                    "the grid must keep each client's context.state from message to "
                    "message, as LocalGrid, PackedGrid and Flower's own grids do; "
                    "nodes that are started again have lost theirs"
                )
            problem = (
                "PERSONAL STATE IS LOST: none of the %s clients that have been asked "
                "to train and now evaluate has kept anything, and %s needs what they "
                "keep: %s"
            )
            log(WARNING, problem, len(told), type(self).__name__, cause)


def _kind(client: int, round: Round) -> str:
    """Return whether a client was asked to train, where that may be known."""
    if round.private and not round.cohort:
        return "all"
    return "seen" if client in round.trained else "unseen"
