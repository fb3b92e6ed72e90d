"""Shakespeare's speakers as clients, and test windows of all of them."""

import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.data.clients import speaker_windows, speakers

Columns = dict[str, Tensor]


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test windows of the speaker that the context is of."""
    client = int(context.node_config["partition-id"])
    window = int(context.run_config["window"])
    train, test = (
        {"text": speaker_windows(split, client, window)} for split in ("train", "test")
    )
    return train, test


def central_data(config: UserConfig) -> Columns:
    """Return test windows of every speaker, as many of each."""
    most, window = int(config["central-windows"]), int(config["window"])
    number = speakers("test").num_partitions
    parts = [speaker_windows("test", client, window)[:most] for client in range(number)]
    return {"text": torch.cat(parts)}
