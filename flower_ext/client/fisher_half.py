"""The diagonal Fisher of a client's trained model, on its way to the server.

:class:`FisherHalf` collects it, :func:`read_fisher` reads it from the reply; methods
that weigh parameters by what clients know of them share both.
"""

from typing import Literal, get_args

import numpy as np
import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from flower_ext.client.fisher import Batch, SquaredGradients, per_example
from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.task import batches
from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import one_of, refuse
from flower_ext.core.protocol import Reply, Round
from flower_ext.core.replies import MalformedReply

FISHER_KEY = "fisher"
ESTIMATOR_KEY = "fisher-estimator"

Estimator = Literal["last-epoch", "all-epochs", "per-example", "sampled"]


class FisherHalf(ClientHalf):
    """Collects the diagonal Fisher, as the strategy says under ``fisher-estimator``.

    ``last-epoch`` and ``all-epochs`` take it from the gradients of the training steps,
    those of a :meth:`regularizer` included; ``per-example`` and ``sampled`` from one
    more pass over the client's data.
    """

    def __init__(self) -> None:
        self._gradients: SquaredGradients | None = None
        self._examples = 0

    def begin(self, local: Local) -> None:
        """Choose the passes that count."""
        estimator = local.config.get(ESTIMATOR_KEY, "last-epoch")
        one_of("estimator", str(estimator), get_args(Estimator))
        if estimator == "sampled" and local.task.sample_labels is None:
            refuse("estimator", estimator, "used with a Task that has sample_labels")
        # What is wanted is the Fisher at the client's own solution: the gradients of
        # the last epoch are nearest to it, those before are skipped.
        if estimator in ("last-epoch", "all-epochs") and local.num_steps:
            window = local.num_steps
            if estimator == "last-epoch":
                window = min(window, local.steps_per_epoch)
            self._gradients = SquaredGradients(
                local.model, window, skip=local.num_steps - window
            )

    def objective(self, losses: Tensor, batch: Batch) -> Tensor:
        """Count the examples whose mean is minimised."""
        self._examples = len(losses)
        return losses

    def after_backward(self, model: nn.Module) -> None:
        """Take in the squared gradients."""
        if self._gradients:
            self._gradients.add(self._examples)

    def fisher(self, local: Local) -> dict[str, Tensor]:
        """Return the Fisher of the trained model."""
        return self._gradients.mean() if self._gradients else _afterwards(local)


def _afterwards(local: Local) -> dict[str, Tensor]:
    """Return the Fisher per example, with the data's labels or sampled ones."""
    sample = local.task.sample_labels
    if local.config.get(ESTIMATOR_KEY) != "sampled" or sample is None:
        data = batches(local.train, local.settings.batch_size)
        return per_example(local.model, local.task.loss, data)
    generator = torch.Generator(local.device).manual_seed(local.seed(stream=2))
    drawn = (
        sample(local.model, batch, generator)
        for batch in batches(local.train, local.settings.batch_size)
    )
    return per_example(local.model, local.task.loss, drawn)


def read_fisher(reply: Reply, round: Round) -> Arrays:
    """Return the Fisher of a reply: squares, of some or all arrays of the model.

    Raises
    ------
    MalformedReply
        If it is missing or empty, has other names than the model, or is no square.
    """
    record = reply.content.array_records.get(FISHER_KEY, ArrayRecord())
    if unknown := sorted(set(record) - set(round.sent)):
        raise MalformedReply(
            f"ArrayRecord {FISHER_KEY!r} must have names of the model's arrays, "
            f"unknown {unknown[:5]}: watch_fisher(...).record(arrays) takes those "
            "of the reply"
        )
    # Squares beyond float32 tell nothing, and would overflow in sums of float64.
    like = {
        name: np.broadcast_to(np.float32(0), x.shape)
        for name, x in round.floats.items()
        if name in record
    }
    fisher = reply.arrays(FISHER_KEY, like)
    if not fisher or any(np.min(f, initial=0) < 0 for f in fisher.values()):
        raise MalformedReply(f"ArrayRecord {FISHER_KEY!r} must hold squares, >= 0")
    return fisher
