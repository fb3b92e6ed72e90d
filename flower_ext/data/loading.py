"""Find a data set by name, prepare it once, open it."""

from __future__ import annotations

import difflib
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING

from flower_ext.data.cache import cache_root, prepared, prepared_dir
from flower_ext.data.catalogue import CATALOGUE, Entry
from flower_ext.data.errors import DataError

if TYPE_CHECKING:
    from datasets import DatasetDict


def load(
    name: str,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    **options: object,
) -> DatasetDict:
    """Load a data set with the splits "train" and "test".

    The first call fetches and converts it, later calls memory-map the result, also
    from several processes at once.

    Parameters
    ----------
    name : str
        "shakespeare", "fashion-mnist", "adult", "compas", "mnist-small",
        "spam-assassin" or "schools"; or, when it contains a "/", a data set on the
        Hugging Face Hub, which comes with the splits and columns it has there.
    cache_dir : path or None, default None
        Where to keep it. None: ``$FLOWER_EXT_CACHE``, else
        ``$XDG_CACHE_HOME/flower-ext``, else ``~/.cache/flower-ext`` (Hub data sets:
        the Hub's own cache).
    **options
        Options of that data set, such as ``min_words=500`` for "shakespeare". For a
        Hub data set, further arguments of `datasets.load_dataset`.

    Returns
    -------
    datasets.DatasetDict
        The splits.

    Raises
    ------
    ValueError
        Unknown name or option, or an option out of range.
    DataError
        It could not be fetched, verified or written.

    Examples
    --------
    >>> from flower_ext.data import load, partitioner
    >>> plays = load("shakespeare")  # doctest: +SKIP
    >>> clients = partitioner(plays["train"], "natural")  # doctest: +SKIP
    >>> clients.num_partitions  # doctest: +SKIP
    373
    """
    if "/" in name:
        return _load_from_hub(name, cache_dir, options)
    entry = find(name)
    values = _all_options(entry, options)
    root = cache_root(cache_dir)
    return prepared(root, key(entry, values), lambda: entry.prepare(root, **values))


def find(name: str) -> Entry:
    """Catalogue entry of `name`, or a `ValueError` that lists the known names."""
    if name in CATALOGUE:
        return CATALOGUE[name]
    close = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.5)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"name={name!r} is not a known data set{hint}: choose one of "
        f"{', '.join(CATALOGUE)}, or an 'owner/name' of the Hugging Face Hub"
    )


def location(name: str, cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Folder of a data set prepared with its default options."""
    entry = find(name)
    return prepared_dir(cache_root(cache_dir), key(entry, _all_options(entry, {})))


def key(entry: Entry, options: dict[str, object]) -> str:
    """Name of the prepared folder: data set and all its options."""
    parts = [f"{option}={value}" for option, value in sorted(options.items())]
    return ",".join([entry.name, *parts])


def _all_options(entry: Entry, given: dict[str, object]) -> dict[str, object]:
    """Given options over the defaults, so that both share one prepared folder."""
    known = {
        parameter.name: parameter.default
        for parameter in inspect.signature(entry.prepare).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    for option, value in given.items():
        if option not in known:
            raise ValueError(
                f"{option}={value!r} is not an option of {entry.name!r}: it has "
                f"{', '.join(known) or 'no options'}"
            )
        # Values are in the folder's name: 500 and 500.0 would be prepared apart.
        if type(value) is not type(known[option]):
            raise ValueError(
                f"{option}={value!r} must be of type {type(known[option]).__name__}"
            )
    return known | given


def _load_from_hub(
    name: str,
    cache_dir: str | os.PathLike[str] | None,
    options: dict[str, object],
) -> DatasetDict:
    from datasets import DatasetDict, load_dataset

    where = None if cache_dir is None else str(cache_root(cache_dir))
    try:
        data = load_dataset(name, cache_dir=where, **options)
    # Without a network several kinds of OSError are raised, and so for a missing name.
    except OSError as error:
        raise DataError(
            f"{name!r} could not be loaded from the Hugging Face Hub: {error}. "
            "Usually there is no network or the name is misspelt; these need no Hub: "
            f"{', '.join(CATALOGUE)}"
        ) from error
    if not isinstance(data, DatasetDict):
        raise ValueError(
            f"options for {name!r} must not include 'split' or 'streaming': load() "
            "returns every split"
        )
    return data
