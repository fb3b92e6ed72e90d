"""The methods that are compared, with the same cohorts, seeds and options."""

from collections.abc import Callable, Iterable, Mapping

from flwr.app import ArrayRecord, ConfigRecord, Message, UserConfig
from flwr.serverapp import Grid

from flower_ext.core.sampling import HeldOutSampler
from flower_ext.server.personal import PersonalStrategy
from flower_ext.strategies import (
    MRMTL,
    Ditto,
    Ensemble,
    FedBABU,
    FedBN,
    FedPer,
    FedRep,
    FineTuned,
    HypCluster,
    KNNPer,
    LocalOnly,
)
from personalization.model import make_model

# The last layer, of either model.
HEAD = "out.*"
METHODS: Mapping[
    str, tuple[type[PersonalStrategy], Callable[[UserConfig], dict[str, object]]]
] = {
    "fedavg": (PersonalStrategy, lambda config: {}),
    "local": (LocalOnly, lambda config: {}),
    "fine-tuned": (
        FineTuned,
        lambda config: {"tuning_epochs": int(config["tuning-epochs"])},
    ),
    "ditto": (Ditto, lambda config: {"strength": float(config["ditto-strength"])}),
    "mrmtl": (MRMTL, lambda config: {"strength": float(config["mrmtl-strength"])}),
    "fedper": (FedPer, lambda config: {"personal": HEAD}),
    "fedrep": (
        FedRep,
        lambda config: {"personal": HEAD, "head_epochs": int(config["head-epochs"])},
    ),
    "fedbn": (FedBN, lambda config: {"model": make_model(config)}),
    "fedbabu": (
        FedBABU,
        lambda config: {"tuning_epochs": int(config["tuning-epochs"])},
    ),
    "hypcluster": (
        HypCluster,
        lambda config: {"num_clusters": int(config["num-models"])},
    ),
    "ensemble": (
        Ensemble,
        lambda config: {"num_models": int(config["num-models"])},
    ),
    "knnper": (KNNPer, lambda config: {}),
}


def seldom(
    kind: type[PersonalStrategy], every: int, learning_rate: float
) -> type[PersonalStrategy]:
    """Return the strategy, evaluated after every so many rounds only.

    An evaluation asks all clients. Some methods train for it, with the learning rate,
    or that of all training if it is 0.
    """

    def configure_evaluate(
        self: PersonalStrategy,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> Iterable[Message]:
        if server_round % every:
            return []
        if learning_rate:
            config["learning-rate"] = learning_rate
        return kind.configure_evaluate(self, server_round, arrays, config, grid)

    return type(kind.__name__, (kind,), {"configure_evaluate": configure_evaluate})


def make_strategy(name: str, config: UserConfig) -> PersonalStrategy:
    """Make a method by its name."""
    if name not in METHODS:
        raise ValueError(f"strategies={name!r} must name some of {list(METHODS)}")
    kind, options = METHODS[name]
    sampler = HeldOutSampler(
        int(config["seed"]), num_training_clients=int(config["num-training-clients"])
    )
    every, rate = int(config["evaluate-every"]), float(config["tuning-learning-rate"])
    make = seldom(kind, every, rate)
    return make(
        sampler=sampler,
        fraction_train=float(config["fraction-train"]),
        **options(config),
    )
