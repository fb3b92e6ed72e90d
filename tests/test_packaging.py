import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from shutil import copy, copytree

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

import flower_ext

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
BASELINES = sorted(ROOT.glob("baselines/*/pyproject.toml"))
SHIPPED = ("flower_ext", "strategies")


def source_files() -> set[str]:
    """Return the path in the wheel of every module of the checkout."""
    package = {
        file.relative_to(ROOT).as_posix()
        for file in (ROOT / "flower_ext").rglob("*.py")
        if "strategies" not in file.relative_to(ROOT).parts
    }
    strategies = (ROOT / "strategies").rglob("*.py")
    return package | {
        f"flower_ext/{f.relative_to(ROOT).as_posix()}" for f in strategies
    }


def test_every_module_is_in_a_listed_package():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    assert settings["package-dir"]["flower_ext.strategies"] == "strategies"
    folders = {Path(file).parent for file in source_files()}
    assert {".".join(f.parts) for f in folders} <= set(settings["packages"])
    for name in settings["packages"]:
        folder = ROOT / name.replace(".", "/").replace(
            "flower_ext/strategies", SHIPPED[1]
        )
        assert (folder / "__init__.py").is_file(), name


def test_typing_marker_is_shipped():
    assert (ROOT / "flower_ext" / "py.typed").is_file()
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"][
        "setuptools"
    ]
    assert "py.typed" in settings["package-data"]["flower_ext"]


def test_version_is_from_one_place_and_in_the_changelog():
    assert flower_ext.__version__ == PROJECT["version"]
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first, *released = re.findall(r"^## (.+)$", changes, re.MULTILINE)
    assert first == "[Unreleased]"
    releases = [release(section) for section in released]
    assert releases == sorted(releases, reverse=True)
    newest, published = releases[0]
    assert str(newest) == PROJECT["version"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == PROJECT["version"]
    assert citation["date-released"] == published
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", changes, re.MULTILINE)) <= kinds


def release(section: str) -> tuple[Version, date]:
    """Return version and day of a released section's heading."""
    found = re.fullmatch(r"\[(\S+)\] - (\d{4}-\d\d-\d\d)", section)
    assert found, section
    version = Version(found[1])
    assert str(version) == found[1], f"{section}: Python spells it {version}"
    return version, date.fromisoformat(found[2])


@pytest.mark.parametrize(
    ("section", "expected"),
    [
        ("[1.0.0rc1] - 2026-11-28", (Version("1.0.0rc1"), date(2026, 11, 28))),
        ("[1.2.3] - 2027-01-02", (Version("1.2.3"), date(2027, 1, 2))),
    ],
)
def test_headings_of_releases_are_understood(section, expected):
    assert release(section) == expected


@pytest.mark.parametrize(
    "section",
    [
        "[1.0.0-rc.1] - 2026-11-28",  # Semantic Versioning's spelling, not Python's
        "[1.0.0rc1]",
        "[1.0.0rc1] - 2026-02-30",
        "[next] - 2026-11-28",
        "1.0.0 - 2026-11-28",
    ],
)
def test_other_headings_are_refused(section):
    with pytest.raises((AssertionError, ValueError)):
        release(section)


def test_a_candidate_is_before_its_release():
    candidate, final = (
        release("[1.0.0rc1] - 2026-11-28"),
        release("[1.0.0] - 2026-11-28"),
    )
    assert candidate < final


def test_dependencies_are_what_is_imported():
    """No package is asked for in vain, and none is there by luck only."""
    declared = {Requirement(text).name for text in PROJECT["dependencies"]}
    extras = {
        Requirement(text).name
        for name in ("dp", "lora", "plot", "tensorboard")
        for text in PROJECT["optional-dependencies"][name]
    }
    imported = {
        module.split(".")[0].replace("_", "-")
        for file in source_files()
        for module in imports(ROOT / file.replace("flower_ext/strategies", SHIPPED[1]))
    }
    imported -= {name.replace("_", "-") for name in sys.stdlib_module_names}
    # Ray comes with flwr[simulation], and torch itself imports tensorboard.
    assert imported - {"flower-ext", "ray"} == (declared | extras) - {"tensorboard"}
    assert declared.isdisjoint(extras)


def imports(file: Path) -> Iterator[str]:
    """Yield the name of each module that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module or ""


def test_the_workflow_runs_every_python_that_is_promised():
    versions = [
        text.rpartition(" ")[2]
        for text in PROJECT["classifiers"]
        if text.startswith("Programming Language :: Python :: 3.")
    ]
    workflow = yaml.safe_load(
        (ROOT / ".github/workflows/checks.yml").read_text("utf-8")
    )
    matrix = workflow["jobs"]["checks"]["strategy"]["matrix"]
    assert matrix["python"] == versions
    assert PROJECT["requires-python"] == f">={versions[0]}"


@pytest.mark.parametrize("baseline", BASELINES, ids=lambda path: path.parent.name)
def test_baselines_take_this_version(baseline):
    """Also a candidate: installers take one where a requirement names one."""
    asked = [
        Requirement(text)
        for text in tomllib.loads(baseline.read_text("utf-8"))["project"][
            "dependencies"
        ]
    ]
    (ours,) = (requirement for requirement in asked if requirement.name == "flower-ext")
    assert ours.specifier.contains(PROJECT["version"]), ours
    assert ours.extras <= PROJECT["optional-dependencies"].keys()


@pytest.mark.slow
def test_wheel_holds_the_modules_and_nothing_else(tmp_path):
    # A copy without the link flower_ext/strategies: the build must not need it,
    # nor may a stale build folder of the checkout leak in.
    for name in SHIPPED:
        copytree(
            ROOT / name,
            tmp_path / name,
            ignore=lambda folder, names: {
                n
                for n in names
                if n == "__pycache__" or (Path(folder) / n).is_symlink()
            },
        )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, tmp_path)
    command = [sys.executable, "-m", "build", "--wheel", str(tmp_path)]
    if int(version("setuptools").split(".")[0]) >= 77:
        command.append("--no-isolation")
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    modules = {name for name in names if not name.split("/")[0].endswith(".dist-info")}
    assert modules == source_files() | {"flower_ext/py.typed"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
