r"""Ensemble: several models of federated averaging, of which each client uses one.

The models start apart and are trained independently of each other, in turns: round t is
a round of federated averaging for model :math:`(t - 1) \bmod m`. Where they are used, a
client takes the one with the least loss on examples that it has held out of its
training data:

.. math:: c_k = \arg\min_j F_k^{\text{held out}}(\theta_j).

It is the baseline of methods with several models (Wu et al. 2022, "Motley: benchmarking
heterogeneity and personalization in federated learning", arXiv 2206.09262): it says
what choosing alone is worth, without clusters.
"""

from collections.abc import Hashable, Sequence
from typing import Unpack

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.personalization import hold_out
from flower_ext.client.several import choose
from flower_ext.client.task import num_examples
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.errors import fraction, refuse
from flower_ext.core.protocol import (
    MODEL_NUMBER_KEY,
    Config,
    Metrics,
    Payload,
    Reply,
    Round,
)
from flower_ext.core.several import change_of_one, model_of, unstack
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.several import SeveralModels

HOLDOUT_KEY = "ensemble-holdout"
CHOSEN = "ensemble-model"


class EnsembleClient(ClientHalf):
    """Trains the model that comes; of those that come to be evaluated, uses the best.

    With more than one model, a part of its training examples is held out of all
    training, to choose by. A client with too few for that chooses by those it has.
    """

    name = "ensemble"
    post_processing = True  # it chooses in evaluations only

    def __init__(self) -> None:
        self._chosen = 0

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Hold examples out of a training; choose a model for an evaluation."""
        rest, held = hold_out(local, local.number(HOLDOUT_KEY, 0.0))
        if local.phase == "train":
            local.train = rest
            return arrays
        models = unstack(arrays)
        data = held if num_examples(held) else local.train
        if len(models) > 1:
            self._chosen = choose([local.loss_of(model, data) for model in models])
        return models[self._chosen]

    def evaluate(self, local: Local) -> Metrics:
        """Return the number of the model that was used."""
        return {CHOSEN: self._chosen}


class Ensemble(SeveralModels):
    r"""Independent models of federated averaging, each client using the best for it.

    Against FedAvg: a round trains one of m models, in turns, and so takes what a round
    of FedAvg takes; in an evaluation all models travel, and a client uses the one with
    the least loss on examples that it has held out. With ``num_models=1`` it is FedAvg.
    Works with the client half :class:`EnsembleClient`, or with the mod
    :func:`~flower_ext.client.several.choosing` around a loop of one's own. It starts
    from several models: see :func:`~flower_ext.client.several.initial_models`.

    Parameters
    ----------
    num_models : int
        m, at least 1; 1 is FedAvg.
    *flowers
        Flower's own options by position.
    holdout : float (default: 0.2)
        Share of a client's training examples, in [0, 1), that no model is trained on.
        With 0, and with one model, none is held out, and clients choose by their
        training examples.
    **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Notes
    -----
    A model and its moments in the server optimizer change in its own rounds only, so
    that after m T rounds each has had T. Metrics ``ensemble-size-0`` and so on of an
    evaluation are the numbers of clients that used a model.

    *Revealed*: in a training what FedAvg reveals; in an evaluation the model that suits
    a client. Under a mechanism the evaluations are withheld. Its noise covers all
    models in every round, of which one moves: noise that is correlated over rounds
    (any factorization but ``"identity"``) does not cancel within a model.

    Deviation: Motley's ensembles train each model in a run of its own, with its own
    cohorts; so do these, but for their rounds' places in one run.

    Examples
    --------
    >>> strategy = Ensemble(num_models=3, fraction_train=0.1)
    """

    client_half = EnsembleClient
    drop_in = DropIn(
        imports="from flower_ext.client.several import choosing",
        mod="choosing(held_out_loss)",
        fill_in="held_out_loss(arrays, context): the mean loss of a model with the\n"
        "arrays of a state_dict on examples that the client does not train on\n"
        "the ServerApp starts from initial_models(Net, num_models), which is in\n"
        "flower_ext.client.several",
        arguments=lambda _: {"num_models": 1},
        written="num_models=...",
    )
    needs_rounds = "each round trains one of the models, and stale clients another one"
    consumed_metrics = (CHOSEN,)

    def __init__(
        self,
        num_models: int,
        *flowers: object,
        holdout: float = 0.2,
        **options: Unpack[AdditiveOptions],
    ) -> None:
        super().__init__(num_models, *flowers, **options)
        self.holdout = fraction("holdout", holdout)
        if holdout == 1:
            refuse("holdout", holdout, "below 1", "nothing would be left to train on")

    def tell(self, round: Round) -> Config:
        """Tell clients how much to hold out."""
        share = self.holdout if self.num_models > 1 else 0.0
        return {**super().tell(round), HOLDOUT_KEY: share}

    def payload(self, variant: Hashable, round: Round) -> Payload:
        """Return the one model that is trained, or all to be evaluated."""
        if round.phase == "evaluate":
            return Payload(round.sent)
        number = turn(round, self.num_models)
        return Payload(model_of(round.sent, number), config={MODEL_NUMBER_KEY: number})

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of the one model."""
        change = change_of_one(reply, round, turn(round, self.num_models))
        return Contribution({DELTA: change})

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the mean change of the one model; the others stay as they are."""
        prefix = f"{turn(round, self.num_models)}/"
        return {n: x for n, x in total.mean().items() if n.startswith(prefix)}

    def report_evaluate(self, replies: Sequence[Reply], round: Round) -> Metrics:
        """Return the spread of the metrics, and how many clients used each model."""
        used = [r.whole(CHOSEN, self.num_models) for r in replies if r.has(CHOSEN)]
        sizes: Metrics = {
            f"ensemble-size-{j}": used.count(j) for j in range(self.num_models)
        }
        return {**super().report_evaluate(replies, round), **(sizes if used else {})}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Models": self.num_models,
            "Held out": self.holdout,
            **super().settings(),
        }


def turn(round: Round, num_models: int) -> int:
    """Return the model that a round trains.

    Examples
    --------
    >>> [turn(Round(number, {}), 3) for number in (1, 2, 3, 4)]
    [0, 1, 2, 0]
    """
    return (round.number - 1) % num_models
