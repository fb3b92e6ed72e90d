r"""HypCluster: several models, and every client trains the one that fits it best.

The server has m models. A client takes the one with the least loss on its training
data, trains it, and sends the change and its number; each model moves by the mean of
the clients that took it:

.. math::
   c_k = \arg\min_j F_k(\theta_j), \qquad
   \theta_j \leftarrow \theta_j +
   \frac{\sum_{k: c_k = j} n_k \Delta_k}{\sum_{k: c_k = j} n_k}

(Mansour, Mohri, Ro and Suresh 2020, "Three approaches for personalization with
applications to federated learning", arXiv 2002.10619, section 3: HypCluster; Ghosh,
Chung, Yin and Ramchandran 2020, "An efficient framework for clustered federated
learning", arXiv 2006.04088: IFCA, with averaging of models.)
"""

from collections.abc import Mapping, Sequence
from typing import Unpack

import numpy as np
from flwr.app import ArrayRecord

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.several import CLUSTER
from flower_ext.client.tensors import Tensors
from flower_ext.core.arrays import Arrays, zeros_like
from flower_ext.core.contribution import DELTA, WEIGHT_OF, Contribution, Total
from flower_ext.core.errors import whole
from flower_ext.core.protocol import (
    Metrics,
    Reply,
    Round,
)
from flower_ext.core.several import change_of_one, unstack
from flower_ext.server.drop_in import DropIn
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.several import SeveralModels

SIZES = "cluster-sizes"


class HypClusterClient(ClientHalf):
    """Takes the model with the least loss on its training data, and trains it.

    It takes one for an evaluation, too, by the training data as well, so that clients
    that never trained are served.
    """

    name = "hypcluster"
    # It sends a trained model and a choice that is private where the training is.
    post_processing = True

    def __init__(self) -> None:
        self._cluster = 0

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Choose."""
        models = unstack(arrays)
        self._cluster = local.model_number = local.best_of(models)
        return models[self._cluster]

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return the number of the model that was trained."""
        return {}, {CLUSTER: self._cluster}


class HypCluster(SeveralModels):
    r"""Federated averaging of several models, each by the clients that it fits best.

    Against FedAvg: all models are sent, and a client's change counts for the one that
    it chose. A model that nobody chose stays as it is, and so do its moments in the
    server optimizer. With ``num_clusters=1`` it is FedAvg. Works with the client half
    :class:`HypClusterClient`, or with the mod
    :func:`~flower_ext.client.several.choosing` around a loop of one's own. It starts
    from several models: see
    :func:`~flower_ext.client.several.initial_models`.

    Parameters
    ----------
    num_clusters : int
        m, from 1 to the number of clients less one. 1 is FedAvg.
    *flowers, **options
        Server optimizer, sampler, mechanism and Flower's own options, see
        :class:`~flower_ext.server.options.AdditiveOptions`.

    Raises
    ------
    ValueError
        Before the first round, if there are as many clusters as clients, or if the
        initial arrays are not so many models.

    Notes
    -----
    Train metrics ``cluster-size-0`` and so on are the numbers of clients that chose a
    model. **They may collapse**: models that start alike may all but one be chosen by
    nobody, and one that is ahead in the first rounds may win all clients. Start apart,
    or from one trained model with last layers of their own, and look at the sizes.

    The result is only as good as the start: the objective is not convex in who belongs
    where, and Ghosh et al. prove convergence from a start near the solution.

    *Revealed*: which model suits a client, in each round, which is a statement about
    its data that FedAvg does not make. Under a mechanism the sums of each model and the
    number of its clients are parts of one clipped and noised vector, and the sizes that
    are reported are noisy; a model whose number of clients is below its noise stays as
    it is. Where silos train with DPSGD, the choice reads their data: it must be private
    and is charged, see :class:`~flower_ext.privacy.SiloPrivacy`.

    Examples
    --------
    >>> strategy = HypCluster(num_clusters=2, fraction_train=0.1)
    """

    client_half = HypClusterClient
    drop_in = DropIn(
        imports="from flower_ext.client.several import choosing",
        mod="choosing(training_loss)",
        fill_in="training_loss(arrays, context): the mean loss of a model with the\n"
        "arrays of a state_dict on the client's training data\n"
        "the ServerApp starts from initial_models(Net, num_clusters), which is in\n"
        "flower_ext.client.several",
        arguments=lambda _: {"num_clusters": 1},
        written="num_clusters=...",
    )
    consumed_metrics = (CLUSTER,)
    number = "num_clusters"
    too_many = "as many clusters as clients: each would learn alone, as in LocalOnly"

    def __init__(
        self, num_clusters: int, *flowers: object, **options: Unpack[AdditiveOptions]
    ) -> None:
        count = whole("num_clusters", num_clusters, 1)
        # A change of the usual clipping norm, 1 or less, shall outweigh the count.
        self.scales = {WEIGHT_OF + part(j): 0.1 for j in range(count)}
        super().__init__(num_clusters, *flowers, **options)

    def contribution(self, reply: Reply, round: Round) -> Contribution:
        """Return the change of one model, and nothing for the others."""
        chosen = reply.whole(CLUSTER, below=self.num_models)
        weight = 1.0 if round.private else reply.num_examples
        # Under a mechanism the weights are these counts already.
        sizes = {} if round.private else {SIZES: np.eye(self.num_models)[chosen]}
        return Contribution(
            {part(chosen): change_of_one(reply, round, chosen)},
            scalars=sizes,
            weights={part(chosen): weight},
        )

    def zero(self, sent: Arrays) -> Contribution:
        """Return no change of any model, chosen by nobody."""
        zeros = zeros_like(sent)
        parts = {part(j): j for j in range(self.num_models)}
        return Contribution(
            {
                p: {n: x for n, x in zeros.items() if n.startswith(f"{j}/")}
                for p, j in parts.items()
            },
            scalars={} if self.mechanism else {SIZES: np.zeros(self.num_models)},
            weights=dict.fromkeys(parts, 0.0),
        )

    def update(self, total: Total, round: Round) -> Arrays:
        """Return the mean change of each model that was chosen."""
        chosen = [
            part(j)
            for j in range(self.num_models)
            if total.weights[part(j)] > total.noise.get(WEIGHT_OF + part(j), 0.0)
        ]
        return {name: x for j in chosen for name, x in total.mean(j).items()}

    def report(self, total: Total, round: Round) -> Metrics:
        """Return how many clients chose each of the models."""
        sizes: Sequence[float] = (
            [total.weights[part(j)] for j in range(self.num_models)]
            if round.private
            else [float(x) for x in total.scalars[SIZES]]
        )
        return {f"cluster-size-{j}": size for j, size in enumerate(sizes)}

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {"Clusters": self.num_models, **super().settings()}


def part(number: int) -> str:
    """Return the name of a model's part in the sum."""
    return f"{DELTA}-{number}"
