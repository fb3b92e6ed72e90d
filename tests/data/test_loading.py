import subprocess
import sys
from pathlib import Path

import datasets
import pytest

import flower_ext.data
from flower_ext.data import DataError, load
from flower_ext.data.catalogue import CATALOGUE


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="mean 'shakespeare'") as caught:
        load("shakespear")
    assert all(name in str(caught.value) for name in CATALOGUE)


def test_unknown_name_without_a_close_match():
    with pytest.raises(ValueError, match="'zzz' is not a known data set: choose"):
        load("zzz")


def test_unknown_option_lists_the_options():
    with pytest.raises(ValueError, match=r"minwords=1 is not an option.*min_words"):
        load("shakespeare", minwords=1)
    with pytest.raises(ValueError, match="has no options"):
        load("adult", screened=True)


def test_each_value_of_an_option_has_its_folder(plays, without_pip, cache):
    load("shakespeare", min_words=4)
    load("shakespeare", min_words=4)
    load("shakespeare", min_words=1)
    names = sorted(p.name for p in (cache / "prepared" / "v1").iterdir())
    assert names == ["shakespeare,min_words=1", "shakespeare,min_words=4"]


def test_second_load_needs_no_package(plays, index, cache):
    first = load("shakespeare", min_words=1)
    (index / plays.file).unlink()
    (cache / "downloads" / plays.file).unlink()
    assert load("shakespeare", min_words=1)["train"].to_list() == (
        first["train"].to_list()
    )


def test_cache_dir_argument(plays, tmp_path, cache):
    load("shakespeare", min_words=1, cache_dir=tmp_path / "other")
    assert (tmp_path / "other" / "prepared").is_dir()
    assert not cache.exists()


def test_hub_name_goes_to_datasets(monkeypatch, tmp_path):
    asked = []

    def fake(name, **options):
        asked.append((name, options))
        return datasets.DatasetDict()

    monkeypatch.setattr(datasets, "load_dataset", fake)
    assert load("owner/data", cache_dir=tmp_path, revision="1") == {}
    assert asked == [("owner/data", {"cache_dir": str(tmp_path), "revision": "1"})]


def test_hub_without_network(monkeypatch):
    def fail(name, **options):
        raise ConnectionError("Couldn't reach the Hub")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(DataError, match=r"'owner/data'.*no network.*shakespeare"):
        load("owner/data")


def test_hub_split_is_refused(monkeypatch):
    part = datasets.Dataset.from_dict({"x": [1]})
    monkeypatch.setattr(datasets, "load_dataset", lambda name, **options: part)
    with pytest.raises(ValueError, match="'split'"):
        load("owner/data", split="train")


def test_import_is_light():
    # A stand-in for the parent package, whose own imports are not tested here.
    parent = str(Path(flower_ext.data.__file__).parents[1])
    code = (
        "import sys, types; p = types.ModuleType('flower_ext'); "
        f"p.__path__ = [{parent!r}]; sys.modules['flower_ext'] = p; "
        "import flower_ext.data; "
        "print({'datasets', 'flwr_datasets', 'torch', 'pandas'} & set(sys.modules))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert out.stdout == "set()\n"
