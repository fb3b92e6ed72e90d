"""Senders of mail as clients: tokens of their messages, and the list they went to."""

from functools import lru_cache

import torch
from flwr.app import Context
from torch import Tensor

from flower_ext.client.adapters import load_tokenizer
from flower_ext.data import load, model_folder, partitioner

Columns = dict[str, Tensor]


@lru_cache(maxsize=4)
def tokenized(split: str, tokens: int) -> Columns:
    """Return all messages of a split; made once per process.

    Parameters
    ----------
    split : {"train", "test"}
        Which.
    tokens : int
        What is longer is cut, what is shorter padded.

    Returns
    -------
    dict
        ``input_ids`` and ``attention_mask`` ``(messages, tokens)``, ``labels``.
    """
    data = load("spam-assassin")[split]
    encoded = load_tokenizer(model_folder("minilm"))(
        list(data["text"]),
        max_length=tokens,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    labels = torch.tensor(list(data["label"]))
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": labels,
    }


@lru_cache(maxsize=2)
def senders(split: str) -> list[Tensor]:
    """Return the rows of every sender in a split."""
    clients = partitioner(load("spam-assassin")[split], "natural")
    return [torch.from_numpy(clients.rows(i)) for i in range(clients.num_partitions)]


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test data of the client that the context is of."""
    client = int(context.node_config["partition-id"])
    tokens = int(context.run_config["tokens"])
    train, test = (
        {k: x[senders(split)[client]] for k, x in tokenized(split, tokens).items()}
        for split in ("train", "test")
    )
    return train, test
