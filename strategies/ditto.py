r"""Ditto: beside the shared model a personal one, which is drawn to it.

A client trains two models. One is that of FedAvg, :math:`w`. The other is its own, and
solves

.. math:: \min_{v_k}\; F_k(v_k) + \frac{\lambda}{2} \|v_k - w\|^2

(equation (Ditto) of Li, Hu, Beirami and Smith 2021, "Ditto: fair and robust federated
learning through personalization", ICML, arXiv 2012.04221). :math:`\lambda` leads from
local training, at 0, to the shared model, at infinity.
"""

from dataclasses import replace
from typing import Unpack, cast

from flwr.app import Context, Message

from flower_ext.client.encoding import Mod
from flower_ext.client.half import ClientHalf, Local, LocalSettings, Proximal
from flower_ext.client.mods import Answer, asked, drawn
from flower_ext.client.seeds import same_globals
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import at_least, refuse, whole
from flower_ext.core.protocol import Config, Round
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.personal import PersonalStrategy

STRENGTH_KEY = "ditto-strength"
EPOCHS_KEY = "ditto-personal-epochs"
# What a client keeps: its own model.
MODEL = "model"


class DittoClient(ClientHalf):
    """Trains the received model, and then its own, drawn to the received one.

    The first model of its own is the one that it receives when it is first asked to
    train. It evaluates its own model; before it has one, the received one.
    """

    name = "ditto"
    num_trainings = 2
    keeps = True
    post_processing = True  # sent and kept are trained models, and nothing else
    compares = True

    def planned_steps(self, local: Local) -> int:
        """Return the steps of both models."""
        return local.num_steps + replace(local, settings=_of_own(local)).num_steps

    def begin(self, local: Local) -> None:
        """Refuse a strength with which steps would lead away from both models."""
        self._term(local).require_stable(local)

    def after_training(self, local: Local) -> None:
        """Train the client's own model, and keep it."""
        own = local.personal.arrays(MODEL, like=local.start, first=local.start)
        personal = local.with_model(own)
        personal.settings = _of_own(local)
        # Algorithm 1, line 8: towards the model as it came, not as it was trained here.
        personal.fit(self._term(local))
        local.personal.save(**{MODEL: personal.end})

    def model_to_evaluate(self, local: Local) -> Tensors | None:
        """Return the client's own model, if it has one."""
        if MODEL not in local.personal:
            return None
        return local.personal.arrays(MODEL, like=local.start)

    def _term(self, local: Local) -> Proximal:
        return Proximal(local.start, local.number(STRENGTH_KEY, 0.0))


def _of_own(local: Local) -> LocalSettings:
    """Return the settings with which a client trains its own model."""
    if epochs := int(local.number(EPOCHS_KEY, 0)):
        return replace(local.settings, local_epochs=epochs, local_steps=0)
    return local.settings


def paired() -> Mod:
    """Return the mod that makes a loop of one's own that of :class:`Ditto`.

    For ``ClientApp(mods=[paired()])``, or ``mods=[packed, paired()]``. The app's train
    function is called twice: with the received model, and with the client's own, when
    the proximal term is added to each step of its torch optimizer. Its evaluate
    function is called with both. For other strategies it does nothing.
    """

    def mod(message: Message, context: Context, call_next: Answer) -> Message:
        if not (found := asked(DittoClient.name, message, context, call_next)):
            return call_next(message, context)
        client, config = found
        if client.phase == "evaluate":
            return client.evaluated(compares=True)
        if config[EPOCHS_KEY]:
            cause = "the loop trains for as many epochs as it does"
            refuse("personal_epochs", config[EPOCHS_KEY], "None with the mod", cause)
        reply = client.answer()
        if reply.has_content():
            strength = float(cast(float, config[STRENGTH_KEY]))
            begun = client.kept or client.received
            # What the loop draws at random for the shared model is not to depend on it.
            with same_globals(), drawn(begun, client.received, strength) as pull:
                own = client.answer(begun)
            pull.require_steps(begun, client.model_of(own)[1])
            client.keep(own)
        return reply

    return mod


class Ditto(PersonalStrategy):
    r"""Federated averaging with a personal model beside the shared one.

    The shared model is that of FedAvg, bit for bit, whatever the options below are.
    Works with the client half :class:`DittoClient`, or with the mod :func:`paired` for
    a training loop of one's own.

    Parameters
    ----------
    strength : float (default: 0.1)
        :math:`\lambda \ge 0`. 0 trains the personal model alone, as
        :class:`~flower_ext.strategies.LocalOnly` does. The larger, the nearer it stays
        to the shared model; SGD needs :math:`\lambda < 2 / \text{learning rate}`.
    personal_epochs : int, optional
        Epochs that the personal model is trained in a round, at least 1. By default as
        much as the shared one.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        At the client, before it has trained, if :math:`\lambda` is too large for its
        learning rate.

    Notes
    -----
    Twice the steps of FedAvg, and the same bytes. A client that has not been asked yet
    is evaluated with the shared model. For the metrics see
    :class:`~flower_ext.server.personal.PersonalStrategy`.

    The personal model never leaves the client, and what does is what FedAvg sends: a
    mechanism protects it all, and says nothing of the personal models, which are made
    of their client's data without noise. With ``DPSGD`` in silos both models are
    trained privately, and the steps of both are charged.

    Personal and shared model are trained with the same settings, as in Algorithm 1; the
    default of :math:`\lambda` is ours, the paper chooses it for each client.

    Examples
    --------
    >>> strategy = Ditto(fraction_train=0.1, strength=1.0)
    """

    client_half = DittoClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.ditto import paired",
        mod="paired()",
        silent=True,
    )

    def __init__(
        self,
        *flowers: object,
        strength: float = 0.1,
        personal_epochs: int | None = None,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        cause = "0 is local training, a large one FedAvg"
        self.strength = at_least("strength", strength, 0, cause)
        self.personal_epochs = personal_epochs
        if personal_epochs is not None:
            whole("personal_epochs", personal_epochs, 1, "None is as many as of both")

    def tell(self, round: Round) -> Config:
        """Tell clients how their own models are trained."""
        return {STRENGTH_KEY: self.strength, EPOCHS_KEY: self.personal_epochs or 0}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Strength of the pull to the shared model": self.strength,
            "Personal epochs": self.personal_epochs or "as the shared model's",
            **super().settings(),
        }
