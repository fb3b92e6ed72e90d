"""Small models: of characters a GRU, of images a perceptron."""

from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext.data.char_gru import CharGRU, next_characters


def make_model(run_config: UserConfig) -> nn.Module:
    """Make the model that the run config asks for."""
    hidden = int(run_config["hidden-size"])
    if run_config["dataset"] == "shakespeare":
        return CharGRU(hidden=hidden)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10)
    )


def logits_and_targets(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return logits ``(batch, classes, time)`` and targets; images have one time."""
    if "x" in batch:
        return model(batch["x"]).unsqueeze(2), batch["y"].unsqueeze(1)
    return next_characters(model, batch)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each image's or window's mean cross-entropy, in nats."""
    logits, targets = logits_and_targets(model, batch)
    return nn.functional.cross_entropy(logits, targets, reduction="none").mean(1)


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each one's share of right predictions."""
    logits, targets = logits_and_targets(model, batch)
    return {"accuracy": (logits.argmax(1) == targets).float().mean(1)}
