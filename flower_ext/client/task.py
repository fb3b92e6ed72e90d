"""The task: what is learned, and how a model is measured on data."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from flwr.app import Context, UserConfig
from torch import Tensor, nn

from flower_ext.client.once import forward_once
from flower_ext.core.errors import refuse
from flower_ext.core.ties import Ties

if TYPE_CHECKING:
    from flower_ext.client.half import Local, LocalSettings

Batch = Mapping[str, Tensor]

_BATCHES = 8  # whose rows are picked together

MakeOptimizer = Callable[
    [Iterable[nn.Parameter], "LocalSettings"], torch.optim.Optimizer
]


class LocalOptimizer(ABC):
    """Makes an optimizer that depends on more of the client than its settings.

    ``Task.optimizer`` may be one, such as :class:`~flower_ext.client.Grass`.
    """

    @abstractmethod
    def make(
        self, parameters: Mapping[str, nn.Parameter], local: "Local"
    ) -> torch.optim.Optimizer:
        """Return the optimizer of one local training.

        Parameters
        ----------
        parameters : dict[str, Parameter]
            What is trained, by the names under which it travels.
        local : Local
            The client at work: its settings, the codec of its upload, its seeds.
        """


@dataclass(frozen=True)
class Task:
    """What is learned: a model, each client's data, and the loss of an example.

    Parameters
    ----------
    model : callable
        ``run_config -> torch.nn.Module``.
    data : callable
        ``Context -> (train, test)`` of one client, each a dict of tensors whose first
        axis counts examples, ``{"x": (n, ...), "y": (n,)}``. ``node_config`` of the
        context says which client (``partition-id``).
    loss : callable
        ``(model, batch) -> losses`` of shape ``(batch,)``: one loss per example.
    metrics : callable, optional
        ``(model, batch) -> {name: values}`` of shape ``(batch,)``, averaged over the
        examples at evaluation, such as ``{"accuracy": hits}``.
    optimizer : callable, optional
        ``(parameters, LocalSettings) -> torch.optim.Optimizer``, or a
        :class:`LocalOptimizer`; SGD by default.
    sample_labels : callable, optional
        ``(model, batch, generator) -> batch`` with labels drawn from the model's own
        predictions; needed by FedFish's ``sampled`` Fisher only.
    """

    model: Callable[[UserConfig], nn.Module]
    data: Callable[[Context], tuple[Batch, Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    metrics: Callable[[nn.Module, Batch], Mapping[str, Tensor]] | None = None
    optimizer: "MakeOptimizer | LocalOptimizer | None" = None
    sample_labels: Callable[[nn.Module, Batch, torch.Generator], Batch] | None = None


_STACKING = ContextVar("stacking", default=False)


def is_stacking() -> bool:
    """Whether the losses that are computed are those of several clients at once.

    Then no value may decide what is computed, as in ``if mask.all()``.
    """
    return _STACKING.get()


@contextmanager
def stacking() -> Iterator[None]:
    """Say that losses are those of several clients at once."""
    token = _STACKING.set(True)
    try:
        yield
    finally:
        _STACKING.reset(token)


def num_examples(data: Batch) -> int:
    """Return the number of examples, which all columns must share."""
    sizes = {name: column.shape[0] for name, column in data.items()}
    if len(set(sizes.values())) != 1:
        raise ValueError(f"columns must have as many examples as each other: {sizes}")
    return next(iter(sizes.values()))


def batches(
    data: Batch,
    batch_size: int,
    generator: torch.Generator | None = None,
    *,
    join_last: bool = False,
) -> Iterator[Batch]:
    """Cut data into batches, shuffled if there is a generator.

    With ``join_last``, a single example that is left goes into the batch before it.
    """
    total = num_examples(data)
    order = (
        torch.arange(total)
        if generator is None
        else torch.randperm(total, generator=generator)
    )
    cuts = list(range(0, total, batch_size))
    if join_last and len(cuts) > 1 and total - cuts[-1] == 1:
        cuts.pop()
    # Some batches together: to pick rows takes as long for one as for a few.
    for first in range(0, len(cuts), _BATCHES):
        some = [*cuts[first : first + _BATCHES + 1], total][: _BATCHES + 1]
        rows = order[some[0] : some[-1]]
        picked = {name: column[rows] for name, column in data.items()}
        for start, stop in pairwise(x - some[0] for x in some):
            yield {name: column[start:stop] for name, column in picked.items()}


def example_losses(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Return the task's losses, of shape ``(batch,)``."""
    return per_example("loss", task.loss(model, batch), batch)


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, data: Batch, batch_size: int = 256
) -> dict[str, float]:
    """Return the mean ``loss`` and metrics over data, in evaluation mode.

    Without examples every value is NaN.
    """
    sums: dict[str, float] = {"loss": 0.0}
    for found in example_metrics(task, model, data, batch_size):
        for name, values in found.items():
            sums[name] = sums.get(name, 0.0) + float(values.sum())
    size = num_examples(data)
    return {name: value / size if size else math.nan for name, value in sums.items()}


@torch.no_grad()
def example_metrics(
    task: Task, model: nn.Module, data: Batch, batch_size: int = 256
) -> Iterator[dict[str, Tensor]]:
    """Yield ``loss`` and metrics of every example, batch after batch, in float64.

    In evaluation mode. Where both call the model with the same tensors it computes
    once.
    """
    was_training = model.training
    model.eval()
    with forward_once(model) as calls:
        for batch in batches(data, batch_size):
            calls.clear()
            found = {"loss": task.loss(model, batch)}
            if task.metrics:
                metrics = task.metrics(model, batch)
                if not isinstance(metrics, Mapping):
                    cause = "one value for each example of the batch under each name"
                    refuse("Task.metrics(...)", type(metrics).__name__, "a dict", cause)
                found |= metrics
            yield {
                name: per_example(name, values, batch).double()
                for name, values in found.items()
            }
    model.train(was_training)


@torch.no_grad()
def losses_of(
    task: Task, model: nn.Module, data: Batch, batch_size: int = 256
) -> Tensor:
    """Return the loss of every example, of shape ``(examples,)``, in evaluation mode.

    In float64, on the CPU.
    """
    was_training = model.training
    model.eval()
    found = [
        example_losses(task, model, batch).cpu().double()
        for batch in batches(data, batch_size)
    ]
    model.train(was_training)
    return torch.cat(found) if found else torch.zeros(0, dtype=torch.float64)


def per_example(name: str, values: Tensor, batch: Batch) -> Tensor:
    """Require one value for each example: a mean would be averaged twice."""
    size = num_examples(batch)
    shape = tuple(getattr(values, "shape", ("none",)))
    if shape != (size,):
        raise ValueError(
            f"{name!r} has shape {shape}, must be ({size},): one value "
            "for each example of the batch, reduction='none'"
        )
    return values


def tied_names(model: nn.Module) -> Ties:
    """Return the further names of tensors that a model has under several.

    An output layer that shares its weight with the embedding gives ``{"head.weight":
    "embed.weight"}``: each name with the first name of the same tensor.
    """
    first: dict[object, str] = {}
    tied = {}
    for name, x in model.state_dict().items():
        if x.numel():
            place = (x.device, x.data_ptr(), x.dtype, x.shape, x.stride())
            if first.setdefault(place, name) != name:
                tied[name] = first[place]
    return tied
