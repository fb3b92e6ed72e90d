r"""FedCurv: clients that hold on to what the others' data need.

Client k of round t + 1 minimises

.. math::
   F_k(w) + \lambda \sum_{j \ne k} (w - w_j)^\top \operatorname{diag}(I_j) (w - w_j),

where :math:`w_j` is the model that client j of round t has trained, and :math:`I_j` its
diagonal Fisher information there: a parameter is held where it matters to others, and
free where it does not (Shoham, Avidor, Keren, Israel, Benditkis, Mor-Yosef and Zeitak
2019, "Overcoming forgetting in federated learning on non-IID data", arXiv 1910.07796,
equation 5; it is elastic weight consolidation, Kirkpatrick et al. 2017, over clients).
The sums :math:`U = \sum_j I_j` and :math:`V = \sum_j I_j w_j` are all that has to
travel to clients.
"""

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from logging import WARNING
from typing import Unpack, cast, get_args

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from torch import nn

from flower_ext._flower import log
from flower_ext.client.fisher import SquaredGradients, spellings
from flower_ext.client.fisher_half import (
    ESTIMATOR_KEY,
    FISHER_KEY,
    Estimator,
    FisherHalf,
    read_fisher,
)
from flower_ext.client.half import Local, trainable
from flower_ext.client.loops import before_steps
from flower_ext.client.personal import Personal, forget_other_runs
from flower_ext.client.tensors import Tensors, read_tensors
from flower_ext.core.arrays import Arrays, all_finite, is_averaged, multiply, zeros_like
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import at_least, one_of, refuse
from flower_ext.core.protocol import (
    Config,
    Metrics,
    Payload,
    Reply,
    Round,
    model_in,
    told,
)
from flower_ext.core.states import new_id
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions

STRENGTH_KEY = "fedcurv-strength"
# Which round's the sums are, and which this one is: a number of its own in any run.
SUMMED_KEY, NUMBER_KEY = "fedcurv-summed", "fedcurv-number"
SUM, SUM_OF_MODELS = "fedcurv-fisher", "fedcurv-fisher-model"
FISHER_DELTA = "fisher-delta"
# What a client keeps: its Fisher, the model it is of, and the round.
OWN_FISHER, OWN_MODEL, OWN_ROUND = "fedcurv-fisher", "fedcurv-model", "fedcurv-round"


@dataclass(frozen=True, eq=False)
class Curvature:
    r"""The penalty :math:`\lambda \sum_i U_i (w_i - V_i / U_i)^2`.

    Up to a constant it is that of the paper, and what is not known, :math:`U_i = 0`,
    is left free.

    Parameters
    ----------
    fisher : dict[str, Tensor]
        U, the sum of the Fishers of other clients.
    centre : dict[str, Tensor]
        V / U, the mean of their models that U weighs; anything where U is 0.
    strength : float
        :math:`\lambda`.

    Examples
    --------
    >>> import torch
    >>> model = nn.Linear(1, 1, bias=False)
    >>> model.weight.grad = torch.zeros(1, 1)
    >>> centre = {"weight": model.weight.detach() - 3}
    >>> Curvature({"weight": torch.ones(1, 1)}, centre, 0.5).pull(trainable(model))
    >>> float(model.weight.grad)
    3.0
    """

    fisher: Tensors
    centre: Tensors
    strength: float

    @classmethod
    def of_others(
        cls,
        received: Mapping[str, Tensors],
        personal: Personal,
        config: ConfigRecord,
        trained: Collection[str],
    ) -> "Curvature | None":
        """Return what the server sends, less the client's own terms if they are in it.

        Parameters
        ----------
        received : dict[str, dict[str, Tensor]]
            What came beside the model.
        personal : Personal
            Where the client has kept its terms, see :func:`keep`.
        config : ConfigRecord
            What the server tells.
        trained : collection of str
            Names of what the client trains. Noisy sums are of more.
        """
        if SUM not in received:
            return None
        fisher, weighted = (
            {name: x for name, x in received[key].items() if name in trained}
            for key in (SUM, SUM_OF_MODELS)
        )
        if personal.number(OWN_ROUND, 0) == config.get(SUMMED_KEY):
            own = personal.arrays(OWN_FISHER, like=fisher)
            model = personal.arrays(OWN_MODEL, like=fisher)
            weighted = {n: x - own[n] * model[n] for n, x in weighted.items()}
            # What rounding leaves of a client's own terms alone may be below 0.
            fisher = {n: (x - own[n]).clamp(min=0) for n, x in fisher.items()}
        centre = {n: weighted[n] / x.where(x > 0, 1) for n, x in fisher.items()}
        return cls(fisher, centre, float(cast(float, config[STRENGTH_KEY])))

    def pull(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Add the penalty's gradient to those of a step, before it is taken."""
        for name, p in parameters.items():
            if name in self.fisher and p.grad is not None:
                away = p.detach() - self.centre[name].to(p)
                p.grad += 2 * self.strength * self.fisher[name].to(p) * away


def keep(
    personal: Personal, fisher: Tensors, model: Tensors, config: ConfigRecord
) -> None:
    """Keep a client's terms, which it does not pull itself to in the next round.

    Raises
    ------
    ValueError
        If they are not finite.
    """
    model = {name: model[name] for name in fisher}
    if not all(bool(x.isfinite().all()) for x in (*fisher.values(), *model.values())):
        refuse(
            "the Fisher of the trained model",
            "NaN or infinite",
            "finite",
            "training diverged: strength times learning-rate must be below 1 / the "
            "fisher-largest: a smaller strength or learning-rate",
        )
    personal.save(**{OWN_FISHER: fisher, OWN_MODEL: model})
    personal.save(**{OWN_ROUND: float(cast(float, config[NUMBER_KEY]))})


class Held:
    """The hold on a client with a training loop of its own, from now on.

    One line before the training, with the received model, and ``"fisher":
    held.record()`` in the reply.

    Parameters
    ----------
    model : torch.nn.Module
        With the received weights.
    message : Message
        The server's.
    context : Context
        The client's, whose state keeps its terms.
    batches_per_epoch : int, optional
        Take the Fisher from the last epoch's gradients: its number of optimizer steps.
    """

    def __init__(
        self,
        model: nn.Module,
        message: Message,
        context: Context,
        batches_per_epoch: int | None = None,
    ) -> None:
        content = message.content
        forget_other_runs(content, context.state)
        self._model, self._personal = model, Personal(context.state)
        self._config = told(content)
        received = {key: read_tensors(x) for key, x in content.array_records.items()}
        # The Fisher is of the client's own loss: it looks before the pull is added.
        self._fisher = SquaredGradients(model, batches_per_epoch).watch()
        names = {ways[-1] for ways in spellings(model)}
        others = Curvature.of_others(received, self._personal, self._config, names)
        pull = others.pull if others else lambda _: None
        sent = model_in(content, (SUM, SUM_OF_MODELS))
        before_steps(model, lambda own, _: pull(own), sent)

    def record(self) -> ArrayRecord:
        """Keep the client's terms, and return the Fisher, which is sent."""
        record = self._fisher.record()
        own = dict(self._model.named_parameters())
        model = {ways[-1]: own[ways[0]].detach() for ways in spellings(self._model)}
        keep(self._personal, read_tensors(record), model, self._config)
        return record


class FedCurvClient(FisherHalf):
    """Stays where other clients' models need it, and says where its own does."""

    name = "fedcurv"
    sends_kept = True

    def begin(self, local: Local) -> None:
        """Read what others need."""
        super().begin(local)
        self._others = Curvature.of_others(
            local.received, local.personal, local.config, trainable(local.model)
        )

    def after_backward(self, model: nn.Module) -> None:
        """Pull, once the squared gradients of the client's own loss are taken."""
        super().after_backward(model)
        if self._others:
            self._others.pull(trainable(model))

    def records(self, local: Local) -> tuple[Mapping[str, Tensors], Metrics]:
        """Keep and send the Fisher."""
        fisher = self.fisher(local)
        keep(local.personal, fisher, local.end, local.config)
        return {FISHER_KEY: fisher}, {}


class FedCurv(AdditiveStrategy):
    r"""Federated averaging of clients that are held where others' models need it.

    Against FedAvg: a client sends the diagonal Fisher :math:`I_k` of its trained model
    beside the model, and is sent the sums U and V over the last cohort, to which it is
    pulled in its local training. Works with the client half :class:`FedCurvClient`, or
    with :class:`Held` in a loop of one's own.

    Parameters
    ----------
    strength : float (default: 1.0)
        :math:`\lambda \ge 0`; 0 is FedAvg. The pull grows with the size of the cohort,
        over which the paper sums.
    estimator : str (default: "per-example")
        Of the Fisher, see :class:`~flower_ext.strategies.fedfish.FedFish`.
        ``per-example`` is the paper's, and costs a pass over the data. ``last-epoch``
        and ``all-epochs`` are free, and larger by up to a batch's size where a client
        has not arrived at its own minimum, from which the penalty keeps it: with a
        strength that is as much smaller. :class:`Held` takes these.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    Twice FedAvg's bytes travel up, from the second round on three times as many down:
    the paper's clients also send :math:`I_j w_j`, which the server knows here from the
    change, :math:`V = \sum_j I_j \Delta_j + U w` with the model :math:`w` that was
    sent. Codecs are for the model only.

    Clients keep :math:`I_k` and :math:`w_k`, to leave out their own terms where they
    were in the last cohort. A client whose reply was lost after it had trained leaves
    out what is not in the sum; what would pull it away from the sum's mean without end
    is cut off at no pull. Steps of SGD along the penalty diverge where
    :math:`\lambda \eta U_i \ge 1`; train metric ``fisher-largest`` is :math:`\max U`.

    U and V tell every client where the others' data lie, in sums over a cohort; with
    two clients each knows the other's. Under a mechanism the Fisher and its product
    with the change are clipped and noised with the change, as with FedFish:
    ``scales={"fisher": s, "fisher-delta": s}`` brings the small squares to its size. A
    client then leaves out its own terms as they were before clipping; parameters of
    which the noise hides U are left free. A hostile Fisher is as large as it likes
    without a mechanism, and holds all clients at one model.

    Examples
    --------
    >>> strategy = FedCurv(fraction_train=0.1, strength=0.5)
    """

    client_half = FedCurvClient
    drop_in = DropIn(
        imports="from flower_ext.strategies.fedcurv import Held",
        before="held = Held({model}, {message}, {context}, len({loader}))",
        records={FISHER_KEY: "held.record()"},
    )
    needs_rounds = "clients leave out their terms of the last sum, that of one round"
    other_arrays = (FISHER_KEY,)

    def __init__(
        self,
        *flowers: object,
        strength: float = 1.0,
        estimator: Estimator = "per-example",
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.strength = at_least("strength", strength, 0, "0 is FedAvg")
        self.estimator = one_of("estimator", estimator, get_args(Estimator))
        self._sums: dict[str, Arrays] = {}
        self._number = self._summed = 0.0

    def tell(self, round: Round) -> Config:
        """Tell clients which Fisher to send, how strong the pull is, and of whom."""
        if round.phase == "train":
            self._number = new_id()
        return {
            ESTIMATOR_KEY: self.estimator,
            STRENGTH_KEY: self.strength,
            SUMMED_KEY: self._summed,
            NUMBER_KEY: self._number,
        }

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Send the sums of the last cohort to those who train."""
        if round.phase == "evaluate" or not self.strength:
            return Payload(round.sent)
        return Payload(round.sent, beside=self._sums)

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        r"""Return :math:`\Delta_k`, and :math:`I_k` and their product, of weight 1."""
        delta, fisher = reply.delta(round), read_fisher(reply, round)
        product = {name: multiply(f, delta[name]) for name, f in fisher.items()}
        # Under a mechanism all weights are 1, and further ones would need a share of
        # the clipping norm.
        own = {} if round.private else {FISHER_KEY: 1.0, FISHER_DELTA: 1.0}
        return Contribution(
            {DELTA: delta, FISHER_KEY: fisher, FISHER_DELTA: product}, weights=own
        )

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change that nobody knows anything of."""
        zeros = zeros_like(sent)
        known = {name: x for name, x in zeros.items() if is_averaged(x)}
        return Contribution({DELTA: zeros, FISHER_KEY: known, FISHER_DELTA: known})

    def report(self, total: Total, round: Round) -> Metrics:
        """Return the largest curvature of the next penalty, without its strength."""
        largest = (np.max(x, initial=0) for x in total.arrays[FISHER_KEY].values())
        return {"fisher-largest": float(max(largest, default=0.0))}

    def advance(self, total: Total, round: Round) -> None:
        """Take over the sums, for the next round's clients."""
        least = total.noise.get(FISHER_KEY, 0.0)  # what is below it says nothing
        sums: dict[str, Arrays] = {SUM: {}, SUM_OF_MODELS: {}}
        with np.errstate(over="ignore", invalid="ignore"):
            for name, fisher in total.arrays[FISHER_KEY].items():
                sent, product = round.sent[name], total.arrays[FISHER_DELTA][name]
                weighted = np.where(fisher > least, product + fisher * sent, 0)
                dtype = np.result_type(sent, np.float32)
                sums[SUM][name] = np.where(fisher > least, fisher, 0).astype(dtype)
                sums[SUM_OF_MODELS][name] = weighted.astype(dtype)
        if all(all_finite(arrays.values()) for arrays in sums.values()):
            self._sums, self._summed = sums, self._number
        else:
            problem = "round %s: sums of Fishers are not finite: the old ones stay"
            log(WARNING, problem, round.number)

    def state_dict(self) -> dict[str, object]:
        """Add the sums."""
        return {**super().state_dict(), "sums": self._sums, "summed": self._summed}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the sums."""
        super().load_state_dict(state)
        self._sums = dict(cast(dict[str, Arrays], state["sums"]))
        self._summed = cast(float, state["summed"])

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        own = {"Strength": self.strength, "Fisher": self.estimator}
        return {**own, **super().settings()}
