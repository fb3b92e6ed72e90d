r"""FedRep: clients first fit a head of their own, then move the body they share.

Collins, Hassani, Mokhtari and Shakkottai 2021, "Exploiting shared representations for
personalized federated learning", ICML, arXiv 2102.07078.
"""

from dataclasses import replace
from typing import Unpack

from flower_ext.client.half import Local, LocalSettings
from flower_ext.client.parts import PART, PartlyPersonalClient, freeze
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import whole
from flower_ext.core.parts import Filter
from flower_ext.core.protocol import Config, Round
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.parts import PartlyPersonal

EPOCHS_KEY = "fedrep-head-epochs"


class FedRepClient(PartlyPersonalClient):
    """Trains the head under a fixed body, and then the body under that head.

    Either is fixed with all its arrays, BatchNorm's statistics too.
    """

    name = "fedrep"
    num_trainings = 2
    post_processing = True  # sent and kept are what is trained

    def __init__(self) -> None:
        self._head: Tensors = {}

    def planned_steps(self, local: Local) -> int:
        """Return the steps of both phases."""
        head = replace(local, settings=_of_head(local))
        return head.num_steps + local.num_steps

    def begin(self, local: Local) -> None:
        """Train the head, and fix it."""
        own = set(self.personal(local))
        head = local.with_model(local.start)
        head.settings = _of_head(local)
        freeze(head.model, lambda name: name not in own)
        head.fit()
        self._head = {name: x for name, x in head.end.items() if name in own}
        local.load({**local.start, **self._head})
        freeze(local.model, own.__contains__)

    def after_training(self, local: Local) -> None:
        """Keep the head."""
        local.personal.save(**{PART: self._head})


def _of_head(local: Local) -> LocalSettings:
    epochs = int(local.number(EPOCHS_KEY, 1))
    return replace(local.settings, local_epochs=epochs, local_steps=0)


class FedRep(PartlyPersonal):
    r"""Federated averaging of a body, each client's best head on it found first.

    Against FedAvg, clients keep a head :math:`v_k` of their own, which they train for
    :math:`E_h` epochs under the body as it came; then they train the body under the new
    head, and send its change:

    .. math::
       v_k \leftarrow \mathrm{SGD}_v(v_k; u), \qquad
       u_k \leftarrow \mathrm{SGD}_u(u; v_k), \qquad
       u \leftarrow u + \frac{\sum_k n_k (u_k - u)}{\sum_k n_k}.

    Works with the client half :class:`FedRepClient`, or with
    :func:`~flower_ext.client.parts.freeze` and the mod
    :func:`~flower_ext.client.parts.keep_at_home` in a loop of one's own.

    Parameters
    ----------
    personal : str, sequence of str or callable, optional
        The head: patterns of names such as ``"head.*"``, as of :mod:`fnmatch`, or a
        function ``name -> bool``. By default the model's last layer.
    head_epochs : int (default: 10)
        :math:`E_h \ge 0`. 0 leaves all heads as they are in the initial model. The
        body is trained for the clients' ``local-epochs``, or ``local-steps``.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If a pattern matches no array, if the filter matches all, or if one tensor is
        both shared and personal; in ``configure_train``, before a client is asked. At
        the client, before it has trained, if head or body has nothing to train.

    Notes
    -----
    A round costs the steps of both phases, and their gradients only of one part each.
    ``train-loss`` is that of the body's. Personal arrays never travel to the server; to
    a client they do until it has first answered, and in every round where a mechanism
    keeps secret who takes part. A client that was never asked to train has the head
    of the initial model, and is evaluated with that: in the paper such a client trains
    a head first. What is shared reveals as much as with FedAvg; under a mechanism it
    alone is clipped and noised. Under ``DPSGD`` both phases are private,
    and their steps are charged together.

    Examples
    --------
    >>> strategy = FedRep(personal="head.*", head_epochs=5, fraction_train=0.1)
    """

    client_half = FedRepClient
    drop_in = DropIn(
        imports="from flower_ext.client.parts import freeze, keep_at_home",
        mod="keep_at_home()",
        fill_in='with freeze(model, "body.*"): train the head\n'
        'with freeze(model, "head.*"): train the body',
    )

    def __init__(
        self,
        *flowers: object,
        personal: Filter = None,
        head_epochs: int = 10,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, personal=personal, **options)
        self.head_epochs = whole("head_epochs", head_epochs, 0, "0 trains no head")

    def tell(self, round: Round) -> Config:
        """Tell clients how long they train the head."""
        return {**super().tell(round), EPOCHS_KEY: self.head_epochs}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Epochs of the head": self.head_epochs, **super().settings()}
