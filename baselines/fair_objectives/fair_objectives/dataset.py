"""Schools as clients; a part of every school's pupils is held out."""

from functools import lru_cache

import numpy as np
import torch
from flwr.app import Context, UserConfig
from torch import Tensor

from flower_ext.core.errors import refuse
from flower_ext.data import load

Columns = dict[str, Tensor]


def client_data(context: Context) -> tuple[Columns, Columns]:
    """Return training and test data of the school that the context is of."""
    return school(int(context.node_config["partition-id"]), context.run_config)


def num_schools(config: UserConfig) -> int:
    """Return the number of schools, which is that of the clients."""
    return len(_schools(int(config["min-pupils"])))


def school(number: int, config: UserConfig) -> tuple[Columns, Columns]:
    """Return training and test data of a school.

    The seed decides which pupils are held out, and, of the first ``wrong-schools``,
    which scores pupils are said to have: those of other pupils, three times as far from
    the mean. Tests are always on the true ones. ``group`` is the school, for bounded
    group loss.
    """
    if not 0 <= number < num_schools(config):
        last = num_schools(config) - 1
        refuse("partition-id", number, f"from 0 to {last}, a school's number")
    share = float(config["test-share"])
    key = int(config["min-pupils"]), number, int(config["seed"]), share
    return _split(*key, wrong=number < int(config["wrong-schools"]))


@lru_cache(maxsize=512)
def _split(
    min_pupils: int, number: int, seed: int, share: float, *, wrong: bool
) -> tuple[Columns, Columns]:
    data = _schools(min_pupils)[number]
    draw = np.random.default_rng([seed, number])
    order = torch.from_numpy(draw.permutation(len(data["y"])))
    held_out = max(1, round(share * len(order)))
    train, test = (
        {name: column[rows] for name, column in data.items()}
        for rows in (order[held_out:], order[:held_out])
    )
    if wrong:
        train["y"] = 3 * train["y"][torch.from_numpy(draw.permutation(len(train["y"])))]
    return train, test


@lru_cache(maxsize=2)
def _schools(min_pupils: int) -> list[Columns]:
    """Return features, scores and number of every school with enough pupils."""
    splits = load("schools").values()
    names = np.concatenate([np.asarray(split["school"][:]) for split in splits])
    x = torch.from_numpy(np.concatenate([split["features"][:] for split in splits]))
    y = torch.from_numpy(np.concatenate([split["label"][:] for split in splits]))
    places = (np.flatnonzero(names == name) for name in np.unique(names))
    kept = [rows for rows in places if len(rows) >= min_pupils]
    return [
        {"x": x[rows], "y": y[rows], "group": torch.full((len(rows),), i)}
        for i, rows in enumerate(kept)
    ]
