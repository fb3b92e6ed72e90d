r"""FedBN: every client keeps its own normalisation layers.

Li, Jiang, Zhang, Kamp and Dou 2021, "FedBN: federated learning on non-IID features via
local batch normalization", ICLR, arXiv 2102.07623.
"""

from typing import Unpack

from torch import nn

from flower_ext.client.parts import PartlyPersonalClient, normalization_arrays
from flower_ext.core.errors import refuse
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.parts import PartlyPersonal


class FedBNClient(PartlyPersonalClient):
    """Trains the model, and keeps its normalisation layers."""

    name = "fedbn"


class FedBN(PartlyPersonal):
    r"""Federated averaging of all but the normalisation layers.

    Clients whose inputs differ in scale or offset, such as images of other cameras,
    each learn to normalise their own. Against FedAvg the arrays of these layers,
    :math:`v_k`, stay with the client: scale and offset, and BatchNorm's running
    statistics and counters, too. The others are averaged as ever,
    :math:`u \leftarrow u + \sum_k n_k (u_k - u) / \sum_k n_k`. Works with the client
    half :class:`FedBNClient`, or with the mod
    :func:`~flower_ext.client.parts.keep_at_home` around a loop of one's own.

    Parameters
    ----------
    model : Module
        A model like the clients', whose layers are looked at, see
        :func:`~flower_ext.client.parts.normalization_arrays`; its values are not used.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If the model has no normalisation layer with arrays, or nothing else.

    Notes
    -----
    A client that was never asked to train, also one that evaluates only, normalises as
    the server's initial model does, which is the weak point of the method. What a
    client keeps never travels to the server; what it shares reveals as much as with
    FedAvg. Under a mechanism statistics that stay at home need no noise. ``DPSGD``
    takes no BatchNorm; with GroupNorm or LayerNorm it works.

    The paper speaks of BatchNorm. Other normalisation layers, which have no statistics,
    stay at home here as well.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    >>> strategy = FedBN(model=net, fraction_train=0.1)
    """

    client_half = FedBNClient
    drop_in = DropIn(
        imports="from flower_ext.client.parts import keep_at_home",
        mod="keep_at_home()",
        fill_in="on the server: FedBN(model=Net()), of a Net with normalisation layers",
        written="model=Net()",
    )

    def __init__(
        self, *flowers: object, model: nn.Module, **options: Unpack[AdditiveOptions]
    ) -> None:
        if not isinstance(model, nn.Module):
            refuse("model", model, "a torch module", "an instance, such as Net()")
        own = frozenset(normalization_arrays(model))
        if not own:
            refuse(
                "model",
                type(model).__name__,
                "one with normalisation layers that have arrays",
                "of other layers choose yourself, with FedPer(personal=...)",
            )
        # Of those that travel: a model may send its adapters only.
        super().__init__(*flowers, personal=own.__contains__, **options)

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {**super().settings(), "Personal arrays": "normalisation layers"}
