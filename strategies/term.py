r"""TERM: tilted losses, between the mean and the worst, or the best, of them.

The tilted mean of losses is

.. math::
   \tilde R(t; w) = \frac 1t \log \sum_k p_k e^{t F_k(w)}, \qquad
   \nabla \tilde R = \sum_k a_k \nabla F_k, \quad
   a_k = \frac{p_k e^{t F_k}}{\sum_j p_j e^{t F_j}},

the mean at t = 0, the maximum for t to infinity, the minimum for t to minus infinity.
Over clients a positive t is fairness to the worst of them, over the examples of a
client a negative one is robustness to wrong labels (Li, Beirami, Sanjabi and Smith
2021, "Tilted Empirical Risk Minimization", ICLR, arXiv 2007.01162: equations 2 and 3,
and section 4.3 for the hierarchy of both).
"""

import math
import sys
from collections.abc import Mapping
from typing import Unpack

import numpy as np
import torch
from torch import Tensor

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import Batch, losses_of, num_examples
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, zeros_like
from flower_ext.core.contribution import DELTA, WEIGHT, Contribution, Total
from flower_ext.core.errors import finite, positive, refuse
from flower_ext.core.protocol import Config, Metrics, Reply, Round
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

LOSS = "term-loss"
CLIENT_TILT_KEY = "term-client-tilt"
EXAMPLE_TILT_KEY = "term-example-tilt"
# exp of this and of minus this are far from the limits of a float64, whatever the
# number of examples that they are multiplied with.
_FOLD = 128.0
_MOST = 1e6


def tilted_loss(losses: Tensor, tilt: float) -> Tensor:
    r"""Return :math:`\frac 1t \log \frac 1n \sum_i e^{t\ell_i}`, for any training loop.

    Parameters
    ----------
    losses : Tensor of shape (examples,)
        Of a batch, or of all training data.
    tilt : float
        :math:`t`. 0 is the mean.

    Returns
    -------
    Tensor
        A scalar to call ``backward()`` on. Its gradient is the mean of the losses'
        gradients with weights ``softmax(tilt * losses)``.

    Examples
    --------
    >>> losses = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64)
    >>> [round(float(tilted_loss(losses, t)), 4) for t in (-100, 0, 1, 100)]
    [0.011, 1.0, 1.309, 1.989]
    """
    if not tilt:
        return losses.mean()
    return (torch.logsumexp(tilt * losses, 0) - math.log(len(losses))) / tilt


class TERMClient(ClientHalf):
    """Tilts the losses of each batch, and tells the loss of the received model.

    The objective is the tilted loss of a batch itself, the same for each example of it,
    so that the trainer's mean is the tilted loss and not a mean of reweighted ones. Of
    batches that are not all the data it is an estimate, and a biased one: the
    normaliser is that of the batch. It is no sum over examples: DPSGD refuses it.
    """

    name = "term"

    def begin(self, local: Local) -> None:
        """Measure the received model, if clients are weighed by it."""
        self._tilt = local.number(EXAMPLE_TILT_KEY, 0.0)
        self._metrics: Metrics = {}
        if local.number(CLIENT_TILT_KEY, 0.0):
            local.session.measures()
            losses = losses_of(local.task, local.model, local.train)
            found = float(tilted_loss(losses, self._tilt)) if len(losses) else 0.0
            self._metrics = {LOSS: found}

    def objective(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the tilted loss of the batch, for each of its examples."""
        if not self._tilt:
            return losses
        return tilted_loss(losses, self._tilt).expand(num_examples(batch))

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Return the loss of the received model."""
        return {}, self._metrics


class TERM(AdditiveStrategy):
    r"""Federated averaging of tilted losses, over clients, over examples, or both.

    Against FedAvg, a client that weighs :math:`n_k` weighs
    :math:`n_k e^{t F_k}`, with :math:`F_k` the loss of the received model on its
    training data; its local objective is the tilted loss with a tilt of its own. As a
    sum: :math:`\sum_k n_k e^{tF_k}\Delta_k / \sum_k n_k e^{tF_k}` over the cohort.
    Works with the client half :class:`TERMClient`; a loop of one's own tells the loss
    as the metric ``"term-loss"`` and trains on :func:`tilted_loss`.

    Parameters
    ----------
    client_tilt : float (default: 1.0)
        :math:`t` over clients, at most 1e6 in size. 0 is FedAvg; a positive one weighs
        clients of large losses more, up to the worst one only; a negative one those of
        small losses. Losses ten times as large want a tenth of it. The paper tries -5
        to 10.
    example_tilt : float (default: 0.0)
        :math:`\tau` over the examples of a client; 0 is the plain mean. With both, F_k
        is the client's tilted loss (the paper's hierarchy); where they are equal, the
        objective is the tilted loss over all examples of all clients.
    loss_cap : float, optional
        :math:`M > 0`. A client's loss counts as one from 0 to this: who claims an
        absurd loss does not get all the weight. A mechanism needs one.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        With a mechanism and a ``client_tilt``, if ``loss_cap`` is not given.

    Notes
    -----
    Weights neither overflow nor vanish, whatever the losses are: terms are added up by
    the nearest multiple of 128 to :math:`tF_k`, times what is left of the exponential,
    and the sums are put together by the differences of these multiples. The result does
    not depend on how clients are packed. There is one sum for each multiple that
    occurs, which is one while :math:`|t F_k| < 64`.

    The weights are normalised over the cohort. Where only a part of the clients takes
    part, their expectation is not :math:`a_k`; the paper's estimate for batches, a
    moving average of the normaliser, would be a change of the server's step size.

    A loss that is NaN or infinite drops the reply; a negative one is as good as any. A
    client without examples has no weight.

    **Privacy.** A client tells its loss: how well the model fits it. Under a mechanism
    the weight is :math:`e^{tF_k - \max(0, tM)} \le 1`, clipped and noised with the
    change, times 0.1 (the mechanism's ``scales={"weight": ...}`` says otherwise);
    ``num-examples`` counts for nothing.

    Metrics: ``tilted-loss``, of the model that the cohort received.

    Examples
    --------
    >>> strategy = TERM(client_tilt=2.0, fraction_train=0.1)
    """

    client_half = TERMClient
    drop_in = DropIn(
        metrics={LOSS: "received_loss"},
        fill_in="received_loss: of the received model on the client's training data, "
        "before training\n"
        "with an example_tilt it is tilted_loss(losses, example_tilt), and the loss "
        "that is trained on as well",
    )
    consumed_metrics = (LOSS,)
    # A change of the usual clipping norm, 1 or less, shall outweigh the weight.
    scales = {WEIGHT: 0.1}

    def __init__(
        self,
        *flowers: object,
        client_tilt: float = 1.0,
        example_tilt: float = 0.0,
        loss_cap: float | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        self.client_tilt = _tilt("client_tilt", client_tilt)
        self.example_tilt = _tilt("example_tilt", example_tilt)
        if loss_cap is not None:
            positive("loss_cap", loss_cap)
        elif self.client_tilt and options.get("mechanism") is not None:
            cause = "without it the weights have no bound"
            refuse("loss_cap", None, "given with a mechanism", cause)
        self.loss_cap = loss_cap
        self.declares_weight = self.client_tilt != 0
        super().__init__(*flowers, **options)

    def tell(self, round: Round) -> Config:
        """Tell the tilts to those who train."""
        return {
            CLIENT_TILT_KEY: self.client_tilt,
            EXAMPLE_TILT_KEY: self.example_tilt,
        }

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change, with a weight of its own by the loss."""
        delta = reply.delta(round)
        if not self.client_tilt:
            return Contribution({DELTA: delta})
        exponent = self.client_tilt * self._loss(reply)
        if round.private:
            weight = math.exp(exponent - self._highest) if reply.num_examples else 0.0
            return Contribution({DELTA: delta}, weight)
        fold, rest = _folded(exponent)
        weight = reply.num_examples * math.exp(rest)
        return Contribution({part(fold): delta}, weights={part(fold): weight})

    def _loss(self, reply: Reply) -> float:
        found = reply.number(LOSS, -sys.float_info.max)
        return found if self.loss_cap is None else min(max(found, 0.0), self.loss_cap)

    @property
    def _highest(self) -> float:
        """The largest exponent of a client, where losses have a cap."""
        return max(0.0, self.client_tilt * (self.loss_cap or 0.0))

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change, of no weight."""
        if self.mechanism or not self.client_tilt:
            return super().zero(sent)
        return Contribution({part(0): zeros_like(sent)}, weights={part(0): 0.0})

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the weighted mean of the changes."""
        shares = self._shares(total)
        if len(shares) < 2:
            return total.mean(next(iter(shares), DELTA))
        means = {name: total.mean(name) for name in shares}
        first = next(iter(means.values()))
        return {
            key: np.asarray(sum(s * means[name][key] for name, s in shares.items()))
            for key in first
        }

    def _shares(self, total: Total) -> dict[str, float]:
        """Return the share of each sum in the weight of all, of those that have any."""
        logs = self._log_weights(total)
        whole = _log_sum(logs)
        return {name: math.exp(x - whole) for name, x in logs.items()}

    def _log_weights(self, total: Total) -> dict[str, float]:
        r"""Return the logarithm of :math:`\sum n_k e^{tF_k}` over each of the sums."""
        if not total.weights:
            top = self._highest
            return {DELTA: math.log(total.weight) + top} if total.weight > 0 else {}
        return {
            name: math.log(weight) + _FOLD * int(name.removeprefix(part("")))
            for name, weight in total.weights.items()
            if weight > 0
        }

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the tilted loss of the cohort."""
        logs = self._log_weights(total)
        base = total.count if round.private else total.weight
        if not self.client_tilt or not logs or not base > 0:
            return {}
        found = _log_sum(logs) - math.log(base)
        return {"tilted-loss": found / self.client_tilt}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Tilt over clients": self.client_tilt,
            "Tilt over examples": self.example_tilt,
            "Cap of losses": "none" if self.loss_cap is None else self.loss_cap,
            **super().settings(),
        }


def part(fold: int | str) -> str:
    """Return the name of the sum of the terms whose weights were divided alike."""
    return f"{DELTA}-{fold}"


def _folded(exponent: float) -> tuple[int, float]:
    fold = round(exponent / _FOLD)
    return fold, exponent - fold * _FOLD


def _log_sum(logs: Mapping[str, float]) -> float:
    return float(np.logaddexp.reduce([*logs.values()]))


def _tilt(name: str, value: float) -> float:
    if abs(finite(name, value)) > _MOST:
        cause = "losses that differ by 1e-3 are e^1000 apart then"
        refuse(name, value, f"at most {_MOST:g} in size", cause)
    return float(value)
