"""A small character model: embedding, one GRU layer, one linear layer."""

from typing import cast

from flwr.app import UserConfig
from torch import Tensor, nn

from fedfish.dataset import VOCABULARY


class CharGRU(nn.Module):
    """Predicts the next character.

    Parameters
    ----------
    embedding, hidden : int
        Widths of the character embedding and of the GRU.
    """

    def __init__(self, embedding: int = 16, hidden: int = 96) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.out = nn.Linear(hidden, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters ``(batch, time)`` to logits ``(batch, time, characters)``."""
        states, _ = self.gru(self.embedding(x))
        return cast(Tensor, self.out(states))


def make_model(run_config: UserConfig) -> nn.Module:
    """Make the model that the run config asks for."""
    return CharGRU(hidden=int(run_config["hidden-size"]))


def logits_and_targets(
    model: nn.Module, batch: dict[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return logits ``(batch, characters, time)`` and the next characters."""
    text = batch["text"].long()
    return model(text[:, :-1]).transpose(1, 2), text[:, 1:]


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each window's mean cross-entropy, in nats a character."""
    logits, targets = logits_and_targets(model, batch)
    return nn.functional.cross_entropy(logits, targets, reduction="none").mean(1)


def accuracy(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return each window's share of characters predicted right."""
    logits, targets = logits_and_targets(model, batch)
    return {"accuracy": (logits.argmax(1) == targets).float().mean(1)}
