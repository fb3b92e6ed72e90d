"""The strategies that are compared: FedAvg, one run per bound, and minimax."""

from flwr.app import UserConfig

from bounded_group_loss.dataset import SOURCES, group_names
from flower_ext.core.sampling import UniformSampler
from flower_ext.strategies import BoundedGroupLoss


def make_strategies(config: UserConfig) -> dict[str, BoundedGroupLoss]:
    """Make the strategies by name.

    ``dual_bound=0`` is FedAvg, with group metrics. A bound of 0, which nothing can
    meet, makes the duals grow until they weigh the worst group alone: minimax.
    """

    def make(upper_bound: float, dual_bound: float) -> BoundedGroupLoss:
        return BoundedGroupLoss(
            groups=group_names(config),
            labels=SOURCES[str(config["dataset"])].labels
            if config["by-label"]
            else None,
            upper_bound=upper_bound,
            dual_bound=dual_bound,
            dual_learning_rate=float(config["dual-learning-rate"]),
            fraction_train=float(config["fraction-train"]),
            sampler=UniformSampler(int(config["seed"])),
        )

    largest = float(config["dual-bound"])
    strategies = {"fedavg": make(0.0, dual_bound=0.0)}
    for bound in str(config["upper-bounds"]).split():
        strategies[f"bound-{bound}"] = make(float(bound), largest)
    if config["minimax"]:
        strategies["minimax"] = make(0.0, largest)
    return strategies
