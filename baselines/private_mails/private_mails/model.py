"""The models: of words, MiniLM's last layer with a head, and that head alone."""

from collections.abc import Callable
from copy import deepcopy
from functools import cache, partial

import torch
from flwr.app import UserConfig
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModel

from flower_ext import Task
from flower_ext.client.public import PublicProjection
from flower_ext.data import model_folder
from private_mails.dataset import (
    WORDS,
    client_data,
    mean_of,
    public_directions,
    public_features,
)

TOPICS, WIDTH = 6, 384


class Words(nn.Module):
    """The mean of word vectors, and a head: nothing of it is public."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.head = nn.Linear(32, TOPICS)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of the topics."""
        words = self.embed(batch["input_ids"])
        out: Tensor = self.head(mean_of(words, batch["attention_mask"]))
        return out


class Mails(nn.Module):
    """MiniLM's last layer, and a head on the mean of its tokens."""

    def __init__(self, layer: nn.Module, public_mean: Tensor) -> None:
        super().__init__()
        self.layer = layer
        self.head = zeros(WIDTH)
        self.register_buffer("public_mean", public_mean)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of the topics."""
        seen = batch["attention_mask"]
        outside = (1.0 - seen[:, None, None, :].float()) * -1e9
        found = self.layer(batch["hidden"], attention_mask=outside)
        hidden = found[0] if isinstance(found, tuple) else found
        out: Tensor = self.head(mean_of(hidden, seen) - self.public_mean)
        return out


class Probe(nn.Module):
    """The head alone, on features or on their coordinates in a few directions."""

    def __init__(self, projection: nn.Module, width: int) -> None:
        super().__init__()
        self.projection = projection
        self.head = zeros(width)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Return the logits of the topics."""
        out: Tensor = self.head(self.projection(batch["x"]))
        return out


def zeros(width: int) -> nn.Linear:
    """Return a head that begins at zero."""
    head = nn.Linear(width, TOPICS)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


def task_of(name: str, config: UserConfig) -> Task:
    """Return the task of a method, with its data and its model.

    Parameters
    ----------
    name : str
        See :func:`private_mails.strategy.make_strategy`.
    config : UserConfig
        With ``rank``, ``tokens`` and ``seed``.
    """
    kind, _, k = name.partition("@")
    tokens, rank = int(config["tokens"]), int(config["rank"])
    if kind == "scratch":
        return _task("words", lambda config: Words())
    if kind == "probe":
        return _task("features", partial(make_probe, int(k or 0), tokens))
    return _task("layers", partial(make_mails, rank, tokens, int(config["seed"])))


def make_probe(k: int, tokens: int, config: UserConfig) -> nn.Module:
    """Return a head on all features, or on k public directions of them."""
    if not k:
        return Probe(nn.Identity(), WIDTH)
    return Probe(PublicProjection(public_directions(k, tokens)), k)


def make_mails(rank: int, tokens: int, seed: int, config: UserConfig) -> nn.Module:
    """Return the last layer with LoRA and a head."""
    model = Mails(deepcopy(_last_layer()), public_features(tokens).mean(0))
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["query", "value"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model)
    return model.requires_grad_(True)  # the strategy says what is trained


@cache
def _last_layer() -> nn.Module:
    model = AutoModel.from_pretrained(
        model_folder("minilm"),
        local_files_only=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return model.encoder.layer[-1]


def _task(kind: str, make: Callable[[UserConfig], nn.Module]) -> Task:
    return Task(make, partial(client_data, kind), loss, hits)


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return each mail's cross-entropy."""
    return nn.functional.cross_entropy(model(batch), batch["labels"], reduction="none")


def hits(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return whether the largest logit is that of the mail's list."""
    return {"accuracy": (model(batch).argmax(-1) == batch["labels"]).float()}
