"""What the README shows is applied and run."""

import importlib
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from flower_ext.client import Metrics
from flower_ext.contribution import Total
from flower_ext.simulation.local import app_config, run_local
from flower_ext.strategies import FedFish

ROOT = Path(__file__).parents[1]
QUICKSTART = ROOT / "tests" / "quickstart"


def diffs() -> dict[str, str]:
    """Return the README's diffs by the file that they change."""
    readme = (ROOT / "README.md").read_text("utf-8")
    found = re.findall(r"```diff\n# (\S+)\n(.*?)```", readme, re.DOTALL)
    return dict(found)


def apply(diff: str, text: str) -> str:
    """Apply a diff of hunks without line numbers; ``...`` separates hunks."""
    for hunk in re.split(r"^ *\.\.\.\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines()
        before = "".join(line[1:] + "\n" for line in lines if line[:1] in " -")
        after = "".join(line[1:] + "\n" for line in lines if line[:1] in " +")
        assert text.count(before) == 1, f"the README's diff does not apply:\n{before}"
        text = text.replace(before, after)
    return text


@pytest.fixture
def app(tmp_path: Path) -> Iterator[Path]:
    """Return a copy of the quickstart that can be imported."""
    folder = tmp_path / "app"
    shutil.copytree(QUICKSTART, folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.startswith("quickstart")]:
        del sys.modules[name]


def run(app: Path) -> None:
    """Run the app in process."""
    importlib.invalidate_caches()
    server = importlib.import_module("quickstart.server_app")
    client = importlib.import_module("quickstart.client_app")
    run_local(server.app, client.app, num_supernodes=4, run_config=app_config(app))


def test_the_quickstart_runs_as_it_is(
    app: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(app)
    assert "eval_acc" in capsys.readouterr().out


def test_three_lines_a_side_make_it_fedfish(
    app: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = diffs()
    assert sorted(changes) == ["client_app.py", "server_app.py"]
    for name, diff in changes.items():
        added = [line for line in diff.splitlines() if line.startswith("+")]
        assert 0 < len(added) <= 3
        path = app / "quickstart" / name
        path.write_text(apply(diff, path.read_text("utf-8")), "utf-8")
    fishers = []
    report = FedFish.report

    def spy(self: FedFish, total: Total) -> Metrics:
        metrics = report(self, total)
        fishers.append(metrics["fisher-mean"])
        return metrics

    monkeypatch.setattr(FedFish, "report", spy)
    run(app)
    assert "eval_acc" in capsys.readouterr().out
    assert len(fishers) == 2
    assert min(fishers) > 0
