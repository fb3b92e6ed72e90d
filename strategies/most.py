r"""MosT: several models that share the clients out among them, each fair to its own.

The server has m models. Optimal transport between n clients and m models, with the
clients' losses as costs, says how much of a client is each model's; each model moves
along the common descent direction of what is its own:

.. math::
   \Gamma = \arg\min_{\Gamma \ge 0,\ \Gamma 1 = \alpha,\ \Gamma^T 1 = \beta}
   \langle \Gamma, L\rangle + \epsilon\,\mathrm{KL}, \qquad
   a_j = \arg\min_{a \ge 0,\ 1^T a = 1} \Big\| \sum_i a_i \Gamma_{ij} \Delta_{ij}
   \Big\|^2, \qquad \theta_j \leftarrow \theta_j + \sum_i a_{ij} \Delta_{ij}

(Li, Li, Smith, Bilmes and Zhou 2025, "Many-Objective Multi-Solution Transport", ICLR,
arXiv 2403.04099).
"""

import math
import sys
from collections.abc import Mapping, Sequence
from typing import Unpack, cast

import numpy as np

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import num_examples
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import fraction, one_of, positive, refuse, whole
from flower_ext.core.protocol import Config, Metrics, Reply, Round
from flower_ext.core.several import require_models, stack, unstack
from flower_ext.core.typing import Floats
from flower_ext.server.drop_in import DropIn
from flower_ext.server.min_norm import (
    Change,
    changes_of,
    combination,
    descent_weights,
    gram_of,
)
from flower_ext.server.optimal_transport import transport
from flower_ext.server.options import RoundOptions
from flower_ext.server.personal import spread
from flower_ext.server.strategy import RoundStrategy

LOSSES = "most-losses"
# Of the running average of the transport's cost, and of the best clients of a model by
# which it is given mass; as in the authors' code.
_KEPT, _BEST = 0.95, 0.1
# Of an equal part of a client: a model with less of it does not move for it.
_OWN = 0.5


class MosTClient(ClientHalf):
    """Trains each of the models that it is sent, and tells their losses before.

    It evaluates the one that loses least on its training data, so that clients that
    never trained are served.
    """

    name = "most"

    def __init__(self) -> None:
        self._models: list[Tensors] = []
        self._trained: list[Tensors] = []
        self._losses: list[float] = []

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Measure all models, and begin with the first; to evaluate, take the best."""
        self._models = [*unstack(arrays)]
        if local.phase == "evaluate":
            return self._models[local.best_of(self._models)]
        some = num_examples(local.train) > 0
        self._losses = [local.loss_of(x) if some else 0.0 for x in self._models]
        return self._models[0]

    def after_training(self, local: Local) -> None:
        """Train the others as the first."""
        self._trained = [local.end]
        for arrays in self._models[1:]:
            other = local.with_model(arrays)
            other.fit()
            self._trained.append(other.end)

    def model_to_send(self, local: Local) -> Tensors:
        """Return all trained models."""
        return stack(self._trained)

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Return the losses of the received models."""
        return {}, {LOSSES: self._losses}


def marginals(cost: Floats, uniform: float) -> tuple[Floats, Floats]:
    r"""Return how much of the clients, and of the models, there is to share out.

    Both sum to m. With s = ``uniform``, clients have :math:`s` times equal parts and
    :math:`1 - s` times parts that grow with their best loss; models have :math:`1 - s`
    times equal parts and s times parts that grow with the loss of their best tenth of
    the clients. From s = 1 to 0, models first choose clients, and in the end no client
    that all models serve badly is left out.

    Parameters
    ----------
    cost : ndarray of shape (clients, models)
        Not negative.
    uniform : float
        From 0 to 1.

    Examples
    --------
    >>> rows, columns = marginals(np.array([[1.0, 3.0], [4.0, 2.0]]), uniform=0.0)
    >>> rows.round(3), columns
    (array([0.667, 1.333]), array([1., 1.]))
    """
    n, m = cost.shape
    best = np.sort(cost, axis=0)[: max(1, int(_BEST * n))].sum(0)
    rows, columns = _shares(cost.min(1)), _shares(best)
    return (
        m * (uniform / n + (1 - uniform) * rows),
        m * ((1 - uniform) / m + uniform * columns),
    )


class MosT(RoundStrategy):
    r"""Several models, to which optimal transport assigns clients by their losses.

    Against :class:`~flower_ext.strategies.HypCluster`, where a client takes one model
    and a model may be taken by nobody, every model has its share of the clients. With
    ``num_models=1`` there is nothing to assign: it is
    :class:`~flower_ext.strategies.FedMGDA` with a prior of equal weights. Works with
    the client half :class:`MosTClient`. It starts from several models: see
    :func:`~flower_ext.client.several.initial_models`.

    Parameters
    ----------
    num_models : int
        m, from 1 to the number of clients.
    marginals : {"equal", "scheduled"} (default: "equal")
        How much of the clients and of the models there is: 1/n and 1/m of all in every
        round, or as the authors' code has it, see :func:`marginals`. That gives most
        to the model that is worst for its best clients: where another one fits its own
        well, it takes them away, and two populations may not be told apart.
    marginal_decay : float (default: 0.995)
        Of scheduled marginals: :math:`s_t` is this to the power of the rounds after the
        warm-up. 1 keeps s at 1, 0 begins at s = 1 and has 0 from then on.
    regularization : float (default: 0.1)
        :math:`\epsilon > 0` of the transport, in units of the spread of the models'
        losses on a client. A large one gives every model as much of every client, a
        small one gives a client to as few models as the marginals allow.
    warmup_rounds : int (default: 3)
        First rounds, in which each model is the plain mean over all clients.
    max_deviation : float (default: 1.0)
        :math:`\epsilon` of :class:`~flower_ext.strategies.FedMGDA`, around the parts
        that transport gives; 0 averages by these.
    *flowers, **options
        Server optimizer, sampler and Flower's own options, see
        :class:`~flower_ext.server.options.RoundOptions`.

    Raises
    ------
    ValueError
        Before the first round, if there are more models than clients, or if the initial
        arrays are not so many models.

    Notes
    -----
    As in the authors' code, MGDA is used only while the cost
    :math:`\langle \Gamma, L\rangle` is below its running average, otherwise, and in the
    first round of transport, the model moves by the mean with weights
    :math:`\Gamma_{ij}`. Changes are not multiplied by :math:`\Gamma_{ij}` again.

    MGDA is over a model's own clients, of whom it has half of an equal part or more:
    with less, a client's :math:`\Gamma_{ij}\Delta_{ij}` would be the shortest, and the
    whole step would be that client's. The code's plans have zeros there, an entropy
    leaves none.

    Deviations. Marginals are equal unless asked for otherwise. Transport is Sinkhorn's,
    where the code has proximal steps or a regularizer of diversity. Models move by
    weights that sum to 1, where the code multiplies the step by a model's mass. The
    plan is that of the round, with no average over rounds; a cohort is assigned by its
    own losses, where the code has stale ones for clients that were not drawn. Where
    losses are negative, all are raised by the lowest for the marginals.

    It is no sum: the server holds m models of every client of the cohort, and each
    client downloads, trains and uploads m models. There is neither a mechanism nor an
    asynchronous run. A client tells how well each model fits it. A loss that is not
    finite drops the reply; where a cohort has fewer clients than there are models, a
    client is shared by several.

    Metrics: ``model-share-0`` and so on, each model's part of the clients;
    ``transport-cost``; ``assigned``, the mean of the largest part of a client, 1 where
    each has one model; ``common-descent``, 1 where MGDA was used; at evaluation those
    of all personal models, see :func:`~flower_ext.server.personal.spread`.

    Examples
    --------
    >>> strategy = MosT(num_models=3, warmup_rounds=5)
    """

    client_half = MosTClient
    drop_in = DropIn(
        fill_in="an app made with client_app and MosTClient, which trains all models;\n"
        "the ServerApp starts from initial_models(Net, num_models), which is in\n"
        "flower_ext.client.several",
        written="num_models=...",
    )
    consumed_metrics = (LOSSES,)

    def __init__(
        self,
        num_models: int,
        *flowers: object,
        marginals: str = "equal",
        marginal_decay: float = 0.995,
        regularization: float = 0.1,
        warmup_rounds: int = 3,
        max_deviation: float = 1.0,
        **options: Unpack[RoundOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.num_models = whole("num_models", num_models, 1)
        self.marginals = one_of("marginals", marginals, ("equal", "scheduled"))
        self.marginal_decay = fraction("marginal_decay", marginal_decay)
        self.regularization = positive("regularization", regularization)
        self.warmup_rounds = whole("warmup_rounds", warmup_rounds, 0)
        self.max_deviation = fraction("max_deviation", max_deviation)
        self._average_cost = -math.inf  # so that no first cost is below it

    def tell(self, round: Round) -> Config:
        """Look at the models before clients are told of them; tell nothing."""
        require_models(round.sent, self.num_models, "num_models")
        if self.num_models > round.population:
            cause = "each would have less than a client"
            bound = f"<= {round.population} clients"
            refuse("num_models", self.num_models, bound, cause)
        return {}

    def aggregate(self, round: Round, replies: Sequence[Reply]) -> Arrays:
        """Return the direction of each model."""
        found = changes_of(replies, round)
        if not found:
            return {}
        plan, cost = self._plan([reply for reply, _ in found], round)
        changes = [change for _, change in found]
        moved: Arrays = {}
        for j in range(self.num_models):
            weights = _shares(plan[:, j])
            if self._descends(round, cost):
                own = plan[:, j] >= _OWN * plan.sum(1) / self.num_models
                weights = self._common(j, changes, np.where(own, plan[:, j], 0), round)
            names = [name for name in round.sent if name.startswith(f"{j}/")]
            moved = {**moved, **combination(changes, weights, names)}
        return moved

    def _plan(self, replies: Sequence[Reply], round: Round) -> tuple[Floats, float]:
        """Return how much of each client each model has, and what that costs."""
        m, lowest = self.num_models, -sys.float_info.max
        losses = np.array([reply.vector(LOSSES, m, lowest) for reply in replies])
        n = len(losses)
        plan = np.full((n, m), 1 / n)
        if not self._is_alone(round):
            rows, columns = np.full(n, m / n), np.ones(m)
            if self.marginals == "scheduled":
                raised = losses - min(0.0, float(losses.min()))
                rows, columns = marginals(raised, self._uniform(round))
            # A constant for a client changes no plan; differences are what counts.
            cost = losses - losses.mean(1, keepdims=True)
            unit = float(cost.std()) or 1.0
            plan = transport(cost / unit, rows, columns, self.regularization)
        return plan, float((plan * losses).sum())

    def _is_alone(self, round: Round) -> bool:
        """Whether nothing is assigned: one model has all, or each has all."""
        return self.num_models == 1 or round.number <= self.warmup_rounds

    def _uniform(self, round: Round) -> float:
        return self.marginal_decay ** (round.number - self.warmup_rounds - 1)

    def _descends(self, round: Round, cost: float) -> bool:
        """Whether models move along common descent directions."""
        if self.num_models == 1:
            return True
        return not self._is_alone(round) and cost < self._average_cost

    def _common(
        self, j: int, changes: Sequence[Change], parts: Floats, round: Round
    ) -> Floats:
        """Return the weights of a model's clients in their descent direction."""
        own = [name for name in round.parameters if name.startswith(f"{j}/")]
        gram = gram_of(changes, own) * np.outer(parts, parts)
        # Those of whom it has nothing would be vectors of 0, the least of all.
        some, weights = parts > 0, np.zeros(len(parts))
        if not some.any():
            return weights
        weights[some] = descent_weights(
            gram[np.ix_(some, some)], _shares(parts[some]), self.max_deviation
        )
        return weights

    def finish(self, round: Round, replies: Sequence[Reply]) -> Metrics:
        """Take the cost into the running average; return how clients were assigned."""
        used = [reply for reply in replies if reply.num_examples > 0]
        if not used:
            return {}
        plan, cost = self._plan(used, round)
        descends = self._descends(round, cost)
        if not self._is_alone(round):
            known = math.isfinite(self._average_cost)
            old = self._average_cost if known else cost
            self._average_cost = _KEPT * old + (1 - _KEPT) * cost
        shares = plan.sum(0) / plan.sum()
        best = plan.max(1).sum() / plan.sum()
        return {
            **{f"model-share-{j}": float(x) for j, x in enumerate(shares)},
            "transport-cost": cost / self.num_models,
            "assigned": float(best),
            "common-descent": int(descends),
        }

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the spread of the clients' metrics, each with its best model."""
        rows = [
            (
                "seen" if reply.client in round.trained else "unseen",
                {k: x for k, x in reply.numbers().items() if k != self.weighted_by_key},
            )
            for reply in replies
        ]
        return spread(rows)

    def state_dict(self) -> dict[str, object]:
        """Add the running average of the cost."""
        return {**super().state_dict(), "average-cost": self._average_cost}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the running average of the cost."""
        super().load_state_dict(state)
        self._average_cost = float(cast("float", state["average-cost"]))

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Models": self.num_models,
            "Marginals": f"{self.marginals}, decay {self.marginal_decay:g}",
            "Regularization": self.regularization,
            "Warm-up rounds": self.warmup_rounds,
            "Largest deviation of weights": self.max_deviation,
            **super().settings(),
        }


def _shares(x: Floats) -> Floats:
    whole = float(x.sum())
    return x / whole if whole > 0 else np.full(len(x), 1 / len(x))
