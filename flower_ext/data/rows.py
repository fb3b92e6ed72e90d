"""A partitioner that knows the row numbers of each client."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from flwr_datasets.partitioner import Partitioner
from numpy.typing import NDArray

from flower_ext.core.errors import refuse

_ROW = "__row__"


class RowPartitioner(Partitioner):  # type: ignore[misc]
    """Clients as lists of row numbers.

    Parameters
    ----------
    dataset : datasets.Dataset
        The rows to divide.
    num_partitions : int
        Number of clients.
    rows : callable
        Row numbers of client i, shape ``(examples,)``, for i from 0 to
        ``num_partitions - 1``.
    """

    def __init__(
        self,
        dataset: Dataset,
        num_partitions: int,
        rows: Callable[[int], NDArray[np.int64]],
    ) -> None:
        super().__init__()
        self.dataset = dataset
        self._num_partitions = num_partitions
        self._rows = rows

    @property
    def num_partitions(self) -> int:
        """Number of clients."""
        return self._num_partitions

    def rows(self, partition_id: int) -> NDArray[np.int64]:
        """Row numbers of one client, for columns that are read already.

        Parameters
        ----------
        partition_id : int
            The client's number, from 0 to ``num_partitions - 1``.

        Returns
        -------
        ndarray
            Shape ``(examples,)``, in the order of :meth:`load_partition`.

        Raises
        ------
        ValueError
            No such client.
        """
        if not 0 <= partition_id < self._num_partitions:
            raise ValueError(
                f"partition_id={partition_id} must be from 0 to "
                f"{self._num_partitions - 1}: usually num-supernodes is larger than "
                f"the number of partitions ({self._num_partitions})"
            )
        return self._rows(int(partition_id))

    def load_partition(self, partition_id: int) -> Dataset:
        """Rows of one client, as a view of the data set.

        Parameters
        ----------
        partition_id : int
            The client's number, from 0 to ``num_partitions - 1``.

        Returns
        -------
        datasets.Dataset
            The client's rows; no rows for a natural client that is absent here.

        Raises
        ------
        ValueError
            No such client.
        """
        rows = self.rows(partition_id)
        # A block of neighbours is a slice of the file, without a table of indices.
        if len(rows) and np.array_equal(rows, np.arange(rows[0], rows[0] + len(rows))):
            return self.dataset.select(range(rows[0], rows[0] + len(rows)))
        return self.dataset.select(rows)


def delegate(inner: Partitioner, table: Dataset, dataset: Dataset) -> RowPartitioner:
    """Let a flwr-datasets partitioner divide a `row_table` of the data set.

    The partitioner sees row numbers and labels only: it never sorts, copies or caches
    the data itself.
    """
    inner.dataset = table

    def rows(partition_id: int) -> NDArray[np.int64]:
        part = inner.load_partition(partition_id)
        return np.asarray(part[_ROW][:], dtype=np.int64)

    # flwr-datasets divides at the first request: settings that cannot be met are
    # refused here and not in some client later.
    rows(0)
    return RowPartitioner(dataset, inner.num_partitions, rows)


def row_table(dataset: Dataset, column: str | None) -> Dataset:
    """Data set in memory with the row numbers and, unless None, one column."""
    columns: dict[str, NDArray[Any]] = {_ROW: np.arange(len(dataset))}
    if column is not None:
        columns[column] = column_values(dataset, column)
    return Dataset.from_dict(columns)


def column_values(dataset: Dataset, column: str) -> NDArray[Any]:
    """One column as an array of shape ``(examples,)``, without reading the others.

    Refuses values by which rows cannot be divided: lists and other nested types, and
    missing values, NaN among them.
    """
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    if pa.types.is_nested(values.type) or isinstance(values.type, pa.ExtensionType):
        refuse(
            "column",
            column,
            "a column of single values",
            f"its rows hold {values.type}; make one label of each",
        )
    if missing := pc.sum(pc.is_null(values, nan_is_null=True)).as_py():
        raise ValueError(
            f"column={column!r} has {missing} missing values, which belong "
            "to no client: filter those rows or fill them in"
        )
    return np.asarray(values.to_numpy())
