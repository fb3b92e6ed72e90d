"""A small perceptron, or multinomial logistic regression."""

from flwr.app import UserConfig
from torch import Tensor, nn


def make_model(run_config: UserConfig) -> nn.Module:
    """Make the model that the run config asks for; convex without a hidden layer."""
    hidden = int(run_config["hidden-size"])
    if not hidden:
        return nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each image's cross-entropy, in nats."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whether each image is named rightly."""
    return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}
