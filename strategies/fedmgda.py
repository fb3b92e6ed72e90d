r"""FedMGDA: a step that is good for every client, not only in the mean.

The direction is the least convex combination of the clients' changes,

.. math::
   a = \arg\min_{a \ge 0,\ \sum_k a_k = 1} \Big\| \sum_k a_k \Delta_k \Big\|^2, \qquad
   w \leftarrow w + \sum_k a_k \Delta_k,

along which no client's loss rises, to first order; where it is 0 no such direction is
left, and the model is Pareto stationary (Hu, Shaloudegi, Zhang and Yu 2022, "Federated
Learning Meets Multi-Objective Optimization", IEEE TNSE, arXiv 2006.11489).
"""

from collections.abc import Sequence
from typing import Unpack

import numpy as np

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import fraction, yes_or_no
from flower_ext.core.protocol import Metrics, Reply, Round
from flower_ext.core.typing import Floats
from flower_ext.server.min_norm import (
    changes_of,
    combination,
    descent_weights,
    gram_of,
)
from flower_ext.server.options import RoundOptions
from flower_ext.server.strategy import RoundStrategy


class FedMGDA(RoundStrategy):
    r"""Federated averaging whose weights make the average as short as it can be.

    Against FedAvg, clients do not weigh by their examples: those weigh most whose
    changes are short, or against those of others. It needs nothing of clients that
    FedAvg does not.

    Parameters
    ----------
    max_deviation : float (default: 1.0)
        :math:`\epsilon` from 0 to 1: no weight is further than this from the client's
        share of the examples. 0 is FedAvg; 1 leaves the weights free, as in MGDA. In
        between one client whose model fits already does not stop all others.
    normalize : bool (default: False)
        Compare and average directions: each change is brought to the length that the
        changes have in the mean (FedMGDA+). Lengths then do not tell who is followed,
        and a client that sends a huge change moves the model no further than others.
    *flowers, **options
        Server optimizer, sampler and Flower's own options, see
        :class:`~flower_ext.server.options.RoundOptions`.

    Notes
    -----
    It is no sum: the weights are found from the inner products of all changes. The
    server holds the cohort's changes at once, one model for each client, and there is
    neither a mechanism nor an asynchronous run. Inner products are over the trained
    parameters; BatchNorm's statistics and integers are averaged with the weights found.

    A client whose change is 0, because the model is its optimum, stops the run: no
    direction is better for it. One without examples is left out. One that is hostile
    stops it as well, by a change of 0 or one against all others.

    The paper normalises by the length of each change and has a learning rate of the
    server for what is then a direction; here the mean length is kept, so that equal
    changes are averaged as FedAvg does.

    Metrics: ``largest-weight``; ``clients-with-weight``; ``common-descent``, the ratio
    of the direction's squared length to the mean squared length of the changes: 1 where
    all agree, 0 where nothing is good for all.

    Examples
    --------
    >>> strategy = FedMGDA(max_deviation=0.1, normalize=True)
    """

    def __init__(
        self,
        *flowers: object,
        max_deviation: float = 1.0,
        normalize: bool = False,
        **options: Unpack[RoundOptions],
    ) -> None:
        super().__init__(*flowers, **options)
        self.max_deviation = fraction("max_deviation", max_deviation)
        self.normalize = yes_or_no("normalize", normalize)

    def aggregate(self, round: Round, replies: Sequence[Reply]) -> Arrays:
        """Return the common direction."""
        found = changes_of(replies, round)
        if not found:
            return {}
        changes = [change for _, change in found]
        gram = gram_of(changes, round.parameters)
        weights = self._weights([reply for reply, _ in found], gram)
        scales = self._scales(gram)
        trained = combination(changes, weights * scales, round.parameters)
        others = [name for name in round.sent if name not in round.parameters]
        return {**trained, **combination(changes, weights, others)}

    def finish(self, round: Round, replies: Sequence[Reply]) -> Metrics:
        """Return how clients were weighed."""
        found = changes_of(replies, round)
        if not found:
            return {}
        gram = gram_of([change for _, change in found], round.parameters)
        weights = self._weights([reply for reply, _ in found], gram)
        scales = self._scales(gram)
        squared = float((weights * scales) @ gram @ (weights * scales))
        mean = float(np.trace(gram)) / len(gram)
        return {
            "largest-weight": float(weights.max()),
            "clients-with-weight": int(np.count_nonzero(weights)),
            "common-descent": squared / mean if mean > 0 else 0.0,
        }

    def _weights(self, replies: Sequence[Reply], gram: Floats) -> Floats:
        sizes = np.array([reply.num_examples for reply in replies])
        scales = self._scales(gram)
        prior = sizes / sizes.sum()
        return descent_weights(
            gram * np.outer(scales, scales), prior, self.max_deviation
        )

    def _scales(self, gram: Floats) -> Floats:
        """Return the factors that bring changes to one length, or ones."""
        lengths = np.sqrt(np.diag(gram))
        if not self.normalize:
            return np.ones(len(gram))
        mean = np.full(len(gram), lengths.mean())
        scales = np.zeros(len(gram))
        return np.asarray(np.divide(mean, lengths, out=scales, where=lengths > 0))

    def settings(self) -> dict[str, object]:
        """Return the settings that ``summary()`` logs."""
        return {
            "Largest deviation of weights": self.max_deviation,
            "Normalizes changes": self.normalize,
            **super().settings(),
        }
