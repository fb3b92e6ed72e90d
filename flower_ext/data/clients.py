"""Clients of real data as tensors: images with label skew, speakers of plays, mails.

They are made once a process and kept, since a process meets a client many times.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flower_ext.data.loading import load
from flower_ext.data.models import model_folder
from flower_ext.data.partition import partitioner
from flower_ext.data.tensors import character_windows, pixels, scaled

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flower_ext.data.rows import RowPartitioner


@lru_cache(maxsize=2)
def _images(dataset: str) -> tuple[NDArray[Any], NDArray[Any]]:
    from flower_ext.data.rows import column_values

    train = load(dataset)["train"]
    return pixels(train), column_values(train, "label")


@lru_cache(maxsize=2)
def _skewed(
    dataset: str, num_images: int, num_clients: int, alpha: float, seed: int
) -> RowPartitioner:
    images = load(dataset)["train"]
    if num_images:
        images = images.select(range(num_images))
    return partitioner(
        images, "dirichlet", num_partitions=num_clients, alpha=alpha, seed=seed
    )


@lru_cache(maxsize=256)
def client_images(
    client: int,
    *,
    num_clients: int,
    alpha: float,
    seed: int,
    dataset: str = "fashion-mnist",
    num_images: int = 0,
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return a client's images: four fifths for training, a fifth for testing.

    Parameters
    ----------
    client : int
        Its number, below ``num_clients``.
    num_clients : int
        Clients that share the training images.
    alpha : float
        Concentration of the Dirichlet distribution over the labels; the smaller, the
        fewer kinds of images a client has.
    seed : int
        Of the division, and of the order of a client's images.
    dataset : str (default: "fashion-mnist")
        Of :func:`flower_ext.data.load`, with columns ``image`` and ``label``.
    num_images : int (default: 0)
        Only the first so many are shared; 0 means all.

    Returns
    -------
    tuple of dict[str, Tensor]
        Columns as of :func:`~flower_ext.data.tensors.image_columns`. They are kept and
        shared: do not change them in place.
    """
    divided = _skewed(dataset, num_images, num_clients, alpha, seed)
    rows = divided.rows(client)
    rows = rows[np.random.default_rng(seed).permutation(len(rows))]
    images, labels = _images(dataset)
    columns = scaled(images[rows], labels[rows])
    test = len(rows) // 5
    return (
        {name: x[test:] for name, x in columns.items()},
        {name: x[:test] for name, x in columns.items()},
    )


@lru_cache(maxsize=2)
def speakers(split: str) -> RowPartitioner:
    """Return Shakespeare's speakers in a split, in the order of the plays."""
    return partitioner(load("shakespeare")[split], "natural")


@lru_cache(maxsize=2)
def _speeches(split: str) -> list[str]:
    return list(load("shakespeare")[split]["text"])


@lru_cache(maxsize=1024)
def speaker_windows(split: str, client: int, window: int) -> Tensor:
    """Return a speaker's speeches as windows of characters.

    Parameters
    ----------
    split : {"train", "test"}
        Of the data set ``shakespeare``.
    client : int
        The speaker's number.
    window : int
        See :func:`~flower_ext.data.tensors.character_windows`.
    """
    speeches = _speeches(split)
    text = "\n".join(speeches[row] for row in speakers(split).rows(client))
    return character_windows(text, window)


@lru_cache(maxsize=2)
def senders(split: str) -> RowPartitioner:
    """Return the senders of mail in a split."""
    return partitioner(load("spam-assassin")[split], "natural")


@lru_cache(maxsize=4)
def mail_tokens(split: str, tokens: int) -> dict[str, Tensor]:
    """Return the mails of all senders, for a model that fine-tunes ``minilm``.

    Parameters
    ----------
    split : {"train", "test"}
        Of the data set ``spam-assassin``.
    tokens : int
        What is longer is cut, what is shorter padded.

    Returns
    -------
    dict[str, Tensor]
        ``input_ids`` and ``attention_mask``, int64 of shape ``(mails, tokens)``, and
        ``labels``, the list that a mail went to, of shape ``(mails,)``. They are kept
        and shared: do not change them in place.
    """
    from transformers import AutoTokenizer

    mails = load("spam-assassin")[split]
    tokenizer = AutoTokenizer.from_pretrained(
        model_folder("minilm"), local_files_only=True
    )
    encoded = tokenizer(
        list(mails["text"]),
        max_length=tokens,
        padding="max_length",
        truncation=True,
        return_tensors="pt",
    )
    return {
        "input_ids": encoded["input_ids"],
        "attention_mask": encoded["attention_mask"],
        "labels": torch.tensor(list(mails["label"])),
    }


def sender_tokens(split: str, client: int, tokens: int) -> dict[str, Tensor]:
    """Return a sender's rows of :func:`mail_tokens`."""
    rows = senders(split).rows(client)
    return {name: x[rows] for name, x in mail_tokens(split, tokens).items()}
