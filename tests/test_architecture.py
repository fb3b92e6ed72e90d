"""Who may import and read what, and how long a strategy may be."""

import ast
import io
import tokenize
from pathlib import Path

import pytest

import flower_ext
import flower_ext.strategies

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = Path(flower_ext.__file__).parent
STRATEGIES = Path(flower_ext.strategies.__file__).parent
BASELINES = ROOT / "baselines"
# A room imports from those of lower and of its own level only.
LEVELS = {
    "core": 0,
    "wire": 1,
    "data": 1,
    "privacy": 2,
    "client": 3,
    "server": 4,
    "simulation": 5,
    "audit": 6,
    "runs": 7,
}
PUBLIC_FLWR = {
    "flwr.app",
    "flwr.clientapp",
    "flwr.clientapp.mod",
    "flwr.serverapp",
    "flwr.serverapp.strategy",
}


def shared_files():
    """The modules that several strategies share, by name."""
    return {
        file.relative_to(PACKAGE).as_posix(): file
        for file in sorted(PACKAGE.rglob("*.py"))
        if file.relative_to(PACKAGE).parts[0] != "strategies"
    }


def strategy_files():
    return {file.name: file for file in sorted(STRATEGIES.glob("*.py"))}


def baseline_files():
    return {
        file.relative_to(BASELINES).as_posix(): file
        for file in sorted(BASELINES.rglob("*.py"))
    }


def imported(source, package=""):
    """Return every ``(module, name)`` that a module imports; ``import m`` has no name.

    Parameters
    ----------
    source : str
        Python.
    package : str
        Package of the module, which relative imports start from.
    """
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {(alias.name, "") for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:
                start = package.split(".")[: len(package.split(".")) - node.level + 1]
                module = ".".join([*start, *filter(None, [module])])
            found |= {(module, alias.name) for alias in node.names}
    return found


def under(module, name, package):
    """Whether an import is of a package or of something in it."""
    return f"{module}.{name}.".startswith(f"{package}.") or module == package


def strategies_imported(source, package):
    return {
        pair
        for pair in imported(source, package)
        if under(*pair, "flower_ext.strategies") or under(*pair, "strategies")
    }


def private_imports(source):
    """Names and modules with a leading underscore, but for ``__future__``."""
    return {
        (module, name)
        for module, name in imported(source)
        if any(
            part.startswith("_") and not part.endswith("__")
            for part in [*module.split("."), name]
        )
    }


def private_flwr_imports(source):
    return {
        (module, name)
        for module, name in imported(source)
        if under(module, name, "flwr")
        and (module, name) != ("flwr.common", "NDArray")
        and (module not in PUBLIC_FLWR or name.startswith("_"))
    }


def package_of(relative):
    return ".".join(["flower_ext", *Path(relative).parts[:-1]])


def test_shared_code_knows_no_strategy():
    files = shared_files()
    assert "server/additive.py" in files and "simulation/local.py" in files
    for relative, file in files.items():
        found = strategies_imported(file.read_text("utf-8"), package_of(relative))
        assert not found, f"{relative} imports {found}"


def upward(room, source, package):
    """Return what a module imports from rooms above its own, or from beside them."""
    return {
        pair
        for pair in imported(source, package)
        for other in LEVELS
        if under(*pair, f"flower_ext.{other}") and LEVELS[other] > LEVELS[room]
    }


def test_every_folder_is_a_room():
    rooms = {Path(relative).parts[0] for relative in shared_files() if "/" in relative}
    assert rooms == set(LEVELS)


def test_imports_go_down():
    for relative, file in shared_files().items():
        room = Path(relative).parts[0]
        if room in LEVELS:
            source, package = file.read_text("utf-8"), package_of(relative)
            found = upward(room, source, package)
            assert not found, f"{relative} imports {found}"


def test_no_strategy_imports_another():
    files = strategy_files()
    assert {"fedfish.py", "maxfl.py", "bounded_group_loss.py"} <= set(files)
    for name, file in files.items():
        if name != "__init__.py":
            found = strategies_imported(
                file.read_text("utf-8"), "flower_ext.strategies"
            )
            assert not found, f"{name} imports {found}"


def test_baselines_import_nothing_private():
    files = baseline_files()
    # They are not in the wheel, whose tests run without them.
    assert files or not (ROOT / "strategies").is_dir()
    for relative, file in files.items():
        found = private_imports(file.read_text("utf-8"))
        assert not found, f"{relative} imports {found}"


def test_private_names_of_flower_are_in_one_module():
    shared = shared_files()
    assert private_flwr_imports(shared.pop("_flower.py").read_text("utf-8"))
    for files in (shared, strategy_files(), baseline_files()):
        for relative, file in files.items():
            found = private_flwr_imports(file.read_text("utf-8"))
            assert not found, f"{relative} imports {found}"


def test_strategies_are_imported_by_their_public_name():
    init = strategy_files()["__init__.py"].read_text("utf-8")
    names = {name for _, name in imported(init)}
    assert names == set(flower_ext.strategies.__all__)


TEMPLATE = ROOT / "tools" / "template"


def users_of_the_core():
    """The modules that use the core as anybody can, by path from the checkout."""
    audit = sorted((PACKAGE / "audit").glob("*.py"))
    files = [*audit, PACKAGE / "testing.py", PACKAGE / "check.py"]
    files += [*strategy_files().values(), *sorted(TEMPLATE.glob("*.py"))]
    return {f"{file.parent.name}/{file.name}": file for file in files} | {
        f"baselines/{relative}": file for relative, file in baseline_files().items()
    }


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def is_itself(node):
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def own_names(tree):
    """Return what a module defines: functions, methods, fields, attributes of self."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names |= {node.attr} if is_itself(node.value) else set()
    return names


def foreign_attributes(source):
    """Return the private attributes of others that a module reads, with their lines.

    Those of ``self`` and ``cls`` that the module itself defines are its own. A name in
    ``getattr(x, "_name")`` is an attribute, too.
    """
    tree = ast.parse(source)
    own, found = own_names(tree), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in ("getattr", "setattr", "hasattr", "delattr")
            and len(node.args) > 1
            and isinstance(node.args[1], ast.Constant)
        ):
            owner, name = node.args[0], str(node.args[1].value)
        else:
            continue
        if is_private(name) and not (is_itself(owner) and name in own):
            found.add((node.lineno, name))
    return found


def test_nobody_reads_private_attributes_of_the_core():
    files = users_of_the_core()
    assert {"strategies/flasc.py", "audit/run.py", "template/strategy.py"} <= set(files)
    found = {
        relative: foreign_attributes(file.read_text("utf-8"))
        for relative, file in files.items()
    }
    assert {relative: names for relative, names in found.items() if names} == {}


MOST_LINES = 200  # of code in the file of a strategy
NO_CODE = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENDMARKER,
)


def lines_of_code(source):
    """Count the lines that are neither blank nor comment nor docstring."""
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in NO_CODE:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines -= set(range(text.lineno, text.end_lineno + 1))
    return len(lines)


@pytest.mark.parametrize("name", sorted(strategy_files()))
def test_a_strategy_is_short(name):
    assert lines_of_code(strategy_files()[name].read_text("utf-8")) <= MOST_LINES


# The rules can be broken ----------------------------------------------------------


def test_import_of_a_room_above_is_seen():
    source = "def f():\n    from flower_ext.server.rounds import run_rounds"
    assert upward("privacy", source, "flower_ext.privacy")
    assert not upward("audit", source, "flower_ext.audit")


@pytest.mark.parametrize(
    ("source", "package"),
    [
        ("import flower_ext.strategies", "flower_ext"),
        ("import flower_ext.strategies.maxfl as m", "flower_ext"),
        ("from flower_ext import strategies", "flower_ext"),
        ("from flower_ext.strategies import MaxFL", "flower_ext"),
        ("from flower_ext.strategies.maxfl import MaxFL", "flower_ext"),
        ("from strategies import MaxFL", "flower_ext"),
        ("from . import strategies", "flower_ext"),
        ("from .strategies.maxfl import MaxFL", "flower_ext"),
        ("from .. import strategies", "flower_ext.simulation"),
        ("from ..strategies import MaxFL", "flower_ext.simulation"),
        ("from .maxfl import MaxFL", "flower_ext.strategies"),
        ("def f():\n    if x:\n        import flower_ext.strategies", "flower_ext"),
    ],
)
def test_import_of_a_strategy_is_seen(source, package):
    assert strategies_imported(source, package)


@pytest.mark.parametrize(
    "source",
    [
        "from flower_ext import AdditiveStrategy",
        "from flower_ext.strategies_of_others import x",
        "import numpy as np",
    ],
)
def test_other_imports_are_not_of_a_strategy(source):
    assert not strategies_imported(source, "flower_ext")


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from flower_ext.server.additive import _x", True),
        ("from flower_ext._flower import log", True),
        ("import flower_ext._flower", True),
        ("import _thread", True),
        ("from __future__ import annotations", False),
        ("from flower_ext import AdditiveStrategy", False),
    ],
)
def test_private_import_is_seen(source, private):
    assert bool(private_imports(source)) == private


@pytest.mark.parametrize(
    ("source", "private"),
    [
        ("from flwr.supercore import log", True),
        ("from flwr import common", True),
        ("import flwr", True),
        ("import flwr.common", True),
        ("from flwr.common import log", True),
        ("from flwr.serverapp.strategy.strategy_utils import f", True),
        ("from flwr.serverapp.exception import AggregationError", True),
        ("from flwr.app import _x", True),
        ("from flwr.app import ArrayRecord", False),
        ("from flwr.serverapp.strategy import FedAvg", False),
        ("from flwr.clientapp.mod import f", False),
        ("from flwr.common import NDArray", False),
        ("import flwr_datasets.partitioner", False),
    ],
)
def test_private_flwr_import_is_seen(source, private):
    assert bool(private_flwr_imports(source)) == private


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("class A:\n    def f(self): self._x = 1; return self._x", set()),
        ("class A:\n    _x = 1\n    def f(self): return self._x", set()),
        ("class A:\n    _x: int\n    def f(self): return self._x", set()),
        ("class A:\n    def _x(self): pass\n    def f(self): self._x()", set()),
        ("class A(B):\n    def f(self): return super().__init__()", set()),
        ("x = y.__dict__", set()),
        ("x = _helper()", set()),
        ("class A(B):\n    def f(self): return self._sent", {(2, "_sent")}),
        ("class A(B):\n    def f(self): super()._release()", {(2, "_release")}),
        ("def f(strategy): return strategy._sent", {(1, "_sent")}),
        ("def f(s): return s.sampler._cohort.x", {(1, "_cohort")}),
        ('x = getattr(s, "_sent", None)', {(1, "_sent")}),
        ("def f(self, other): self._x = other._x", {(1, "_x")}),
    ],
)
def test_private_attribute_of_another_is_seen(source, names):
    assert foreign_attributes(source) == names


def test_lines_of_code_are_counted():
    source = '"""Text.\n\nMore.\n"""\n\n# why\nx = """a\nb"""  # why\n\n\n'
    source += 'def f(\n    y,\n):\n    """Text."""\n    return y\n'
    assert lines_of_code(source) == 2 + 3 + 1
