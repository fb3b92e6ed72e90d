r"""HeteroFL: clients of different strength train slices of one model.

A small client cannot hold the large model, and a federation of small models for all
wastes what the large clients can do. In HeteroFL a client of width r holds the first
share r of the units of every hidden layer: the small model is the corner of the large
one, and each number is averaged over the clients that hold it (Diao, Ding and Tarokh
2021, "HeteroFL: computation and communication efficient federated learning for
heterogeneous clients", ICLR, arXiv 2010.01264).
"""

from collections.abc import Callable, Sequence
from logging import WARNING
from typing import Unpack

import numpy as np
import torch
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.submodels import SubmodelClient
from flower_ext.core.arrays import Arrays
from flower_ext.core.contribution import DELTA, Contribution, Total, no_change
from flower_ext.core.errors import probability, refuse
from flower_ext.core.protocol import Metrics, Reply, Round
from flower_ext.core.submodels import block
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.submodels import Submodels

# The sum of the weights of the clients of each tier.
TIERS = "tier-weights"


class Scaler(nn.Module):
    """Divides by the width in training, as if the left-out units were there.

    It follows every sliced layer, before its normalisation: a layer that sees half of
    the units sums half as much (section 3 of the paper). In evaluation it changes
    nothing, so that a small model without normalisation layers is then another than the
    one that was trained; with them it is the same.

    Parameters
    ----------
    width : float
        In (0, 1]; 1 changes nothing.

    Examples
    --------
    >>> Scaler(0.5)(torch.ones(1)), Scaler(0.5).eval()(torch.ones(1))
    (tensor([2.]), tensor([1.]))
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        self.width = probability("width", width)

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled activations."""
        return x / self.width if self.training else x


class HeteroFLClient(SubmodelClient):
    """Trains a model of the width that the server says, and sends it."""

    name = "heterofl"


class HeteroFL(Submodels):
    r"""Federated averaging of slices.

    Against FedAvg a client k receives, trains and sends only its slice
    :math:`\Theta_k`, the leading block of every array, and each number of the model
    moves by the mean over the clients that hold it,

    .. math::
       \theta_i \leftarrow \theta_i +
       \frac{\sum_{k:\, i \in \Theta_k} n_k \Delta_{k, i}}
       {\sum_{k:\, i \in \Theta_k} n_k},

    (equations 2 to 4, in which all weigh the same). A number that nobody in the cohort
    holds stays. Which arrays are sliced, and where, is seen from the shapes of the
    small models: an axis that is as long as in the large model, such as that of the
    classes, is whole. If all widths are 1 it is FedAvg. Works with the client half
    :class:`HeteroFLClient`, for which ``Task.model`` reads ``run_config["width"]``.

    Parameters
    ----------
    model : callable
        ``width -> model``, a torch module, or arrays by name, of which only the shapes
        are looked at. It need not divide layers evenly: how many units a width has is
        what the model says.
    widths : sequence of float
        In (0, 1]: the share of the hidden units that the clients of each tier hold. The
        paper has 1, 1/2, 1/4, 1/8 and 1/16.
    width_of : callable, optional
        ``client -> width``, one of ``widths``, of the client at that place; by default
        clients have them in turns, ``widths[client % len(widths)]``. Where clients are
        in other processes it must be picklable, as a function of a module is.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        Before a round, if a small model has no slices of the initial arrays, or if a
        client's width is none of ``widths``.

    Notes
    -----
    Train metrics ``tier-weight-0`` and so on are the examples of each tier in the
    round; a tier may have no clients. Evaluations report each metric for each width,
    such as ``accuracy-width-0.5``. :meth:`slice` is a model of a smaller width, for the
    server's own evaluation, or to ship.

    With a server optimizer that has momentum, numbers that nobody holds in a round
    move on by the momentum of earlier rounds.

    **Deviation from the paper.** Clients weigh by their examples, as in FedAvg;
    ``equal_weights = True`` of a subclass is the paper's mean. :class:`Scaler` is
    there, to be put into the model. Statistics of BatchNorm are averaged as all
    arrays: the paper's static BatchNorm, which keeps none in training and collects them
    from the clients at the end, is ``BatchNorm2d(..., track_running_stats=False)``
    without the end; GroupNorm needs neither. The masked cross-entropy, which leaves out
    the classes that a client has not, is a line of the task's loss. Widths do not
    change from round to round.

    **Privacy.** Under a mechanism the change, with zeros outside of its slice, is
    clipped as one vector, and all clients weigh the same. The divisor of a number is
    the planned cohort times the share of all clients that hold it, which is no secret
    and needs no noise.

    Examples
    --------
    >>> strategy = HeteroFL(
    ...     model=lambda width: nn.Linear(3, int(8 * width)), widths=(1.0, 0.5)
    ... )
    """

    client_half = HeteroFLClient
    drop_in = DropIn(
        fill_in="make Net(width) of the width in the message's configuration, and\n"
        "not the whole one; on the server: HeteroFL(model=Net, widths=(1.0, 0.5))",
        written="model=Net, widths=(1.0, 0.5)",
    )

    def __init__(
        self,
        *flowers: object,
        model: Callable[[float], object],
        widths: Sequence[float],
        width_of: Callable[[int], float] | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        with torch.random.fork_rng(devices=[]):  # models begin at random
            super().__init__(
                *flowers, model=model, widths=widths, width_of=width_of, **options
            )
        self._warned = False

    def slice(self, arrays: Arrays, width: float) -> Arrays:
        """Return the part of a model that clients of one of the widths hold."""
        if width not in self.widths:
            refuse("width", width, f"one of widths={self.widths}")
        return self.slices(self.widths.index(width), arrays).down(arrays)

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of the slice, and zeros around it."""
        tier = self.tier(reply.client)
        slices = self.slices(tier, round.sent)
        change = reply.change(round, start=slices.down(round.sent)).arrays
        large = slices.up(change)
        if round.private:
            return Contribution({DELTA: large})
        examples = reply.num_examples
        weight = float(examples > 0) if self.equal_weights else examples
        return Contribution(
            {DELTA: large}, scalars={TIERS: weight * np.eye(len(self.widths))[tier]}
        )

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change, of no tier."""
        tiers = {} if self.mechanism else {TIERS: (len(self.widths),)}
        return no_change(sent, tiers, weighs=False)

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the mean change of every number over those that hold it."""
        weights = self._weights(total, round)
        slices = [self.slices(t, round.sent).small for t in range(len(weights))]
        direction = {}
        for name, x in total.take(DELTA).items():
            held = np.zeros(x.shape)
            for weight, shapes in zip(weights, slices, strict=True):
                held[block(shapes[name])] += weight
            direction[name] = np.divide(x, held, out=np.zeros(x.shape), where=held > 0)
        return direction

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the weight of each tier."""
        self._warn_of_untrained(round)
        if round.private:
            return {}
        tiers = total.scalars[TIERS]
        return {f"tier-weight-{tier}": float(x) for tier, x in enumerate(tiers)}

    def _weights(self, total: Total, round: Round) -> Sequence[float]:
        """Return the weight of each tier; under a mechanism the planned one."""
        if not round.private:
            return [float(x) for x in total.scalars[TIERS]]
        return [float(x) for x in total.weight * self.shares(round.population)]

    def _warn_of_untrained(self, round: Round) -> None:
        """Warn once where the widths leave out a part of the model."""
        if self._warned:
            return
        self._warned = True
        tiers = [self.slices(t, round.sent).small for t in range(len(self.widths))]
        left = [
            name
            for name, x in round.sent.items()
            if not any(shapes[name] == x.shape for shapes in tiers)
        ]
        if left:
            log(WARNING, _UNTRAINED, len(left), left[0], self.widths)


_UNTRAINED = (
    "%s arrays of the model, such as %r, are larger than in the model of any of "
    "widths=%s: what is outside of these stays as it was initialised"
)
