"""Several models: where they start, and which of them a client takes."""

import math
from collections.abc import Callable, Sequence

import torch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

from flower_ext.client.seeds import seed_torch
from flower_ext.client.tensors import Tensors
from flower_ext.core.errors import refuse, whole
from flower_ext.core.protocol import ARRAYS_KEY
from flower_ext.core.several import stack, unstack

Call = Callable[[Message, Context], Message]

#: Metric of a reply: the number of the model that a client has chosen and trained.
CLUSTER = "cluster"


def choose(losses: Sequence[float]) -> int:
    """Return the index of the smallest loss: of equal ones the first, never of a NaN.

    Examples
    --------
    >>> choose([float("nan"), 0.5, 0.25, 0.25])
    2
    """
    known = [math.inf if math.isnan(loss) else loss for loss in losses]
    return known.index(min(known))


def choosing(
    loss: Callable[[Tensors, Context], float],
) -> Callable[[Message, Context, Call], Message]:
    """Return a Flower mod that gives an app's own loop the model that fits it best.

    The loop receives one model, as with federated averaging; the mod adds to its reply
    which one it was. Where one model came, there is nothing to choose.

    Parameters
    ----------
    loss : callable
        ``(state_dict, Context) -> float``, the mean loss of a model on the client's
        training data. It is asked before training and before evaluation.

    Examples
    --------
    >>> mod = choosing(lambda arrays, context: float(arrays["w"]))
    """

    def mod(message: Message, context: Context, call_next: Call) -> Message:
        content = message.content
        models = unstack(content.array_records[ARRAYS_KEY])
        if not models:
            return call_next(message, context)
        losses = [
            loss(ArrayRecord(arrays).to_torch_state_dict(), context)
            for arrays in models
        ]
        chosen = choose(losses)
        message.content = RecordDict(
            {**content, ARRAYS_KEY: ArrayRecord(models[chosen])}
        )
        try:
            reply = call_next(message, context)
        finally:
            message.content = content
        if reply.has_content() and message.metadata.message_type.startswith("train"):
            reply.content[CLUSTER] = MetricRecord({CLUSTER: chosen})
        return reply

    return mod


def initial_models(
    make_model: Callable[[], nn.Module],
    num_models: int,
    *,
    seed: int = 0,
    warm: ArrayRecord | None = None,
) -> ArrayRecord:
    """Return the arrays that a strategy with several models starts from.

    Parameters
    ----------
    make_model : callable
        ``() -> torch.nn.Module``, called once a model, each with a seed of its own.
    num_models : int
        At least 1.
    seed : int (default: 0)
        Of the first model; the others have the next ones.
    warm : ArrayRecord, optional
        A trained model, such as the result of federated averaging. The models are
        copies of it, but for the layer of the last parameter, which is as
        ``make_model`` makes it. By default they differ in all layers.

    Returns
    -------
    ArrayRecord
        Arrays named ``0/...``, ``1/...`` and so on.

    Examples
    --------
    >>> sorted(initial_models(lambda: nn.Linear(2, 1), 2))
    ['0/bias', '0/weight', '1/bias', '1/weight']
    """
    whole("num_models", num_models, 1)
    whole("seed", seed, 0)
    models = []
    for number in range(num_models):
        with torch.random.fork_rng(devices=[]):
            seed_torch(seed + number)
            model = make_model()
        arrays: dict[str, Array] = {**ArrayRecord(model.state_dict())}
        if warm is not None:
            arrays = {**arrays, **_all_but_the_last(model, warm)}
        models.append(arrays)
    return ArrayRecord(stack(models))


def _all_but_the_last(model: nn.Module, warm: ArrayRecord) -> dict[str, Array]:
    if warm.keys() != model.state_dict().keys():
        refuse("warm", list(warm)[:3], "a record of the model that make_model makes")
    *_, (last, _) = model.named_parameters()
    layer = last.rpartition(".")[0]
    kept = {n: x for n, x in warm.items() if n.rpartition(".")[0] != layer}
    if not kept:
        refuse("warm", list(warm)[:3], "of more than one layer", "all would start anew")
    return kept
