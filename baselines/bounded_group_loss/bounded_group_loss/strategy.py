"""The strategies that are compared: FedAvg, and one run per bound."""

from flwr.app import UserConfig

from bounded_group_loss.dataset import GROUPS, LABELS
from flower_ext.strategies import BoundedGroupLoss


def make_strategies(config: UserConfig) -> dict[str, BoundedGroupLoss]:
    """Make the strategies by name; ``dual_bound=0`` is FedAvg, with group metrics."""
    groups = GROUPS[str(config["group"])]

    def make(upper_bound: float, dual_bound: float) -> BoundedGroupLoss:
        return BoundedGroupLoss(
            groups=groups,
            labels=LABELS if config["by-label"] else None,
            upper_bound=upper_bound,
            dual_bound=dual_bound,
            dual_learning_rate=float(config["dual-learning-rate"]),
        )

    strategies = {"fedavg": make(0.0, dual_bound=0.0)}
    for bound in str(config["upper-bounds"]).split():
        strategies[f"bound-{bound}"] = make(float(bound), float(config["dual-bound"]))
    return strategies
