"""Divide a data set into clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flower_ext.core.errors import whole
from flower_ext.data.metadata import natural_ids

if TYPE_CHECKING:
    from datasets import Dataset

    from flower_ext.data.rows import RowPartitioner

SCHEMES = ("natural", "iid", "dirichlet", "shard")
_SHARDS_PER_CLIENT = 2


def partitioner(
    dataset: Dataset,
    scheme: str,
    *,
    num_partitions: int | None = None,
    column: str | None = None,
    alpha: float | None = None,
    ids: Sequence[str] | None = None,
    seed: int = 0,
) -> RowPartitioner:
    """Divide one split into clients.

    The same arguments give the same clients in every process. Only the rows' numbers
    are computed, never a copy of the data, and nothing is written to disk.

    Parameters
    ----------
    dataset : datasets.Dataset
        One split, such as ``load("shakespeare")["train"]``.
    scheme : {"natural", "iid", "dirichlet", "shard"}
        "natural": one client per value of `column`. "iid": equal random parts.
        "dirichlet": each label's rows are divided in proportions drawn from a
        symmetric Dirichlet distribution. "shard": rows sorted by label, cut into
        equal shards, two random shards per client (the few rows left over are not
        used). The last three are flwr-datasets' own partitioners.
    num_partitions : int or None
        Number of clients, at least 1. For "natural" it may be left out, which takes
        every value of `column`; fewer keep the first ones in sorted order.
    column : str or None
        "natural": the column of client ids; None takes the data set's own
        (``client``, ``occupation``, ...). "dirichlet" and "shard": the label column;
        None takes ``label``. "iid" ignores it.
    alpha : float or None
        Concentration for "dirichlet", finite and above 0. Near 0 every label goes to
        few clients; large values tend to "iid".
    ids : sequence of str or None
        "natural": the ids that get the numbers 0, 1, ... in sorted order. None takes
        those recorded by `load` for train and test together, so that a client keeps
        its number in both (and may be empty in one), or else those in `dataset`. Rows
        of ids that are not listed are left out.
    seed : int, default 0
        Seed of "iid", "dirichlet" and "shard". "natural" is not random.

    Returns
    -------
    flwr_datasets.partitioner.Partitioner
        It already holds the data set: use ``.load_partition(i)`` and
        ``.num_partitions``. ``.rows(i)`` gives the numbers of the client's rows only.

    Raises
    ------
    ValueError
        Unknown scheme or column, a column of lists or with missing values (None or
        NaN), or a number out of range.

    Notes
    -----
    "dirichlet" draws train and test independently: for test data with a client's own
    label proportions, divide train only and split each client's rows.

    References
    ----------
    Hsu et al., "Measuring the Effects of Non-Identical Data Distribution for
    Federated Visual Classification", 2019 (dirichlet). McMahan et al., AISTATS 2017
    (two shards per client).
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} must be one of {', '.join(SCHEMES)}")
    if num_partitions is not None:
        whole("num_partitions", num_partitions, 1)
    if scheme != "dirichlet" and alpha is not None:
        raise ValueError(
            f"alpha={alpha} has no meaning for scheme={scheme!r}: leave it out or use "
            "'dirichlet'"
        )
    if scheme == "natural":
        column = _natural_column(dataset, column)
        return _natural(dataset, column, num_partitions, ids)
    if ids is not None:
        raise ValueError(f"ids has no meaning for scheme={scheme!r}: only 'natural'")
    if num_partitions is None:
        raise ValueError(f"num_partitions=None: scheme={scheme!r} needs a number")
    shards = _SHARDS_PER_CLIENT if scheme == "shard" else 1
    if num_partitions * shards > len(dataset):
        raise ValueError(
            f"num_partitions={num_partitions} must be <= {len(dataset) // shards} for "
            f"scheme={scheme!r} with {len(dataset)} rows: some clients would be empty"
        )
    if scheme == "iid":
        return _iid(dataset, num_partitions, seed)
    column = "label" if column is None else column
    _check_column(dataset, column)
    if scheme == "shard":
        return _shard(dataset, num_partitions, column, seed)
    if alpha is None or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(
            f"alpha={alpha} must be a finite number > 0 for scheme='dirichlet': "
            "0.1 is strongly skewed, 1 moderately; use 'iid' for no skew"
        )
    return _dirichlet(dataset, num_partitions, column, alpha, seed)


def _natural(
    dataset: Dataset, column: str, number: int | None, ids: Sequence[str] | None
) -> RowPartitioner:
    import numpy as np

    from flower_ext.data.rows import RowPartitioner, column_values

    # Ids of train and test together, where they are known: a client then has the same
    # number in both splits.
    values = column_values(dataset, column)
    present = np.unique(values)
    recorded = natural_ids(dataset).get(column, [])
    if ids is not None:
        names = np.unique(np.asarray(ids))
    elif set(present) <= set(recorded):
        names = np.asarray(recorded)
    else:
        names = present
    if number is not None and number > len(names):
        raise ValueError(
            f"num_partitions={number} must be <= {len(names)}, the number of natural "
            f"clients in column={column!r}: usually num-supernodes is larger than that"
        )
    # After one sort each client is a slice. It is stable: rows stay in file order.
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    starts = np.searchsorted(ordered, names, side="left")
    ends = np.searchsorted(ordered, names, side="right")
    count = len(names) if number is None else number
    return RowPartitioner(dataset, count, lambda i: order[starts[i] : ends[i]])


def _iid(dataset: Dataset, number: int, seed: int) -> RowPartitioner:
    from flwr_datasets.partitioner import IidPartitioner

    from flower_ext.data.rows import delegate, row_table

    # flwr-datasets cuts contiguous blocks, which are far from iid in a sorted file.
    table = row_table(dataset, None).shuffle(seed=seed)
    return delegate(IidPartitioner(number), table, dataset)


def _shard(dataset: Dataset, number: int, column: str, seed: int) -> RowPartitioner:
    from flwr_datasets.partitioner import ShardPartitioner

    from flower_ext.data.rows import delegate, row_table

    inner = ShardPartitioner(
        num_partitions=number,
        partition_by=column,
        num_shards_per_partition=_SHARDS_PER_CLIENT,
        seed=seed,
    )
    return delegate(inner, row_table(dataset, column), dataset)


def _dirichlet(
    dataset: Dataset, number: int, column: str, alpha: float, seed: int
) -> RowPartitioner:
    from flwr_datasets.partitioner import DirichletPartitioner

    from flower_ext.data.rows import delegate, row_table

    inner = DirichletPartitioner(
        num_partitions=number,
        partition_by=column,
        alpha=float(alpha),
        min_partition_size=1,
        seed=seed,
    )
    table = row_table(dataset, column)
    try:
        return delegate(inner, table, dataset)
    except ValueError as error:
        raise ValueError(
            f"alpha={alpha} with num_partitions={number}: every draw left a client "
            "without rows. Use a larger alpha or fewer partitions"
        ) from error


def _natural_column(dataset: Dataset, column: str | None) -> str:
    if column is not None:
        _check_column(dataset, column)
        return column
    recorded = list(natural_ids(dataset)) or ["client"]
    if recorded[0] in dataset.column_names:
        return str(recorded[0])
    raise ValueError(
        f"column=None: the data set has no natural clients, name one of its columns "
        f"{dataset.column_names} or use scheme='dirichlet' or 'shard'"
    )


def _check_column(dataset: Dataset, column: str) -> None:
    if column not in dataset.column_names:
        raise ValueError(
            f"column={column!r} is not in the data set, which has "
            f"{', '.join(dataset.column_names)}"
        )
