"""Shakespeare's speakers in a few shards, and windows of all for the server."""

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.core.errors import refuse
from flower_ext.data.clients import speaker_windows, speakers

Columns = dict[str, Tensor]


@lru_cache(maxsize=1)
def shards_of(kind: str, number: int, window: int, seed: int) -> list[Tensor]:
    """Return the training windows of each worker.

    Parameters
    ----------
    kind : {"iid", "speakers"}
        Whether windows are dealt out at random, or speakers are.
    number : int
        Of workers.
    window : int
        Characters to predict in a window.
    seed : int
        Of who has what.
    """
    if kind not in ("iid", "speakers"):
        raise ValueError(f"shards={kind!r} must be 'iid' or 'speakers'")
    parts = [
        speaker_windows("train", i, window)
        for i in range(speakers("train").num_partitions)
    ]
    generator = np.random.default_rng(seed)
    if kind == "speakers":
        order = generator.permutation(len(parts))
        return [torch.cat([parts[i] for i in order[k::number]]) for k in range(number)]
    windows = torch.cat(parts)
    order = generator.permutation(len(windows))
    return [windows[order[k::number]] for k in range(number)]


def worker_data(context: Context) -> tuple[Columns, Columns]:
    """Return a worker's windows; none are for testing, which the server does."""
    config = context.run_config
    found = shards_of(
        str(config["shards"]),
        int(config["num-clients"]),
        int(config["window"]),
        int(config["seed"]),
    )
    number = int(context.node_config["partition-id"])
    if not 0 <= number < len(found):
        refuse("partition-id", number, f"from 0 to num-clients - 1 = {len(found) - 1}")
    text = found[number]
    return {"text": text}, {"text": text[:0]}


def central_data(config: UserConfig) -> Columns:
    """Return some test windows of all speakers, the same for all seeds."""
    window = int(config["window"])
    number = speakers("test").num_partitions
    windows = torch.cat([speaker_windows("test", i, window) for i in range(number)])
    order = np.random.default_rng(0).permutation(len(windows))
    return {"text": windows[order[: int(config["central-windows"])]]}
