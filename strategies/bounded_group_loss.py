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
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from logging import WARNING
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord
from torch import Tensor

from flower_ext._flower import log
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Batch, batches, num_examples
from flower_ext.core.arrays import (
    Arrays,
    accumulate,
    is_averaged,
    to_record,
)
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import at_least, positive, refuse
from flower_ext.core.protocol import Config, Metrics, Reply, Round
from flower_ext.core.replies import MalformedReply
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.optimizers import apply_direction
from flower_ext.server.options import AdditiveOptions

LOSS_SUMS = "group-loss-sums"
COUNTS = "group-counts"
MULTIPLIERS_KEY = "group-multipliers"
NUM_LABELS_KEY = "group-num-labels"
GRADIENT_KEY = "lagrangian-gradient"
# Of one step of theta, and of theta above the slack and below: whatever the losses
# were, a dual comes back within some tens of steps.
_STEP, _HIGH, _LOW = 5.0, 10.0, -40.0

Vector = npt.NDArray[np.float64]


def dual_weights(theta: Vector, dual_bound: float) -> Vector:
    r"""Return :math:`\lambda_a = B e^{\theta_a} / (1 + \sum_b e^{\theta_b})`.

    The 1 is the slack: all :math:`\lambda \ge 0` and their sum stays below :math:`B`
    (and reaches it where a large :math:`\theta` rounds the slack away).

    Examples
    --------
    >>> dual_weights(np.zeros(3), dual_bound=2.0)
    array([0.5, 0.5, 0.5])
    """
    top = max(0.0, float(np.max(theta, initial=0.0)))
    scaled = np.exp(theta - top)
    return np.asarray(dual_bound * scaled / (np.exp(-top) + scaled.sum()))


def dual_step(theta: Vector, step: Vector) -> Vector:
    r"""Return :math:`\theta` after an exponentiated gradient step, kept in bounds.

    A step of more than 5 counts as 5: the theory wants steps below 1, and one absurd
    loss must not decide all that follows. Where the largest :math:`\theta` would exceed
    10 all are lowered alike, which changes no ratio of two duals, and their sum by less
    than :math:`e^{-10}`; none falls below -40.

    Examples
    --------
    >>> dual_step(np.zeros(2), np.array([0.5, 1e300]))
    array([0.5, 5. ])
    >>> dual_step(np.array([9.0, 4.0]), np.array([3.0, 0.0]))
    array([10.,  2.])
    """
    theta = theta + np.clip(step, -_STEP, _STEP)
    return np.maximum(theta - max(0.0, float(theta.max()) - _HIGH), _LOW)


def example_multipliers(
    dual: Vector, counts: Vector, bound: float = math.inf
) -> Vector:
    r"""Return :math:`\lambda_a\, n / n_a`: what is added to 1 in an example's weight.

    With :math:`h_k = \frac{1}{n_k}\sum_i (1 + \lambda_{a_i} n/n_{a_i})\ell_i` the
    average :math:`\sum_k \frac{n_k}{n} h_k` is the Lagrangian but for a constant. A
    group of which no example is known gets 0, none gets more than ``bound``.
    """
    share = counts / (float(counts.sum()) or 1.0)
    found = np.divide(dual, share, out=np.zeros_like(dual), where=share > 0)
    return np.minimum(found, bound)


@dataclass
class DualityGap:
    r"""How far the average model may be from the optimum, for convex losses.

    With :math:`\mathcal L(w, \lambda) = F(w) + \sum_a\lambda_a(L_a(w) - \zeta_a)`, the
    :math:`T` models :math:`w_t` so far, duals :math:`\lambda_t` and gradients
    :math:`g_t = \nabla_w \mathcal L(w_t, \lambda_t)`, convexity gives, over all
    models of norm :math:`\le R`,

    .. math::
       \max_{\|\lambda\|_1 \le B} \mathcal L(\bar w, \lambda) \le
       \bar F + B \max(0, \max_a \bar L_a - \zeta_a), \qquad
       \min_w \mathcal L(w, \bar\lambda) \ge
       \tfrac 1T \sum_t (\mathcal L(w_t, \lambda_t) - \langle g_t, w_t\rangle)
       - R \|\bar g\|,

    the primal and the dual value (bars are means over the rounds). By weak duality the
    optimum under the bounds lies above the latter (Agarwal et al. 2018, Section 3,
    whose best response we bound instead of computing it). It certifies what clients
    report: losses, counts and gradients of all, none cut off at a bound of its own.
    """

    radius: float
    rounds: int = 0
    overall: float = 0.0
    excess: Vector = field(default_factory=lambda: np.zeros(0))
    constant: float = 0.0
    gradient: dict[str, Vector] = field(default_factory=dict)

    def after(
        self,
        overall: float,
        excess: Vector,
        dual: Vector,
        gradient: Mapping[str, Vector],
        model: Arrays,
    ) -> "DualityGap":
        r"""Return that after another :math:`F, L - \zeta, \lambda, g, w`."""
        slope = sum(
            float(np.vdot(array, model[name].astype(np.float64)))
            for name, array in gradient.items()
        )
        return DualityGap(
            self.radius,
            self.rounds + 1,
            self.overall + overall,
            excess + (self.excess if self.excess.size else 0.0),
            self.constant + overall + float(dual @ excess) - slope,
            {k: g + self.gradient.get(k, 0.0) for k, g in gradient.items()},
        )

    def values(self, dual_bound: float) -> tuple[float, float]:
        """Return the primal and the dual value."""
        squares = sum(float(np.vdot(g, g)) for g in self.gradient.values())
        worst = max(0.0, float(np.max(self.excess)))
        primal = self.overall + dual_bound * worst
        dual = self.constant - self.radius * math.sqrt(squares)
        return primal / self.rounds, dual / self.rounds


def group_sums(
    losses: Tensor, groups: Tensor, num_groups: int
) -> dict[str, list[float]]:
    """Return the metrics that the server reads, for a training loop of one's own.

    Parameters
    ----------
    losses : Tensor of shape (examples,)
        Of the received model, before training.
    groups : Tensor of shape (examples,)
        Index of each example's constraint, ``group * num_labels + label`` if labels
        count.
    num_groups : int
        Number of constraints.
    """
    _require_known("groups", groups, num_groups)
    sums = torch.zeros(num_groups, dtype=torch.float64)
    sums.index_add_(0, groups.cpu(), losses.detach().cpu().double())
    counts = torch.bincount(groups.cpu(), minlength=num_groups)
    return {
        LOSS_SUMS: sums.tolist(),
        COUNTS: [float(count) for count in counts],
    }


def _require_known(name: str, indices: Tensor, size: int) -> None:
    if indices.dtype != torch.int64 or indices.dim() != 1:
        found = f"{indices.dtype}{list(indices.shape)}"
        refuse(name, found, "int64 indices, one per example")
    if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < size:
        refuse(
            name,
            [int(indices.min()), int(indices.max())],
            f"indices from 0 to {size - 1}",
            "a group or label that the strategy was not told of",
        )


class BoundedGroupLossClient(ClientHalf):
    """Weighs examples by their group, and adds up the groups' losses.

    Parameters
    ----------
    group : str (default: "group")
        Column of the data with the group's index, int64.
    label : str (default: "y")
        Column with the label's index, used if the strategy bounds (group, label) pairs.
    """

    name = "bounded-group-loss"

    def __init__(self, group: str = "group", label: str = "y") -> None:
        self._group = group
        self._label = label
        self._multipliers = torch.zeros(0)
        self._num_labels = 0
        self._metrics: Metrics = {}
        self._gradient: dict[str, ArrayRecord] = {}

    def begin(self, local: Local) -> None:
        """Add up the losses of the received model."""
        self._read(local)
        self._metrics = self._sums(local, local.train)
        if local.config.get(GRADIENT_KEY):
            self._gradient = {GRADIENT_KEY: self._lagrangian_gradient(local)}

    def objective(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the weighted mean loss."""
        return ((1 + self._multipliers[self._constraint(batch)]) * losses).mean()

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return the sums of losses and the counts, and the gradient if asked for."""
        return self._gradient, self._metrics

    def evaluate(self, local: Local) -> Metrics:
        """Return sums and counts on test data."""
        self._read(local)
        return self._sums(local, local.test)

    def _read(self, local: Local) -> None:
        told = local.config.get(MULTIPLIERS_KEY)
        if not isinstance(told, list):
            raise ValueError(
                f"no {MULTIPLIERS_KEY!r} in the message's configuration: the server "
                "must run the strategy BoundedGroupLoss"
            )
        self._multipliers = torch.tensor(told, dtype=torch.float32, device=local.device)
        self._num_labels = int(local.number(NUM_LABELS_KEY, 0))

    def _check(self, data: Batch) -> None:
        sizes = {self._group: len(self._multipliers) // max(self._num_labels, 1)}
        if self._num_labels:
            sizes[self._label] = self._num_labels
        for column, size in sizes.items():
            if column not in data:
                refuse("column", column, f"one of the data's columns {sorted(data)}")
            _require_known(f"column {column!r}", data[column], size)

    def _constraint(self, batch: Batch) -> Tensor:
        index = batch[self._group]
        if self._num_labels:
            index = index * self._num_labels + batch[self._label]
        return index

    @torch.no_grad()
    def _sums(self, local: Local, data: Batch) -> Metrics:
        self._check(data)
        local.model.eval()
        parts = [
            local.task.loss(local.model, batch).detach()
            for batch in batches(data, batch_size=256)
        ]
        losses = torch.cat(parts) if parts else torch.zeros(0)
        sums = group_sums(losses, self._constraint(data), len(self._multipliers))
        return {**sums}

    def _lagrangian_gradient(self, local: Local) -> ArrayRecord:
        """Return the gradient of the weighted mean loss of all training examples."""
        local.model.zero_grad()
        for batch in batches(local.train, batch_size=256):
            losses = local.task.loss(local.model, batch)
            share = num_examples(batch) / num_examples(local.train)
            (share * self.objective(losses, batch)).backward()  # type: ignore[no-untyped-call]
        found = {name: p.grad for name, p in local.model.named_parameters()}
        local.model.zero_grad()
        return ArrayRecord(
            {
                name: torch.zeros_like(x) if found.get(name) is None else found[name]
                for name, x in local.model.state_dict().items()
                if x.is_floating_point()
            }
        )


class BoundedGroupLoss(AdditiveStrategy):
    r"""Federated averaging under an upper bound on the loss of every group.

    Against FedAvg, clients weigh their examples by the dual of their group, and send
    the sum of losses and the number of examples of each group, at the model they
    received; the server adds these up, and raises the dual of a group whose loss is
    above its bound. Works with the client half :class:`BoundedGroupLossClient`, or
    with :func:`group_sums` in a loop of one's own.

    Parameters
    ----------
    groups : sequence of str
        Names; a client's examples carry indices into it.
    upper_bound : float or sequence of float
        :math:`\zeta_a`, for all constraints or one each; negative where losses are, as
        those of a likelihood. Where it is not reachable the duals stick at
        ``dual_bound``; if it is far below and ``dual_bound`` large, the worst group is
        what is minimised.
    labels : sequence of str, optional
        Bound the loss of every (group, label) pair instead: conditional bounded group
        loss, related to equalised odds. Constraints are ordered group by group.
    dual_bound : float (default: 5.0)
        :math:`B \ge 0`, bounds the sum of the duals; 0 is FedAvg.
    dual_learning_rate : float (default: 0.5)
        :math:`\eta_\theta > 0` of the exponentiated gradient, see :func:`dual_step`;
        losses ten times as large want a tenth of it.
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
        :class:`DualityGap`. Not with a mechanism.
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
        imports="from flower_ext.strategies.bounded_group_loss import group_sums",
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
    scales = {LOSS_SUMS: 0.01, COUNTS: 0.01}

    def __init__(
        self,
        *flowers: object,
        groups: Sequence[str],
        upper_bound: float | Sequence[float],
        labels: Sequence[str] | None = None,
        dual_bound: float = 5.0,
        dual_learning_rate: float = 0.5,
        multiplier_bound: float = math.inf,
        loss_bound: float | None = None,
        group_counts: Sequence[float] | None = None,
        average_iterates: bool = True,
        certificate_radius: float | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        _require_names("groups", groups)
        if labels is not None:
            _require_names("labels", labels)
        if not isinstance(average_iterates, bool):
            refuse("average_iterates", average_iterates, "True or False")
        self.constraints = [
            f"{group}/{label}" if label else group
            for group in groups
            for label in labels or [""]
        ]
        self.num_labels = len(labels or [])
        size = (len(self.constraints),)
        self.scalars = {LOSS_SUMS: size, COUNTS: size}
        self.upper_bound = self._per_constraint("upper_bound", upper_bound)
        at_least("dual_bound", dual_bound, 0)
        positive("dual_learning_rate", dual_learning_rate)
        positive("multiplier_bound", multiplier_bound, allow_inf=True)
        if loss_bound is None:
            loss_bound = max(100.0, 10 * float(np.max(np.abs(self.upper_bound))))
        self.dual_bound = dual_bound
        self.dual_learning_rate = dual_learning_rate
        self.multiplier_bound = multiplier_bound
        self.loss_bound = positive("loss_bound", loss_bound)
        self._gap: DualityGap | None = None
        self.certifies = certificate_radius is not None
        if certificate_radius is not None:
            positive("certificate_radius", certificate_radius)
            if self.mechanism:
                cause = "what is noised certifies nothing"
                refuse("certificate_radius", certificate_radius, "left out", cause)
            self._gap = DualityGap(certificate_radius)
        self._known = group_counts is not None
        self._counts = self._per_constraint(
            "group_counts", 0.0 if group_counts is None else group_counts, low=0.0
        )
        if self._known and not self._counts.any():
            refuse("group_counts", group_counts, "> 0 for some group")
        # Groups that are known to have no examples need not be measured.
        self._needed = (self._counts > 0) | (not self._known)
        self._theta = np.zeros(len(self.constraints))
        self._losses = np.full(len(self.constraints), np.nan)  # the last known ones
        self._average: dict[str, npt.NDArray[np.float64]] = {}
        self._rounds = 0
        self._keep_average = average_iterates
        self._best: tuple[tuple[float, ...], Arrays] | None = None

    @property
    def dual(self) -> Vector:
        r"""The current :math:`\lambda`."""
        return dual_weights(self._theta, self.dual_bound)

    def tell(self, round: Round) -> Config:
        """Tell clients what to add to the weight of an example of each group."""
        return {
            MULTIPLIERS_KEY: [float(m) for m in self._multipliers()],
            NUM_LABELS_KEY: self.num_labels,
            GRADIENT_KEY: self.certifies,
        }

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the delta, and the loss sums and counts of the groups."""
        arrays = {DELTA: reply.delta(round)}
        if self.certifies:
            floats = {name: x for name, x in round.sent.items() if is_averaged(x)}
            arrays[GRADIENT_KEY] = dict(reply.arrays(GRADIENT_KEY, floats))
        return Contribution(arrays, scalars=self._read_sums(reply))

    def report(self, total: Total, round: Round) -> Metrics:
        """Return group losses and duals of the model that the cohort received."""
        losses = self._measured(total)
        latest = np.where(np.isnan(losses), self._losses, losses)
        metrics = self._loss_metrics(losses)
        if metrics:
            metrics["worst-group-loss"] = float(np.nanmax(latest))
        metrics |= {
            "groups-unseen": int(np.sum(np.isnan(latest) & self._needed)),
            "feasible": int(self._rank(losses)[:2] == (0, 0)),
        }
        for name, value in zip(self.constraints, self.dual, strict=True):
            metrics[f"dual/{name}"] = float(value)
        gap = self._gap_after(total, round)
        if gap is not None and total.scalars[COUNTS].any():
            primal, dual = gap.values(self.dual_bound)
            metrics |= {"primal-value": primal, "dual-value": dual}
            metrics["duality-gap"] = primal - dual
        return metrics

    def advance(self, total: Total, round: Round) -> None:
        """Take the dual step, and the model into the average."""
        losses = self._measured(total)
        self._gap = self._gap_after(total, round)
        if not self._known:
            self._counts += np.maximum(total.scalars[COUNTS], 0)
        self._losses = np.where(np.isnan(losses), self._losses, losses)
        self._remember(losses, round.sent)
        excess = np.nan_to_num(losses - self.upper_bound)
        self._theta = dual_step(self._theta, self.dual_learning_rate * excess)

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the group losses on test data."""
        sums = {key: np.zeros(len(self.constraints)) for key in (LOSS_SUMS, COUNTS)}
        for reply in replies:
            try:
                read = self._read_sums(reply)
            except MalformedReply:  # a loop of one's own may not report them
                continue
            for key, value in read.items():
                sums[key] += value
        return self._loss_metrics(_losses(sums))

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
        if self._best is None:
            return {}
        (missing, *_), best = self._best
        unseen = np.isnan(self._losses) & self._needed
        if missing:
            log(
                WARNING,
                "best-feasible: no cohort had examples of all groups, %d were missing "
                "at the least and are taken at their last known losses; never seen: %s",
                missing,
                [name for name, x in zip(self.constraints, unseen, strict=True) if x],
            )
        found = {"best-feasible": to_record(best)}
        if self._keep_average:
            average = {
                name: apply_direction(like, self._average[name] / self._rounds - like)
                for name, like in best.items()
            }
            found["average"] = to_record(average)
        return found

    def state_dict(self) -> dict[str, object]:
        """Add duals, counts and iterates."""
        state: dict[str, object] = {
            "theta": self._theta,
            "counts": self._counts,
            "losses": self._losses,
            "rounds": self._rounds,
            "average": dict(self._average),
        }
        if self._best is not None:
            state["best"] = {"rank": list(self._best[0]), "arrays": self._best[1]}
        if self._gap:
            state["gap"] = {**vars(self._gap), "gradient": dict(self._gap.gradient)}
        return {**super().state_dict(), "bounded-group-loss": state}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over duals, counts and iterates."""
        super().load_state_dict(state)
        own = dict(state["bounded-group-loss"])  # type: ignore[call-overload]
        if own["theta"].shape != self._theta.shape:
            refuse(
                "groups", self.constraints, f"{len(own['theta'])} as in the saved run"
            )
        self._theta, self._counts, self._losses = (
            np.array(own[name]) for name in ("theta", "counts", "losses")
        )
        self._rounds = own["rounds"]
        self._average = {k: np.array(x) for k, x in own["average"].items()}
        if best := own.get("best"):
            self._best = tuple(best["rank"]), dict(best["arrays"])
        if self._gap and "gap" in own:
            gap = {**own["gap"], "excess": np.array(own["gap"]["excess"])}
            self._gap = DualityGap(**gap)

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        bounds = zip(self.constraints, self.upper_bound, strict=True)
        return {
            "Upper bounds": ", ".join(f"{name} {bound:g}" for name, bound in bounds),
            "Dual": f"bound {self.dual_bound:g}, rate {self.dual_learning_rate:g}",
            "Bound of multipliers": self.multiplier_bound,
            "Bound of losses": self.loss_bound,
            "Radius of the certificate": self._gap.radius if self._gap else "none",
            "Group counts": self._counts.tolist() if self._known else "learned",
            "Averages iterates": self._keep_average,
            **super().settings(),
        }

    def _per_constraint(
        self, name: str, value: float | Sequence[float], low: float = -math.inf
    ) -> Vector:
        size = len(self.constraints)
        try:
            values = np.array(value, np.float64)
        except (TypeError, ValueError):
            values = np.zeros((0, 0))
        if values.shape not in ((), (size,)) or isinstance(value, bool | str):
            refuse(name, value, f"one number or {size}, for {self.constraints}")
        if not np.all(np.isfinite(values)) or np.any(values < low):
            refuse(name, value, "finite" + f" and >= {low:g}" * math.isfinite(low))
        return np.array(np.broadcast_to(values, (size,)))

    def _multipliers(self) -> Vector:
        return example_multipliers(self.dual, self._counts, self.multiplier_bound)

    def _read_sums(self, reply: Reply) -> dict[str, Vector]:
        """Return a reply's sums and counts, no loss beyond its bound."""
        size = len(self.constraints)
        sums = reply.vector(LOSS_SUMS, size, -sys.float_info.max)
        counts = reply.vector(COUNTS, size)
        if np.any((counts == 0) & (sums != 0)):
            raise MalformedReply(f"{LOSS_SUMS!r} of a group without examples")
        examples = reply.num_examples
        if counts.sum() > examples * (1 + 1e-6):
            raise MalformedReply(
                f"metric {COUNTS!r} adds up to {counts.sum():g}, more than "
                f"{self.weighted_by_key!r}={examples:g}"
            )
        most = self.loss_bound * counts
        return {LOSS_SUMS: np.clip(sums, -most, most), COUNTS: counts}

    def _measured(self, total: Total) -> Vector:
        return _losses(total.scalars, total.noise.get(COUNTS, 0.0))

    def _loss_metrics(self, losses: Vector) -> Metrics:
        known = {
            f"group-loss/{name}": float(loss)
            for name, loss in zip(self.constraints, losses, strict=True)
            if not np.isnan(loss)
        }
        return {**known, "worst-group-loss": max(known.values())} if known else {}

    def _rank(self, losses: Vector) -> tuple[float, float, float]:
        """Return groups not measured, largest excess, overall loss: less is better.

        A group that was not measured has its last known loss; the overall loss weighs
        groups by all examples counted so far, not by those of the cohort.
        """
        missing = int(np.sum(np.isnan(losses) & self._needed))
        losses = np.where(np.isnan(losses), self._losses, losses)
        excess = float(np.nanmax(losses - self.upper_bound, initial=0))
        known = np.where(np.isnan(losses), 0.0, self._counts)
        overall = float(known @ np.nan_to_num(losses)) / max(float(known.sum()), 1e-300)
        return missing, excess, overall

    def _gap_after(self, total: Total, round: Round) -> DualityGap | None:
        """Return the duality gap after this round.

        A round in which no example was counted is left out: it measured nothing.
        """
        counts = total.scalars[COUNTS]
        if self._gap is None or not counts.any():
            return self._gap
        share = counts / counts.sum()
        losses = np.where(counts > 0, self._measured(total), self._losses)
        return self._gap.after(
            float(total.scalars[LOSS_SUMS].sum() / counts.sum()),
            np.nan_to_num(losses - self.upper_bound),
            self._multipliers() * share,
            total.mean(GRADIENT_KEY),
            round.sent,
        )

    def _remember(self, losses: Vector, sent: Arrays) -> None:
        """Take the model that was sent into the average, and if it is best, keep it."""
        rank = self._rank(losses)
        if self._best is None or rank < self._best[0]:
            self._best = rank, sent
        if self._keep_average:
            self._average = self._average or {
                name: np.zeros(x.shape) for name, x in sent.items()
            }
            for name, array in sent.items():
                accumulate(self._average[name], [(array, 1.0)])
        self._rounds += 1


def _require_names(name: str, values: Sequence[str]) -> None:
    ok = isinstance(values, Sequence) and not isinstance(values, str)
    if not ok or not values or len(set(values)) < len(values):
        refuse(name, values, "a sequence of different names")


def _losses(scalars: Mapping[str, Vector], floor: float = 0.0) -> Vector:
    """Return the loss of each group; NaN for one of no more than ``floor`` examples."""
    sums, counts = scalars[LOSS_SUMS], scalars[COUNTS]
    losses = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=losses, where=counts > floor)
    return losses
