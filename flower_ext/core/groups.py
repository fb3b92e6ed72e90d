"""Losses of groups that cut across clients, from the sums in replies.

Groups part the examples, or they overlap: an example is then of several, or of none,
and one more entry behind those of the groups is of all examples.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flower_ext.core.contribution import Total
from flower_ext.core.errors import different_names, one_each, refuse, yes_or_no
from flower_ext.core.protocol import Metrics, Reply
from flower_ext.core.replies import MalformedReply
from flower_ext.core.typing import Floats

LOSS_SUMS = "group-loss-sums"
COUNTS = "group-counts"


def group_names(
    groups: Sequence[str], labels: Sequence[str] | None, overlapping: bool = False
) -> list[str]:
    """Return the names of all groups, or of all pairs of a group and a label.

    Of groups that overlap there are no pairs.

    Examples
    --------
    >>> group_names(["f", "m"], ["no", "yes"])
    ['f/no', 'f/yes', 'm/no', 'm/yes']
    """
    groups = different_names("groups", groups)
    if labels is None:
        return groups
    if overlapping:
        cause = "let pairs be groups of their own"
        refuse("labels", labels, "left out where groups overlap", cause)
    labels = different_names("labels", labels)
    return [f"{group}/{label}" for group in groups for label in labels]


def read_sums(
    reply: Reply, size: int, loss_bound: float, *, overlapping: bool = False
) -> dict[str, Floats]:
    """Return a reply's sums of losses and counts of examples, by group.

    Parameters
    ----------
    reply : Reply
        Of one client.
    size : int
        Number of groups.
    loss_bound : float
        No mean loss of a group counts as more than this in size.
    overlapping : bool (default: False)
        Whether there is an entry for all examples behind those of the groups.

    Raises
    ------
    MalformedReply
        If there is a loss without examples, or more examples than the client has.
    """
    sums = reply.vector(LOSS_SUMS, size + overlapping, -sys.float_info.max)
    counts = reply.vector(COUNTS, size + overlapping)
    if np.any((counts == 0) & (sums != 0)):
        raise MalformedReply(f"{LOSS_SUMS!r} of a group without examples")
    found = counts.max() if overlapping else counts.sum()
    if overlapping and found > counts[-1]:
        raise MalformedReply(f"metric {COUNTS!r} has a group of more than all examples")
    if found > reply.num_examples * (1 + 1e-6):
        raise MalformedReply(
            f"metric {COUNTS!r} adds up to {found:g}, more than "
            f"{reply.keys.weight!r}={reply.num_examples:g}"
        )
    most = loss_bound * counts
    return {LOSS_SUMS: np.clip(sums, -most, most), COUNTS: counts}


def example_multipliers(
    dual: Floats,
    counts: Floats,
    bound: float = np.inf,
    examples: float | None = None,
) -> Floats:
    r"""Return :math:`\lambda_a\, n / n_a`: what is added to 1 in an example's weight.

    With :math:`h_k = \frac{1}{n_k}\sum_i (1 + \sum_{a \ni i} \lambda_a n/n_a)\ell_i`
    the average :math:`\sum_k \frac{n_k}{n} h_k` is the Lagrangian but for a constant. A
    group of which no example is known gets 0, none gets more than ``bound``. Of groups
    that overlap, :math:`n` is not the sum of the counts: ``examples``.
    """
    share = counts / ((float(counts.sum()) if examples is None else examples) or 1.0)
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
    overlapping : bool (default: False)
        Whether an example may be of several of them, or of none.
    """

    def __init__(
        self,
        names: Sequence[str],
        counts: float | Sequence[float] | None = None,
        *,
        overlapping: bool = False,
    ) -> None:
        self.names = list(names)
        self.overlapping = yes_or_no("overlapping", overlapping)
        self.size = len(self.names) + overlapping
        self.are_counted = counts is None
        self.counts = one_each(
            "group_counts", 0.0 if counts is None else counts, names, 0.0
        )
        if counts is not None and not self.counts.any():
            refuse("group_counts", counts, "> 0 for some group")
        if counts is not None and overlapping:
            cause = "they do not add up to the number of examples, which is counted"
            refuse("group_counts", counts, "left out where groups overlap", cause)
        self.examples = float(self.counts.sum())
        # Groups that are known to have no examples need not be measured.
        self._needed = (self.counts > 0) | self.are_counted
        self.losses = np.full(len(self.names), np.nan)

    def about_counts(self) -> object:
        """Return what ``summary()`` says of the counts."""
        return "learned" if self.are_counted else self.counts.tolist()

    def measured(self, total: Total) -> Floats:
        """Return the losses of a round; of a group counted below its noise NaN."""
        losses = mean_losses(total.scalars, total.noise.get(COUNTS, 0.0))
        return losses[: len(self.names)]

    def shares(self, total: Total) -> Floats:
        """Return which share of a round's examples each group has."""
        counts = total.scalars[COUNTS]
        return counts[: len(self.names)] / self._of_all(counts)

    def mean(self, total: Total) -> float:
        """Return the loss over all examples of a round; 0 if there are none."""
        found = self._of_all(total.scalars[LOSS_SUMS])
        return found / max(self._of_all(total.scalars[COUNTS]), 1e-300)

    def _of_all(self, vector: Floats) -> float:
        return float(vector[-1] if self.overlapping else vector.sum())

    def latest(self, losses: Floats) -> Floats:
        """Return the losses; of a group that was not measured, its last known one."""
        return np.where(np.isnan(losses), self.losses, losses)

    def missing(self, losses: Floats) -> list[str]:
        """Return the groups without a loss, of those that may have one."""
        unknown = np.isnan(losses) & self._needed
        return [name for name, x in zip(self.names, unknown, strict=True) if x]

    def rank(self, total: Total, upper_bound: Floats) -> tuple[float, float, float]:
        """Return groups not measured, largest excess, overall loss: less is better."""
        losses = self.measured(total)
        latest = self.latest(losses)
        excess = float(np.nanmax(latest - upper_bound, initial=0))
        return len(self.missing(losses)), excess, self.overall(latest, total)

    def overall(self, losses: Floats, total: Total) -> float:
        """Return the mean loss by all examples counted so far, not by the cohort's.

        Of groups that overlap it cannot be told, and is that of the cohort.
        """
        if self.overlapping:
            return self.mean(total)
        known = np.where(np.isnan(losses), 0.0, self.counts)
        return float(known @ np.nan_to_num(losses)) / max(float(known.sum()), 1e-300)

    def add(self, total: Total) -> None:
        """Take over the losses of a round, and count its examples."""
        self.losses = self.latest(self.measured(total))
        if self.are_counted:
            found = np.maximum(total.scalars[COUNTS], 0)
            self.counts = self.counts + found[: len(self.names)]
            self.examples += self._of_all(found)

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
        total = {key: np.zeros(self.size) for key in (LOSS_SUMS, COUNTS)}
        for reply in replies:
            try:
                read = read_sums(
                    reply, len(self.names), loss_bound, overlapping=self.overlapping
                )
            except MalformedReply:  # a loop of one's own may not report them
                continue
            for key, value in read.items():
                total[key] += value
        return self.metrics(mean_losses(total)[: len(self.names)])

    def multipliers(self, dual: Floats, bound: float) -> Floats:
        """Return :func:`example_multipliers` of the examples counted so far."""
        return example_multipliers(dual, self.counts, bound, self.examples)

    def state_dict(self) -> dict[str, object]:
        """Return counts and losses."""
        return {
            "counts": self.counts,
            "losses": self.losses,
            "examples": self.examples,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        if len(state["counts"]) != len(self.names):
            refuse("groups", self.names, f"{len(state['counts'])} as in the saved run")
        self.counts, self.losses = np.array(state["counts"]), np.array(state["losses"])
        self.examples = float(state["examples"])
