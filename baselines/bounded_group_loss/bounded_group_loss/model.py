"""Logistic regression."""

from functools import lru_cache

import torch
from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext.data import feature_names, load


@lru_cache(maxsize=1)
def num_features() -> int:
    """Return the width of the feature vector."""
    return len(feature_names(load("adult")["train"]))


def make_model(_: UserConfig) -> nn.Module:
    """Make the model."""
    return nn.Linear(num_features(), 2)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each person's cross-entropy, in nats."""
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whether each person's income is predicted right."""
    return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).to(torch.float32)}
