"""Modules of an app that another folder hides."""

import ast
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray import cloudpickle

import flower_ext
from flower_ext.runs.shadows import require_own
from flower_ext.simulation.ray_workplace import worker_class
from flower_ext.simulation.setting import Setting


def touch(folder, *files):
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return folder


@pytest.fixture
def app(tmp_path):
    """An app with a package, a module beside it, and imports that it has not."""
    folder = tmp_path / "new"
    package = folder / "demo"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "client_app.py").write_text(
        "from demo import task\nimport helper.deep\n"
    )
    (package / "task.py").write_text("from .parts import one\nimport json, numpy\n")
    (package / "parts").mkdir()
    (package / "parts" / "one.py").write_text("import nothing_such\n")
    (folder / "helper").mkdir()
    (folder / "helper" / "deep.py").write_text("def broken(:\n")
    (folder / "unused.py").write_text("")
    return folder


@pytest.mark.parametrize(
    ("other", "name", "own"),
    [
        ("demo/__init__.py", "demo", "demo/__init__.py"),
        ("demo.py", "demo", "demo/__init__.py"),
        ("helper/deep.py", "helper.deep", "helper/deep.py"),
    ],
)
def test_the_first_one_found_is_refused_with_both_paths(
    app, tmp_path, other, name, own
):
    old = touch(tmp_path / "old", other)
    with pytest.raises(ValueError, match="start from another folder") as caught:
        require_own(app, ["demo.client_app"], [tmp_path, old])
    assert f"module {name!r} of the app, {app / own}, is hidden" in str(caught.value)
    assert str(old / other) in str(caught.value)


def test_modules_of_an_app_without_a_package_count(tmp_path):
    flat = touch(tmp_path / "flat", "client_app.py", "task.py")
    (flat / "client_app.py").write_text("import task")
    old = touch(tmp_path / "old", "task.py")
    require_own(flat, ["client_app"], [tmp_path])
    with pytest.raises(ValueError, match="'task' of the app"):
        require_own(flat, ["client_app"], [old])


def test_what_does_not_hide_anything_is_no_matter(app, tmp_path):
    # Folders without __init__.py give way to packages that have one; nobody imports
    # the rest from the app.
    old = touch(
        tmp_path / "old",
        "demo/task.py",
        "unused.py",
        "json.py",
        "nothing_such.py",
        "other/demo/__init__.py",
    )
    linked = tmp_path / "linked"
    linked.symlink_to(app)
    for before in ([], [app], [old], [linked], [tmp_path / "missing"], [app / "demo"]):
        require_own(app, ["demo.client_app", "demo.missing"], before)


def test_what_lies_beside_an_installed_package_is_not_followed(app, tmp_path):
    old = touch(tmp_path / "old", "helper/deep.py")
    require_own(app, ["demo.client_app"], [old], imported=False)
    touch(old, "demo/__init__.py")
    with pytest.raises(ValueError, match="'demo' of the app"):
        require_own(app, ["demo.client_app"], [old], imported=False)


def test_workers_look_where_the_driver_looks(tmp_path):
    """A worker finds the driver's versions, though its own path has others before."""
    old = touch(tmp_path / "old", "demo.py")
    (old / "flower_ext.py").write_text("raise ImportError('another version')")
    new = touch(tmp_path / "new", "demo.py")
    (new / "demo.py").write_text(
        "from flwr.clientapp import ClientApp\napp=ClientApp()"
    )
    paths = [str(new), str(Path(flower_ext.__file__).parents[1]), *sys.path]
    setting = Setting("demo:app", range(1)).pickled()
    sent = tmp_path / "sent"
    sent.write_bytes(cloudpickle.dumps((worker_class(), setting, paths)))
    script = (
        f"import sys; sys.path.insert(0, {str(old)!r})\n"
        "import pickle, pathlib; from ray import cloudpickle\n"
        f"sent = pathlib.Path({str(sent)!r}).read_bytes()\n"
        "worker, setting, paths = cloudpickle.loads(sent)\n"
        "worker(setting, paths, 1).ready()\n"
        "import demo, flower_ext; print(demo.__file__, flower_ext.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(new / "demo.py"), flower_ext.__file__]


def test_threads_parse_one_after_the_other(app, tmp_path, monkeypatch):
    parse, inside, most = ast.parse, [], []

    def watched(source):
        inside.append(source)
        time.sleep(0.001)  # to let the others in, if they can
        most.append(len(inside))
        try:
            return parse(source)
        finally:
            inside.remove(source)

    monkeypatch.setattr(ast, "parse", watched)
    threads = [
        threading.Thread(target=require_own, args=(app, ["demo.client_app"], []))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1 and len(most) >= 4
