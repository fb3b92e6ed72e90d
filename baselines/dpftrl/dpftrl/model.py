"""A perceptron for images, a small GRU for characters; examples are ``x`` and ``y``."""

from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext.data.char_gru import CharGRU


def make_model(config: UserConfig) -> nn.Module:
    """Make the model for the data set."""
    if config["dataset"] == "shakespeare":
        return CharGRU(int(config["hidden-size"]))
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 10))


def _logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return logits whose second axis counts classes, as the losses of torch want."""
    logits: Tensor = model(batch["x"])
    return logits.transpose(1, 2) if logits.ndim > 2 else logits


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each image's, or each window's mean, cross-entropy in nats."""
    losses = nn.functional.cross_entropy(
        _logits(model, batch), batch["y"].long(), reduction="none"
    )
    return losses.flatten(1).mean(1) if losses.ndim > 1 else losses


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the share of each image's, or window's, labels that are predicted."""
    hits = (_logits(model, batch).argmax(1) == batch["y"]).float()
    return {"accuracy": hits.flatten(1).mean(1) if hits.ndim > 1 else hits}
