"""The methods: what the server does, and what workers are told in each round."""

from dataclasses import dataclass
from functools import partial

import torch
from flwr.app import UserConfig

from diloco.client_app import BETAS, INNER_KEY
from flower_ext import AdditiveStrategy
from flower_ext.core.arrays import Arrays
from flower_ext.core.schedules import Cosine
from flower_ext.server.callbacks import Callback, Schedule
from flower_ext.server.optimizers import SGD, TorchOptimizer
from flower_ext.strategies import DiLoCo
from flower_ext.wire import EDEN, Codec, ErrorFeedback

KINDS = ("sync", "fedavg", "diloco", "muloco")


@dataclass(frozen=True)
class Method:
    """A method, by its name: ``diloco/4:2+`` has 4 fragments, 2 bits and feedback.

    Parameters
    ----------
    name : str
        One of :data:`KINDS`, with ``/`` and the number of fragments, ``:`` and bits a
        value, and ``+`` for error feedback, where wanted.
    config : dict
        The run config.
    """

    name: str
    config: UserConfig

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"methods={self.name!r} must begin with one of {KINDS}")
        if self.inner_steps % self.steps:
            raise ValueError(
                f"inner-steps={self.inner_steps} must be a multiple of {self.steps}, "
                f"the steps of a round of {self.name}"
            )

    @property
    def kind(self) -> str:
        """What it is but for fragments and codec."""
        return self.name.removesuffix("+").partition(":")[0].partition("/")[0]

    @property
    def fragments(self) -> int:
        """How many parts of the model are exchanged in turns."""
        return int(self.name.removesuffix("+").partition(":")[0].partition("/")[2] or 1)

    @property
    def codec(self) -> Codec | None:
        """How changes travel."""
        bits = self.name.removesuffix("+").partition(":")[2]
        if not bits:
            return None
        feedback = self.name.endswith("+")
        codec = EDEN(float(bits), unbiased=not feedback)
        return ErrorFeedback(codec) if feedback else codec

    @property
    def inner_steps(self) -> int:
        """Of each worker in all rounds."""
        return int(self.config["inner-steps"])

    @property
    def steps(self) -> int:
        """Of each worker in a round."""
        between = int(self.config["steps-between"])
        return 1 if self.kind == "sync" else between // self.fragments

    @property
    def rounds(self) -> int:
        """Of the run."""
        return self.inner_steps // self.steps

    @property
    def tokens(self) -> int:
        """Tokens that all workers train on in a round."""
        each = int(self.config["batch-size"]) * int(self.config["window"])
        return int(self.config["num-clients"]) * each * self.steps

    @property
    def learning_rate(self) -> Cosine:
        """The rate of the optimizer of each round: down to a tenth."""
        key = {"sync": "sync-", "muloco": "muon-"}.get(self.kind, "") + "learning-rate"
        rate = float(self.config[key])
        return Cosine(rate, self.rounds, 0.1 * rate)

    def callbacks(self) -> list[Callback]:
        """Return what tells workers how they train in each round."""
        inner = {"sync": "sgd", "muloco": "muon"}.get(self.kind, "adamw")
        # A worker's change is minus its gradient where there is one step.
        rate = (lambda _: 1.0) if self.kind == "sync" else self.learning_rate
        return [
            Schedule("learning-rate", rate),
            Schedule("local-steps", lambda _: self.steps),
            Schedule(INNER_KEY, lambda _: inner),
        ]

    def strategy(self) -> AdditiveStrategy:
        """Make the strategy."""
        if self.kind == "sync":
            decay = float(self.config["weight-decay"])
            optimizer = ScheduledAdamW(self.learning_rate, decay)
            return Synchronous(
                fraction_evaluate=0.0, server_optimizer=optimizer, upload=self.codec
            )
        if self.kind == "fedavg":
            return Synchronous(fraction_evaluate=0.0, upload=self.codec)
        rate = float(self.config["outer-learning-rate"])
        momentum = float(self.config["outer-momentum"])
        return DiLoCo(
            fragments=self.fragments,
            fraction_evaluate=0.0,
            server_optimizer=SGD(rate, momentum, nesterov=momentum > 0),
            upload=self.codec,
        )


class Synchronous(AdditiveStrategy):
    """The mean of what workers send, who all weigh the same."""

    equal_weights = True


class ScheduledAdamW(TorchOptimizer):
    """AdamW on the server, with a learning rate for every step.

    Parameters
    ----------
    schedule : callable
        ``step -> learning rate``, from 1.
    weight_decay : float
        Decoupled.
    """

    def __init__(self, schedule: Cosine, weight_decay: float) -> None:
        self._schedule, self._decay = schedule, weight_decay
        super().__init__(self._of_step(1))

    def _of_step(self, step: int) -> "partial[torch.optim.Optimizer]":
        rate = self._schedule(step)
        return partial(
            torch.optim.AdamW, lr=rate, betas=BETAS, weight_decay=self._decay
        )

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model."""
        done = max((int(x) for x in self.state.get("step", {}).values()), default=0)
        self.factory = self._of_step(done + 1)
        return super().step(sent, direction)
