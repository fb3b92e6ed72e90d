import subprocess
import sys
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from flower_ext.data import DataError, cache_root
from flower_ext.data.cache import is_intact, prepared, prepared_dir

BUILD = """
import sys
from multiprocessing import get_context
from pathlib import Path
from datasets import Dataset, DatasetDict
from flower_ext.data.cache import prepared

def build():
    with open(sys.argv[2], "a") as log:
        log.write("built\\n")
    part = Dataset.from_dict({"x": list(range(1000))})
    return DatasetDict(train=part, test=part)

def load(barrier):
    barrier.wait()
    print(sum(prepared(Path(sys.argv[1]), "numbers", build)["train"]["x"][:]))

# Forked, so that one process imports for all of them.
fork = get_context("fork")
barrier = fork.Barrier(4)
processes = [fork.Process(target=load, args=(barrier,)) for _ in range(4)]
for process in processes:
    process.start()
for process in processes:
    process.join()
"""


class Build:
    """Builds four rows and counts how often."""

    calls = 0

    def __call__(self) -> DatasetDict:
        self.calls += 1
        part = Dataset.from_dict({"x": [1, 2, 3, 4]})
        return DatasetDict(train=part, test=part)


def test_built_once(tmp_path):
    build = Build()
    for _ in range(3):
        assert prepared(tmp_path, "x", build)["train"]["x"][:] == [1, 2, 3, 4]
    assert build.calls == 1
    assert is_intact(prepared_dir(tmp_path, "x"))


def test_processes_that_load_at_once_build_once(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", BUILD, str(tmp_path / "cache"), str(log)]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert out == "499500\n" * 4
    assert log.read_text() == "built\n"


def damage_truncate(folder: Path) -> None:
    arrow = next(folder.glob("train/*.arrow"))
    arrow.write_bytes(arrow.read_bytes()[:-8])


def damage_overwrite(folder: Path) -> None:
    arrow = next(folder.glob("train/*.arrow"))
    arrow.write_bytes(b"\x01" * arrow.stat().st_size)


def damage_remove_part(folder: Path) -> None:
    (folder / "test" / "dataset_info.json").unlink()


def damage_remove_manifest(folder: Path) -> None:
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    "damage",
    [damage_truncate, damage_overwrite, damage_remove_part, damage_remove_manifest],
)
def test_damaged_folder_is_built_again(tmp_path, damage):
    build = Build()
    prepared(tmp_path, "x", build)
    damage(prepared_dir(tmp_path, "x"))
    assert prepared(tmp_path, "x", build)["train"]["x"][:] == [1, 2, 3, 4]
    assert build.calls == 2


def test_failed_build_leaves_nothing(tmp_path):
    def fail() -> DatasetDict:
        raise DataError("no network")

    with pytest.raises(DataError, match="no network"):
        prepared(tmp_path, "x", fail)
    assert not prepared_dir(tmp_path, "x").exists()
    assert prepared(tmp_path, "x", Build())["test"].num_rows == 4


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"file.*cache_dir= or \$FLOWER_EXT_CACHE"):
        prepared(tmp_path / "file", "x", Build())


def test_transforms_of_the_user_do_not_count_as_damage(tmp_path):
    build = Build()
    first = prepared(tmp_path, "x", build)["train"]
    first.shuffle(seed=1)
    first.map(lambda row: {"y": row["x"]})
    prepared(tmp_path, "x", build)
    assert build.calls == 1


def test_cache_root(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", "/home/ham")
    monkeypatch.delenv("FLOWER_EXT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_root() == Path("/home/ham/.cache/flower-ext")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_root() == Path("/xdg/flower-ext")
    monkeypatch.setenv("FLOWER_EXT_CACHE", "/own")
    assert cache_root() == Path("/own")
    assert cache_root("~/here") == Path("/home/ham/here")
