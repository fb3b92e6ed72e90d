"""The strategies that are compared, with the same seeds and options."""

from functools import partial

from flwr.app import UserConfig

from flower_ext import AdditiveStrategy
from flower_ext.core.sampling import AllClients, HeldOutSampler
from flower_ext.strategies import FedConv, HeteroFL
from unequal_clients.client_app import task
from unequal_clients.dataset import public_data
from unequal_clients.model import make_model


def numbers(config: UserConfig, key: str) -> list[float]:
    """Return the numbers in a setting such as ``1.0 0.5``."""
    return [float(x) for x in str(config[key]).split()]


def width_of(client: int, *, widths: list[float], tiers: list[float]) -> float:
    """Return a client's width: so many clients of each, in their order."""
    for width, size in zip(widths, tiers, strict=True):
        if client < size:
            return width
        client -= int(size)
    raise ValueError(f"tiers={tiers} must be num-clients in all")


def model_of(width: float, *, config: UserConfig) -> object:
    """Return the model of a width."""
    return make_model({**config, "width": width})


def make_strategy(name: str, config: UserConfig) -> AdditiveStrategy:
    """Make one of the methods.

    ``all`` lets every client train the whole model, which most could not; ``large``
    leaves out those that could not; ``small`` gives all the smallest model, and
    ``heterofl`` and ``fedconv`` give each what it can take.
    """
    widths, tiers = numbers(config, "widths"), numbers(config, "tiers")
    sampler = AllClients(int(config["seed"]))
    model = partial(model_of, config=config)
    own = partial(width_of, widths=widths, tiers=tiers)
    if name == "all":
        return HeteroFL(model=model, widths=(1.0,), sampler=sampler)
    if name == "large":
        held_out = HeldOutSampler(
            int(config["seed"]),
            num_training_clients=int(tiers[0]),
            same_for_evaluation=True,
        )
        return HeteroFL(model=model, widths=(1.0,), sampler=held_out)
    if name == "small":
        return HeteroFL(model=model, widths=widths[-1:], sampler=sampler)
    if name == "heterofl":
        return HeteroFL(model=model, widths=widths, width_of=own, sampler=sampler)
    if name == "fedconv":
        return FedConv(
            task=task,
            public=public_data(config),
            widths=widths,
            width_of=own,
            sampler=sampler,
            server_steps=int(config["server-steps"]),
            server_learning_rate=float(config["server-learning-rate"]),
            run_config=config,
        )
    known = "all, large, small, heterofl, fedconv"
    raise ValueError(f"strategies={name!r} must name one of {known}")
