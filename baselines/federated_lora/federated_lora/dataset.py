"""A few organisations as clients: each has mails, more to some lists than to others."""

from functools import lru_cache

from flwr.app import Context
from torch import Tensor

from federated_lora.model import below
from flower_ext.data import load
from flower_ext.data.clients import mail_tokens
from flower_ext.data.partition import partitioner

Columns = dict[str, Tensor]


@lru_cache(maxsize=2)
def mails(split: str, tokens: int, layers: int) -> Columns:
    """Return the mails of a split as the adapted layers read them."""
    columns = mail_tokens(split, tokens)
    kept = {name: columns[name] for name in ("attention_mask", "labels")}
    return {"inputs_embeds": below(columns, layers), **kept}


@lru_cache(maxsize=64)
def _rows(client: int, num_clients: int, alpha: float, seed: int) -> list[int]:
    divided = partitioner(
        load("spam-assassin")["train"],
        "dirichlet",
        num_partitions=num_clients,
        alpha=alpha,
        seed=seed,
    )
    return list(divided.rows(client))


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training data of the client that the context is of, and all test data."""
    config, node = context.run_config, context.node_config
    form = int(config["tokens"]), int(config["layers"])
    rows = _rows(
        int(node["partition-id"]),
        int(node["num-partitions"]),
        float(config["dirichlet-alpha"]),
        int(config["seed"]),
    )
    train = mails("train", *form)
    return {name: x[rows] for name, x in train.items()}, mails("test", *form)
