"""Small models: of characters a GRU, of images a perceptron. Both end in ``out``."""

from collections import OrderedDict
from collections.abc import Mapping

from flwr.app import UserConfig
from torch import Tensor, nn

from flower_ext.data.char_gru import CharGRU, next_characters
from personalization.dataset import is_text


def make_model(run_config: UserConfig) -> nn.Module:
    """Make the model that the run config asks for."""
    hidden = int(run_config["hidden-size"])
    if is_text(run_config):
        return CharGRU(hidden=hidden)
    layers = OrderedDict[str, nn.Module](
        flat=nn.Flatten(), hidden=nn.Linear(784, hidden)
    )
    if run_config["batch-norm"]:
        layers["norm"] = nn.BatchNorm1d(hidden)
    layers |= {"relu": nn.ReLU(), "out": nn.Linear(hidden, 10)}
    return nn.Sequential(layers)


def targets(batch: Mapping[str, Tensor]) -> Tensor:
    """Return the kinds of clothes, or the characters that come next."""
    return batch["y"] if "x" in batch else batch["text"][:, 1:].long()


def logits_and_targets(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return logits ``(batch, classes, time)`` and targets; images have one time."""
    if "x" in batch:
        return model(batch["x"]).unsqueeze(2), targets(batch).unsqueeze(1)
    return next_characters(model, batch)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each image's or window's mean cross-entropy, in nats."""
    logits, targets = logits_and_targets(model, batch)
    return nn.functional.cross_entropy(logits, targets, reduction="none").mean(1)


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each one's share of right predictions."""
    logits, targets = logits_and_targets(model, batch)
    return {"accuracy": (logits.argmax(1) == targets).float().mean(1)}
