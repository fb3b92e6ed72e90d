"""A small GRU that predicts the next character."""

from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext.data.char_gru import CharGRU, next_characters


def make_model(run_config: UserConfig) -> nn.Module:
    """Make the model, all but whose biases is pruned."""
    return CharGRU(int(run_config["hidden-size"]))


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each window's mean cross-entropy, in nats."""
    logits, targets = next_characters(model, batch)
    return nn.functional.cross_entropy(logits, targets, reduction="none").mean(1)


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each window's share of right predictions."""
    logits, targets = next_characters(model, batch)
    return {"accuracy": (logits.argmax(1) == targets).float().mean(1)}
