"""The client half: what a strategy's clients do besides plain local training."""

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache
from logging import WARNING
from typing import ClassVar, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.seeds import random_seed
from flower_ext.client.task import (
    Batch,
    Task,
    batches,
    evaluate,
    example_losses,
    num_examples,
)
from flower_ext.core.errors import at_least, positive, refuse, whole
from flower_ext.core.protocol import Metrics


@dataclass(frozen=True)
class LocalSettings:
    """Settings of local training, read from the message's and the run's configuration.

    Parameters
    ----------
    learning_rate : float (default: 0.1)
        Key ``learning-rate``, or ``lr``.
    local_epochs : int (default: 1)
        Passes over the client's data.
    local_steps : int (default: 0)
        Steps instead of epochs; 0 means epochs.
    batch_size : int (default: 32)
        Examples a step; the last batch of an epoch may be smaller, or larger by one
        that BatchNorm could not take alone.
    momentum, weight_decay : float (default: 0.0)
        Of the default optimizer.
    max_gradient_norm : float (default: inf)
        Gradients are scaled down to this l2 norm.
    seed : int (default: 0)
        With round and client it fixes every random choice.
    torch_threads : int (default: 1)
        Threads a virtual client. Two threads each on two busy cores cost a factor of
        20, so this is 1 unless told otherwise; 0 leaves torch's setting alone.
    """

    learning_rate: float = 0.1
    local_epochs: int = 1
    local_steps: int = 0
    batch_size: int = 32
    momentum: float = 0.0
    weight_decay: float = 0.0
    max_gradient_norm: float = math.inf
    seed: int = 0
    torch_threads: int = 1

    def __post_init__(self) -> None:
        at_least("learning-rate", self.learning_rate, 0)
        whole("local-epochs", self.local_epochs, 0)
        whole("local-steps", self.local_steps, 0)
        whole("batch-size", self.batch_size, 1)
        at_least("momentum", self.momentum, 0)
        at_least("weight-decay", self.weight_decay, 0)
        if self.max_gradient_norm != math.inf:
            positive("max-gradient-norm", self.max_gradient_norm)
        whole("seed", self.seed, 0)
        whole("torch-threads", self.torch_threads, 0)

    @classmethod
    def read(cls, *configs: Mapping[str, object]) -> "LocalSettings":
        """Read from configurations; the first that has a key decides.

        Raises
        ------
        ValueError
            If a configuration has a key in another spelling, such as ``learning_rate``,
            which would not be read.
        """
        found: dict[str, object] = {}
        for config in configs:
            _require_spelling(config)
        for config in reversed(configs):
            for item in fields(cls):
                key = item.name.replace("_", "-")
                for name in (key, "lr") if key == "learning-rate" else (key,):
                    if name in config:
                        found[item.name] = config[name]
        return cls(**found)  # type: ignore[arg-type]


_SPELLED = {
    item.name.replace("_", ""): item.name.replace("_", "-")
    for item in fields(LocalSettings)
} | {"lr": "lr"}


def _require_spelling(config: Mapping[str, object]) -> None:
    for key, value in config.items():
        right = _right_spelling(key)
        if right != key and right not in config:
            refuse(f"configuration {key!r}", value, f"spelt {right!r}")


@cache
def _right_spelling(key: str) -> str:
    """Return a setting's own spelling, and any other key as it is."""
    letters = "".join(filter(str.isalnum, key)).lower()
    if letters in _SPELLED:
        return _SPELLED[letters]
    for near in get_close_matches(key, _SPELLED.values(), 1, 0.85):
        log(WARNING, "The configuration has %r, the setting is called %r", key, near)
    return key


@dataclass
class Local:
    """One client at work on one message: what a client half is given.

    Attributes
    ----------
    task : Task
        What is learned.
    model : torch.nn.Module
        With the received weights; trained in place.
    train, test : dict[str, Tensor]
        The client's data, on ``device``.
    settings : LocalSettings
        How it trains.
    config : ConfigRecord
        What the server sent along.
    context : Context
        The client's own; ``context.state`` stays with it between rounds.
    device : torch.device
        The accelerator that was assigned to the client, or the CPU.
    run : ConfigRecord
        What the server says of a run that it saves: its ``name``, and the round that it
        is ``resumed-after``; empty otherwise.
    """

    task: Task
    model: nn.Module
    train: Batch
    test: Batch
    settings: LocalSettings
    config: ConfigRecord
    context: Context
    device: torch.device
    run: ConfigRecord = field(default_factory=ConfigRecord)
    # Whether the model cannot be trained on a single example.
    needs_two: bool = False

    @property
    def client(self) -> int:
        """The client's stable number: its partition, or else its node."""
        return client_of(self.context)

    @property
    def server_round(self) -> int:
        """The current round."""
        return int(self.number("server-round", 0))

    def number(self, key: str, default: float) -> float:
        """Return a number from the server's configuration."""
        value = self.config.get(key, default)
        if not isinstance(value, int | float):
            refuse(f"config[{key!r}]", value, "a number")
        return float(value)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training data."""
        examples, size = num_examples(self.train), self.settings.batch_size
        joined = self.needs_two and examples > size > 1 and examples % size == 1
        return math.ceil(examples / size) - joined

    @property
    def num_steps(self) -> int:
        """Optimizer steps of this local training; none without examples."""
        settings = self.settings
        if not self.steps_per_epoch:
            return 0
        return settings.local_steps or settings.local_epochs * self.steps_per_epoch

    def seed(self, stream: int = 0) -> int:
        """Return a seed for a use of its own: 0 is the order of the batches."""
        return random_seed(self.settings.seed, self.server_round, self.client, stream)

    def mean_loss(self, data: Batch, model: nn.Module | None = None) -> float:
        """Return the mean loss of a model, in evaluation mode."""
        return float(evaluate(self.task, model or self.model, data)["loss"])


class ClientHalf:
    """What a strategy's clients do besides plain local training.

    A new one is made for every message. Override what differs; a half that overrides
    nothing is plain local training.
    """

    #: Messages name the half that they need.
    name: ClassVar[str] = "plain"
    #: What this half promises, another half of the same ClientApp would break.
    exclusive: ClassVar[bool] = False

    def begin(self, local: Local) -> None:
        """Look at model and data before the first step."""

    def optimizer(self, local: Local) -> torch.optim.Optimizer:
        """Return the optimizer of this local training."""
        make = local.task.optimizer or _sgd
        return make(trainable(local.model), local.settings)

    def batches(self, local: Local) -> Iterator[Batch]:
        """Return the batch of every step: epochs in an order of their own."""
        order = torch.Generator().manual_seed(local.seed())
        steps = 0
        while steps < local.num_steps:
            for batch in batches(
                local.train,
                local.settings.batch_size,
                order,
                join_last=local.needs_two and local.settings.batch_size > 1,
            ):
                yield batch
                steps += 1
                if steps == local.num_steps:
                    break

    def step(
        self, local: Local, optimizer: torch.optim.Optimizer, batch: Batch
    ) -> float:
        """Take one optimizer step; return the objective before it."""
        optimizer.zero_grad()
        loss = self.objective(example_losses(local.task, local.model, batch), batch)
        loss.backward()  # type: ignore[no-untyped-call]
        self.after_backward(local.model)
        if local.settings.max_gradient_norm != math.inf:
            nn.utils.clip_grad_norm_(
                trainable(local.model), local.settings.max_gradient_norm
            )
        optimizer.step()
        return float(loss.detach())

    def objective(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return the scalar to minimise, from losses of shape ``(batch,)``."""
        return losses.mean()

    def after_backward(self, model: nn.Module) -> None:
        """Look at the gradients after each backward pass, before they are clipped."""

    def records(self, local: Local) -> tuple[Mapping[str, ArrayRecord], Metrics]:
        """Return array records and metrics to add to the reply."""
        return {}, {}

    def evaluate(self, local: Local) -> Metrics:
        """Return metrics to add to the reply to an evaluation."""
        return {}

    def release(self, metrics: Metrics) -> Metrics:
        """Return those metrics of a reply that may leave the client."""
        return metrics


class HalfFactory(Protocol):
    """A client half's class, or a partial of it."""

    def __call__(self) -> ClientHalf:
        """Make a half for one message."""


def trainable(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters that are trained."""
    return [p for p in model.parameters() if p.requires_grad]


def _sgd(
    parameters: Iterable[nn.Parameter], settings: LocalSettings
) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


def client_of(context: Context) -> int:
    """Return a client's stable number: its partition, or else its node."""
    return int(context.node_config.get("partition-id", context.node_id))
