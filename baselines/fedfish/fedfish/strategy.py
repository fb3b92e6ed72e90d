"""The strategies that are compared, with the same cohorts, seeds and options."""

from flwr.app import UserConfig

from fedfish.client_app import BarrierClient
from flower_ext import AdditiveStrategy
from flower_ext.core.protocol import Config, Round
from flower_ext.core.sampling import HeldOutSampler
from flower_ext.strategies import FedFish


class WithEpochs(FedFish):
    """FedFish that tells its clients how many local epochs to train."""

    def __init__(self, local_epochs: int, **options: object) -> None:
        super().__init__(barrier=True, **options)  # type: ignore[arg-type]
        self.local_epochs = local_epochs

    def tell(self, round: Round) -> Config:
        """Tell clients."""
        return {**super().tell(round), "local-epochs": self.local_epochs}


class FedAvg(WithEpochs):
    """FedAvg with FedFish's barrier; its clients send no Fisher."""

    client_half = BarrierClient
    contribution = AdditiveStrategy.contribution
    zero = AdditiveStrategy.zero
    update = AdditiveStrategy.update
    report = AdditiveStrategy.report


def make_strategy(name: str, run_config: UserConfig) -> WithEpochs:
    """Make ``fedavg`` or ``fedfish``, or ``fedfish@16`` with 16 local epochs."""
    kind, _, epochs = name.partition("@")
    options = {
        "local_epochs": int(epochs or run_config["local-epochs"]),
        "sampler": HeldOutSampler(
            int(run_config["seed"]),
            num_training_clients=int(run_config["num-training-clients"]),
            same_for_evaluation=True,
        ),
        "fraction_train": float(run_config["fraction-train"]),
        "fraction_evaluate": float(run_config["fraction-train"]),
    }
    if kind == "fedavg":
        return FedAvg(**options)
    if kind == "fedfish":
        return WithEpochs(
            damping=float(run_config["damping"]),
            estimator=run_config["estimator"],
            normalization=run_config["normalization"],
            **options,
        )
    raise ValueError(f"strategies={name!r} must name fedavg or fedfish")
