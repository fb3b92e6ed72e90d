"""What a global model is worth to a client once it is the client's own."""

from copy import deepcopy
from dataclasses import replace

from flower_ext.client.half import Local
from flower_ext.client.task import evaluate
from flower_ext.core.errors import whole
from flower_ext.core.protocol import Metrics


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
    if num_examples is not None:
        whole("num_examples", num_examples, 1)
    tuned = replace(
        local,
        model=deepcopy(local.model),
        train={name: column[:num_examples] for name, column in local.train.items()},
        settings=replace(local.settings, local_steps=num_steps),
    )
    tuned.fit()
    return dict(evaluate(local.task, tuned.model, local.test))
