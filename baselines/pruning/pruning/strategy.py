"""Federated averaging whose server prunes, and whose messages are as sparse."""

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.optimizers import (
    SGD,
    OneShotSparsity,
    PeriodicSparsity,
    PolynomialSparsity,
    PruneAfter,
    ServerOptimizer,
)
from flower_ext.wire import Nonzero

# Those whose masks have their sparsity from the first round on, and change.
GROWING = ("set", "rigl")
CRITERIA = ("magnitude", "saliency", "random", *GROWING)


def make_optimizer(name: str, config: UserConfig) -> ServerOptimizer:
    """Make the server's optimizer by the name of a run.

    Parameters
    ----------
    name : str
        ``none``; a criterion, ``-erk`` or ``-once`` behind it, with a sparsity,
        ``magnitude-erk:0.8``; or n of m, ``2:4``.
    config : UserConfig
        The run's.
    """
    server = SGD(float(config["server-learning-rate"]))
    if name == "none":
        return server
    last, seed = int(config["num-server-rounds"]), int(config["seed"])
    first, end = (
        max(1, round(float(config[key]) * last)) for key in ("prune-from", "prune-to")
    )
    kind, _, number = name.partition(":")
    if kind.isdigit():
        pattern = int(kind), int(number)
        once = OneShotSparsity(1 - pattern[0] / pattern[1], at=first)
        return PruneAfter(server, once, n_of_m=pattern)
    criterion, *words = kind.split("-")
    if criterion not in CRITERIA or not {*words} <= {"erk", "once"}:
        raise ValueError(f"runs={name!r} must name none, n:m or one of {CRITERIA}")
    every, sparsity = int(config["prune-every"]), float(number)
    schedule = PolynomialSparsity(sparsity, first, end, every)
    if criterion in GROWING:
        schedule = PeriodicSparsity(sparsity, every, end=end)
    elif "once" in words:
        schedule = OneShotSparsity(sparsity, at=first)
    spread = "erk" if "erk" in words else "uniform"
    return PruneAfter(server, schedule, criterion, distribution=spread, seed=seed)


def make_strategy(name: str, config: UserConfig) -> AdditiveStrategy:
    """Make federated averaging that prunes as a name says."""
    optimizer = make_optimizer(name, config)
    sparse = isinstance(optimizer, PruneAfter)
    return AdditiveStrategy(
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=0.0,
        sampler=UniformSampler(int(config["seed"])),
        server_optimizer=optimizer,
        download=Nonzero() if sparse else None,
        upload=optimizer.upload if sparse else None,
    )
