"""The strategies that are compared, with the same cohorts and options."""

import gc
from collections.abc import Callable, Iterable
from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, UserConfig
from flwr.serverapp import Grid
from flwr.serverapp.strategy import QFedAvg, Strategy

from fair_objectives.client_app import LOSS, MeasuringClient
from fair_objectives.dataset import num_schools
from flower_ext import AdditiveStrategy
from flower_ext.core.protocol import Config, Round
from flower_ext.core.sampling import UniformSampler
from flower_ext.strategies import (
    TERM,
    AgnosticFL,
    BoundedGroupLoss,
    FedMGDA,
    MaxFL,
    MosT,
)


class EqualFedAvg(AdditiveStrategy):
    """FedAvg whose clients all weigh the same."""

    equal_weights = True


class MeasuredQFedAvg(QFedAvg):
    """Flower's own q-FedAvg; its clients are asked for the received model's loss."""

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask for the half that measures."""
        config[MeasuringClient.asked_by] = True
        return super().configure_train(server_round, arrays, config, grid)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Aggregate as Flower does."""
        # It collects garbage after every reply: of all that is there, where clients are
        # in this process, that takes longer than the rest of the round.
        gc.freeze()
        try:
            return super().aggregate_train(server_round, replies)
        finally:
            gc.unfreeze()


class GentleBound(BoundedGroupLoss):
    """Bounded group loss with a learning rate of its own.

    A pupil weighs up to ``1 + multiplier-bound``, which is a factor of a step.
    """

    learning_rate = 0.0

    def tell(self, round: Round) -> Config:
        """Tell clients the learning rate, too."""
        return {**super().tell(round), "learning-rate": self.learning_rate}


def bounded(upper_bound: float, config: UserConfig, **options: object) -> Strategy:
    """Return a bound on the loss of every school."""
    strategy = GentleBound(
        groups=[f"school-{i}" for i in range(num_schools(config))],
        upper_bound=upper_bound,
        dual_learning_rate=float(config["dual-learning-rate"]),
        multiplier_bound=float(config["multiplier-bound"]),
        **options,  # type: ignore[arg-type]
    )
    strategy.learning_rate = float(config["bounded-learning-rate"])
    return strategy


def make_strategy(name: str, config: UserConfig) -> Strategy:
    """Make a strategy by name; ``term@5``, ``q-fedavg@2`` and ``bounded@0.45`` of it.

    The number is the tilt, q, or the bound of every school's loss.
    """
    kind, _, number = name.partition("@")
    value = float(number or 1)
    makers: dict[str, Callable[..., Strategy]] = {
        "fedavg": AdditiveStrategy,
        "fedavg-equal": EqualFedAvg,
        "term": partial(TERM, client_tilt=value),
        "agnostic": partial(
            AgnosticFL, weight_learning_rate=float(config["weight-learning-rate"])
        ),
        "bounded": partial(bounded, value, config),
        "maxfl": partial(
            MaxFL,
            temperature=float(config["temperature"]),
            warmup_rounds=int(config["warmup-rounds"]),
        ),
        "fedmgda": FedMGDA,
        "fedmgda+": partial(
            FedMGDA, max_deviation=float(config["max-deviation"]), normalize=True
        ),
        "most": partial(MosT, int(config["num-models"])),
    }
    share = {"fraction_train": float(config["fraction-train"])}
    if kind == "q-fedavg":
        rate = float(config["learning-rate"])
        options = {"q": value, "train_loss_key": LOSS, "fraction_evaluate": 0.0}
        return MeasuredQFedAvg(rate, **options, **share)  # type: ignore[arg-type]
    if kind not in makers:
        known = sorted([*makers, "q-fedavg"])
        raise ValueError(f"strategies={name!r} must name one of {known}")
    sampler = UniformSampler(int(config["seed"]))
    return makers[kind](fraction_evaluate=0.0, sampler=sampler, **share)
