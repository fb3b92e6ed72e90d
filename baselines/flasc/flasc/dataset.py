"""Senders of mail as clients: tokens of their messages, and the list they went to."""

from flwr.app import Context
from torch import Tensor

from flower_ext.data.clients import sender_tokens

Columns = dict[str, Tensor]


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test data of the client that the context is of."""
    client = int(context.node_config["partition-id"])
    tokens = int(context.run_config["tokens"])
    train, test = (sender_tokens(split, client, tokens) for split in ("train", "test"))
    return train, test
