"""A small convolutional network, as wide as a client can take."""

from itertools import pairwise

from flwr.app import UserConfig
from torch import Tensor, nn


def make_model(run_config: UserConfig) -> nn.Module:
    """Make the model of the configuration's width; 1 is the whole."""
    width = float(run_config.get("width", 1.0))
    first = int(int(run_config["channels"]) * width)
    sizes = [1, first, 2 * first, 4 * first]
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes):
        layers += [nn.Conv2d(before, after, 3, stride=2, padding=1)]
        # One group: sums over fewer channels come out as large as over all.
        layers += [nn.GroupNorm(1, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(sizes[-1] * 4 * 4, 10))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each image's cross-entropy, in nats."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whether each image is named rightly."""
    return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}
