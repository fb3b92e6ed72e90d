"""Logistic regression on words, a small convolutional network on images."""

from collections.abc import Mapping

from flwr.app import UserConfig
from torch import Tensor, nn

from private_optimizers.dataset import CLASSES


def make_model(config: UserConfig) -> nn.Module:
    """Make the model for the data set."""
    if config["data"] == "mails":
        return nn.Linear(int(config["words"]), CLASSES["mails"])
    return nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 7 * 7, CLASSES["images"]),
    )


def loss(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Return each example's cross-entropy, in nats."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return whether each example is classified rightly."""
    return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}
