"""Local training: every client learns alone, and nothing of it travels.

The baseline that a federation has to beat, for each client. It is what personal methods
become where they share nothing (Wu et al. 2022, "Motley: benchmarking heterogeneity and
personalization in federated learning", arXiv 2206.09262).
"""

from typing import Unpack

from flwr.app import ArrayRecord, Context, Message

from flower_ext.client.encoding import Mod
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.mods import Answer, asked
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays
from flower_ext.core.contribution import Contribution, Total
from flower_ext.core.errors import refuse
from flower_ext.core.protocol import Reply, Round
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.personal import PersonalStrategy


class LocalOnlyClient(ClientHalf):
    """Trains a model of the client's own, and keeps it.

    The first one is the model that the client received when it was first asked.
    """

    name = "local-only"
    keeps = True
    post_processing = True  # nothing is sent, and what is kept is the trained model

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Begin with the client's own model."""
        return local.personal.arrays("model", like=arrays, first=arrays)

    def after_training(self, local: Local) -> None:
        """Keep it."""
        local.personal.save(model=local.end)

    def model_to_send(self, local: Local) -> Tensors:
        """Send no array."""
        return {}


def alone() -> Mod:
    """Return the mod that makes a loop of one's own that of :class:`LocalOnly`.

    For ``ClientApp(mods=[alone()])``, or ``mods=[packed, alone()]``. The app's
    functions are given the client's own model in the place of the received one, and
    what they train is kept. For other strategies it does nothing.
    """

    def mod(message: Message, context: Context, call_next: Answer) -> Message:
        if not (found := asked(LocalOnlyClient.name, message, context, call_next)):
            return call_next(message, context)
        client, _ = found
        if client.phase == "evaluate":
            return client.evaluated(compares=False)
        reply = client.answer(client.kept)
        if reply.has_content():
            client.keep(reply)
            key, _ = client.model_of(reply)
            reply.content[key] = ArrayRecord()
        return reply

    return mod


class LocalOnly(PersonalStrategy):
    """Local training of every client, with nothing averaged.

    Against FedAvg: clients send no array, and the server's model stays as it is. Works
    with the client half :class:`LocalOnlyClient`, or with the mod :func:`alone` for a
    training loop of one's own.

    Parameters
    ----------
    *flowers, **options
        Sampler and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If there is a mechanism: nothing is sent that it could protect. Clients that are
        to protect their examples from whoever sees their models train with ``DPSGD``.

    Notes
    -----
    Revealed are the numbers of examples and the training losses, as with FedAvg, and
    nothing else. A client's first model is the server's, which travels in every round,
    so that a client whose state was lost can begin anew. For the metrics see
    :class:`~flower_ext.server.personal.PersonalStrategy`; a client that was never asked
    to train is evaluated with the server's model.

    Examples
    --------
    >>> strategy = LocalOnly(fraction_train=0.1)
    """

    client_half = LocalOnlyClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.local_only import alone",
        mod="alone()",
        silent=True,
        moves=False,
    )

    def __init__(self, *flowers: object, **options: Unpack[AdditiveOptions]) -> None:
        if options.get("mechanism") is not None:
            refuse(
                "mechanism",
                options["mechanism"],
                "None",
                "nothing is sent that it could protect; silos train with DPSGD",
            )
        super().__init__(*flowers, **options)

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return nothing."""
        return Contribution({})

    def update(self, total: Total, round: Round) -> Arrays:
        """Move nothing: an optimizer may move a model that no client moves."""
        return {}
