"""What a global model is worth to a client once it is the client's own."""

from collections.abc import Callable
from dataclasses import replace

import torch

from flower_ext.client.half import ClientHalf, Local
from flower_ext.client.seeds import random_seed
from flower_ext.client.task import Batch, evaluate
from flower_ext.client.task import num_examples as count_examples
from flower_ext.core.errors import whole
from flower_ext.core.protocol import Metrics

# A use of the client's seeds.
_HELD_OUT = 8

Watch = Callable[[int, Local], None]


class _Watched(ClientHalf):
    """Plain local training that is looked at after every epoch."""

    def __init__(self, watch: Watch | None) -> None:
        self._watch, self._steps = watch, 0

    def after_step(self, local: Local) -> None:
        self._steps += 1
        epoch, rest = divmod(self._steps, local.steps_per_epoch)
        if self._watch and not rest:
            self._watch(epoch, local)


def fine_tuned(
    local: Local,
    *,
    epochs: int = 0,
    steps: int = 0,
    learning_rate: float | None = None,
    num_examples: int | None = None,
    after_epoch: Watch | None = None,
) -> Local:
    """Return the client on a copy of its model that it has trained further.

    Parameters
    ----------
    local : Local
        The client, whose own model stays as it is.
    epochs : int (default: 0)
        Epochs of plain local training.
    steps : int (default: 0)
        Steps instead of epochs; 0 means epochs. Without either the copy stays as it is.
    learning_rate : float, optional
        By default, and for all else, the client's settings.
    num_examples : int, optional
        Few-shot: only the first so many training examples are used. By default all.
    after_epoch : callable, optional
        Called with the number of the epoch, from 1, and the client on the copy, which
        it must not change.
    """
    whole("epochs", epochs, 0)
    whole("steps", steps, 0)
    if num_examples is not None:
        whole("num_examples", num_examples, 1)
    settings = replace(local.settings, local_epochs=epochs, local_steps=steps)
    if learning_rate is not None:
        settings = replace(settings, learning_rate=learning_rate)
    tuned = replace(
        local.with_model(local.end),
        train={name: column[:num_examples] for name, column in local.train.items()},
        settings=settings,
        branch=local.branch,
    )
    if epochs or steps:
        with torch.enable_grad():
            tuned.session.train(tuned, _Watched(after_epoch))
    return tuned


def hold_out(local: Local, share: float) -> tuple[Batch, Batch]:
    """Return a client's training examples in two parts: to use, and held out.

    The same in every round, by the client's seed. With too few examples for both parts
    none is held out.

    Parameters
    ----------
    local : Local
        The client.
    share : float
        Of the examples to hold out, from 0 to 1, rounded to whole examples.
    """
    size = count_examples(local.train)
    seed = random_seed(local.settings.seed, 0, local.client, _HELD_OUT)
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed))
    order = order.to(local.device)
    count = round(share * size)
    count = count if count < size else 0
    # In their own order, so that without a held-out part nothing changes.
    out, rest = order[:count].sort().values, order[count:].sort().values
    return (
        {name: column[rest] for name, column in local.train.items()},
        {name: column[out] for name, column in local.train.items()},
    )


def evaluate_fine_tuned(
    local: Local, *, num_steps: int, num_examples: int | None = None
) -> Metrics:
    """Fine-tune a copy of the received model, and evaluate it.

    Parameters
    ----------
    local : Local
        The client, with the received model, which stays as it is.
    num_steps : int
        Steps of plain local training, at least 1, with the client's settings.
    num_examples : int, optional
        Few-shot: only the first so many training examples are used. By default all.

    Returns
    -------
    dict[str, float]
        ``loss`` and the task's metrics on the client's test data.
    """
    whole("num_steps", num_steps, 1)
    tuned = fine_tuned(local, steps=num_steps, num_examples=num_examples)
    return dict(evaluate(local.task, tuned.model, local.test))
