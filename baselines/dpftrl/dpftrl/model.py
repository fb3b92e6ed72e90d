"""A perceptron for images, a small GRU for characters; examples are ``x`` and ``y``."""

from typing import cast

from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext.data.tensors import CHARACTERS


class CharGRU(nn.Module):
    """Predicts the next character at every place of a window."""

    def __init__(self, hidden: int, embedding: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.out = nn.Linear(hidden, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters ``(batch, time)`` to logits ``(batch, characters, time)``."""
        states, _ = self.gru(self.embedding(x.long()))
        return cast(Tensor, self.out(states).transpose(1, 2))


def make_model(config: UserConfig) -> nn.Module:
    """Make the model for the data set."""
    if config["dataset"] == "shakespeare":
        return CharGRU(int(config["hidden-size"]))
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each image's, or each window's mean, cross-entropy in nats."""
    losses = nn.functional.cross_entropy(
        model(batch["x"]), batch["y"].long(), reduction="none"
    )
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of each image's, or window's, labels that are predicted."""
    hits = (model(batch["x"]).argmax(1) == batch["y"]).float()
    return {"accuracy": hits.flatten(1).mean(1) if hits.ndim > 1 else hits}
