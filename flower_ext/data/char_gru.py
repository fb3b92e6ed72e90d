"""A small model of windows of characters, as of :mod:`flower_ext.data.clients`."""

from collections.abc import Mapping
from typing import cast

from torch import Tensor, nn

from flower_ext.data.tensors import CHARACTERS


class CharGRU(nn.Module):
    """Predicts the next character.

    Parameters
    ----------
    hidden, embedding : int
        Widths of the GRU and of the character embedding.
    """

    def __init__(self, hidden: int = 96, embedding: int = 16) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, embedding)
        self.gru = nn.GRU(embedding, hidden, batch_first=True)
        self.out = nn.Linear(hidden, CHARACTERS)

    def forward(self, x: Tensor) -> Tensor:
        """Map characters ``(batch, time)`` to logits ``(batch, time, characters)``."""
        states, _ = self.gru(self.embedding(x.long()))
        return cast(Tensor, self.out(states))


def next_characters(
    model: nn.Module, batch: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """Return logits ``(batch, characters, time)`` and targets of windows ``text``."""
    text = batch["text"]
    return model(text[:, :-1]).transpose(1, 2), text[:, 1:].long()
