r"""Bounded group loss: the best model under a bound on every group's loss.

Groups (of people, not of clients) cut across clients. With the global group losses
:math:`L_a(w) = \frac{1}{n_a}\sum_k \sum_{i \in D_k, a_i = a} \ell_i(w)`,

.. math::
   \min_w F(w) \;\text{s.t.}\; L_a(w) \le \zeta_a, \qquad
   \min_w \max_{\lambda \ge 0, \|\lambda\|_1 \le B}
   F(w) + \sum_a \lambda_a (L_a(w) - \zeta_a)

is solved by local SGD on the weighted loss for :math:`w` and exponentiated gradient
on the server for :math:`\lambda` (Hu, Wu and Smith 2022, "Fair Federated Learning via
Bounded Group Loss", arXiv:2203.10190; the dual step as in Agarwal et al. 2018, "A
Reductions Approach to Fair Classification", ICML).
"""

import math
from collections.abc import Mapping, Sequence
from logging import WARNING
from typing import Unpack

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from flower_ext._flower import log
from flower_ext.client.groups import GroupIndex, mean_gradient
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Batch
from flower_ext.core.arrays import Term
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import one_each, positive
from flower_ext.core.groups import (
    COUNTS,
    LOSS_SUMS,
    GroupLosses,
    group_names,
    read_sums,
)
from flower_ext.core.protocol import Config, Metrics, Reply, Round
from flower_ext.core.schedules import Scheduled
from flower_ext.core.states import Stateful, load_states, states_of
from flower_ext.core.typing import Floats
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.iterates import Iterates
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.saddle import Dual, DualityGap, certificate

MULTIPLIERS_KEY = "group-multipliers"
NUM_LABELS_KEY = "group-num-labels"
OVERLAPPING_KEY = "groups-overlap"
_NOT_ALL = (
    "best-feasible: no cohort had examples of all groups, %d were missing at the least "
    "and are taken at their last known losses; never seen: %s"
)
GRADIENT_KEY = "lagrangian-gradient"


class BoundedGroupLossClient(ClientHalf):
    """Weighs examples by their group, and adds up the groups' losses.

    Parameters
    ----------
    group : str (default: "group")
        Column of the data with the group's index, int64; of groups that overlap, with
        a flag for each of them, of shape ``(examples, groups)``.
    label : str (default: "y")
        Column with the label's index, used if the strategy bounds (group, label) pairs.
    """

    name = "bounded-group-loss"

    def __init__(self, group: str = "group", label: str = "y") -> None:
        self._columns = group, label
        self._metrics: Metrics = {}
        self._gradient: dict[str, ArrayRecord] = {}

    def begin(self, local: Local) -> None:
        """Add up the losses of the received model."""
        # Before the first step: duals are raised by the losses of the server's model.
        self._read(local)
        self._metrics = self._index.sums(local, local.train)
        if local.config.get(GRADIENT_KEY):
            self._gradient = {GRADIENT_KEY: mean_gradient(local, self.objective)}

    def objective(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the weighted losses."""
        # The Lagrangian per example: multipliers are lambda_a n / n_a, since the loss
        # of a group is a mean over n_a of all n examples.
        return (1 + self._index.added(self._multipliers, batch)) * losses

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return the sums of losses and the counts, and the gradient if asked for."""
        return self._gradient, self._metrics

    def evaluate(self, local: Local) -> Metrics:
        """Return sums and counts on test data."""
        self._read(local)
        return self._index.sums(local, local.test)

    def _read(self, local: Local) -> None:
        told = local.config.get(MULTIPLIERS_KEY)
        if not isinstance(told, list):
            raise ValueError(
                f"no {MULTIPLIERS_KEY!r} in the message's configuration: the server "
                "must run the strategy BoundedGroupLoss"
            )
        self._multipliers = torch.tensor(told, dtype=torch.float32, device=local.device)
        num_labels = int(local.number(NUM_LABELS_KEY, 0))
        overlap = bool(local.config.get(OVERLAPPING_KEY))
        self._index = GroupIndex(*self._columns, len(told), num_labels, overlap)


class BoundedGroupLoss(AdditiveStrategy):
    r"""Federated averaging under an upper bound on the loss of every group.

    Against FedAvg, clients weigh their examples by the dual of their group, and send
    the sum of losses and the number of examples of each group, at the model they
    received; the server adds these up, and raises the dual of a group whose loss is
    above its bound. Works with the client half :class:`BoundedGroupLossClient`, or with
    :func:`~flower_ext.client.groups.group_sums` in a loop of one's own.

    Parameters
    ----------
    groups : sequence of str
        Names; a client's examples carry indices into it.
    upper_bound : float or sequence of float
        :math:`\zeta_a`, for all constraints or one each; negative where losses are, as
        those of a likelihood. Where it is not reachable the duals stick at
        ``dual_bound``; if it is far below and ``dual_bound`` large, the worst group is
        what is minimised.
    overlapping : bool (default: False)
        Whether an example may be of several groups, such as of those by sex and those
        by age, or of none. Clients' examples then carry a flag for each group.
    labels : sequence of str, optional
        Bound the loss of every (group, label) pair instead: conditional bounded group
        loss, related to equalised odds. Constraints are ordered group by group. Not of
        groups that overlap, which may have such pairs among them.
    dual_bound : float (default: 5.0)
        :math:`B \ge 0`, bounds the sum of the duals; 0 is FedAvg.
    dual_learning_rate : float or callable (default: 0.5)
        :math:`\eta_\theta > 0` of the exponentiated gradient, see
        :func:`~flower_ext.server.saddle.dual_step`; may be a schedule, ``round ->
        rate``. Losses ten times as large want a tenth of it.
    multiplier_bound : float (default: inf)
        :math:`> 0`, most that is added to the weight of an example. Those of a rare
        group get :math:`\lambda_a n/n_a`, which may throw a step of SGD far; capped,
        the group pulls less than its dual says. Infinity caps nothing.
    loss_bound : float, optional
        :math:`M > 0`, most that the mean loss of one client's group counts, in size: a
        client of a share :math:`p` of a group moves its loss by no more than
        :math:`2pM`, whatever it sends. By default ten times the largest bound, and at
        least 100.
    group_counts : sequence of float, optional
        Examples per constraint over all clients, where they are public. Otherwise
        they are counted in the replies so far, and the first round, which knows none,
        is one of FedAvg.
    average_iterates : bool (default: True)
        Keep the mean of the models (one more model in memory, float64).
    certificate_radius : float, optional
        :math:`R > 0`, a bound on the norm of the best model. If given, clients also
        send the gradient of their weighted loss (one more pass over their data, and
        as many bytes as their model), and the duality gap is a metric, see
        :class:`~flower_ext.server.saddle.DualityGap`. Not with a mechanism.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Attributes
    ----------
    dual : ndarray of shape (constraints,)
        :math:`\lambda`.

    Notes
    -----
    ``start`` returns the last iterate; :meth:`iterates` has the averaged one, for
    which the theory is, and the best feasible one. Metrics: ``group-loss/<name>`` of
    each constraint of which the cohort has examples, ``dual/<name>``,
    ``worst-group-loss``, for which a group that the cohort lacks has its last known
    loss, ``groups-unseen``, of which no example was ever counted, and ``feasible``:
    whether the cohort has examples of all groups and none is above its bound. All are
    at the model that the cohort received, on training data; at evaluation the group
    losses on test data. A group whose ``group_counts`` is 0 needs no examples. With
    ``certificate_radius`` also ``primal-value``, ``dual-value`` and ``duality-gap``:
    for convex losses, and where all clients take part in every round, the loss of the
    average model is above the best one's under the bounds by no more than the gap.

    Beside their model, clients reveal sums and counts per group, not the group of an
    example; the counts of a small client are sensitive nevertheless. With partial
    participation the losses are those of the cohort.

    Under a mechanism, sums and counts are clipped together with the change of the
    model, times 0.01, for clients of about a hundred examples; ``scales`` of the
    mechanism says otherwise. A group counted below its noise is taken as unseen.

    Examples
    --------
    >>> strategy = BoundedGroupLoss(groups=["female", "male"], upper_bound=0.4)
    >>> strategy.dual
    array([1.66666667, 1.66666667])
    """

    client_half = BoundedGroupLossClient
    drop_in = DropIn(
        imports="from flower_ext.client.groups import group_sums",
        before="sums = group_sums(losses, groups, num_groups)",
        metrics={"**": "sums"},
        fill_in="losses: of the received model, one for each training example\n"
        "groups: the index of each example's group, of num_groups\n"
        "in the training, the loss of an example of group a weighs "
        '1 + config["group-multipliers"][a]',
        arguments=lambda _: {"groups": ("a", "b"), "upper_bound": 1.0},
        written='groups=("...", "..."), upper_bound=...',
    )
    consumed_metrics = (LOSS_SUMS, COUNTS)
    needs_rounds = "duals and average are about the one model of a round"
    scales = {LOSS_SUMS: 0.01, COUNTS: 0.01}

    def __init__(
        self,
        *flowers: object,
        groups: Sequence[str],
        upper_bound: float | Sequence[float],
        overlapping: bool = False,
        labels: Sequence[str] | None = None,
        dual_bound: float = 5.0,
        dual_learning_rate: Scheduled = 0.5,
        multiplier_bound: float = math.inf,
        loss_bound: float | None = None,
        group_counts: Sequence[float] | None = None,
        average_iterates: bool = True,
        certificate_radius: float | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        names = self.constraints = group_names(groups, labels, overlapping)
        self.num_labels = len(labels or ())
        self._groups = GroupLosses(names, group_counts, overlapping=overlapping)
        self.overlapping = overlapping
        self.scalars = dict.fromkeys((LOSS_SUMS, COUNTS), (self._groups.size,))
        self.upper_bound = one_each("upper_bound", upper_bound, names)
        positive("multiplier_bound", multiplier_bound, allow_inf=True)
        self.multiplier_bound = multiplier_bound
        if loss_bound is None:
            loss_bound = max(100.0, 10 * float(np.max(np.abs(self.upper_bound))))
        self.loss_bound = positive("loss_bound", loss_bound)
        self.certifies = certificate_radius is not None
        self._dual = Dual(len(names), dual_bound, dual_learning_rate)
        self._iterates = Iterates(average_iterates)
        self._gap = certificate(certificate_radius, noised=bool(self.mechanism))

    @property
    def dual(self) -> Floats:
        r"""The current :math:`\lambda`."""
        return self._dual.weights

    @property
    def _multipliers(self) -> Floats:
        return self._groups.multipliers(self.dual, self.multiplier_bound)

    def tell(self, round: Round) -> Config:
        """Tell clients what to add to the weight of an example of each group."""
        return {
            MULTIPLIERS_KEY: self._multipliers.tolist(),
            NUM_LABELS_KEY: self.num_labels,
            OVERLAPPING_KEY: self.overlapping,
            GRADIENT_KEY: self.certifies,
        }

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the delta, and the loss sums and counts of the groups."""
        arrays: dict[str, Mapping[str, Term]] = {DELTA: reply.delta(round)}
        if self.certifies:
            arrays[GRADIENT_KEY] = reply.arrays(GRADIENT_KEY, round.floats)
        size, overlapping = len(self.constraints), self.overlapping
        sums = read_sums(reply, size, self.loss_bound, overlapping=overlapping)
        return Contribution(arrays, scalars=sums)

    def report(self, total: Total, round: Round) -> Metrics:
        """Return group losses and duals of the model that the cohort received."""
        losses = self._groups.measured(total)
        latest = self._groups.latest(losses)
        metrics = self._groups.metrics(losses, latest)
        missing, excess, _ = self._groups.rank(total, self.upper_bound)
        metrics["groups-unseen"] = len(self._groups.missing(latest))
        metrics["feasible"] = int(missing == excess == 0)
        duals = zip(self.constraints, self.dual, strict=True)
        metrics |= {f"dual/{name}": float(value) for name, value in duals}
        gap = self._gap_after(total, round)
        if gap is not self._gap and gap is not None:
            metrics |= gap.metrics(self._dual.bound)
        return metrics

    def advance(self, total: Total, round: Round) -> None:
        """Take the dual step, and the model into the average."""
        # All of it is about the model that was sent, with the duals that went along:
        # the gap before the counts and the duals change, the dual step last.
        losses = self._groups.measured(total)
        self._gap = self._gap_after(total, round)
        self._groups.add(total)
        self._iterates.add(round.sent, self._groups.rank(total, self.upper_bound))
        self._dual.step(losses - self.upper_bound, round.number)

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the group losses on test data."""
        return self._groups.evaluated(replies, self.loss_bound)

    def iterates(self) -> dict[str, ArrayRecord]:
        """Return ``"average"`` and ``"best-feasible"``, as far as there are any.

        The average is over all models that were sent out and replied to. Best feasible
        is, of these, the one of least overall loss among those within all bounds, or,
        if none was, the one that exceeded its bounds least. What counts are models at
        which the losses of all groups were measured; where there is none, those with
        the fewest groups missing, which are taken at their last known losses, and the
        log says so. A cohort measures the losses of its own clients: only where all
        take part are they those of everybody.
        """
        if not self._iterates.best:
            return {}
        if missing := self._iterates.rank[0]:
            never = self._groups.missing(self._groups.losses)
            log(WARNING, _NOT_ALL, missing, never)
        return self._iterates.records(best="best-feasible")

    @property
    def _parts(self) -> dict[str, Stateful]:
        gap: dict[str, Stateful] = {"gap": self._gap} if self._gap else {}
        groups, dual, iterates = self._groups, self._dual, self._iterates
        return {"groups": groups, "dual": dual, "iterates": iterates, **gap}

    def state_dict(self) -> dict[str, object]:
        """Add duals, counts and iterates."""
        return {**super().state_dict(), "bounded-group-loss": states_of(self._parts)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over duals, counts and iterates."""
        super().load_state_dict(state)
        load_states(self._parts, state["bounded-group-loss"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        bounds = zip(self.constraints, self.upper_bound, strict=True)
        return {
            "Upper bounds": ", ".join(f"{name} {bound:g}" for name, bound in bounds),
            "Dual": str(self._dual),
            "Bound of multipliers": self.multiplier_bound,
            "Bound of losses": self.loss_bound,
            "Radius of the certificate": self._gap.radius if self._gap else "none",
            "Group counts": self._groups.about_counts(),
            "Averages iterates": self._iterates.keeps_average,
            **super().settings(),
        }

    def _gap_after(self, total: Total, round: Round) -> DualityGap | None:
        """Return the duality gap after this round.

        A round in which no example was counted is left out: it measured nothing.
        """
        if self._gap is None or not total.scalars[COUNTS].any():
            return self._gap
        # Over the cohort's examples, as its losses are: weights are those of this
        # round.
        groups = self._groups
        losses = groups.latest(groups.measured(total))
        return self._gap.after(
            groups.mean(total),
            np.nan_to_num(losses - self.upper_bound),
            self._multipliers * groups.shares(total),
            total.mean(GRADIENT_KEY),
            round.sent,
        )
