r"""FedBABU: a body that is trained under a head that nobody trains, until it is used.

Oh, Kim and Yun 2022, "FedBABU: toward enhanced representation for federated image
classification", ICLR, arXiv 2106.06042.
"""

from collections.abc import Hashable
from typing import Unpack

from flower_ext.client.half import Local
from flower_ext.client.parts import PartlyPersonalClient, freeze
from flower_ext.client.personalization import fine_tuned
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import one_of, whole
from flower_ext.core.parts import Filter
from flower_ext.core.protocol import Config, Round
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.parts import PartlyPersonal

EPOCHS_KEY = "fedbabu-tuning-epochs"
TUNES_KEY = "fedbabu-tunes"
ALL, HEAD = "all", "head"


class FedBABUClient(PartlyPersonalClient):
    """Trains the body under the fixed head; fine-tunes a copy when it evaluates.

    It keeps nothing: the head is the initial one in every round.
    """

    name = "fedbabu"
    compares = True
    keeps = False
    post_processing = True  # sent is the trained body, and nothing is kept

    def begin(self, local: Local) -> None:
        """Fix the head."""
        freeze(local.model, self.personal(local))

    def after_training(self, local: Local) -> None:
        """Keep nothing."""

    def model_to_evaluate(self, local: Local) -> Tensors:
        """Return a copy of the received model, fine-tuned."""
        own = set(self.personal(local))
        if local.config.get(TUNES_KEY) == HEAD:
            freeze(local.model, lambda name: name not in own)
        epochs = int(local.number(EPOCHS_KEY, 0))
        return fine_tuned(local, epochs=epochs).end


class FedBABU(PartlyPersonal):
    r"""Federated averaging of a body under one random head, fine-tuned by each client.

    Heads that are trained on skewed labels pull the bodies apart. Against FedAvg, the
    head :math:`v_0` gets no gradient while clients train: it is the initial model's in
    every round and at all clients, and only the body :math:`u` learns. Whoever uses the
    model fine-tunes it first, on data of its own:

    .. math::
       u_k \leftarrow \mathrm{SGD}_u(u; v_0), \qquad
       u \leftarrow u + \frac{\sum_k n_k (u_k - u)}{\sum_k n_k}, \qquad
       (\hat u_k, \hat v_k) = \mathrm{SGD}(u, v_0).

    Works with the client half :class:`FedBABUClient`, or with
    :func:`~flower_ext.client.parts.freeze` in a loop of one's own.

    Parameters
    ----------
    personal : str, sequence of str or callable, optional
        The head: patterns of names such as ``"head.*"``, as of :mod:`fnmatch`, or a
        function ``name -> bool``. By default the model's last layer.
    tuning_epochs : int (default: 5)
        Epochs of fine-tuning before an evaluation; 0 evaluates under the random head.
    tunes : {"all", "head"} (default: "all")
        What is fine-tuned.
    *flowers, **options
        Server optimizer, sampler, mechanism, codecs and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If a pattern matches no array, if the filter matches all, or if one tensor is
        both in the head and in the body; in ``configure_train``, before a client is
        asked.

    Notes
    -----
    Clients keep nothing, so that those who never trained are served as all others. The
    head travels down in every round, exact under any codec, and never up. The model
    before fine-tuning is evaluated, too, as ``received-loss`` and the like; its head
    knows nothing, which is what is expected of it. The head in the result's ``arrays``
    is the initial one. Under a mechanism only the body is clipped and noised. Under
    ``DPSGD`` each evaluation is charged to the silo as a training of its steps.

    Examples
    --------
    >>> strategy = FedBABU(personal="head.*", tuning_epochs=3)
    """

    client_half = FedBABUClient
    drop_in = DropIn(
        imports="from flower_ext.client.parts import freeze, keep_at_home",
        before="freeze({model})",
        mod="keep_at_home()",
    )

    def __init__(
        self,
        *flowers: object,
        personal: Filter = None,
        tuning_epochs: int = 5,
        tunes: str = ALL,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, personal=personal, **options)
        cause = "0 evaluates under the random head"
        self.tuning_epochs = whole("tuning_epochs", tuning_epochs, 0, cause)
        self.tunes = one_of("tunes", tunes, (ALL, HEAD))

    def tell(self, round: Round) -> Config:
        """Tell clients how they fine-tune."""
        own: Config = {EPOCHS_KEY: self.tuning_epochs, TUNES_KEY: self.tunes}
        return {**super().tell(round), **own}

    def variant(self, client: int, round: Round) -> Hashable:
        """Return the same for all: nobody has a head of its own."""
        return None

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        tuned = f"{self.tuning_epochs} epochs, {self.tunes}"
        return {"Fine-tuning": tuned, **super().settings()}
