"""Four silos of mails; public text is Shakespeare's."""

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context
from numpy.typing import NDArray
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

from flower_ext.client.public import public_subspace
from flower_ext.data import load, model_folder
from flower_ext.data.clients import mail_tokens
from flower_ext.data.partition import partitioner

Columns = dict[str, Tensor]
WORDS = 4096  # tokens are hashed to so many, where words are learned from scratch
_SPEECHES = 1000


@lru_cache(maxsize=8)
def columns(kind: str, split: str, tokens: int) -> Columns:
    """Return the mails of a split as a kind of model reads them.

    Parameters
    ----------
    kind : {"words", "layers", "features"}
        Hashed tokens; what MiniLM's last layer reads; or what it makes of a mail, less
        what it makes of public text on average.
    split : {"train", "test"}
        Of ``spam-assassin``.
    tokens : int
        Of a mail.
    """
    mails = mail_tokens(split, tokens)
    kept = {name: mails[name] for name in ("attention_mask", "labels")}
    if kind == "words":
        return {"input_ids": mails["input_ids"] % WORDS, **kept}
    if kind == "layers":
        return {"hidden": _computed(mails, layers=5), **kept}
    x = features(mails) - public_features(tokens).mean(0)
    return {"x": x, "labels": mails["labels"]}


@torch.no_grad()
def _computed(texts: Columns, layers: int) -> Tensor:
    """Return what MiniLM's first layers make of texts, for every token."""
    model = AutoModel.from_pretrained(model_folder("minilm"), local_files_only=True)
    model.encoder.layer = model.eval().encoder.layer[:layers]
    names = "input_ids", "attention_mask"
    pieces = zip(*(texts[name].split(64) for name in names), strict=True)
    return torch.cat([model(*piece).last_hidden_state for piece in pieces])


def mean_of(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean over a text's tokens, which is MiniLM's representation of it."""
    weights = attention_mask[..., None] / attention_mask.sum(1)[:, None, None]
    return (hidden * weights).sum(1)


def features(texts: Columns) -> Tensor:
    """Return what MiniLM makes of texts, of shape (texts, 384)."""
    return mean_of(_computed(texts, layers=6), texts["attention_mask"])


@lru_cache(maxsize=2)
def public_features(tokens: int) -> Tensor:
    """Return the features of speeches of Shakespeare, of shape (speeches, 384)."""
    folder = model_folder("minilm")
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    speeches = tokenizer(
        load("shakespeare")["train"]["text"][:_SPEECHES],
        max_length=tokens,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    return features({**speeches})


def public_directions(dimensions: int, tokens: int) -> NDArray[np.float64]:
    """Return the directions in which public features are largest, about their mean."""
    public = public_features(tokens)
    return public_subspace((public - public.mean(0)).numpy(), dimensions)


@lru_cache(maxsize=16)
def _rows(client: int, num_clients: int, seed: int) -> list[int]:
    mails = load("spam-assassin")["train"]
    divided = partitioner(mails, "iid", num_partitions=num_clients, seed=seed)
    return list(divided.rows(client))


def client_data(kind: str, context: Context) -> tuple[Columns, Columns]:
    """Return training data of the silo that the context is of, and all test data."""
    config, node = context.run_config, context.node_config
    tokens = int(config["tokens"])
    silo = int(node["partition-id"]), int(node["num-partitions"])
    rows = _rows(*silo, int(config["seed"]))
    train = columns(kind, "train", tokens)
    return {name: x[rows] for name, x in train.items()}, columns(kind, "test", tokens)
