"""What a prepared data set says about itself: natural ids and feature names."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict


def describe(
    data: DatasetDict,
    *,
    licence: str,
    citation: str,
    natural_columns: Sequence[str] = (),
    feature_names: Sequence[str] = (),
) -> DatasetDict:
    """Record natural ids and feature names where `save_to_disk` keeps them.

    The ids are those of all splits together, so that a client has one number in
    train and test. The first natural column is the default one.
    """
    ids = {
        column: sorted({v for split in data.values() for v in split.unique(column)})
        for column in natural_columns
    }
    # The description is free text, and is saved with every split.
    text = json.dumps({"natural_ids": ids, "feature_names": list(feature_names)})
    for split in data.values():
        split.info.description = text
        split.info.license = licence
        split.info.citation = citation
    return data


def feature_names(dataset: Dataset) -> list[str]:
    """Names of the entries of the `features` column, in order.

    Parameters
    ----------
    dataset : datasets.Dataset
        A split of `load("adult")`, `load("compas")` or `load("schools")`, or a part.

    Returns
    -------
    list of str
        ``"age"`` for a standardised number, ``"occupation=Sales"`` for an indicator.

    Raises
    ------
    ValueError
        The data set has no recorded feature names.
    """
    names = _recorded(dataset).get("feature_names")
    if not isinstance(names, list) or not names:
        raise ValueError(
            f"dataset has no feature names (columns: {dataset.column_names}): only "
            "'adult', 'compas' and 'schools' have a `features` column"
        )
    return [str(name) for name in names]


def natural_ids(dataset: Dataset) -> dict[str, list[str]]:
    """Natural columns and all their ids over train and test; empty if unknown."""
    ids = _recorded(dataset).get("natural_ids")
    return ids if isinstance(ids, dict) else {}


def _recorded(dataset: Dataset) -> dict[str, object]:
    try:
        found = json.loads(dataset.info.description or "{}")
    except ValueError:  # a data set from elsewhere, whose description is prose
        return {}
    return found if isinstance(found, dict) else {}
