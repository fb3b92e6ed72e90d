"""Senders of mail, or Fashion-MNIST with label skew, as users; what is public."""

from __future__ import annotations

from collections import Counter
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
import torch
from flwr.app import Context, UserConfig
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flower_ext.data import load, partitioner
from flower_ext.data.tensors import image_columns, pixels, scaled

if TYPE_CHECKING:
    from datasets import Dataset
    from numpy.typing import NDArray

Columns = dict[str, Tensor]
CLASSES = {"mails": 6, "images": 10}
# Rows of Fashion-MNIST's training images; the first are the users'.
_VALIDATION = range(50_000, 55_000)
_PUBLIC = 55_000
_TEST_IMAGES = 5_000


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return the data of a user, or of a silo of users; it tests on the same.

    Accuracy is measured by the server, on test data of its own: averages over clients
    would not be private.
    """
    client = int(context.node_config["partition-id"])
    silos = int(context.run_config["silos"])
    data = (
        silo_data(client, silos, context.run_config)
        if silos
        else user_data(client, context.run_config)
    )
    return data, data


def num_users(config: UserConfig) -> int:
    """Return the number of users in the data."""
    if config["data"] == "mails":
        return len(_senders(int(config["min-mails"])))
    return int(config["num-clients"])


def sampling_rate(config: UserConfig) -> float:
    """Return the share of users, or of examples, in a round or a step."""
    return int(config["num-sampled-clients"]) / int(config["population-size"])


def user_data(user: int, config: UserConfig) -> Columns:
    """Return a user's training data: ``x``, ``y`` and, all the same, ``user``."""
    if config["data"] == "mails":
        found = _mails_of(
            user,
            int(config["min-mails"]),
            int(config["words"]),
            validate=bool(config["validate"]),
        )
    else:
        found = _images_of(
            user,
            int(config["num-clients"]),
            int(config["num-images"]),
            float(config["alpha"]),
            int(config["seed"]),
        )
    return {**found, "user": torch.full((len(found["y"]),), user)}


def silo_data(silo: int, silos: int, config: UserConfig) -> Columns:
    """Return the data of a silo, which has every ``silos``-th user."""
    users = range(silo, num_users(config), silos)
    parts = [user_data(user, config) for user in users]
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def central_data(config: UserConfig) -> Columns:
    """Return the server's test data; to choose settings, validation data."""
    if config["data"] == "mails":
        validate = bool(config["validate"])
        mails = _mails(int(config["min-mails"]), "train" if validate else "test")
        texts, labels = [], []
        for found, classes in mails.values():
            first = len(found) - _held_out(len(found)) if validate else 0
            texts += found[first:]
            labels += classes[first:]
        return {"x": bags(texts, vocabulary(config)), "y": torch.tensor(labels)}
    if config["validate"]:
        return _small(image_columns(load("fashion-mnist")["train"].select(_VALIDATION)))
    return _small(image_columns(load("fashion-mnist")["test"].take(_TEST_IMAGES)))


def public_data(config: UserConfig) -> Columns:
    """Return what nobody asks to protect: data of no user."""
    if config["data"] == "mails":
        texts, labels = _public_mails(int(config["min-mails"]))
        return {"x": bags(texts, vocabulary(config)), "y": torch.tensor(labels)}
    rows = range(_PUBLIC, _PUBLIC + int(config["public-images"]))
    return _small(image_columns(load("fashion-mnist")["train"].select(rows)))


def word_frequencies(config: UserConfig) -> NDArray[np.float64]:
    """Return the share of public mails that have each word of the vocabulary."""
    return public_data(config)["x"].double().mean(0).numpy()


def vocabulary(config: UserConfig) -> dict[str, int]:
    """Return the places of the words that most public mails have."""
    return _vocabulary(int(config["min-mails"]), int(config["words"]))


def bags(texts: list[str], places: dict[str, int]) -> Tensor:
    """Return which words a text has, 0 or 1, of shape ``(texts, words)``.

    >>> bags(["A cat, a dog", "dogs"], {"a": 0, "dog": 1, "dogs": 2}).tolist()
    [[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]
    """
    found = torch.zeros(len(texts), len(places))
    for row, text in enumerate(texts):
        found[row, [places[word] for word in _words(text) if word in places]] = 1.0
    return found


def _words(text: str) -> set[str]:
    cleaned = "".join(x if x.isalnum() else " " for x in text.lower())
    return set(cleaned.split())


def _held_out(mails: int) -> int:
    """Return how many of a sender's last training mails are for validation."""
    return max(1, mails // 5)


@lru_cache(maxsize=2)
def _vocabulary(min_mails: int, words: int) -> dict[str, int]:
    texts, _ = _public_mails(min_mails)
    counts = Counter(chain.from_iterable(map(_words, texts)))
    # Ties by the alphabet, not by the order of a set.
    ranked = sorted(counts, key=lambda word: (-counts[word], word))
    return {word: place for place, word in enumerate(ranked[:words])}


def _grouped(rows: Dataset) -> dict[str, tuple[list[str], list[int]]]:
    found: dict[str, tuple[list[str], list[int]]] = {}
    for sender, text, label in zip(
        rows["client"], rows["text"], rows["label"], strict=True
    ):
        texts, labels = found.setdefault(sender, ([], []))
        texts.append(text)
        labels.append(label)
    return found


@lru_cache(maxsize=4)
def _mails(min_mails: int, split: str) -> dict[str, tuple[list[str], list[int]]]:
    return _grouped(load("spam-assassin", min_mails=min_mails)[split])


def _senders(min_mails: int) -> list[str]:
    return list(_mails(min_mails, "train"))


@lru_cache(maxsize=2)
def _public_mails(min_mails: int) -> tuple[list[str], list[int]]:
    """Return mails of senders who have fewer than the users."""
    users = set(_senders(min_mails))
    texts, labels = [], []
    for rows in load("spam-assassin", min_mails=2).values():
        for sender, (found, classes) in _grouped(rows).items():
            if sender not in users:
                texts += found
                labels += classes
    return texts, labels


@lru_cache(maxsize=512)
def _mails_of(user: int, min_mails: int, words: int, *, validate: bool) -> Columns:
    texts, labels = _mails(min_mails, "train")[_senders(min_mails)[user]]
    kept = len(texts) - (_held_out(len(texts)) if validate else 0)
    return {
        "x": bags(texts[:kept], _vocabulary(min_mails, words)),
        "y": torch.tensor(labels[:kept]),
    }


@lru_cache(maxsize=1)
def _user_images(count: int) -> Columns:
    rows = load("fashion-mnist")["train"].take(count)
    return _small(scaled(pixels(rows), np.asarray(rows["label"])))


@lru_cache(maxsize=512)
def _images_of(user: int, users: int, count: int, alpha: float, seed: int) -> Columns:
    rows = _divided(users, count, alpha, seed)[user]
    return {name: column[rows] for name, column in _user_images(count).items()}


@lru_cache(maxsize=2)
def _divided(users: int, count: int, alpha: float, seed: int) -> list[Tensor]:
    images = load("fashion-mnist")["train"].take(count)
    found = partitioner(
        images, "dirichlet", num_partitions=users, alpha=alpha, seed=seed
    )
    order = np.random.default_rng(seed)
    return [torch.from_numpy(order.permutation(found.rows(i))) for i in range(users)]


def _small(images: Columns) -> Columns:
    """Return images of half the size."""
    return {**images, "x": avg_pool2d(images["x"], 2)}
