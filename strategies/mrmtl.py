r"""MR-MTL: models of the silos' own, which are pulled towards their mean.

Mean-regularised multi-task learning. Every silo keeps a model of its own, and all
minimise together

.. math:: \sum_k p_k \Big( F_k(w_k) + \frac{\lambda}{2} \|w_k - \bar w\|^2 \Big),
   \quad \bar w = \sum_k p_k w_k

(Liu, Hu, Wu and Smith 2022, "On privacy and personalization in cross-silo federated
learning", NeurIPS, arXiv:2206.07902). With :math:`\lambda = 0` silos learn alone, with
:math:`\lambda = \infty` they share one model: in between, a silo borrows as much from
the others as the noise in its own estimate is worth.
"""

import math
from collections.abc import Callable
from typing import Literal, Unpack, get_args

from flwr.app import Context, Message, RecordDict
from torch import Tensor, nn

from flower_ext.client.encoding import Mod
from flower_ext.client.half import ClientHalf, Local, Proximal
from flower_ext.client.mods import tell_state
from flower_ext.client.personal import Personal, forget_other_runs
from flower_ext.client.tensors import Tensors, read_tensors, tensor_record
from flower_ext.core.errors import at_least, one_of, refuse
from flower_ext.core.protocol import Config, Round
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.personal import PersonalStrategy

STRENGTH_KEY = "mrmtl-strength"
MEAN = "mrmtl-mean"
OWN = "model"

Weights = Literal["examples", "equal"]


class MRMTLClient(ClientHalf):
    """Trains a model of the client's own, and pulls it towards the received mean.

    It begins as the mean that the client receives when it is first asked to train. The
    server is sent the client's model, and averages these. One model is trained in a
    round, so that under ``DPSGD`` a silo pays for its steps once.

    Notes
    -----
    The pull is added to a step's gradient after clipping and noise, since it knows no
    data.
    """

    name = "mrmtl"
    post_processing = True  # it sends and keeps the trained model
    compares = True
    keeps = True
    sends_kept = True

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Begin with the client's own model; evaluate it beside the received mean."""
        self.keeps = local.number(STRENGTH_KEY, 1.0) < math.inf
        if local.phase == "evaluate":
            return arrays
        return local.personal.arrays(OWN, like=arrays, first=arrays)

    def begin(self, local: Local) -> None:
        """Look where the pull goes."""
        self._strength = local.number(STRENGTH_KEY, 1.0)
        self._pull = pull(local.model_received, self._strength)
        self._pull.require_stable(local)

    def regularizer(self, model: nn.Module) -> Tensor | None:
        r"""Return :math:`\lambda/2 \|w - \bar w\|^2`."""
        return self._pull(model)

    def after_training(self, local: Local) -> None:
        """Keep the model, but where all share one."""
        if self._strength < math.inf:
            local.personal.save(**{OWN: local.end})

    def model_to_evaluate(self, local: Local) -> Tensors | None:
        """Return the client's own model, if it has one."""
        if OWN not in local.personal:
            return None
        return local.personal.arrays(OWN, like=local.start)


def pull(mean: Tensors, strength: float) -> Proximal:
    r"""Return the term :math:`\lambda/2 \|w - \bar w\|^2` of a model.

    There is none where :math:`\lambda` is 0 or infinite: a model is then not pulled, in
    the one case because it is alone, in the other because it begins as the mean.
    """
    return Proximal(mean, 0.0 if math.isinf(strength) else strength)


def pull_to_mean(message: Message) -> Callable[[nn.Module], Tensor | float]:
    """Return the term to add to the loss, for a training loop of one's own.

    Needs the mod :func:`mean_regularized`, which hands over the mean.

    Parameters
    ----------
    message : Message
        The one that asks to train.

    Returns
    -------
    callable
        ``model -> term``, 0 where there is none.
    """
    content = message.content
    if MEAN not in content.array_records:
        cause = "the ClientApp needs the mod mean_regularized()"
        refuse("array records", sorted(content.array_records), f"with {MEAN!r}", cause)
    mean = read_tensors(content.array_records[MEAN])
    term = pull(mean, _strength_told(content) or 0.0)

    def added(model: nn.Module) -> Tensor | float:
        found = term(model)
        return 0.0 if found is None else found

    return added


def mean_regularized() -> Mod:
    """Return a Flower mod that gives an app's training and evaluation its own model.

    The app's functions stay as they are: they receive the client's own model in place
    of the mean, and what they reply with after training is kept. The training loop adds
    :func:`pull_to_mean`. Messages of other strategies pass through.

    Returns
    -------
    callable
        For ``ClientApp(mods=[mean_regularized()])``.
    """

    def mod(
        message: Message,
        context: Context,
        call_next: Callable[[Message, Context], Message],
    ) -> Message:
        content, personal = message.content, Personal(context.state)
        strength = _strength_told(content)
        if strength is None:
            return call_next(message, context)
        forget_other_runs(content, context.state)
        [(key, record)] = content.array_records.items()
        mean = read_tensors(record)
        own = tensor_record(personal.arrays(OWN, like=mean, first=mean))
        message.content = RecordDict({**content, key: own, MEAN: record})
        try:
            reply = call_next(message, context)
        finally:
            message.content = content
        trains = message.metadata.message_type.partition(".")[0] == "train"
        if trains and strength < math.inf and not reply.has_error():
            personal.save(**{OWN: read_tensors(reply.content.array_records[key])})
        if not trains:
            tell_state(reply, OWN in personal or math.isinf(strength))
        return reply

    return mod


def _strength_told(content: RecordDict) -> float | None:
    for config in content.config_records.values():
        if STRENGTH_KEY in config:
            return float(config[STRENGTH_KEY])  # type: ignore[arg-type]
    return None


class MRMTL(PersonalStrategy):
    r"""Averages models that stay different, and that are pulled towards the average.

    Against FedAvg, a client goes on from its own model :math:`w_k` instead of the
    received :math:`\bar w`, with a term :math:`\lambda/2\,\|w - \bar w\|^2` in its
    objective; the server averages as before. ``strength=0`` is local training, with
    models that are averaged for nobody's use; ``strength=math.inf`` is FedAvg. Works
    with the client half :class:`MRMTLClient`, or with :func:`mean_regularized` and
    :func:`pull_to_mean` in a loop of one's own.

    Parameters
    ----------
    strength : float (default: 1.0)
        :math:`\lambda \ge 0`. Below :math:`2 / \eta` for steps of SGD of learning rate
        :math:`\eta`, or infinite. Clients that estimate a mean with variance
        :math:`\sigma^2`, the noise of DP-SGD included, while silos differ by a variance
        :math:`\tau^2`, are best off with :math:`\sigma^2 / \tau^2`: the more noise, the
        larger.
    weights : {"examples", "equal"} (default: "examples")
        :math:`p_k`: by the number of examples, or the same for all.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        If an option is out of its range.

    Notes
    -----
    **Privacy of the people in a silo**: ``client_app(task, MRMTLClient,
    trainer=DPSGD(privacy))``, where ``privacy`` may be a function of the silo's own
    context, so that each has an epsilon of its own. All that a silo sends and keeps is
    made of its DP-SGD steps and of means that it received.

    **Privacy of a client** as a whole: a mechanism protects it in the mean. Clipped is
    :math:`w_k - \bar w`, which does not vanish as training goes on: a clipping norm
    below the distance between clients holds the mean back. A client's own model never
    leaves it unclipped; it is made of its data and of noisy means, and may be shown to
    that client only.

    **Partial participation.** The mean is that of the clients in the round, an estimate
    of that of all: right on average, with a spread that does not go away. A server
    optimizer ``SGD(cohort / population)`` averages over as many rounds as it takes to
    see all clients. To send :math:`w_k^{new} - w_k^{old}`, as the authors' code does,
    is the same where all take part and begin alike; where they do not, it moves the
    mean by too much, and what a codec, clipping or a lost state takes away never comes
    back.

    The authors' code clips the gradient of an example with the pull in it. That is
    private, too, but clipping weakens the pull along with the gradient. See
    :class:`~flower_ext.server.personal.PersonalStrategy` for the metrics; those that
    begin with ``received-`` are of the mean.

    Examples
    --------
    >>> strategy = MRMTL(strength=1.0, weights="equal")
    """

    client_half = MRMTLClient
    needs_rounds = "the model is the mean of clients' own models, as they all are now"
    drop_in = DropIn(
        imports="from flower_ext.strategies.mrmtl import mean_regularized",
        mod="mean_regularized()",
        fill_in="in the training, the loss is that of a batch plus "
        "pull_to_mean(message)(model), of the same module",
        silent=True,
    )

    def __init__(
        self,
        *flowers: object,
        strength: float = 1.0,
        weights: Weights = "examples",
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        cause = "0 is local training, infinity FedAvg"
        self.strength = at_least("strength", strength, 0, cause, allow_inf=True)
        self.equal_weights = one_of("weights", weights, get_args(Weights)) == "equal"

    def tell(self, round: Round) -> Config:
        """Tell clients how strongly they are pulled."""
        return {STRENGTH_KEY: self.strength}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Strength": self.strength,
            "Weights": "equal" if self.equal_weights else "examples",
            **super().settings(),
        }
