"""The documentation's Python runs, and its reference is complete.

The ``python`` blocks of a page run one after the other in one namespace, which begins
with the stand-ins of :func:`stand_ins`: what the reader is supposed to have. Functions
named ``test_...`` are called after that. A block that cannot run says why, in a comment
``<!-- not run: why -->`` in the line above it.
"""

import importlib
import json
import logging
import os
import pkgutil
import re
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from flwr.app import ArrayRecord, UserConfig
from torch import nn

import flower_ext
from flower_ext import LocalGrid, Task, client_app, simulation, strategies
from flower_ext.check import imported, started
from flower_ext.runs import report

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    if "```python" in path.read_text("utf-8")
)
BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```python\n(.*?)^```$", re.M | re.S)


def blocks(page):
    """Return the blocks that run, each at its own line of the page."""
    text = (ROOT / page).read_text("utf-8")
    for found in BLOCK.finditer(text):
        if not found[1]:
            yield "\n" * text.count("\n", 0, found.start(2)) + found[2]


def make_model(run_config: UserConfig) -> nn.Module:
    return nn.Linear(3, 2)


def client_data(context):
    generator = torch.Generator().manual_seed(context.node_config["partition-id"])
    x = torch.randn(12, 3, generator=generator)
    columns = {"x": x, "y": (x[:, 0] > 0).long(), "group": (x[:, 1] > 0).long()}
    return columns, columns


def per_example_loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model, batch):
    return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}


def stand_ins():
    """Return what a reader has: a model, a task, clients, and what Flower exports."""
    task = Task(make_model, client_data, per_example_loss, accuracy)
    halves = [name for name in strategies.__all__ if name.endswith("Client")]
    app = client_app(task, *(getattr(strategies, name) for name in halves))
    return {
        "Net": lambda: make_model({}),
        "accuracy": accuracy,
        "client_data": client_data,
        "grid": LocalGrid(app, 4),
        "initial_arrays": ArrayRecord(make_model({}).state_dict()),
        "loss": per_example_loss,
        "make_model": make_model,
        "per_example_loss": per_example_loss,
        "task": task,
    }


@pytest.fixture
def quickstart(tmp_path, monkeypatch):
    """Go to a copy of the quickstart, which is also the reader's ``my_app``."""
    folder = tmp_path / "app"
    shutil.copytree(ROOT / "tests" / "quickstart", folder)
    (folder / "my_app").symlink_to("quickstart")
    (folder / "my-app").symlink_to(".")
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    forget_the_app()


def forget_the_app():
    """Let the app be imported anew."""
    for name in [name for name in sys.modules if name.startswith(("quick", "my_app"))]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.mark.parametrize("page", PAGES)
def test_blocks_run(page, quickstart, monkeypatch, cluster):
    if page == "docs/scaling.md":
        cluster()
        one = partial(simulation.PackedGrid, num_workers=1)  # which starts in seconds
        monkeypatch.setattr(simulation, "PackedGrid", one)
    module = ModuleType("page")
    monkeypatch.setitem(sys.modules, "page", module)
    names = module.__dict__
    names.update(stand_ins())
    for block in blocks(page):
        exec(compile(block, page, "exec"), names)
    for name in [name for name in names if name.startswith("test_")]:
        names[name]()


SECTIONS = [
    "The idea",
    "Equations",
    "Use it",
    "When, and when not",
    "Guarantee",
    "Measured",
    "Deviations from the paper",  # where there are any
    "Reference",
]


@pytest.mark.parametrize(
    "page",
    [
        *sorted(ROOT.glob("docs/strategies/*.md")),
        ROOT / "tools" / "template" / "page.md",
    ],
    ids=lambda page: page.stem,
)
def test_pages_of_strategies_have_one_order(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text("utf-8"), flags=re.M | re.S)
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    faithful = "Deviations from the paper" not in found
    assert found == [s for s in SECTIONS if not (faithful and s == SECTIONS[-2])]
    use = text[text.index("## Use it") : text.index("## When, and")]
    assert "\nAll options: " in use or ". All options: " in use


def test_every_page_with_python_is_looked_at():
    assert {"README.md", "docs/own_strategy.md", "docs/privacy.md"} <= set(PAGES)


# The tutorial -----------------------------------------------------------------------


def apply(diff, text):
    """Apply a diff of hunks without line numbers; ``...`` separates hunks."""
    for hunk in re.split(r"^ *\.\.\.\n", diff, flags=re.MULTILINE):
        lines = hunk.splitlines()
        before = "".join(line[1:] + "\n" for line in lines if line[:1] in " -")
        after = "".join(line[1:] + "\n" for line in lines if line[:1] in " +")
        assert text.count(before) == 1, f"the diff does not apply:\n{before}"
        text = text.replace(before, after)
    return text


def diffs(text):
    """Return the diffs of a text, each with the file that it changes."""
    return re.findall(r"```diff\n# (\S+)\n(.*?)```", text, re.DOTALL)


CHANGED = [
    page
    for page in sorted((ROOT / "docs" / "strategies").glob("*.md"))
    if {"client_app.py", "server_app.py"} <= dict(diffs(page.read_text("utf-8"))).keys()
]


@pytest.mark.parametrize("page", CHANGED, ids=lambda page: page.stem)
def test_the_lines_of_a_page_change_the_quickstart(page, quickstart, caplog):
    text = page.read_text("utf-8")
    for name, diff in diffs(text):
        path = quickstart / "quickstart" / name
        path.write_text(apply(diff, path.read_text("utf-8")), "utf-8")
    with imported(quickstart, {}) as app:
        begun = started(app, 3)
        grid = LocalGrid(app.client_app, 3, app.config)
        result = begun.strategy.start(
            grid, begun.arrays, num_rounds=2, train_config=begun.train_config
        )
    assert type(begun.strategy).__name__ in strategies.__all__
    assert result.train_metrics_clientapp[2]["num-replies"] == 3
    found = result.evaluate_metrics_clientapp[2]
    assert found["eval_acc"] > 0
    if '"received-' in text or "paired()" in text:
        assert "received-eval_acc-seen-p10" in found and "eval_acc-seen-hurt" in found
    assert "PERSONAL STATE IS LOST" not in caplog.text


def test_tutorial_step_by_step(quickstart, capsys, caplog):
    (script,) = blocks("docs/tutorial.md")
    tutorial = (ROOT / "docs" / "tutorial.md").read_text("utf-8")
    steps = filter(None, map(diffs, tutorial.split("\n## ")))
    said = []
    for step in [[], *steps]:
        for name, diff in step:
            path = quickstart / "quickstart" / name
            path.write_text(apply(diff, path.read_text("utf-8")), "utf-8")
            # Python would not see two edits within a second.
            shutil.rmtree(path.parent / "__pycache__", ignore_errors=True)
        forget_the_app()
        caplog.clear()
        exec(compile(script, "run.py", "exec"), {})
        said.append(caplog.text)
        assert "Final evaluation" in capsys.readouterr().out
    stock, swapped, tracked, private = said
    assert "eval_acc" in stock
    assert "Starting FedFish strategy" in swapped
    fishers = re.findall(r"Aggregated.*'fisher-mean': ([\d.e-]+)", swapped)
    assert len(fishers) == 2 and min(map(float, fishers)) > 0
    assert "eval_acc" in tracked
    assert "epsilon" in private and "eval_acc" not in private
    assert report.main(["results"]) == 0
    page = Path("results/report.html").read_text("utf-8")
    assert all(name in page for name in ("plain", "private", "epsilon"))


def test_three_lines_a_side_make_the_quickstart_fedfish():
    readme = diffs((ROOT / "README.md").read_text("utf-8"))
    assert sorted(name for name, _ in readme) == ["client_app.py", "server_app.py"]
    for _, diff in readme:
        added = [line for line in diff.splitlines() if line.startswith("+")]
        assert 0 < len(added) <= 3
    # They are the tutorial's first step, which is applied and run.
    assert readme == diffs((ROOT / "docs" / "tutorial.md").read_text("utf-8"))[:2]


# The reference ----------------------------------------------------------------------


def test_every_public_name_is_in_the_reference():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    listed = {
        name
        for page in pages
        for name in re.findall(r"^::: (\S+)$", page.read_text("utf-8"), re.MULTILINE)
    }
    packages = "client", "data", "privacy", "simulation", "strategies", "wire"
    for package in ("flower_ext", *(f"flower_ext.{name}" for name in packages)):
        module = importlib.import_module(package)
        for name in module.__all__:
            home = getattr(getattr(module, name), "__module__", None)
            assert name == "__version__" or home in listed, f"{home}.{name}"
    # What the pages, the examples and the baselines import is public too.
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("**/*.md")] + [
        *(ROOT / "baselines").rglob("*.py")
    ]:
        for module in re.findall(
            r"^ *from (flower_ext[\w.]*) import", path.read_text("utf-8"), re.MULTILINE
        ):
            package = module in {"flower_ext", "flower_ext.strategies"} or (
                module
                in {"flower_ext.client", "flower_ext.simulation", "flower_ext.data"}
            )
            assert package or module in listed, f"{path.name} imports {module}"
    known = {
        m.name for m in pkgutil.walk_packages(flower_ext.__path__, "flower_ext.")
    } | {"flower_ext"}
    assert listed <= known


@pytest.mark.slow
def test_notebook_runs(monkeypatch, caplog):
    monkeypatch.setenv("MPLBACKEND", "agg")
    # It makes Flower quiet: put back, after it, for the tests that read the log.
    caplog.set_level(logging.getLogger("flwr").level, logger="flwr")
    cells = json.loads((ROOT / "docs" / "first_steps.ipynb").read_text("utf-8"))[
        "cells"
    ]
    found = {}
    for number, cell in enumerate(cells):
        assert not cell.get("outputs"), "a notebook is committed without outputs"
        if cell["cell_type"] == "code":
            lines = [line for line in cell["source"] if not line.startswith("%")]
            exec(compile("".join(lines), f"cell {number}", "exec"), found)
    # What its text says: own models are ahead of the shared one, less noise of more.
    ahead = zip(found["own"], found["shared"], strict=True)
    assert all(own > shared for own, shared in ahead)
    assert found["found"][0][1] < found["found"][-1][1]


@pytest.mark.slow
@pytest.mark.parametrize("generator", ["mkdocs", "zensical"])
def test_site_builds_without_a_warning_and_fetches_nothing(tmp_path, generator):
    # In a copy: Zensical writes beside its settings.
    for name in ("docs", "tools", "baselines", "flower_ext", "strategies"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"):
        shutil.copy(ROOT / name, tmp_path)
    source = [sys.executable, "tools/docs_source.py", "build/docs"]
    subprocess.run(source, cwd=tmp_path, check=True)
    command = [Path(sys.executable).parent / generator, "build", "-f", "mkdocs.yml"]
    done = subprocess.run(
        [*command, *["--quiet"] * (generator == "mkdocs")],
        cwd=tmp_path,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert generator == "zensical" or not done.stderr, done.stderr
    site = tmp_path / "site"
    pages = {path: path.read_text("utf-8") for path in site.rglob("*.html")}
    assert site / "baselines" / "dpftrl" / "index.html" in pages
    assert "<math" in pages[site / "strategies" / "dpftrl.html"]
    for path, page in pages.items():
        assert not re.search(r"<(script|link|img|iframe)[^>]*https?://", page), path
        assert not re.search(r":(class|func|meth|math):|\$\$|\$\\[a-z]", page), path
