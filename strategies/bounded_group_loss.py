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

from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Message, RecordDict
from torch import Tensor

from flower_ext.additive import AdditiveStrategy, Config
from flower_ext.arrays import Arrays, accumulate, to_record, zeros_like
from flower_ext.client import Batch, ClientHalf, Local, Metrics, batches
from flower_ext.contribution import DELTA, Contribution, Total
from flower_ext.drop_in import DropIn
from flower_ext.errors import at_least, positive, refuse
from flower_ext.options import AdditiveOptions
from flower_ext.replies import MalformedReply, read_vector
from flower_ext.server_optimizer import apply_direction

LOSS_SUMS = "group-loss-sums"
COUNTS = "group-counts"
MULTIPLIERS_KEY = "group-multipliers"
NUM_LABELS_KEY = "group-num-labels"

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


def example_multipliers(dual: Vector, counts: Vector) -> Vector:
    r"""Return :math:`\lambda_a\, n / n_a`: what is added to 1 in an example's weight.

    With :math:`h_k = \frac{1}{n_k}\sum_i (1 + \lambda_{a_i} n/n_{a_i})\ell_i` the
    average :math:`\sum_k \frac{n_k}{n} h_k` is the Lagrangian but for a constant. A
    group of which no example is known gets 0.
    """
    share = counts / (float(counts.sum()) or 1.0)
    return np.divide(dual, share, out=np.zeros_like(dual), where=share > 0)


def group_sums(
    losses: Tensor, groups: Tensor, num_groups: int
) -> dict[str, list[float]]:
    """Return the metrics that the server reads, for a training loop of one's own.

    Parameters
    ----------
    losses : Tensor of shape (examples,)
        Of the received model, before training; not negative.
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

    def begin(self, local: Local) -> None:
        """Add up the losses of the received model."""
        self._read(local)
        self._metrics = self._sums(local, local.train)

    def objective(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the weighted mean loss."""
        return ((1 + self._multipliers[self._constraint(batch)]) * losses).mean()

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return the sums of losses and the counts."""
        return {}, self._metrics

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
        :math:`\zeta_a \ge 0`, for all constraints or one each. Where it is not
        reachable the duals stick at ``dual_bound``; at 0 and with a large
        ``dual_bound`` the worst group is what is minimised.
    labels : sequence of str, optional
        Bound the loss of every (group, label) pair instead: conditional bounded group
        loss, related to equalised odds. Constraints are ordered group by group.
    dual_bound : float (default: 5.0)
        :math:`B \ge 0`, bounds the sum of the duals; 0 is FedAvg.
    dual_learning_rate : float (default: 0.5)
        :math:`\eta_\theta > 0` of the exponentiated gradient; scales with the loss.
    group_counts : sequence of float, optional
        Examples per constraint over all clients, where they are public. Otherwise
        they are counted in the replies so far, and the first round, which knows none,
        is one of FedAvg.
    average_iterates : bool (default: True)
        Keep the mean of the models (one more model in memory, float64).
    **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.options.AdditiveOptions`.

    Attributes
    ----------
    dual : ndarray of shape (constraints,)
        :math:`\lambda`.

    Notes
    -----
    ``start`` returns the last iterate; :meth:`iterates` has the averaged one, for
    which the theory is, and the best feasible one. Metrics: ``group-loss/<name>``
    and ``dual/<name>`` per constraint, ``worst-group-loss``, and ``feasible``, all at
    the model that the cohort received, on training data; at evaluation the group
    losses on test data. The theory wants a bounded loss.

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
        *,
        groups: Sequence[str],
        upper_bound: float | Sequence[float],
        labels: Sequence[str] | None = None,
        dual_bound: float = 5.0,
        dual_learning_rate: float = 0.5,
        group_counts: Sequence[float] | None = None,
        average_iterates: bool = True,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(**options)
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
        self.upper_bound = self._per_constraint("upper_bound", upper_bound)
        at_least("dual_bound", dual_bound, 0)
        positive("dual_learning_rate", dual_learning_rate)
        self.dual_bound = dual_bound
        self.dual_learning_rate = dual_learning_rate
        self._known = group_counts is not None
        self._counts = self._per_constraint(
            "group_counts", 0.0 if group_counts is None else group_counts
        )
        if self._known and not self._counts.any():
            refuse("group_counts", group_counts, "> 0 for some group")
        self._theta = np.zeros(len(self.constraints))
        self._average: dict[str, npt.NDArray[np.float64]] = {}
        self._rounds = 0
        self._keep_average = average_iterates
        self._best: tuple[tuple[float, float], Arrays] | None = None

    @property
    def dual(self) -> Vector:
        r"""The current :math:`\lambda`."""
        return dual_weights(self._theta, self.dual_bound)

    def client_config(self) -> Config:
        """Tell clients what to add to the weight of an example of each group."""
        multipliers = example_multipliers(self.dual, self._counts)
        return {
            MULTIPLIERS_KEY: [float(m) for m in multipliers],
            NUM_LABELS_KEY: self.num_labels,
        }

    def contribution(self, reply: RecordDict, sent: Arrays) -> Contribution:
        """Return the weighted delta, and the loss sums and counts of the groups."""
        sums, counts = (self._vector(reply, key) for key in (LOSS_SUMS, COUNTS))
        if np.any((counts == 0) & (sums > 0)):
            raise MalformedReply(f"{LOSS_SUMS!r} of a group without examples")
        term = super().contribution(reply, sent)
        return Contribution(term.arrays, term.weight, {LOSS_SUMS: sums, COUNTS: counts})

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change, of a client without examples."""
        none = np.zeros(len(self.constraints))
        return Contribution(
            {DELTA: zeros_like(sent)}, scalars={LOSS_SUMS: none, COUNTS: none}
        )

    def report(self, total: Total) -> Metrics:
        """Return group losses and duals of the model that the cohort received."""
        losses = _losses(total.scalars, total.noise.get(COUNTS, 0.0))
        metrics = self._loss_metrics(losses)
        metrics["feasible"] = int(bool(np.all(_excess(losses, self.upper_bound) <= 0)))
        for name, value in zip(self.constraints, self.dual, strict=True):
            metrics[f"dual/{name}"] = float(value)
        return metrics

    def update(self, total: Total) -> Arrays:
        """Average the deltas, and take the dual step."""
        self._remember(total)
        losses = _losses(total.scalars, total.noise.get(COUNTS, 0.0))
        self._theta += self.dual_learning_rate * np.nan_to_num(
            losses - self.upper_bound
        )
        if not self._known:
            self._counts += np.maximum(total.scalars[COUNTS], 0)
        return total.mean()

    def report_evaluate(self, replies: list[Message]) -> Metrics:
        """Return the group losses on test data."""
        sums = {key: np.zeros(len(self.constraints)) for key in (LOSS_SUMS, COUNTS)}
        for reply in replies:
            try:
                read = {key: self._vector(reply.content, key) for key in sums}
            except MalformedReply:  # a loop of one's own may not report them
                continue
            for key, value in read.items():
                sums[key] += value
        return self._loss_metrics(_losses(sums))

    def iterates(self) -> dict[str, ArrayRecord]:
        """Return ``"average"`` and ``"best-feasible"``, as far as there are any.

        The average is over all models that were sent out and replied to. Best feasible
        is, of these, the one of least overall loss among those within all bounds, or,
        if none was, the one that exceeded its bounds least.
        """
        if self._best is None:
            return {}
        best = self._best[1]
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
            "rounds": self._rounds,
            "average": dict(self._average),
        }
        if self._best is not None:
            state["best"] = {"rank": list(self._best[0]), "arrays": self._best[1]}
        return {**super().state_dict(), "bounded-group-loss": state}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over duals, counts and iterates."""
        super().load_state_dict(state)
        own = dict(state["bounded-group-loss"])  # type: ignore[call-overload]
        if own["theta"].shape != self._theta.shape:
            refuse(
                "groups", self.constraints, f"{len(own['theta'])} as in the saved run"
            )
        self._theta, self._counts = np.array(own["theta"]), np.array(own["counts"])
        self._rounds = own["rounds"]
        self._average = {k: np.array(x) for k, x in own["average"].items()}
        if best := own.get("best"):
            rank = best["rank"]
            self._best = (rank[0], rank[1]), dict(best["arrays"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        bounds = zip(self.constraints, self.upper_bound, strict=True)
        return {
            "Upper bounds": ", ".join(f"{name} {bound:g}" for name, bound in bounds),
            "Dual": f"bound {self.dual_bound:g}, rate {self.dual_learning_rate:g}",
            "Group counts": self._counts.tolist() if self._known else "learned",
            "Averages iterates": self._keep_average,
            **super().settings(),
        }

    def _per_constraint(self, name: str, value: float | Sequence[float]) -> Vector:
        size = len(self.constraints)
        try:
            values = np.array(value, np.float64)
        except (TypeError, ValueError):
            values = np.zeros((0, 0))
        if values.shape not in ((), (size,)) or isinstance(value, bool | str):
            refuse(name, value, f"one number or {size}, for {self.constraints}")
        if not np.all(np.isfinite(values)) or np.any(values < 0):
            refuse(name, value, "finite and >= 0")
        return np.array(np.broadcast_to(values, (size,)))

    def _vector(self, reply: RecordDict, key: str) -> Vector:
        return np.array(read_vector(reply, key, len(self.constraints)))

    def _loss_metrics(self, losses: Vector) -> Metrics:
        known = {
            f"group-loss/{name}": float(loss)
            for name, loss in zip(self.constraints, losses, strict=True)
            if not np.isnan(loss)
        }
        return {**known, "worst-group-loss": max(known.values())} if known else {}

    def _remember(self, total: Total) -> None:
        """Take the model that was sent into the average, and if it is best, keep it."""
        assert self._sent is not None
        losses = _losses(total.scalars, total.noise.get(COUNTS, 0.0))
        overall = total.scalars[LOSS_SUMS].sum() / max(total.scalars[COUNTS].sum(), 1)
        excess = max(
            0.0, float(np.nanmax(_excess(losses, self.upper_bound), initial=0))
        )
        rank = (excess, float(overall))
        if self._best is None or rank < self._best[0]:
            self._best = rank, self._sent
        if self._keep_average:
            self._average = self._average or {
                name: np.zeros(x.shape) for name, x in self._sent.items()
            }
            for name, array in self._sent.items():
                accumulate(self._average[name], [(array, 1.0)])
        self._rounds += 1


def _require_names(name: str, values: Sequence[str]) -> None:
    ok = isinstance(values, Sequence) and not isinstance(values, str)
    if not ok or not values or len(set(values)) < len(values):
        refuse(name, values, "a sequence of different names")


def _losses(scalars: Mapping[str, Vector], floor: float = 0.0) -> Vector:
    """Return the loss of each group; NaN for one of no more than ``floor`` examples."""
    sums, counts = np.maximum(scalars[LOSS_SUMS], 0), scalars[COUNTS]
    losses = np.full(sums.shape, np.nan)
    np.divide(sums, counts, out=losses, where=counts > floor)
    return losses


def _excess(losses: Vector, bound: Vector) -> Vector:
    return np.nan_to_num(losses - bound, nan=-np.inf, neginf=-np.inf)
