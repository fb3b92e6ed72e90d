"""The lines that an app's client needs for a strategy, put into its source.

A strategy states in a :class:`DropIn` what its clients do besides training, as lines
of Python; :func:`edit` finds the places in the source of a ClientApp where they go.
"""

import ast
import difflib
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field

from flower_ext.server.options import AdditiveOptions

Function = ast.FunctionDef | ast.AsyncFunctionDef


# What Flower's own apps call the arguments of their train function.
_GIVEN = {"message": "msg", "context": "context"}


def _nothing(num_clients: int) -> dict[str, object]:
    return {}


@dataclass(frozen=True)
class DropIn:
    """The lines that turn a client of FedAvg into one of another strategy.

    In the lines ``{model}`` stands for the app's variable that holds the model,
    ``{loader}`` for the one that holds the training data, and ``{message}`` and
    ``{context}`` for the two that the train function is given.

    Parameters
    ----------
    imports : str
        One line.
    before : str
        A line to run with the received model, before the training.
    records : Mapping[str, str]
        Expressions of records to add to the reply, by key.
    metrics : Mapping[str, str]
        Expressions of metrics to add to the reply, by name; of a dict if the name is
        ``**``.
    mod : str
        Expression of a mod of the ClientApp.
    fill_in : str
        What only the app's author can write; where it is needed nothing can be tried.
    arguments : callable
        ``number of clients -> arguments`` of the strategy that have no default, for a
        trial.
    written : str
        The same as a user would write them.
    explained : str
        What these are, where only the app's author knows.
    silent : bool
        Whether clients without these lines go on as FedAvg's, and nothing says so.
    moves : bool
        Whether the server's model moves when clients train.
    """

    imports: str = ""
    before: str = ""
    records: Mapping[str, str] = field(default_factory=dict)
    metrics: Mapping[str, str] = field(default_factory=dict)
    mod: str = ""
    fill_in: str = ""
    arguments: Callable[[int], Mapping[str, object]] = _nothing
    written: str = ""
    explained: str = ""
    silent: bool = False
    moves: bool = True

    def __bool__(self) -> bool:
        """Whether a client has to add anything."""
        return bool(
            self.before or self.records or self.metrics or self.mod or self.fill_in
        )

    def lines(self, model: str = "model", loader: str = "trainloader") -> list[str]:
        """Return the lines to add, for a reader who puts them in place by hand."""
        entries = [_entry(*item) for item in self.records.items()]
        metrics = [_entry(*item) for item in self.metrics.items()]
        shown = [
            self.imports,
            self.before,
            f"# in the reply's RecordDict: {', '.join(entries)}" if entries else "",
            f"# in its MetricRecord: {', '.join(metrics)}" if metrics else "",
            f"# ClientApp(mods=[{self.mod}])" if self.mod else "",
            *(f"# {line}" for line in self.fill_in.splitlines()),
        ]
        names = {"model": model, "loader": loader} | _GIVEN
        return [_named(line, names) for line in shown if line]


class NoPlace(ValueError):
    """The source has no place that one of the lines could go to."""


def edit(source: str, app: str, drop_in: DropIn) -> str:
    """Return the source of a ClientApp with a strategy's lines in it.

    Parameters
    ----------
    source : str
        Source of the module that makes the ClientApp.
    app : str
        Name of the ClientApp in it.
    drop_in : DropIn
        What to add.

    Raises
    ------
    NoPlace
        If the place of a line cannot be found in this module.
    """
    # All places are those of the unchanged source; the text is changed at the end.
    tree = ast.parse(source)
    edits: list[tuple[int, str]] = []
    starts = _line_starts(source)
    if drop_in.mod:
        edits.append(_mod(source, starts, _made(tree, app, "ClientApp"), drop_in.mod))
    if drop_in.before or drop_in.records or drop_in.metrics:
        function = _train_function(tree, app)
        # Metrics that the author fills in ask nothing of how the app trains.
        lines = (drop_in.before, *drop_in.records.values(), *drop_in.metrics.values())
        found = any("{" in line for line in lines) or drop_in.before
        names = _names(function) if found else _GIVEN
        if drop_in.before:
            statement = _training(function, names)
            indent = " " * statement.col_offset
            line = f"{indent}{_named(drop_in.before, names)}\n"
            edits.append((starts[statement.lineno - 1], line))
        for key, value in drop_in.records.items():
            entry = _named(_entry(key, value), names)
            edits.append(_into(source, starts, _dict_of(function, "RecordDict"), entry))
        for key, value in drop_in.metrics.items():
            entry = _named(_entry(key, value), names)
            target = _dict_of(function, "MetricRecord")
            edits.append(_into(source, starts, target, entry))
    if drop_in.imports:
        # Imports may also stand further down, in the middle of the code: the new one
        # goes above the first line that needs it.
        first = source[: min(place for place, _ in edits)].count("\n") + 1
        edits.append((starts[_after_imports(tree, first)], drop_in.imports + "\n"))
    return _apply(source, edits)


def add_half(source: str, app: str, half: str, module: str) -> str:
    """Return the source of a ``client_app(task, ...)`` with one more half.

    Raises
    ------
    NoPlace
        If the app is not made by ``client_app`` in this module.
    """
    tree = ast.parse(source)
    starts = _line_starts(source)
    call = _made(tree, app, "client_app")
    if not call.args:
        raise NoPlace("client_app(...) has no task as its first argument")
    last = call.args[-1]
    end = _offset(source, starts, last.end_lineno, last.end_col_offset)
    line = f"from {module} import {half}\n"
    at = starts[_after_imports(tree, call.lineno)]
    edits = [(end, f", {half}"), (at, line)]
    return _apply(source, edits)


def replace_strategy(
    source: str,
    old: str,
    new: str,
    arguments: str,
    known: Collection[str] = tuple(AdditiveOptions.__annotations__),
) -> str:
    """Return the source of a ServerApp that makes another strategy.

    Arguments of the old one that are ``known`` to the new one stay.

    Raises
    ------
    NoPlace
        If the module does not make exactly one strategy of that name, or makes it of
        arguments without names that are not those of Flower's FedAvg.
    """
    tree = ast.parse(source)
    starts = _line_starts(source)
    calls = [call for call in _calls(tree) if _called(call) == old]
    if len(calls) != 1 or not isinstance(calls[0].func, ast.Name):
        raise NoPlace(f"{old}(...) is not called once in this module")
    call = calls[0]
    begin = _offset(source, starts, call.func.lineno, call.func.col_offset)
    end = _offset(source, starts, call.end_lineno, call.end_col_offset)
    if call.args and old != "FedAvg":
        raise NoPlace(f"the arguments of {old}(...) have no names")
    kept = [k for k in call.keywords if k.arg is None or k.arg in known]
    text = new + source[begin + len(old) : end]
    if len(kept) < len(call.keywords):
        left = [ast.get_source_segment(source, x) or "" for x in (*call.args, *kept)]
        text = f"{new}({', '.join(left)})"
    if arguments:
        comma = ", " if call.args or kept else ""
        text = f"{text[:-1].rstrip().rstrip(',')}{comma}{arguments})"
    edited = source[:begin] + text + source[end:]
    # The old import is replaced where it imports nothing else, otherwise kept: the rest
    # of its names may be needed.
    home = "flower_ext" if new == "AdditiveStrategy" else "flower_ext.strategies"
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and [a.name for a in node.names] == [old]:
            line = ast.get_source_segment(source, node) or ""
            return edited.replace(line, f"from {home} import {new}", 1)
    at = _line_starts(edited)[_after_imports(tree, call.lineno)]
    return f"{edited[:at]}from {home} import {new}\n{edited[at:]}"


def changes(old: str, new: str) -> list[str]:
    """Return the lines that differ, each with ``-`` or ``+`` before it.

    Lines that are only added stand between their neighbours, so that a reader sees
    where they belong.
    """
    before, after = old.splitlines(), new.splitlines()
    found: list[str] = []
    edits = difflib.SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    for kind, first, end, start, stop in edits:
        if kind == "equal":
            continue
        alone = kind == "insert"
        above = [f" {line}" for line in before[max(first - 1, 0) : first] if alone]
        below = [f" {line}" for line in before[end : end + 1] if alone]
        if above and found and found[-1] == above[0]:
            above = []  # it is the neighbour below of the last ones
        found += above if "".join(above).strip() else []
        found += [f"-{line}" for line in before[first:end]]
        found += [f"+{line}" for line in after[start:stop]]
        found += below if "".join(below).strip() else []
    return found


def _named(line: str, names: Mapping[str, str]) -> str:
    # Not str.format: the lines are Python, and may have braces of their own.
    for key, name in names.items():
        line = line.replace(f"{{{key}}}", name)
    return line


def _entry(key: str, value: str) -> str:
    return f"**{value}" if key == "**" else f'"{key}": {value}'


def _line_starts(source: str) -> list[int]:
    """Return where every line begins, and where the text ends."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    return starts


def _offset(
    source: str, starts: list[int], line: int | None, column: int | None
) -> int:
    """Return the place in the text; the syntax tree counts bytes within a line."""
    assert line is not None and column is not None
    text = source[starts[line - 1] : starts[line]]
    return starts[line - 1] + len(text.encode()[:column].decode())


def _apply(source: str, edits: list[tuple[int, str]]) -> str:
    # From the end, so that earlier places stay valid.
    for _, place, text in sorted(
        ((place, -i), place, text) for i, (place, text) in enumerate(edits)
    )[::-1]:
        source = source[:place] + text + source[place:]
    return source


def _calls(tree: ast.AST) -> Iterator[ast.Call]:
    return (node for node in ast.walk(tree) if isinstance(node, ast.Call))


def _called(call: ast.Call) -> str:
    function = call.func
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""


def _made(tree: ast.Module, app: str, factory: str) -> ast.Call:
    """Return the call that makes the app at the top of the module."""
    for node in tree.body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.value, ast.Call)
            and _called(node.value) == factory
            and any(isinstance(t, ast.Name) and t.id == app for t in node.targets)
        ):
            return node.value
    raise NoPlace(f"no line `{app} = {factory}(...)`")


def _train_function(tree: ast.Module, app: str) -> Function:
    """Return the function that ``@app.train()`` decorates."""
    for node in ast.walk(tree):
        if isinstance(node, Function):
            for decorator in node.decorator_list:
                called = decorator.func if isinstance(decorator, ast.Call) else None
                if (
                    isinstance(called, ast.Attribute)
                    and called.attr == "train"
                    and isinstance(called.value, ast.Name)
                    and called.value.id == app
                ):
                    return node
    raise NoPlace(f"no function decorated with @{app}.train()")


def _names(function: Function) -> dict[str, str]:
    """Return what the function calls its model and its training data."""
    # The model is what loads the received weights, in plain torch or by peft.
    model = loader = ""
    for call in _calls(function):
        name, func = _called(call), call.func
        if name == "load_state_dict" and isinstance(func, ast.Attribute):
            model = model or (func.value.id if isinstance(func.value, ast.Name) else "")
        elif name == "set_peft_model_state_dict" and call.args:
            first = call.args[0]
            model = model or (first.id if isinstance(first, ast.Name) else "")
    # The data is what is assigned to a name like "loader"; one with "train" is
    # preferred.
    loaders = {
        node.id: None
        for node in ast.walk(function)
        if isinstance(node, ast.Name)
        and isinstance(node.ctx, ast.Store)
        and ("loader" in node.id.lower() or "trainset" in node.id.lower())
    }
    for name in loaders:
        if not loader or ("train" in name and "train" not in loader):
            loader = name
    if not model:
        raise NoPlace("no model that loads a state_dict in the train function")
    if not loader:
        raise NoPlace("no training data called ...loader in the train function")
    given = [argument.arg for argument in function.args.args]
    names = dict(zip(_GIVEN, given, strict=False))
    return {**_GIVEN, **names, "model": model, "loader": loader}


def _training(function: Function, names: Mapping[str, str]) -> ast.stmt:
    """Return the statement that trains: the first that has model and data."""
    model, loader = names["model"], names["loader"]
    for statement in function.body:
        used = {n.id for n in ast.walk(statement) if isinstance(n, ast.Name)}
        if {model, loader} <= used and any(True for _ in _calls(statement)):
            return statement
    raise NoPlace(f"no statement with {model} and {loader} in the train function")


def _dict_of(function: Function, factory: str) -> ast.Dict:
    """Return the dict that the reply's records are made of, the last such one."""
    found: list[ast.Dict] = []
    assigned = {
        node.targets[0].id: node.value
        for node in ast.walk(function)
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Dict)
    }
    for call in _calls(function):
        values = [*call.args, *(keyword.value for keyword in call.keywords)]
        if _called(call) != factory or not values:
            continue
        value: ast.expr | None = values[0]
        if isinstance(value, ast.Name):
            value = assigned.get(value.id)
        if isinstance(value, ast.Dict):
            found.append(value)
    if not found:
        raise NoPlace(f"no {factory}({{...}}) in the train function")
    return max(found, key=lambda node: node.lineno)


def _into(
    source: str, starts: list[int], target: ast.Dict, entry: str
) -> tuple[int, str]:
    """Return the edit that puts an entry at the end of a dict."""
    # Written as the dict is: on a line of its own or in the same line, after a comma
    # unless there is one.
    end = _offset(source, starts, target.end_lineno, target.end_col_offset) - 1
    before = source[:end].rstrip()
    if target.lineno != target.end_lineno:  # one entry a line
        indent = " " * _indent(target)
        comma = "" if before.endswith((",", "{")) else ","
        return len(before), f"{comma}\n{indent}{entry},"
    comma = "" if before.endswith("{") else " " if before.endswith(",") else ", "
    return len(before), comma + entry


def _indent(target: ast.Dict) -> int:
    # An entry ``**other`` has no key, and begins two stars before its value.
    keys = [key for key in target.keys if key is not None]
    return keys[0].col_offset if keys else target.values[0].col_offset - 2


def _mod(source: str, starts: list[int], call: ast.Call, mod: str) -> tuple[int, str]:
    """Return the edit that puts a mod around those that the app has."""
    for keyword in call.keywords:
        if keyword.arg == "mods" and isinstance(keyword.value, ast.List):
            mods = keyword.value
            packed = [
                m for m in mods.elts if isinstance(m, ast.Name) and m.id == "packed"
            ]
            if packed:  # it comes before all that looks at one client
                end = packed[0]
                at = _offset(source, starts, end.end_lineno, end.end_col_offset)
                return at, f", {mod}"
            at = _offset(source, starts, mods.lineno, mods.col_offset) + 1
            return at, f"{mod}, " if mods.elts else mod
    if call.args or call.keywords:
        raise NoPlace("the ClientApp's mods are not a list in its call")
    at = _offset(source, starts, call.end_lineno, call.end_col_offset) - 1
    return at, f"mods=[{mod}]"


def _after_imports(tree: ast.Module, line: int) -> int:
    """Return the line, from 0, after the last import that is above another line."""
    imports = [n for n in tree.body if isinstance(n, ast.Import | ast.ImportFrom)]
    ends = (n.end_lineno or 0 for n in imports)
    return max((end for end in ends if end < line), default=0)
