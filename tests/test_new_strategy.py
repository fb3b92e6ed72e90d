"""``make new-strategy``: what it writes passes the checks as it is."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Where a new strategy is looked at, too.
OTHERS = [f"tests/test_{name}.py" for name in ("architecture", "docs", "doctests")]
NEW = "idea or every_public or strategies_are"
FOLDERS = "flower_ext strategies tests docs tools baselines"
FILES = "mkdocs.yml pyproject.toml README.md"


@pytest.fixture
def checkout(tmp_path):
    """Copy what the checks look at."""
    for name in FILES.split():
        shutil.copy(ROOT / name, tmp_path)
    compiled = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS.split():
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=compiled)
    return tmp_path


def run(checkout, *command):
    """Run Python in the copy, with the copy's package."""
    return subprocess.run(
        [sys.executable, *command],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_a_new_strategy_passes_its_checks(checkout):
    made = run(checkout, "tools/new_strategy.py", "a_new_idea_of_ours")
    assert made.returncode == 0, made.stderr
    written = made.stdout.split()[:3]
    assert written == [
        "strategies/a_new_idea_of_ours.py",
        "tests/strategies/test_a_new_idea_of_ours.py",
        "docs/strategies/a_new_idea_of_ours.md",
    ]
    for path in written:
        assert "emplate" not in (checkout / path).read_text("utf-8")
    table = "tests/strategies/test_every_method.py"
    code = [*written[:2], "strategies/__init__.py", table]
    # Types do not depend on the name: `make check` has looked at the template's.
    for check in (
        ["ruff", "check", *code],
        ["ruff", "format", "--check", *code],
        ["pytest", written[1], table, *OTHERS, "-k", NEW],
    ):
        done = run(checkout, "-m", *check)
        assert done.returncode == 0, (check, done.stdout[-3000:], done.stderr[-2000:])


@pytest.mark.parametrize("name", ["", "MyIdea", "my-idea", "1st", "fedfish", "a/b"])
def test_names_that_are_none_or_taken(name):
    done = run(ROOT, "tools/new_strategy.py", name)
    assert done.returncode == 2
    assert f"NAME={name!r} must be" in done.stderr or "NAME=fedfish is taken" in (
        done.stderr
    )
