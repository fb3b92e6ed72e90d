"""Modules of an app that are hidden by others of the same name."""

import ast
import importlib
from collections.abc import Iterable, Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from threading import Lock

# Python 3.11 counts the depth of a syntax tree for all threads together, and may raise
# SystemError where two build one (https://github.com/python/cpython/issues/106905).
_ONE_AT_A_TIME = Lock()


def require_own(
    folder: Path,
    modules: Iterable[str],
    before: Sequence[Path],
    *,
    imported: bool = True,
) -> None:
    """Refuse an app some of whose modules are found in other folders first.

    Parameters
    ----------
    folder : path
        The app's folder.
    modules : iterable of str
        Those that Flower imports.
    before : sequence of path
        Folders in which a process looks before that of the app.
    imported : bool
        Whether modules in the folder that these import are checked too. Not for a
        package that is installed: all others lie in the same folder.

    Raises
    ------
    ValueError
        With the path of the app's file and that of the other one.
    """
    importlib.invalidate_caches()
    for name, own in sorted(_modules(folder, modules, imported).items()):
        found = _find(name, [*map(str, before), str(folder)])
        if found is not None and found.resolve() != own.resolve():
            raise ValueError(
                f"module {name!r} of the app, {own}, is hidden by {found}: Ray's "
                "workers look there first, and the clients would run that code; start "
                "from another folder, or rename one of the two"
            )


def _modules(folder: Path, names: Iterable[str], imported: bool) -> dict[str, Path]:
    """Return the modules of these names in a folder, and those that they import."""
    found: dict[str, Path] = {}
    waiting = list(names)
    while waiting:
        parts = waiting.pop().split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            file = _file(folder, parts[:end])
            if file is not None and name not in found:
                found[name] = file
                waiting += _imports(file, name) if imported else ()
    return found


def _file(folder: Path, parts: Sequence[str]) -> Path | None:
    place = folder.joinpath(*parts)
    files = [place / "__init__.py", place.with_name(place.name + ".py")]
    return next((file for file in files if file.is_file()), None)


def _imports(file: Path, name: str) -> Iterator[str]:
    """Yield the names that a module imports, which may be modules or what is in one."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    try:
        with _ONE_AT_A_TIME:
            tree = ast.parse(file.read_bytes())
    except SyntaxError:  # which the run will report
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # ``from ..x import y``: each dot after the first is a package further up.
            above = package.split(".")
            above = above[: len(above) - node.level + 1] if node.level else []
            module = ".".join(filter(None, [*above, node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _find(name: str, path: Sequence[str]) -> Path | None:
    """Return the file that ``import name`` would load, None for a folder without."""
    # By Python's own finder, for which folders without ``__init__.py`` and compiled
    # modules count as they do in a run; nothing is imported.
    places: Sequence[str] = path
    origin = None
    for part in name.split("."):
        spec = PathFinder.find_spec(part, places)
        if spec is None:
            return None
        origin, places = spec.origin, list(spec.submodule_search_locations or [])
    return Path(origin) if origin else None
