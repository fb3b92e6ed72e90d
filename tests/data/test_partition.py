import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset, DatasetDict

from flower_ext.data import partitioner
from flower_ext.data.metadata import describe


@pytest.fixture
def letters():
    """100 rows, ten labels, four clients in mixed order."""
    return Dataset.from_dict(
        {
            "client": [f"c{i * 7 % 4}" for i in range(100)],
            "label": [i // 10 for i in range(100)],
            "x": list(range(100)),
        }
    )


def rows(division):
    return [division.load_partition(i)["x"][:] for i in range(division.num_partitions)]


def test_natural_is_every_row_of_the_client_in_order(letters):
    division = partitioner(letters, "natural")
    assert division.num_partitions == 4
    assert rows(division) == [
        [i for i in range(100) if letters[i]["client"] == f"c{k}"] for k in range(4)
    ]


def test_natural_does_not_depend_on_row_order(letters):
    shuffled = letters.shuffle(seed=5)
    a, b = partitioner(letters, "natural"), partitioner(shuffled, "natural")
    assert [sorted(x) for x in rows(a)] == [sorted(x) for x in rows(b)]


def test_natural_ids_have_one_number_in_train_and_test():
    data = describe(
        DatasetDict(
            train=Dataset.from_dict({"who": ["b", "d", "b"], "x": [0, 1, 2]}),
            test=Dataset.from_dict({"who": ["d", "a"], "x": [3, 4]}),
        ),
        licence="",
        citation="",
        natural_columns=["who"],
    )
    assert rows(partitioner(data["train"], "natural")) == [[], [0, 2], [1]]
    assert rows(partitioner(data["test"], "natural")) == [[4], [], [3]]
    empty = partitioner(data["train"], "natural").load_partition(0)
    assert empty.column_names == ["who", "x"]


def test_recorded_ids_survive_saving(tmp_path):
    part = Dataset.from_dict({"who": ["b"], "x": [0]})
    other = Dataset.from_dict({"who": ["a"], "x": [0]})
    data = DatasetDict(train=part, test=other)
    describe(data, licence="", citation="", natural_columns=["who"])
    data.save_to_disk(str(tmp_path / "d"))
    again = DatasetDict.load_from_disk(str(tmp_path / "d"))
    assert partitioner(again["train"], "natural").num_partitions == 2


def test_recorded_ids_that_no_longer_fit_are_not_used():
    part = Dataset.from_dict({"who": ["b", "a"], "x": [0, 1]})
    describe(DatasetDict(t=part), licence="", citation="", natural_columns=["who"])
    renamed = part.map(lambda row: {"who": row["who"] + "!"})
    assert rows(partitioner(renamed, "natural", column="who")) == [[1], [0]]


def test_ids_choose_and_number_clients(letters):
    division = partitioner(letters, "natural", ids=["c3", "c1", "missing"])
    assert division.num_partitions == 3
    assert set(division.load_partition(0)["client"]) == {"c1"}
    assert set(division.load_partition(1)["client"]) == {"c3"}
    assert len(division.load_partition(2)) == 0


def test_natural_by_a_number_column(letters):
    division = partitioner(letters, "natural", column="label", num_partitions=3)
    assert rows(division) == [list(range(10 * k, 10 * k + 10)) for k in range(3)]


def test_iid_of_a_sorted_file_mixes_labels(letters):
    division = partitioner(letters, "iid", num_partitions=4, seed=1)
    parts = rows(division)
    assert sorted(sum(parts, [])) == list(range(100))
    assert [len(part) for part in parts] == [25] * 4
    # A contiguous block would hold at most four labels.
    assert min(len({x // 10 for x in part}) for part in parts) > 5


def test_shards_have_few_labels(letters):
    parts = rows(partitioner(letters, "shard", num_partitions=5))
    assert sorted(sum(parts, [])) == list(range(100))
    assert [len({x // 10 for x in part}) for part in parts] == [2] * 5


def test_dirichlet_alpha_sets_the_skew(letters):
    def skew(alpha):
        parts = rows(partitioner(letters, "dirichlet", num_partitions=4, alpha=alpha))
        assert sorted(sum(parts, [])) == list(range(100))
        counts = [np.bincount(np.array(p) // 10, minlength=10) for p in parts]
        return np.max(counts, axis=0).mean()

    # Largest share of a label's ten rows at one client: 10 at most, 2.5 at least.
    assert skew(0.01) > 9
    assert skew(1000.0) < 4


@pytest.mark.parametrize(
    ("scheme", "options"),
    [("iid", {}), ("shard", {}), ("dirichlet", {"alpha": 0.5})],
)
def test_seed_decides(letters, scheme, options):
    def divide(seed):
        return rows(
            partitioner(letters, scheme, num_partitions=4, seed=seed, **options)
        )

    assert divide(3) == divide(3)
    assert divide(3) != divide(4)


@pytest.mark.parametrize(
    ("scheme", "options"),
    [
        ("natural", {}),
        ("iid", {"num_partitions": 4}),
        ("dirichlet", {"num_partitions": 4, "alpha": 0.5}),
    ],
)
def test_row_numbers_are_those_of_the_clients_rows(letters, scheme, options):
    division = partitioner(letters, scheme, **options)
    assert [division.rows(i).tolist() for i in range(4)] == rows(division)
    with pytest.raises(ValueError, match="partition_id=4 must be from 0 to 3"):
        division.rows(4)


def test_same_division_in_another_process(letters, tmp_path):
    letters.save_to_disk(str(tmp_path / "d"))
    code = (
        "from datasets import load_from_disk\n"
        "from flower_ext.data import partitioner\n"
        f"d = load_from_disk({str(tmp_path / 'd')!r})\n"
        "p = partitioner(d, 'dirichlet', num_partitions=4, alpha=0.5, seed=9)\n"
        "n = partitioner(d, 'natural')\n"
        "print([[q.load_partition(i)['x'][:] for i in range(4)] for q in (p, n)])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    here = [
        rows(partitioner(letters, "dirichlet", num_partitions=4, alpha=0.5, seed=9)),
        rows(partitioner(letters, "natural")),
    ]
    assert out.stdout.strip() == str(here)


def test_nothing_is_written_next_to_the_data(letters, tmp_path):
    from datasets import load_from_disk

    letters.save_to_disk(str(tmp_path / "d"))
    before = sorted((tmp_path / "d").iterdir())
    data = load_from_disk(str(tmp_path / "d"))
    for scheme, options in [("iid", {}), ("shard", {}), ("dirichlet", {"alpha": 1.0})]:
        partitioner(data, scheme, num_partitions=4, **options).load_partition(3)
    assert sorted((tmp_path / "d").iterdir()) == before


@pytest.mark.parametrize("scheme", ["natural", "iid"])
@pytest.mark.parametrize("bad", [4, -1])
def test_partition_that_does_not_exist(letters, scheme, bad):
    division = partitioner(letters, scheme, num_partitions=4)
    with pytest.raises(
        ValueError, match=f"partition_id={bad} must be from 0 to 3.*num-supernodes"
    ):
        division.load_partition(bad)


@pytest.mark.parametrize(
    ("scheme", "options", "message"),
    [
        ("random", {}, "scheme='random' must be one of natural, iid, dirichlet, shard"),
        ("natural", {"column": "who"}, "column='who' is not.*client, label, x"),
        ("natural", {"num_partitions": 5}, "=5 must be <= 4.*num-supernodes"),
        ("natural", {"alpha": 1.0}, "alpha=1.0 has no meaning"),
        ("iid", {}, "num_partitions=None"),
        ("iid", {"num_partitions": 0}, "num_partitions=0 must be an integer >= 1"),
        ("iid", {"num_partitions": 2.0}, "num_partitions=2.0 must be an integer"),
        ("iid", {"num_partitions": 101}, "=101 must be <= 100"),
        ("iid", {"num_partitions": 2, "ids": ["c1"]}, "ids has no meaning"),
        ("shard", {"num_partitions": 51}, "=51 must be <= 50"),
        ("shard", {"num_partitions": 2, "column": "y"}, "column='y' is not"),
        ("dirichlet", {"num_partitions": 2}, "alpha=None must be"),
        ("dirichlet", {"num_partitions": 2, "alpha": 0.0}, "alpha=0.0 must be"),
        ("dirichlet", {"num_partitions": 2, "alpha": -1.0}, "alpha=-1.0 must be"),
        ("dirichlet", {"num_partitions": 2, "alpha": np.nan}, "alpha=nan must be"),
        ("dirichlet", {"num_partitions": 2, "alpha": np.inf}, "alpha=inf must be"),
    ],
)
def test_bad_arguments(letters, scheme, options, message):
    with pytest.raises(ValueError, match=message):
        partitioner(letters, scheme, **options)


@pytest.mark.filterwarnings("ignore:The specified min_partition_size")
def test_dirichlet_that_leaves_a_client_empty(letters):
    with pytest.raises(ValueError, match="alpha=0.001 with num_partitions=90"):
        partitioner(letters, "dirichlet", num_partitions=90, alpha=0.001)


@pytest.mark.parametrize("scheme", ["dirichlet", "shard", "natural"])
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0.0, 1.0, float("nan")], "column='label' has 20 missing values"),
        ([0, 1, None], "column='label' has 20 missing values"),
        ([[0], [1], [0, 1]], "column='label' must be a column of single values: its"),
        ([{"a": 1}, {"a": 2}, {"a": 3}], "column='label' must be a column of single"),
    ],
)
def test_labels_that_tell_no_row_are_refused(scheme, labels, message):
    data = Dataset.from_dict({"label": labels * 20})
    options = {"num_partitions": 3, "alpha": 1.0, "column": "label"}
    if scheme != "dirichlet":
        del options["alpha"]
    with pytest.raises(ValueError, match=message):
        partitioner(data, scheme, **options)


def test_no_natural_column(letters):
    with pytest.raises(ValueError, match=r"no natural clients.*'label', 'x'"):
        partitioner(letters.remove_columns("client"), "natural")


def test_missing_ids():
    data = Dataset.from_dict({"client": ["a", None]})
    with pytest.raises(ValueError, match="column='client' has 1 missing values"):
        partitioner(data, "natural")
