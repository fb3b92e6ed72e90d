"""The strategies that are compared, with the same cohorts and options."""

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.sampling import UniformSampler
from flower_ext.strategies import MaxFL


class FedAvg(MaxFL):
    """FedAvg with MaxFL's metrics: the weights are the numbers of examples."""

    contribution = AdditiveStrategy.contribution
    divisor = AdditiveStrategy.divisor
    update = AdditiveStrategy.update
    report = AdditiveStrategy.report


def make_strategy(name: str, config: UserConfig) -> MaxFL:
    """Make one of the strategies ``fedavg`` and ``maxfl``."""
    kinds = {"fedavg": FedAvg, "maxfl": MaxFL}
    if name not in kinds:
        raise ValueError(f"strategies={name!r} must name {' or '.join(kinds)}")
    return kinds[name](
        temperature=float(config["temperature"]),
        warmup_steps=int(config["warmup-steps"]),
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=float(config["fraction-evaluate"]),
        sampler=UniformSampler(int(config["seed"])),
    )
