"""Shakespeare's speakers as clients: windows of characters."""

from functools import lru_cache

import torch
from flwr.app import Context
from flwr_datasets.partitioner import Partitioner
from torch import Tensor

from flower_ext.data import load, partitioner

VOCABULARY = 96  # newline, then the printable ASCII characters
_UNKNOWN = ord("?")


def encode(text: str, window: int) -> Tensor:
    """Cut a text into windows of ``window + 1`` characters that overlap by one.

    Parameters
    ----------
    text : str
        Characters outside ASCII become ``?``.
    window : int
        Characters to predict in each window. A text that is shorter is padded with
        newlines; what does not fill a last window is left out.

    Returns
    -------
    Tensor of shape (windows, window + 1), uint8
    """
    raw = torch.tensor(list(text.encode("ascii", "replace")), dtype=torch.uint8)
    ids = torch.where(raw == ord("\n"), 0, raw - 31).to(torch.uint8)
    ids = torch.where(ids < VOCABULARY, ids, _UNKNOWN - 31)
    if len(ids) <= window:
        ids = torch.cat([ids, torch.zeros(window + 1 - len(ids), dtype=torch.uint8)])
    return ids.unfold(0, window + 1, window).contiguous()


@lru_cache(maxsize=2)
def speakers(split: str) -> Partitioner:
    """Return the speakers' speeches of a split; opened once per process."""
    return partitioner(load("shakespeare")[split], "natural")


@lru_cache(maxsize=1024)
def client_windows(split: str, client: int, window: int) -> Tensor:
    """Return a speaker's windows; kept, since a process sees a client many times."""
    speeches = speakers(split).load_partition(client)["text"]
    return encode("\n".join(speeches), window)


def client_data(context: Context) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return training and test data of the client that the context is of."""
    client = int(context.node_config["partition-id"])
    window = int(context.run_config["window"])
    train, test = (
        {"text": client_windows(split, client, window)} for split in ("train", "test")
    )
    return train, test


def central_data(window: int, windows_per_client: int) -> dict[str, Tensor]:
    """Return the first test windows of every speaker, for the server's evaluation."""
    parts = [
        client_windows("test", client, window)[:windows_per_client]
        for client in range(speakers("test").num_partitions)
    ]
    return {"text": torch.cat(parts)}
