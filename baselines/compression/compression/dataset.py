"""Shakespeare's speakers or senders of mail as clients, and test data of all."""

import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.data.clients import (
    mail_tokens,
    sender_tokens,
    speaker_windows,
    speakers,
)

Columns = dict[str, Tensor]


def speaker_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test windows of the speaker that the context is of."""
    client = int(context.node_config["partition-id"])
    window = int(context.run_config["window"])
    train, test = (
        {"text": speaker_windows(split, client, window)} for split in ("train", "test")
    )
    return train, test


def sender_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test mails of the sender that the context is of."""
    client = int(context.node_config["partition-id"])
    tokens = int(context.run_config["tokens"])
    train, test = (sender_tokens(split, client, tokens) for split in ("train", "test"))
    return train, test


def central_data(config: UserConfig) -> Columns:
    """Return all test mails, or test windows of every speaker, as many of each."""
    if config["data"] == "mails":
        return mail_tokens("test", int(config["tokens"]))
    most, window = int(config["central-windows"]), int(config["window"])
    number = speakers("test").num_partitions
    parts = [speaker_windows("test", client, window)[:most] for client in range(number)]
    return {"text": torch.cat(parts)}
