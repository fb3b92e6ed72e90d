"""The strategies that are compared, with the same cohorts, seeds and options."""

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.sampling import UniformSampler
from flower_ext.strategies import FedFish


def make_strategy(name: str, run_config: UserConfig) -> AdditiveStrategy:
    """Make one of the strategies ``fedavg`` and ``fedfish``."""
    options = {
        "sampler": UniformSampler(int(run_config["seed"]), same_for_evaluation=True),
        "fraction_train": float(run_config["fraction-train"]),
        "fraction_evaluate": float(run_config["fraction-train"]),
    }
    if name == "fedavg":
        return AdditiveStrategy(**options)
    if name == "fedfish":
        return FedFish(damping=float(run_config["damping"]), barrier=True, **options)
    raise ValueError(f"strategies={name!r} must name fedavg or fedfish")
