"""The client: one local training loop, with one plug for a strategy's client half.

:func:`client_app` makes a complete ClientApp from a :class:`Task` and the client halves
it may be asked for. People who have a loop of their own use the functions that the
strategies export beside their halves instead.
"""

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from functools import cache, partial
from itertools import pairwise
from logging import WARNING
from typing import ClassVar, Protocol, cast

import numpy as np
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
    UserConfig,
)
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.core.errors import at_least, positive, refuse, whole
from flower_ext.core.protocol import (
    ARRAYS_KEY,
    CLIENT_HALF_KEY,
    CONFIG_KEY,
    METRICS_KEY,
    RUN_KEY,
    WRONG_HALF,
    Metrics,
)
from flower_ext.core.ties import TIED_KEY, TIED_TO_KEY, Ties
from flower_ext.wire.sparse import accept_sparse, unseal

Batch = Mapping[str, Tensor]

MakeOptimizer = Callable[
    [Iterable[nn.Parameter], "LocalSettings"], torch.optim.Optimizer
]

Mod = Callable[[Message, Context, Callable[[Message, Context], Message]], Message]


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
        ``(parameters, LocalSettings) -> torch.optim.Optimizer``; SGD by default.
    sample_labels : callable, optional
        ``(model, batch, generator) -> batch`` with labels drawn from the model's own
        predictions; needed by FedFish's ``sampled`` Fisher only.
    """

    model: Callable[[UserConfig], nn.Module]
    data: Callable[[Context], tuple[Batch, Batch]]
    loss: Callable[[nn.Module, Batch], Tensor]
    metrics: Callable[[nn.Module, Batch], Mapping[str, Tensor]] | None = None
    optimizer: "MakeOptimizer | None" = None
    sample_labels: Callable[[nn.Module, Batch, torch.Generator], Batch] | None = None


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


def random_seed(seed: int, server_round: int, client: int, stream: int = 0) -> int:
    """Return the seed of one client in one round, the same wherever it runs."""
    sequence = np.random.SeedSequence([seed, server_round, client, stream])
    return int(sequence.generate_state(1, np.uint64)[0] >> 1)


def seed_all(seed: int) -> None:
    """Seed the global generators of torch, NumPy and Python.

    A client's own code draws from all three: Hugging Face's ``train_test_split`` from
    NumPy's, an augmentation from Python's.
    """
    seed_torch(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    random.seed(seed)


@contextmanager
def _same_generators() -> Iterator[None]:
    """Leave the global generators of torch, NumPy and Python as they were."""
    numpy_state = np.random.get_state()  # noqa: NPY002
    python_state = random.getstate()
    try:
        # A GPU that nobody has used has no state to keep.
        begun = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        used = torch.cuda.device_count() if begun else 0
        with torch.random.fork_rng(devices=range(used)):
            yield
    finally:
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


def seed_torch(seed: int) -> None:
    """Seed torch's own generators, as ``torch.manual_seed`` does but in microseconds.

    That one visits every kind of device, a millisecond even where there is none.
    """
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def num_examples(data: Batch) -> int:
    """Return the number of examples, which all columns must share."""
    sizes = {name: len(column) for name, column in data.items()}
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
    for start, stop in pairwise([*cuts, total]):
        chosen = order[start:stop]
        yield {name: column[chosen] for name, column in data.items()}


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
        return _client(self.context)

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
        return make(_trainable(local.model), local.settings)

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
                _trainable(local.model), local.settings.max_gradient_norm
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


def train(local: Local, half: ClientHalf) -> float:
    """Train in place and return the mean objective over the steps.

    Parameters
    ----------
    local : Local
        Model, data and settings.
    half : ClientHalf
        Its ``begin`` is called first.

    Returns
    -------
    float
        NaN without a step.

    Notes
    -----
    BatchNorm has nothing to normalise a single example with. Where it would raise, the
    last example of an epoch goes into the batch before it, and a client that has one
    example only trains with the statistics that it received.
    """
    local.needs_two = _needs_two(local)
    half.begin(local)
    optimizer = half.optimizer(local)
    local.model.train()
    if local.needs_two and num_examples(local.train) == 1:
        for layer in _batch_norms(local.model):
            layer.eval()
    total, steps = 0.0, 0
    # Dropout has no generator of its own: it draws from torch's global one.
    with _same_generators():
        seed_all(local.seed(stream=1))
        for batch in half.batches(local):
            total += half.step(local, optimizer, batch)
            steps += 1
    return total / steps if steps else math.nan


def _batch_norms(model: nn.Module) -> list[nn.Module]:
    return [
        x for x in model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)
    ]


@torch.no_grad()
def _needs_two(local: Local) -> bool:
    """Whether there is a batch of one, on which the model's BatchNorm raises."""
    examples, size = num_examples(local.train), local.settings.batch_size
    alone = examples == 1 or (size > 1 and examples % size == 1)
    if not alone or not _batch_norms(local.model):
        return False
    tried = copy.deepcopy(local.model).train()
    one = {name: column[:1] for name, column in local.train.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            local.task.loss(tried, one)
        except ValueError:  # torch: more than 1 value per channel
            return True
    return False


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


def _require_told_ties(model: nn.Module, config: ConfigRecord) -> None:
    """Refuse to be one of a run that takes layers for one which only start alike."""
    names, firsts = config.get(TIED_KEY, []), config.get(TIED_TO_KEY, [])
    own = tied_names(model)
    for name, first in zip(
        cast("list[str]", names), cast("list[str]", firsts), strict=True
    ):
        if own.get(name, name) != own.get(first, first):
            raise ValueError(
                f"the server takes {first!r} and {name!r} for one tensor, since they "
                "are equal in its initial model; here they are two: let them start "
                "from different values"
            )


def _trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def example_losses(task: Task, model: nn.Module, batch: Batch) -> Tensor:
    """Return the task's losses, of shape ``(batch,)``."""
    return _per_example("loss", task.loss(model, batch), batch)


def _sgd(
    parameters: Iterable[nn.Parameter], settings: LocalSettings
) -> torch.optim.Optimizer:
    return torch.optim.SGD(
        parameters,
        lr=settings.learning_rate,
        momentum=settings.momentum,
        weight_decay=settings.weight_decay,
    )


@torch.no_grad()
def evaluate(
    task: Task, model: nn.Module, data: Batch, batch_size: int = 256
) -> dict[str, float]:
    """Return the mean ``loss`` and metrics over data, in evaluation mode.

    Without examples every value is NaN.
    """
    was_training = model.training
    model.eval()
    sums: dict[str, float] = {"loss": 0.0}
    for batch in batches(data, batch_size):
        found = {"loss": task.loss(model, batch)}
        if task.metrics:
            found |= task.metrics(model, batch)
        for name, values in found.items():
            total = float(_per_example(name, values, batch).double().sum())
            sums[name] = sums.get(name, 0.0) + total
    model.train(was_training)
    size = num_examples(data)
    return {name: value / size if size else math.nan for name, value in sums.items()}


def _per_example(name: str, values: Tensor, batch: Batch) -> Tensor:
    """Require one value for each example: a mean would be averaged twice."""
    size = num_examples(batch)
    shape = tuple(getattr(values, "shape", ("none",)))
    if shape != (size,):
        raise ValueError(
            f"{name!r} has shape {shape}, must be ({size},): one value "
            "for each example of the batch, reduction='none'"
        )
    return values


def client_app(task: Task, *halves: HalfFactory, mods: Sequence[Mod] = ()) -> ClientApp:
    """Make a ClientApp that trains and evaluates, for any strategy of the pack.

    Parameters
    ----------
    task : Task
        What is learned.
    *halves : type of ClientHalf
        Client halves that the server may ask for, as classes or partials of them.
        Plain local training, which FedAvg and its like need, is always there.
    mods : sequence of callable
        Flower mods, such as :func:`~flower_ext.simulation.packed`.

    Returns
    -------
    ClientApp
        Replies to ``train`` with the trained arrays, ``num-examples``, ``train-loss``
        and what the half adds; to ``evaluate`` with ``num-examples``, ``loss`` and the
        task's metrics on the client's test data.

    Notes
    -----
    Learning rate, epochs and the other :class:`LocalSettings` come from the message's
    configuration (``train_config``) or the run config. The result depends on seed,
    round and client only.
    """
    if not isinstance(task, Task):
        refuse("task", task, "a Task", "Task(model, data, loss)")
    if isinstance(task.model, nn.Module):
        cause = "lambda run_config: Net()"
        refuse(
            "Task.model", type(task.model).__name__, "a function that makes it", cause
        )
    known: dict[str, HalfFactory] = {ClientHalf.name: ClientHalf}
    for half in halves:
        owner = _owner(half)
        name = getattr(owner, "name", None)
        if not callable(half) or not isinstance(name, str):
            refuse("halves", half, "classes derived from ClientHalf")
        if len(halves) > 1 and getattr(owner, "exclusive", False):
            refuse(
                "halves",
                [getattr(_owner(h), "__name__", h) for h in halves],
                f"{getattr(owner, '__name__', owner)} alone",
                "a server that asks for another half would get round its guarantee",
            )
        known[str(name)] = half
    app = ClientApp(mods=list(mods))

    @app.train()
    def train_(message: Message, context: Context) -> Message:
        with _isolated():
            local = _open(task, message, context)
            half = _choose(known, local.config)
            _require_told_ties(local.model, local.config)
            loss = train(local, half)
            arrays, metrics = half.records(local)
        values: Metrics = {
            "num-examples": num_examples(local.train),
            "train-loss": loss,
            **metrics,
        }
        values = half.release(values)
        content = RecordDict(
            {
                ARRAYS_KEY: ArrayRecord(local.model.state_dict()),
                **arrays,
                METRICS_KEY: MetricRecord(values),
            }
        )
        if tied := tied_names(local.model):
            content[TIED_KEY] = ConfigRecord({**tied})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate_(message: Message, context: Context) -> Message:
        with _isolated():
            local = _open(task, message, context)
            half = _choose(known, local.config)
            values: Metrics = {
                "num-examples": num_examples(local.test),
                **evaluate(task, local.model, local.test),
                **half.evaluate(local),
            }
            values = half.release(values)
        return Message(
            RecordDict({METRICS_KEY: MetricRecord(values)}), reply_to=message
        )

    return app


@contextmanager
def _isolated() -> Iterator[None]:
    """Leave random states and torch's number of threads as they were."""
    threads = torch.get_num_threads()
    try:
        with _same_generators():
            yield
    finally:
        torch.set_num_threads(threads)


def _client(context: Context) -> int:
    return int(context.node_config.get("partition-id", context.node_id))


def _owner(half: HalfFactory) -> object:
    """Return the class behind a partial of it."""
    return half.func if isinstance(half, partial) else half


def _choose(known: Mapping[str, HalfFactory], config: ConfigRecord) -> ClientHalf:
    name = str(config.get(CLIENT_HALF_KEY, ClientHalf.name))
    if name not in known:
        advice = "add its class to client_app(task, ...)"
        for half in known.values():
            if getattr(_owner(half), "exclusive", False):
                advice = "a strategy of plain local training is all that it may serve"
        raise ValueError(
            f"{WRONG_HALF} {name!r}, this ClientApp has {sorted(known)}: {advice}"
        )
    return known[name]()


def _open(task: Task, message: Message, context: Context) -> Local:
    """Read a message: settings, model with the received weights, the client's data."""
    for key, kind in ((ARRAYS_KEY, ArrayRecord), (CONFIG_KEY, ConfigRecord)):
        if not isinstance(message.content.get(key), kind):
            raise ValueError(
                f"no {kind.__name__} {key!r} in the message, which has "
                f"{sorted(message.content)}: the strategy's arrayrecord_key and "
                f"configrecord_key must be {ARRAYS_KEY!r} and {CONFIG_KEY!r}"
            )
    config = message.content.config_records[CONFIG_KEY]
    settings = LocalSettings.read(config, context.run_config)
    if settings.torch_threads:
        torch.set_num_threads(settings.torch_threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    # What is random in a model and not sent must agree between clients; a random split
    # of a client's data must be the same in every round.
    seed_all(settings.seed)
    model = accept_sparse(task.model(context.run_config))
    record = unseal(message.content.array_records[ARRAYS_KEY])
    model.load_state_dict(record.to_torch_state_dict())
    seed_all(random_seed(settings.seed, 0, _client(context)))
    train_data, test_data = _columns(task.data(context), device)
    return Local(
        task=task,
        model=model.to(device),
        train=train_data,
        test=test_data,
        settings=settings,
        config=config,
        context=context,
        device=device,
        run=message.content.config_records.get(RUN_KEY, ConfigRecord()),
    )


def _columns(found: object, device: torch.device) -> tuple[Batch, Batch]:
    """Return a client's training and test data on a device, NumPy's as torch's."""
    advice = "(train, test), each a dict of tensors whose first axis counts examples"
    if not isinstance(found, tuple | list) or len(found) != 2:
        refuse("the task's data", type(found).__name__, advice)
    columns: list[Batch] = []
    for data in found:
        if not isinstance(data, Mapping):
            cause = "load it once and stack it: batches are made here"
            refuse("the task's data", type(data).__name__, advice, cause)
        for name, column in data.items():
            if not isinstance(column, Tensor | np.ndarray):
                refuse(f"column {name!r}", type(column).__name__, "a tensor")
        columns.append({k: torch.as_tensor(x).to(device) for k, x in data.items()})
    return columns[0], columns[1]
