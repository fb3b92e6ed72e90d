"""The two models of the simulation benchmark; needs torch only, as its peers do."""

from torch import nn


def make_model(name: str) -> nn.Module:
    """Return an MLP of 51 thousand parameters, or a CNN of 207 thousand."""
    if name == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10)
        )
    return nn.Sequential(
        nn.Conv2d(1, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(1024, 146),
        nn.ReLU(),
        nn.Linear(146, 10),
    )
