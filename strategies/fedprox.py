r"""FedProx: clients that are held back from moving far from the received model.

A client minimises

.. math:: F_k(w) + \frac{\mu}{2} \|w - w^t\|^2

over its local steps (equation 2 of Li, Sahu, Zaheer, Sanjabi, Talwalkar and Smith 2020,
"Federated optimization in heterogeneous networks", MLSys, arXiv 1812.06127). The server
averages as FedAvg does.
"""

from collections.abc import Mapping
from typing import Unpack

from flwr.app import Context, Message
from torch import Tensor, nn

from flower_ext.client.encoding import Mod
from flower_ext.client.half import ClientHalf, Local, Proximal
from flower_ext.client.mods import Answer, add_metrics, drawn
from flower_ext.client.tensors import Tensors
from flower_ext.core.contribution import Contribution
from flower_ext.core.errors import at_least
from flower_ext.core.protocol import (
    Config,
    Metrics,
    Reply,
    Round,
    model_in,
)
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

# As Flower's own strategy calls it.
MU_KEY = "proximal-mu"


class FedProxClient(ClientHalf):
    """Adds the proximal term to what is minimised.

    It serves every strategy that tells ``"proximal-mu"`` and names no other half:
    Flower's own :class:`~flwr.serverapp.strategy.FedProx`, and those with
    ``train_config=ConfigRecord({"proximal-mu": 0.1})``. With 0 it is plain local
    training. Under DP-SGD the term is added after clipping and noise: it costs nothing.
    """

    name = "fedprox"
    asked_by = MU_KEY
    post_processing = True  # the term knows nothing but the received model

    def begin(self, local: Local) -> None:
        """Read the strength; refuse one with which steps would lead away."""
        self._term = Proximal(local.start, local.number(MU_KEY, 0.0), MU_KEY)
        self._term.require_stable(local)

    def regularizer(self, model: nn.Module) -> Tensor | None:
        """Return the proximal term."""
        return self._term(model)

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Say with which strength the model was trained."""
        return {}, {MU_KEY: self._term.strength}


def proximal() -> Mod:
    """Return the mod that adds the term to a training loop of one's own.

    For ``ClientApp(mods=[proximal()])``, with this FedProx or Flower's. The term's
    gradient is added to each step of a torch optimizer.
    """

    def mod(message: Message, context: Context, call_next: Answer) -> Message:
        content = message.content
        told = [x[MU_KEY] for x in content.config_records.values() if MU_KEY in x]
        trains = message.metadata.message_type.partition(".")[0] == "train"
        if not told or not trains:
            return call_next(message, context)
        received, strength = model_in(content), at_least(MU_KEY, told[0], 0)
        with drawn(received, received, strength, MU_KEY) as pull:
            reply = call_next(message, context)
        if reply.has_content():
            pull.require_steps(received, model_in(reply.content))
            add_metrics(reply, {MU_KEY: strength})
        return reply

    return mod


class FedProx(AdditiveStrategy):
    r"""Federated averaging of clients with a proximal term.

    Against FedAvg: clients are told :math:`\mu`. Works with the client half
    :class:`FedProxClient`, or with the mod :func:`proximal` for a loop of one's own.
    Both serve Flower's strategy of the same name as well, which has no server
    optimizers, mechanisms or codecs, and does not notice clients without the term.

    Parameters
    ----------
    proximal_mu : float (default: 0.1)
        :math:`\mu \ge 0`. 0 is FedAvg; the larger, the less a client moves. SGD needs
        :math:`\mu < 2 / \text{learning rate}`. The paper tries 0.001, 0.01, 0.1 and 1.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        At the client, before it has trained, if :math:`\mu` is too large for its
        learning rate.

    Notes
    -----
    What travels and what it reveals is as with FedAvg. Clients are weighed by their
    examples; the paper draws them with these probabilities and averages them alike. The
    term makes clients drift less, and the bias of the average smaller; it does not
    remove it, as :class:`~flower_ext.strategies.Scaffold` does.

    Examples
    --------
    >>> strategy = FedProx(proximal_mu=0.01, fraction_train=0.1)
    """

    client_half = FedProxClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.fedprox import proximal", mod="proximal()"
    )
    consumed_metrics = (MU_KEY,)

    def __init__(
        self,
        *flowers: object,
        proximal_mu: float = 0.1,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.proximal_mu = at_least("proximal_mu", proximal_mu, 0)

    def tell(self, round: Round) -> Config:
        """Tell the strength to those who train."""
        return {MU_KEY: self.proximal_mu}

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of a client that had the term, and says so."""
        reply.number(MU_KEY)
        return super().contribution(reply, round)

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Proximal mu": self.proximal_mu, **super().settings()}
