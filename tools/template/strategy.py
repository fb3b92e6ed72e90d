r"""Template: clients that the model serves badly count for more.

.. math:: q_k = e^{s F_k}, \quad
   \Delta = \frac{\sum_k q_k \Delta_k}{\sum_k q_k}

with the loss :math:`F_k` of the model that client k received and the strength
:math:`s` (authors, year, title, where, its equation number).
"""

import math
from collections.abc import Mapping
from typing import Unpack

from flwr.app import ArrayRecord

from flower_ext.client.half import ClientHalf, Local
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import at_least
from flower_ext.core.protocol import Config, Metrics, Reply, Round
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.options import AdditiveOptions

STRENGTH_KEY = "template-strength"
WEIGHT = "template-weight"


def template_weight(loss: float, strength: float) -> float:
    r"""Return :math:`q = e^{s F}`, for a training loop of one's own.

    Parameters
    ----------
    loss : float
        Of the received model on the client's training data, before training.
    strength : float
        :math:`s`; 0 gives all clients the weight 1.

    Examples
    --------
    >>> template_weight(3.0, strength=0.0)
    1.0
    """
    return math.exp(min(strength * loss, 50.0))


class TemplateClient(ClientHalf):
    """Measures the received model on the client's training data."""

    name = "template"

    def __init__(self) -> None:
        self._weight = 1.0

    def begin(self, local: Local) -> None:
        """Measure before the first step."""
        loss = local.mean_loss(local.train)
        self._weight = template_weight(loss, local.number(STRENGTH_KEY, 0.0))

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return the weight."""
        return {}, {WEIGHT: self._weight}


class Template(AdditiveStrategy):
    r"""Federated averaging that weighs clients by the loss of the received model.

    Against FedAvg, the weight of a client is not its number of examples but
    :math:`q_k`. With ``strength=0`` it is FedAvg with equal weights.
    Works with the client half :class:`TemplateClient`,
    or with :func:`template_weight` in a loop of one's own.

    Parameters
    ----------
    strength : float (default: 1.0)
        :math:`s \ge 0`; 0 is FedAvg with equal weights.
    **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    Train metric ``mean-weight`` is the mean of the weights. They reveal how well a
    client is served. Deviations from the paper: none known.

    Examples
    --------
    >>> strategy = Template(fraction_train=0.1, strength=0.5)
    """

    client_half = TemplateClient
    consumed_metrics = (WEIGHT,)
    declares_weight = True  # q_k depends on data: a mechanism noises it, too

    def __init__(
        self, *, strength: float = 1.0, **options: Unpack[AdditiveOptions]
    ) -> None:
        super().__init__(**options)
        self.strength = at_least("strength", strength, 0)

    def tell(self, round: Round) -> Config:
        """Tell clients the strength."""
        return {STRENGTH_KEY: self.strength}

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        r"""Return :math:`\Delta_k`, of weight :math:`q_k`."""
        return Contribution({DELTA: reply.delta(round)}, reply.number(WEIGHT))

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the mean weight of the cohort."""
        return {"mean-weight": total.weight / total.count}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Strength": self.strength, **super().settings()}
