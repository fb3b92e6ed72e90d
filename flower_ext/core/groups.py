"""Losses of groups that cut across clients, from the sums in replies."""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flower_ext.core.contribution import Total
from flower_ext.core.errors import one_each, refuse
from flower_ext.core.protocol import Metrics, Reply
from flower_ext.core.replies import MalformedReply
from flower_ext.core.typing import Floats

LOSS_SUMS = "group-loss-sums"
COUNTS = "group-counts"


def read_sums(reply: Reply, size: int, loss_bound: float) -> dict[str, Floats]:
    """Return a reply's sums of losses and counts of examples, by group.

    Parameters
    ----------
    reply : Reply
        Of one client.
    size : int
        Number of groups.
    loss_bound : float
        No mean loss of a group counts as more than this in size.

    Raises
    ------
    MalformedReply
        If there is a loss without examples, or more examples than the client has.
    """
    sums = reply.vector(LOSS_SUMS, size, -sys.float_info.max)
    counts = reply.vector(COUNTS, size)
    if np.any((counts == 0) & (sums != 0)):
        raise MalformedReply(f"{LOSS_SUMS!r} of a group without examples")
    if counts.sum() > reply.num_examples * (1 + 1e-6):
        raise MalformedReply(
            f"metric {COUNTS!r} adds up to {counts.sum():g}, more than "
            f"{reply.keys.weight!r}={reply.num_examples:g}"
        )
    most = loss_bound * counts
    return {LOSS_SUMS: np.clip(sums, -most, most), COUNTS: counts}


def example_multipliers(dual: Floats, counts: Floats, bound: float = np.inf) -> Floats:
    r"""Return :math:`\lambda_a\, n / n_a`: what is added to 1 in an example's weight.

    With :math:`h_k = \frac{1}{n_k}\sum_i (1 + \lambda_{a_i} n/n_{a_i})\ell_i` the
    average :math:`\sum_k \frac{n_k}{n} h_k` is the Lagrangian but for a constant. A
    group of which no example is known gets 0, none gets more than ``bound``.
    """
    share = counts / (float(counts.sum()) or 1.0)
    found = np.divide(dual, share, out=np.zeros_like(dual), where=share > 0)
    return np.minimum(found, bound)


def mean_losses(scalars: Mapping[str, Floats], floor: float = 0.0) -> Floats:
    """Return the loss of each group; NaN for one of no more than ``floor`` examples."""
    sums, counts = scalars[LOSS_SUMS], scalars[COUNTS]
    losses = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=losses, where=counts > floor)
    return losses


class GroupLosses:
    """What is known of the groups of a run: their examples, and their last losses.

    Parameters
    ----------
    names : sequence of str
        Of the groups.
    counts : sequence of float, optional
        Examples of each, where they are public; otherwise they are counted.
    """

    def __init__(
        self, names: Sequence[str], counts: float | Sequence[float] | None = None
    ) -> None:
        self.names = list(names)
        self.are_counted = counts is None
        self.counts = one_each(
            "group_counts", 0.0 if counts is None else counts, names, 0.0
        )
        if counts is not None and not self.counts.any():
            refuse("group_counts", counts, "> 0 for some group")
        # Groups that are known to have no examples need not be measured.
        self._needed = (self.counts > 0) | self.are_counted
        self.losses = np.full(len(self.names), np.nan)

    def measured(self, total: Total) -> Floats:
        """Return the losses of a round; of a group counted below its noise NaN."""
        return mean_losses(total.scalars, total.noise.get(COUNTS, 0.0))

    def latest(self, losses: Floats) -> Floats:
        """Return the losses; of a group that was not measured, its last known one."""
        return np.where(np.isnan(losses), self.losses, losses)

    def missing(self, losses: Floats) -> list[str]:
        """Return the groups without a loss, of those that may have one."""
        unknown = np.isnan(losses) & self._needed
        return [name for name, x in zip(self.names, unknown, strict=True) if x]

    def overall(self, losses: Floats) -> float:
        """Return the mean loss by all examples counted so far, not by the cohort's."""
        known = np.where(np.isnan(losses), 0.0, self.counts)
        return float(known @ np.nan_to_num(losses)) / max(float(known.sum()), 1e-300)

    def add(self, total: Total) -> None:
        """Take over the losses of a round, and count its examples."""
        self.losses = self.latest(self.measured(total))
        if self.are_counted:
            self.counts = self.counts + np.maximum(total.scalars[COUNTS], 0)

    def metrics(self, losses: Floats, latest: Floats | None = None) -> Metrics:
        """Return the known losses by name, and the worst of these or of the latest."""
        known = {
            f"group-loss/{name}": float(loss)
            for name, loss in zip(self.names, losses, strict=True)
            if not np.isnan(loss)
        }
        if not known:
            return {}
        worst = float(np.nanmax(losses if latest is None else latest))
        return {**known, "worst-group-loss": worst}

    def evaluated(self, replies: Sequence[Reply], loss_bound: float) -> Metrics:
        """Return the losses over the replies to an evaluation that have them."""
        total = {key: np.zeros(len(self.names)) for key in (LOSS_SUMS, COUNTS)}
        for reply in replies:
            try:
                read = read_sums(reply, len(self.names), loss_bound)
            except MalformedReply:  # a loop of one's own may not report them
                continue
            for key, value in read.items():
                total[key] += value
        return self.metrics(mean_losses(total))

    def multipliers(self, dual: Floats, bound: float) -> Floats:
        """Return :func:`example_multipliers` of the examples counted so far."""
        return example_multipliers(dual, self.counts, bound)

    def state_dict(self) -> dict[str, object]:
        """Return counts and losses."""
        return {"counts": self.counts, "losses": self.losses}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        if len(state["counts"]) != len(self.names):
            refuse("groups", self.names, f"{len(state['counts'])} as in the saved run")
        self.counts, self.losses = np.array(state["counts"]), np.array(state["losses"])
