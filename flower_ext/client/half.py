"""The client half: what a strategy's clients do besides plain local training."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from functools import cache, cached_property
from logging import WARNING
from typing import ClassVar, Protocol

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, UserConfig
from torch import Tensor, nn

from flower_ext._flower import log
from flower_ext.client.personal import Personal
from flower_ext.client.seeds import random_seed, seed_torch
from flower_ext.client.task import (
    Batch,
    LocalOptimizer,
    Task,
    batches,
    evaluate,
    num_examples,
)
from flower_ext.client.tensors import Tensors
from flower_ext.client.trainer import Session
from flower_ext.core.errors import at_least, positive, refuse, whole
from flower_ext.core.protocol import Metrics, Phase
from flower_ext.wire.codec import Codec
from flower_ext.wire.masks import Masks


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
            for key, value in config.items():
                if key in SETTINGS and not (key == "learning-rate" and "lr" in config):
                    name = "learning-rate" if key == "lr" else key
                    found[name.replace("-", "_")] = value
        return cls(**found)  # type: ignore[arg-type]


_SPELLED = {
    item.name.replace("_", ""): item.name.replace("_", "-")
    for item in fields(LocalSettings)
} | {"lr": "lr"}
#: Their keys in a configuration.
SETTINGS = frozenset(_SPELLED.values())


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


class Beside(dict[str, Tensors]):
    """Groups of arrays that came beside the model; one that did not come is named."""

    def __missing__(self, key: str) -> Tensors:
        """Refuse to look for what the server did not send."""
        refuse(
            "local.received",
            sorted(self),
            f"with {key!r}",
            "the strategy must send it: Payload(round.sent, beside={...})",
        )


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
        The client's own.
    device : torch.device
        The accelerator that was assigned to the client, or the CPU.
    run : ConfigRecord
        What the server says of a run that it saves: its ``name``, and the round that it
        is ``resumed-after``; empty otherwise.
    upload : Codec, optional
        How the server wants the change; None is the trained model as it is.
    masks : dict[str, ndarray of bool], optional
        The coordinates of the model that were sent; None if all were, or where
        :meth:`ClientHalf.receive` made the model of something else.
    received : dict[str, dict[str, Tensor]]
        Groups of arrays that came beside the model, by their keys in the message.
    came : dict[str, Tensor]
        The arrays that came in the model's place, where they came in; see
        :attr:`model_received`.
    loaded : dict[str, Tensor]
        The arrays that the model began with, where they came in; see :attr:`start`.
    session : Session
        The trainer's, for this message.
    branch : tuple of int
        Which of the message's models it is: empty for the received one.
    needs_two : bool
        Whether the model cannot be trained on a single example.
    phase : {"train", "evaluate"}
        What the message asks for.
    model_number : int
        Which of the server's models is trained, where it has several: what an encoded
        change of one leaves out is made up for in that one. The server says it of one
        that comes alone; a half that chooses sets it.
    epoch_size : int
        How many an epoch goes through, ``batch-size`` of them a step, where a trainer
        draws something else than examples, such as users; 0 is the examples.
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
    upload: Codec | None = None
    masks: Masks | None = None
    received: Mapping[str, Tensors] = field(default_factory=dict)
    came: Tensors = field(default_factory=dict)
    loaded: Tensors = field(default_factory=dict)
    session: Session = field(default_factory=Session)
    branch: tuple[int, ...] = ()
    needs_two: bool = False
    phase: Phase = "train"
    model_number: int = 0
    epoch_size: int = 0

    def __post_init__(self) -> None:
        self._branches = 0
        if not self.loaded:
            self._remember({})

    @property
    def client(self) -> int:
        """The client's stable number: its partition, or else its node."""
        return client_of(self.context)

    @property
    def server_round(self) -> int:
        """The current round."""
        return int(self.number("server-round", 0))

    @property
    def personal(self) -> Personal:
        """What the client keeps over rounds, and never sends."""
        return Personal(self.context.state, self.device)

    @cached_property
    def model_received(self) -> dict[str, Tensor]:
        """The arrays that came in the model's place, as they came."""
        return {name: x.to(self.device) for name, x in self.came.items()}

    @cached_property
    def start(self) -> dict[str, Tensor]:
        """The arrays that the model began this message with."""
        return {name: x.to(self.device) for name, x in self.loaded.items()}

    @property
    def end(self) -> dict[str, Tensor]:
        """The model's arrays as they are now: trained, once it is; no copies."""
        return {name: x.detach() for name, x in self.model.state_dict().items()}

    def number(self, key: str, default: float) -> float:
        """Return a number from the server's configuration."""
        value = self.config.get(key, default)
        if not isinstance(value, int | float):
            refuse(f"config[{key!r}]", value, "a number")
        return float(value)

    @property
    def steps_per_epoch(self) -> int:
        """Batches in one pass over the training data."""
        examples = self.epoch_size or num_examples(self.train)
        size = self.settings.batch_size
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
        return random_seed(
            self.settings.seed, self.server_round, self.client, stream, *self.branch
        )

    def load(self, arrays: Tensors) -> None:
        """Let the model begin with these arrays."""
        arrays = _apart(arrays, self.model)
        try:
            self.model.load_state_dict(arrays)
        except RuntimeError:
            # In words of one's own, and without torch's as a cause: what an error of
            # this package says is told to the server, also by a silo that trains
            # privately.
            if not (differing := _differing(arrays, self.model)):
                raise
            raise ValueError(
                "the arrays that came are not those of Task.model; a run begins with "
                f"initial_arrays of a model that it makes: {differing}"
            ) from None
        self._remember(arrays)

    def with_model(self, arrays: Tensors) -> "Local":
        """Return the same client at work on a model of its own, such as a personal one.

        Data, settings and trainer are the same; its random choices are its own, so that
        the model of this one trains as it would have without. ::

            personal = local.with_model(own)
            personal.fit(Proximal(towards=local.start, strength=0.1))
            local.personal.save(model=personal.end)

        Parameters
        ----------
        arrays : dict[str, Tensor]
            What the model begins with, under the names of the received one.
        """
        # By its place among the models of the message, not by when it is trained.
        self._branches += 1
        return self._on(arrays, (*self.branch, self._branches))

    def alone(self, local_steps: int) -> "Local":
        """Return the client on a model from a fresh start, as if there were no server.

        The start depends on the seed only, so that it is the same for all clients; the
        training on seed, client and settings, so that it is the same in every round.
        """
        with torch.random.fork_rng(devices=[]):
            seed_torch(random_seed(self.settings.seed, 0, 0, stream=3))
            model = self.task.model(self.context.run_config).to(self.device)
        return replace(
            self,
            model=model,
            loaded={},
            settings=replace(self.settings, local_steps=local_steps),
            config=ConfigRecord({"server-round": 0}),
            upload=None,
        )

    def fit(self, regularizer: "Regularizer | None" = None) -> float:
        """Train the model in place as the client's trainer does, with no half.

        Parameters
        ----------
        regularizer : callable, optional
            See :meth:`ClientHalf.regularizer`.

        Returns
        -------
        float
            The mean objective over the steps, NaN without one.
        """
        with torch.enable_grad():
            half = _Regularized(regularizer) if regularizer else ClientHalf()
            return self.session.train(self, half)

    def mean_loss(self, data: Batch, model: nn.Module | None = None) -> float:
        """Return the mean loss of a model, in evaluation mode."""
        self.session.measures(tests=data is self.test)
        return float(evaluate(self.task, model or self.model, data)["loss"])

    def loss_of(self, arrays: Tensors, data: Batch | None = None) -> float:
        """Return the mean loss of a model with these arrays, by default in training."""
        other = self._on(arrays, self.branch)
        return other.mean_loss(self.train if data is None else data)

    def best_of(self, models: Sequence[Tensors]) -> int:
        """Return which of several models loses least on the training data.

        Of equal ones it is the first. Under DPSGD it is a private choice, which is
        charged, wherever something is told that depends on it: in training, and in
        evaluations that are released.
        """
        return 0 if len(models) == 1 else self.session.choose(self, models)

    def measure(self, arrays: Tensors) -> dict[str, float]:
        """Return loss and metrics of a model with these arrays on the test data."""
        self.session.measures(tests=True)
        return evaluate(self.task, self.with_arrays(arrays), self.test)

    def with_arrays(self, arrays: Tensors) -> nn.Module:
        """Return a model of its own with these arrays."""
        return self._on(arrays, self.branch).model

    def _on(self, arrays: Tensors, branch: tuple[int, ...]) -> "Local":
        other = replace(self, model=_own_copy(self.model), branch=branch)
        other.load(_apart(arrays, self.model))
        return other

    def _remember(self, arrays: Tensors) -> None:
        state = self.model.state_dict()
        # A copy only where they travelled in another form: it is as large as the model.
        if arrays.keys() != state.keys():
            arrays = {name: x.detach().clone() for name, x in state.items()}
        self.loaded = arrays
        self.__dict__.pop("start", None)  # it is of what was loaded before


def _apart(arrays: Tensors, model: nn.Module) -> Tensors:
    """Copy those arrays that are the model's own, as of ``local.end``.

    What a model began with must not change while it is trained.
    """
    own = {x.data_ptr() for x in model.state_dict().values()}
    return {n: x.clone() if x.data_ptr() in own else x for n, x in arrays.items()}


def _differing(arrays: Tensors, model: nn.Module) -> str:
    """Return in which names or shapes arrays differ from those of a model."""
    own, came = (
        {name: tuple(getattr(x, "shape", ())) for name, x in some.items()}
        for some in (model.state_dict(), arrays)
    )
    if own.keys() != came.keys():
        missing, unknown = sorted(own.keys() - came), sorted(came.keys() - own)
        return f"missing {missing[:5]}, unknown {unknown[:5]}"
    other = [f"{n!r} {came[n]}, not {own[n]}" for n in own if came[n] != own[n]]
    return ", ".join(other[:5])


def _own_copy(model: nn.Module) -> nn.Module:
    """Copy a model, but for frozen parameters that nobody sends, such as a base's."""
    sent = model.state_dict()
    # What is loaded into the copy must not be loaded into the model.
    shared = {
        id(p): p
        for name, p in model.named_parameters()
        if not p.requires_grad and name not in sent
    }
    return deepcopy(model, {**shared})


Regularizer = Callable[[nn.Module], Tensor | None]


@dataclass(frozen=True, eq=False)
class Proximal:
    r"""The proximal term of FedProx and Ditto, :math:`\frac{\mu}{2} \|w - w_0\|^2`.

    Parameters
    ----------
    towards : dict[str, Tensor]
        :math:`w_0`; trained parameters without an array of their name are left free.
    strength : float
        :math:`\mu \ge 0`; 0 is no term.
    name : str (default: "strength")
        What it is called where it is refused.

    References
    ----------
    Li et al. 2020, "Federated optimization in heterogeneous networks", arXiv 1812.06127
    (FedProx, equation 2); Li et al. 2021, "Ditto: fair and robust federated learning
    through personalization", arXiv 2012.04221.

    Examples
    --------
    >>> model = nn.Linear(1, 1, bias=False)
    >>> term = Proximal({"weight": model.weight.detach() - 3}, strength=2.0)
    >>> float(term(model))
    9.0
    """

    towards: Tensors
    strength: float
    name: str = "strength"

    def __post_init__(self) -> None:
        at_least(self.name, self.strength, 0)

    def __call__(self, model: nn.Module) -> Tensor | None:
        """Return the term; None if there is none."""
        if not self.strength:
            return None
        squares = [
            (p - self.towards[name].to(p)).square().sum()
            for name, p in trainable(model).items()
            if name in self.towards
        ]
        if not squares:
            names = f"with names of trained parameters {list(trainable(model))[:5]}"
            refuse("towards", list(self.towards)[:5], names)
        return self.strength / 2 * torch.stack(squares).sum()

    def require_stable(self, local: Local) -> None:
        r"""Refuse a strength with which SGD would step over :math:`w_0` and away.

        Its steps multiply the distance by :math:`1 - \eta\mu`, in the term alone; with
        momentum :math:`\beta` they converge for :math:`\eta\mu < 2(1 + \beta)`. Of
        other optimizers nothing is said.
        """
        rate, momentum = local.settings.learning_rate, local.settings.momentum
        if local.task.optimizer is None:
            require_stable(self.name, self.strength, rate, momentum)


def require_stable(
    name: str, strength: float, learning_rate: float, momentum: float
) -> None:
    """Refuse a proximal term that SGD cannot follow, see :class:`Proximal`."""
    bound = 2 * (1 + momentum) / learning_rate if learning_rate else math.inf
    if strength >= bound:
        refuse(
            name,
            strength,
            f"< {bound:.6g} at a learning rate of {learning_rate:g}",
            "every step would lead further away; a lower learning rate allows more",
        )


class ClientHalf:
    """What a strategy's clients do besides plain local training.

    A new one is made for every message. Override what differs; a half that overrides
    nothing is plain local training. The hooks are called in this order:

    ==================  ==============================================================
    make_model          first of all, in training and in evaluation
    receive             before the model is loaded, in both
    begin               before the first step, and ``optimizer`` after it
    objective,          in every step, with ``batches`` for its examples; then
    regularizer,        ``after_step``
    after_backward
    after_training      once the received model is trained
    records             what is added to the reply
    model_to_send       what of the trained model is in it
    model_to_evaluate,  in evaluation
    evaluate
    release             last of all
    ==================  ==============================================================

    Steps are taken by the ClientApp's trainer, whichever it is: plain ones, or those
    of DP-SGD.
    """

    #: Messages name the half that they need.
    name: ClassVar[str] = "plain"
    #: A key of the configuration that asks for this half where no half is named: as by
    #: a strategy of Flower's, which knows of none.
    asked_by: ClassVar[str] = ""
    #: Models that it trains in a round: the received one, and those of ``with_model``.
    num_trainings: int = 1
    #: Whether all that it sends and keeps is made of trained models and of what the
    #: server sent, and nothing of what else the client's data say. DPSGD takes no other
    #: half that overrides hooks which see data. The class that overrides them says it.
    post_processing: ClassVar[bool] = False
    #: Whether an evaluation also tells how the received model does, with metrics
    #: ``received-loss`` and the like: what the server compares a personal model with.
    compares: ClassVar[bool] = False
    #: Whether it is of no use without what it kept in earlier rounds. A
    #: :class:`~flower_ext.server.personal.PersonalStrategy` then warns where clients
    #: have trained and have kept nothing, as on a grid without clients' states. An
    #: object may say False where the server's options need nothing kept.
    keeps: bool = False
    #: Whether what it sends depends on what it kept in earlier rounds. A mechanism that
    #: counts on secret cohorts of fixed size refuses it.
    sends_kept: ClassVar[bool] = False

    def planned_steps(self, local: Local) -> int | None:
        """Return the steps of all trainings of a round, where not all are as long.

        Asked before :meth:`receive`, by a trainer that charges them together. None is
        ``num_trainings`` times those of the first.
        """
        return None

    def make_model(
        self, task: Task, run_config: UserConfig, config: ConfigRecord
    ) -> nn.Module:
        """Return the model of this message, before its weights are loaded.

        Override it where the server says in ``config`` which model it is, such as a
        slice of the full one, which a small client need not hold::

            return task.model({**run_config, "width": config["width"]})
        """
        return task.model(run_config)

    def receive(self, local: Local, arrays: Tensors) -> Tensors:
        """Return the arrays that the model is to begin with, of those that came.

        Override it where the server sends something else than one model, such as
        several to choose from: ``local.loss_of(arrays)`` is the loss of one of them.
        """
        return arrays

    def begin(self, local: Local) -> None:
        """Look at model and data before the first step."""

    def optimizer(self, local: Local) -> torch.optim.Optimizer:
        """Return the optimizer of this local training."""
        make, parameters = local.task.optimizer or _sgd, trainable(local.model)
        if isinstance(make, LocalOptimizer):
            return make.make(parameters, local)
        return make(parameters.values(), local.settings)

    def batches(self, local: Local) -> Iterator[Batch]:
        """Return the batch of every step: epochs in an order of their own."""
        order = torch.Generator().manual_seed(local.seed())
        steps, num_steps = 0, local.num_steps
        while steps < num_steps:
            for batch in batches(
                local.train,
                local.settings.batch_size,
                order,
                join_last=local.needs_two and local.settings.batch_size > 1,
            ):
                yield batch
                steps += 1
                if steps == num_steps:
                    break

    def objective(self, losses: Tensor, batch: Batch) -> Tensor:
        """Return what each example adds to the objective, of shape ``(batch,)``.

        The trainer minimises the mean, or, under DP-SGD, clips each example's gradient.
        There an example's value may depend on that example only.
        """
        return losses

    def regularizer(self, model: nn.Module) -> Tensor | None:
        """Return a scalar that is added to the objective, which knows no data.

        Such as :class:`Proximal`. Under DP-SGD its gradient is added after clipping and
        noise.
        """
        return None

    def after_backward(self, model: nn.Module) -> None:
        """Look at the gradients of a step, or change them, before it is taken.

        They are not yet scaled to ``max-gradient-norm``. Under DP-SGD they are clipped
        and noisy.
        """

    def after_step(self, local: Local) -> None:
        """Change the model after a step: a projection, a mask."""

    def after_training(self, local: Local) -> None:
        """Do what comes after training, such as training a second, personal model."""

    def records(
        self, local: Local
    ) -> tuple[Mapping[str, ArrayRecord | Tensors], Metrics]:
        """Return groups of arrays and metrics to add to the reply."""
        return {}, {}

    def model_to_send(self, local: Local) -> Tensors | None:
        """Return the arrays to send as the trained model, None for all of it.

        Those that are left out stay at home, and none need to be sent at all. Of each
        the server learns the change from what it has sent under the name, whatever the
        model began with: ``local.model_received``.
        """
        return None

    def model_to_evaluate(self, local: Local) -> Tensors | None:
        """Return the arrays of the model to evaluate, None for the received one."""
        return None

    def evaluate(self, local: Local) -> Metrics:
        """Return metrics to add to the reply to an evaluation."""
        return {}

    def release(self, metrics: Metrics) -> Metrics:
        """Return those metrics of a reply that may leave the client."""
        return metrics


class _Regularized(ClientHalf):
    """Plain local training with a regularizer."""

    def __init__(self, regularizer: Regularizer) -> None:
        self._regularizer = regularizer

    def regularizer(self, model: nn.Module) -> Tensor | None:
        return self._regularizer(model)


class HalfFactory(Protocol):
    """A client half's class, or a partial of it."""

    def __call__(self) -> ClientHalf:
        """Make a half for one message."""


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are trained, under the names by which they travel."""
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


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
