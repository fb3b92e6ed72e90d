r"""Agnostic federated learning: the best model for the worst mixture of clients.

With a weight for each client on the simplex,

.. math:: \min_w \max_{\lambda \ge 0, \sum_k \lambda_k = 1} \sum_k \lambda_k F_k(w),

clients descend on the weighted loss and the server ascends in the weights, by projected
gradient steps (Mohri, Sivek and Suresh 2019, "Agnostic Federated Learning", ICML, arXiv
1902.00146: equation 4, and the algorithm Stochastic-AFL, whose result is the average of
the models).
"""

import sys
from collections.abc import Mapping
from typing import Unpack

import numpy as np
from flwr.app import ArrayRecord

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import num_examples
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, zeros_like
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import Metrics, Reply, Round
from flower_ext.core.states import Stateful, load_states, states_of
from flower_ext.core.typing import Floats
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.iterates import Iterates
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.saddle import SimplexWeights

LOSS = "agnostic-loss"
LOSSES, MEASURED = "client-losses", "clients-measured"


class AgnosticFLClient(ClientHalf):
    """Tells the loss of the received model on its training data."""

    name = "agnostic-fl"

    def begin(self, local: Local) -> None:
        """Measure the received model."""
        # Before the first step: weights are raised by the losses of the server's model.
        some = num_examples(local.train) > 0
        self._loss = local.mean_loss(local.train) if some else 0.0

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Return the loss."""
        return {}, {LOSS: self._loss}


class AgnosticFL(AdditiveStrategy):
    r"""Federated averaging with weights that follow the clients' losses.

    Against FedAvg, client k weighs :math:`\lambda_k` and not its number of examples,
    and after each round

    .. math:: \lambda \leftarrow \mathrm{Proj}(\lambda + \gamma F)

    with the losses :math:`F` of the model that was sent, and the projection to the
    simplex. It is the saddle point of
    :class:`~flower_ext.strategies.BoundedGroupLoss` with clients for groups, no bounds,
    and weights that leave no room for the mean loss. Works with the client half
    :class:`AgnosticFLClient`; a loop of one's own tells the loss as the metric
    ``"agnostic-loss"``.

    Parameters
    ----------
    weight_learning_rate : float (default: 0.05)
        :math:`\gamma \ge 0`. 0 is FedAvg with equal weights, where :math:`\lambda`
        starts. Compare it with the weights: of n clients they are :math:`1/n`, so that
        losses that differ by 1 move them all if it is as large. Losses ten times as
        large want a tenth of it.
    average_iterates : bool (default: True)
        Keep the mean of the models (one more model in memory, float64).
    *flowers, **options
        Server optimizer, sampler and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If there is a mechanism: a weight that is about one client cannot be hidden
        among those of others.

    Notes
    -----
    ``start`` returns the last iterate; :meth:`iterates` has the averaged one, for which
    the theory is, and the one whose worst client lost least. They are of the models
    that were sent, each at its clients' losses.

    All clients are meant to take part in every round. Of those that do not, the last
    known loss counts, or the mean of the others if none is known; the direction is
    :math:`\sum \lambda_k\Delta_k / \sum \lambda_k` over those that reply, and none if
    all of these have a weight of 0. A client without examples has no loss and moves
    nothing. One that joins later starts with the mean weight.

    The server knows each client's loss and weighs it by that; a client that claims
    large losses is followed by all others.

    Metrics, of the model that the cohort received: ``worst-client-loss``,
    ``mean-client-loss``, ``largest-weight``, and ``clients-with-weight``, the number of
    clients whose weight is not 0.

    Examples
    --------
    >>> strategy = AgnosticFL(weight_learning_rate=0.01)
    """

    client_half = AgnosticFLClient
    drop_in = DropIn(
        metrics={LOSS: "received_loss"},
        fill_in="received_loss: of the received model on the client's training data, "
        "before training",
    )
    consumed_metrics = (LOSS,)
    needs_rounds = "weights and average are about the one model of a round"

    def __init__(
        self,
        *flowers: object,
        weight_learning_rate: float = 0.05,
        average_iterates: bool = True,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        if options.get("mechanism") is not None:
            cause = "a weight for each client is about that client"
            refuse("mechanism", options["mechanism"], "left out", cause)
        super().__init__(*flowers, **options)
        # Workers weigh by it.
        self.weights = SimplexWeights("weight_learning_rate", weight_learning_rate)
        self._iterates = Iterates(average_iterates)

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change with the client's weight, and its loss in its place."""
        loss, trained = reply.number(LOSS, -sys.float_info.max), reply.num_examples > 0
        place = np.zeros(round.population)
        place[reply.client] = float(trained)
        weight = float(self.weights.of(len(place)) @ place)
        return Contribution(
            {DELTA: reply.delta(round)},
            scalars={LOSSES: loss * place, MEASURED: place},
            weights={DELTA: weight},
        )

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change, of no weight."""
        return Contribution({DELTA: zeros_like(sent)}, weights={DELTA: 0.0})

    def advance(self, total: Total, round: Round) -> None:
        """Take the step of the weights, and the model into the average."""
        losses = _measured(total)
        missing = float(np.isnan(losses).sum())
        worst = float(np.nanmax(losses, initial=-np.inf))
        self._iterates.add(round.sent, (missing, worst))
        self.weights.step(losses)

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the losses of the model that was sent, and how it was weighed."""
        losses = _measured(total)
        if np.isnan(losses).all():
            return {}
        weights = self.weights.of(len(losses))
        return {
            "worst-client-loss": float(np.nanmax(losses)),
            "mean-client-loss": float(np.nanmean(losses)),
            "largest-weight": float(weights.max()),
            "clients-with-weight": int(np.count_nonzero(weights)),
        }

    def iterates(self) -> dict[str, ArrayRecord]:
        """Return ``"average"`` and ``"best"``, as far as there are any.

        Best is, of the models that were sent, the one whose worst client lost least;
        where not all clients took part in each round, of those with the fewest missing.
        """
        return self._iterates.records() if self._iterates.best else {}

    @property
    def _parts(self) -> dict[str, Stateful]:
        return {"weights": self.weights, "iterates": self._iterates}

    def state_dict(self) -> dict[str, object]:
        """Add weights and iterates."""
        return {**super().state_dict(), "agnostic-fl": states_of(self._parts)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over weights and iterates."""
        super().load_state_dict(state)
        load_states(self._parts, state["agnostic-fl"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Learning rate of weights": self.weights.learning_rate,
            "Averages iterates": self._iterates.keeps_average,
            **super().settings(),
        }


def _measured(total: Total) -> Floats:
    """Return the losses of the round, NaN for clients that told none."""
    return np.where(total.scalars[MEASURED] > 0, total.scalars[LOSSES], np.nan)
