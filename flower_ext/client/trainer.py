"""How a client takes its steps, for any client half.

A ClientApp is given a :class:`Trainer`. It makes a :class:`Session` for every message,
which trains all models of that message, and the session makes the :class:`Steps` of
each training.
"""

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from flower_ext.client.seeds import same_globals, seed_all
from flower_ext.client.several import choose
from flower_ext.client.task import Batch, example_losses, num_examples, per_example
from flower_ext.client.tensors import Tensors
from flower_ext.core.protocol import Metrics

if TYPE_CHECKING:
    from flower_ext.client.half import ClientHalf, Local


class Steps:
    """The steps of one training: plain ones.

    Parameters
    ----------
    local : Local
        Model, data and settings.
    half : ClientHalf
        Whose hooks are called.

    Attributes
    ----------
    batch : dict[str, Tensor] or None
        The examples of the next step.
    total, count : float, int
        Sum of the objectives of the steps so far, and their number.
    """

    batch: Batch | None = None
    total: float = 0.0
    count: int = 0
    _batches: Iterator[Batch] | None = None

    def __init__(self, local: "Local", half: "ClientHalf") -> None:
        self.local, self.half = local, half
        self.optimizer = half.optimizer(local)

    @property
    def mean(self) -> float:
        """The mean objective over the steps so far, NaN without one."""
        return self.total / self.count if self.count else math.nan

    def batches(self) -> Iterator[Batch]:
        """Yield the examples of every step."""
        return self.half.batches(self.local)

    def advance(self) -> bool:
        """Read the batch of the next step; return whether there is one."""
        if self._batches is None:
            self._batches = self.batches()
        self.batch = next(self._batches, None)
        return self.batch is not None

    def step(self) -> None:
        """Take the step of the batch that was read."""
        assert self.batch is not None
        self.total += self.take(self.batch)
        self.half.after_step(self.local)
        self.count += 1

    def take(self, batch: Batch) -> float:
        """Take one step; return the objective before it."""
        local, half = self.local, self.half
        self.optimizer.zero_grad()
        losses = half.objective(example_losses(local.task, local.model, batch), batch)
        loss = per_example("objective", losses, batch).mean()
        if (extra := half.regularizer(local.model)) is not None:
            loss = loss + extra
        loss.backward()  # type: ignore[no-untyped-call]
        half.after_backward(local.model)
        if local.settings.max_gradient_norm != math.inf:
            nn.utils.clip_grad_norm_(
                [p for p in local.model.parameters() if p.requires_grad],
                local.settings.max_gradient_norm,
            )
        self.optimizer.step()
        return float(loss.detach())

    def end(self) -> None:
        """Leave the model as one that nobody trains; called after errors too."""


class Session:
    """All trainings of one client for one message."""

    def steps(self, local: "Local", half: "ClientHalf") -> Steps:
        """Return the steps of one training, or refuse them before the first."""
        return Steps(local, half)

    def train(self, local: "Local", half: "ClientHalf") -> float:
        """Train a model in place and return the mean objective over the steps.

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
        BatchNorm has nothing to normalise a single example with. Where it would raise,
        the last example of an epoch goes into the batch before it, and a client that
        has one example only trains with the statistics that it received.
        """
        local.needs_two = _needs_two(local)
        # Before the steps are made, which may ask the half for an objective.
        half.begin(local)
        steps = self.steps(local, half)
        local.model.train()
        if local.needs_two and num_examples(local.train) == 1:
            for layer in batch_norms(local.model):
                layer.eval()
        try:
            # Dropout has no generator of its own: it draws from torch's global one.
            with same_globals():
                seed_all(local.seed(stream=1))
                self.take(steps)
                # What comes after does not depend on how it was trained.
                seed_all(local.seed(stream=4))
        finally:
            steps.end()
        return steps.mean

    def take(self, steps: Steps) -> None:
        """Take all steps of a training."""
        while steps.advance():
            steps.step()

    def measures(self, *, tests: bool = False) -> None:
        """Refuse that a half is shown a loss, where that would not be private.

        Parameters
        ----------
        tests : bool
            Whether it is of the client's test data.
        """

    def choose(self, local: "Local", models: Sequence[Tensors]) -> int:
        """Return which of several models loses least on the training data."""
        return choose([local.loss_of(arrays) for arrays in models])

    def report(self, metrics: Metrics) -> Metrics:
        """Return the metrics of a reply to training, with those of the trainer."""
        return metrics

    def report_evaluation(
        self, metrics: Metrics, local: "Local", own: Tensors | None
    ) -> Metrics:
        """Return the metrics of a reply to an evaluation.

        Parameters
        ----------
        metrics : dict
            What was measured.
        local : Local
            The client.
        own : dict[str, Tensor] or None
            The model that was evaluated, where it is not the received one.
        """
        return metrics

    def end(self) -> None:
        """See the client's personal state as it stays, after all else."""


class Trainer(ABC):
    """How the clients of a ClientApp take their steps.

    One trainer serves all messages, at the same time where an app has threads: what
    belongs to one message is in its session.
    """

    #: Whether the server is not told what an error says that may quote the data.
    discreet: ClassVar[bool] = False
    #: How many clients of a process may be in training at a time.
    at_once: int = 1

    @abstractmethod
    def session(self, local: "Local", half: "ClientHalf") -> Session:
        """Return what trains for one message.

        Called with the client's data, before the half sees them and before the model
        has its weights.
        """

    def admit(self, half: "type[ClientHalf]") -> None:  # noqa: B027
        """Refuse a client half that cannot be served, when the ClientApp is made."""


class Plain(Trainer):
    """Plain steps of the task's optimizer, SGD by default."""

    def session(self, local: "Local", half: "ClientHalf") -> Session:
        """Return a session that keeps nothing."""
        return Session()


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """Return the layers that normalise by the statistics of a batch."""
    return [
        x for x in model.modules() if isinstance(x, nn.modules.batchnorm._BatchNorm)
    ]


@torch.no_grad()
def _needs_two(local: "Local") -> bool:
    """Whether there is a batch of one, on which the model's BatchNorm raises."""
    examples, size = num_examples(local.train), local.settings.batch_size
    alone = examples == 1 or (size > 1 and examples % size == 1)
    if not alone or not batch_norms(local.model):
        return False
    tried = copy.deepcopy(local.model).train()
    one = {name: column[:1] for name, column in local.train.items()}
    with torch.random.fork_rng(devices=[]):
        try:
            local.task.loss(tried, one)
        except ValueError:  # torch: more than 1 value per channel
            return True
    return False
