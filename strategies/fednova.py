r"""FedNova: what a client moved is divided by how much it worked.

Where clients take different numbers of steps, FedAvg minimises another objective than
the one that was asked for: a client that takes ten times the steps counts about ten
times. FedNova averages moves per unit of work, and goes as far as the clients did in
the mean (Wang, Liu, Liang, Joshi and Poor 2020, "Tackling the objective inconsistency
problem in heterogeneous federated optimization", NeurIPS, arXiv 2007.07481).
"""

from collections import Counter
from collections.abc import Mapping
from typing import Unpack

import torch
from torch import nn

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.loops import before_steps
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, scale
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import fraction, positive, refuse, whole
from flower_ext.core.protocol import Metrics, Reply, Round
from flower_ext.core.replies import MalformedReply
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

WORK = "local-work"


def local_work(num_steps: int, momentum: float = 0.0) -> float:
    r"""Return :math:`\|a\|_1`, the gradients that some steps of SGD add up.

    With momentum :math:`\beta` the gradient of step t counts
    :math:`a_t = (1 - \beta^{\tau - t + 1}) / (1 - \beta)` times in the whole move, and

    .. math::
       \|a\|_1 = \frac{1}{1 - \beta}
       \left(\tau - \frac{\beta (1 - \beta^\tau)}{1 - \beta}\right).

    Parameters
    ----------
    num_steps : int
        :math:`\tau`.
    momentum : float
        :math:`\beta` in [0, 1).

    Examples
    --------
    >>> local_work(10), local_work(2, momentum=0.5)
    (10.0, 2.5)
    """
    whole("num_steps", num_steps, 0)
    if fraction("momentum", momentum) == 1:
        refuse("momentum", momentum, "< 1")
    rest = momentum * (1 - momentum**num_steps) / (1 - momentum)
    return (num_steps - rest) / (1 - momentum)


class FedNovaClient(ClientHalf):
    """Says how much it worked.

    Its optimizer must be SGD, with or without momentum: what the steps of others add up
    is not known. A client without examples has not worked.
    """

    name = "fednova"
    # It tells the number of its steps, which is made of settings and of the number of
    # examples, which is sent in any case.
    post_processing = True
    _momentum = 0.0

    def optimizer(self, local: Local) -> torch.optim.Optimizer:
        """Return the optimizer, if it is one whose work is known."""
        found = super().optimizer(local)
        self._momentum = _momentum_of(found)
        return found

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Return the work."""
        return {}, {WORK: local_work(local.num_steps, self._momentum)}


def _momentum_of(optimizer: torch.optim.Optimizer) -> float:
    """Return the momentum of an optimizer, if it is one whose work is known."""
    groups = optimizer.param_groups
    momenta = {float(group.get("momentum", 0)) for group in groups}
    plain = type(optimizer) is torch.optim.SGD and not any(
        group["nesterov"] or group["dampening"] for group in groups
    )
    if not plain or len(momenta) > 1:
        refuse(
            "optimizer",
            type(optimizer),
            "torch.optim.SGD with one momentum, not Nesterov's, and no dampening",
            "FedNova divides by what the steps add up, which it knows of these",
        )
    return momenta.pop()


class Work:
    """Counts the steps of a training loop of one's own.

    One line before the training, ``work = Work(model)``, and ``"local-work":
    work.done()`` in the reply's metrics.

    Parameters
    ----------
    model : torch.nn.Module
        What the loop trains.

    Raises
    ------
    ValueError
        When the loop takes a step of another optimizer than SGD.
    """

    def __init__(self, model: nn.Module) -> None:
        self._steps: Counter[str] = Counter()
        self._momentum = 0.0
        before_steps(model, self._count)

    def _count(
        self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> None:
        self._momentum = _momentum_of(optimizer)
        self._steps.update(list(parameters))

    def done(self, momentum: float | None = None) -> float:
        """Return the work so far, by default of the momentum of the last step."""
        beta = self._momentum if momentum is None else momentum
        return local_work(max(self._steps.values(), default=0), beta)


class FedNova(AdditiveStrategy):
    r"""Federated averaging of moves that are normalised by the work behind them.

    Against FedAvg, with :math:`p_k` the share of the examples and :math:`\tau_k` the
    work of client k (its steps; :func:`local_work` with momentum), the direction is

    .. math::
       \tau_{\text{eff}} \sum_k p_k \frac{\Delta_k}{\tau_k}, \qquad
       \tau_{\text{eff}} = \sum_k p_k \tau_k

    (equation 10 and Algorithm 1). Where all work the same it is FedAvg. Works with the
    client half :class:`FedNovaClient`, or with :class:`Work` in a loop of one's own.

    Parameters
    ----------
    effective_work : float, optional
        :math:`\tau_{\text{eff}} > 0` for all rounds; by default the clients' mean. It
        is a step size of the server, and 1 follows the mean move of a single step.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        With a mechanism, if ``effective_work`` is not given; at the client, for another
        optimizer than SGD.

    Notes
    -----
    FedNova gives each client the say that it was meant to have. It does not undo the
    drift of many steps: where clients' curvatures differ, the solution still depends on
    the number of steps, as FedAvg's with equal steps does.

    All clients must have one learning rate. BatchNorm's statistics and integers are
    averaged as in FedAvg.

    **Privacy.** A client tells how much it worked, which says about how many examples
    it has, as FedAvg does. Under a mechanism all clients weigh the same,
    :math:`\tau_{\text{eff}} \Delta_k / \tau_k` is what is clipped, and how much a
    client worked is part of nothing else: a mean of it would take room from the norm,
    and a given ``effective_work`` needs none. Under ``DPSGD`` it costs nothing.

    Examples
    --------
    >>> strategy = FedNova(fraction_train=0.1)
    """

    client_half = FedNovaClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.fednova import Work",
        before="work = Work({model})",
        metrics={WORK: "work.done()"},
    )
    consumed_metrics = (WORK,)

    def __init__(
        self,
        *flowers: object,
        effective_work: float | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        if effective_work is None and options.get("mechanism") is not None:
            cause = "the clients' mean would have to be protected, too"
            refuse("effective_work", None, "given with a mechanism", cause)
        super().__init__(*flowers, **options)
        self.effective_work = effective_work
        if effective_work is None:
            self.scalars = {WORK: ()}
        else:
            self.effective_work = positive("effective_work", effective_work)

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the move per unit of work, and the work; nothing without a step."""
        work, delta = reply.number(WORK), reply.delta(round)
        if work < 1:
            if round.upload is None and any(x.numpy().any() for x in delta.values()):
                raise MalformedReply(
                    f"metric {WORK!r}={work} of a model that was trained: "
                    "Work(model) comes before the training, by a torch optimizer"
                )
            return Contribution({DELTA: {}})
        factor = (self.effective_work or 1.0) / work
        change = {
            name: scale(x, factor) if name in round.parameters else x
            for name, x in delta.items()
        }
        if self.effective_work is not None:
            return Contribution({DELTA: change})
        return Contribution({DELTA: change}, scalars={WORK: reply.num_examples * work})

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the mean move per unit of work times the work."""
        work, mean = self._work_of(total), total.mean()
        if self.effective_work is not None:
            return mean
        return {n: x * work if n in round.parameters else x for n, x in mean.items()}

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the effective work."""
        return {"effective-work": self._work_of(total)}

    def _work_of(self, total: Total) -> float:
        if self.effective_work is not None:
            return self.effective_work
        return float(total.scalars[WORK]) / total.weight if total.weight else 0.0

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        work = self.effective_work
        shown = "the clients' mean" if work is None else work
        return {"Effective work": shown, **super().settings()}
