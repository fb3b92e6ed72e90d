"""Logistic regression."""

import torch
from flwr.app import UserConfig
from torch import Tensor, nn

from bounded_group_loss.dataset import num_features


def make_model(config: UserConfig) -> nn.Module:
    """Make the model."""
    return nn.Linear(num_features(str(config["dataset"])), 2)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each person's cross-entropy, in nats."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whether each person's label is predicted right."""
    return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).to(torch.float32)}
