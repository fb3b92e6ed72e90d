import re
import subprocess
import sys
import tomllib
import zipfile
from importlib.metadata import version
from pathlib import Path
from shutil import copy, copytree

import pytest

import flower_ext

ROOT = Path(__file__).resolve().parents[1]
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
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert flower_ext.__version__ == declared["version"]
    citation = (ROOT / "CITATION.cff").read_text("utf-8")
    assert f"\nversion: {declared['version']}\n" in citation
    changes = (ROOT / "CHANGELOG.md").read_text("utf-8")
    first, *released = re.findall(r"^## (.+)$", changes, re.MULTILINE)
    assert first == "[Unreleased]" or first.startswith(f"[{declared['version']}] - ")
    for section in released:
        assert re.fullmatch(r"\[\d+\.\d+\.\d+\] - \d{4}-\d\d-\d\d", section)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", changes, re.MULTILINE)) <= kinds


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
