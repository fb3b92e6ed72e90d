"""The known data sets and their facts in one line each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flower_ext.data.images import fashion_mnist, mnist_small
from flower_ext.data.mail import spam_assassin
from flower_ext.data.schools import schools
from flower_ext.data.tabular import adult, compas
from flower_ext.data.text import shakespeare

if TYPE_CHECKING:
    from datasets import DatasetDict


@dataclass(frozen=True)
class Entry:
    """One data set.

    Parameters
    ----------
    name : str
        What `load` takes.
    prepare : callable
        Function that builds it from a cache folder; its keyword-only arguments are
        the options, its docstring describes columns and split.
    examples : str
        Rows in train and test.
    clients : str
        Natural clients with the default options.
    size : str
        Download size.
    licence : str
        Licence of the data.
    """

    name: str
    prepare: Callable[..., DatasetDict]
    examples: str
    clients: str
    size: str
    licence: str


_ENTRIES = [
    Entry(
        "shakespeare",
        shakespeare,
        "18,724 + 5,022",
        "373 roles",
        "5.4 MB",
        "public domain, CC-BY-2.5",
    ),
    Entry(
        "fashion-mnist",
        fashion_mnist,
        "60,000 + 10,000",
        "none",
        "30.9 MB",
        "MIT",
    ),
    Entry(
        "adult",
        adult,
        "32,561 + 16,281",
        "15 occupations",
        "28.2 MB",
        "CC-BY-4.0",
    ),
    Entry(
        "compas",
        compas,
        "5,050 + 2,164",
        "2 charge degrees",
        "28.2 MB",
        "public record (ProPublica)",
    ),
    Entry(
        "mnist-small",
        mnist_small,
        "4,000 + 1,000",
        "none",
        "1.4 MB",
        "BSD-3-Clause, CC-BY-SA-3.0",
    ),
    Entry(
        "spam-assassin",
        spam_assassin,
        "1,653 + 359",
        "130 senders",
        "19.9 MB",
        "Apache-2.0 (package)",
    ),
    Entry(
        "schools",
        schools,
        "3,245 + 814",
        "65 schools",
        "50.1 MB",
        "GPL-2.0-or-later",
    ),
]

CATALOGUE: dict[str, Entry] = {entry.name: entry for entry in _ENTRIES}
