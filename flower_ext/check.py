"""Which strategies drop into a Flower app, and the lines that the others need.

::

    python -m flower_ext.check APP
    python -m flower_ext.check APP --strategy FedFish

runs one round of the app in this process as it is, then one with each strategy of the
pack, or with those that are named, and says of each that it drops in, which lines to
add (they are put into a copy of the source and tried), or why it does not. No file of
the app is changed, and nothing after ``strategy.start`` of its ServerApp runs.
"""

import argparse
import copy
import importlib
import inspect
import io
import logging
import os
import re
import sys
import tokenize
import tomllib
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, cast

import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MessageType,
    RecordDict,
)
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg, Strategy

from flower_ext._flower import NodeInfo
from flower_ext.core.errors import one_of, refuse
from flower_ext.core.protocol import WRONG_HALF
from flower_ext.runs.launch import ConfigValue, parse_run_config
from flower_ext.runs.shadows import require_own
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.drop_in import (
    DropIn,
    NoPlace,
    add_half,
    changes,
    edit,
    replace_strategy,
)
from flower_ext.server.options import AdditiveOptions, FedAvgOptions
from flower_ext.server.strategy import RoundStrategy
from flower_ext.simulation.local import LocalGrid, app_config
from flower_ext.wire.traffic import measure

# Options of FedAvg that a private strategy does not take: its mechanism sets them.
_OF_THE_MECHANISM = ("fraction_train", "min_train_nodes")
_MINIMA = ("min_train_nodes", "min_evaluate_nodes", "min_available_nodes")
_ONLY_YOU = "where only you know"
_HOOKS = (
    "start",
    "configure_train",
    "aggregate_train",
    "configure_evaluate",
    "aggregate_evaluate",
)


@dataclass(frozen=True)
class App:
    """A Flower app, imported.

    Attributes
    ----------
    folder : Path
        The folder of its ``pyproject.toml``.
    server, client : tuple of str
        Module and name of ServerApp and ClientApp.
    server_app, client_app
        The two.
    config : dict
        Its run config.
    """

    folder: Path
    server: tuple[str, str]
    client: tuple[str, str]
    server_app: ServerApp
    client_app: ClientApp
    config: dict[str, ConfigValue]

    def source(self, module: str) -> tuple[Path, str]:
        """Return file and text of a module of the app."""
        file = Path(str(sys.modules[module].__file__))
        with tokenize.open(file) as text:  # in the encoding that it states
            return file, text.read()


@dataclass(frozen=True)
class Started:
    """What the ServerApp handed to ``strategy.start``."""

    strategy: Strategy
    grid: Grid
    arrays: ArrayRecord
    train_config: ConfigRecord | None
    evaluate_config: ConfigRecord | None


@dataclass
class Outcome:
    """How one round went.

    Attributes
    ----------
    problem : str
        What went wrong; empty if nothing did.
    replies : int
        Number of clients that trained.
    bytes_up : int
        Bytes of their replies, as Flower serialises them.
    """

    problem: str = ""
    replies: int = 0
    bytes_up: int = 0


@dataclass
class Verdict:
    """What was found out about one strategy.

    Attributes
    ----------
    name : str
        The strategy's.
    text : str
        The result in a few words.
    lines : dict[str, list[str]]
        Lines to change or to add, by file.
    fits : bool
        Whether a round with the strategy succeeded.
    """

    name: str
    text: str
    lines: dict[str, list[str]] = field(default_factory=dict)
    fits: bool = False


class _Caught(BaseException):
    """Ends the ServerApp where it starts its strategy.

    No ``Exception``, so that an ``except Exception`` of the app does not stop it.
    """

    def __init__(self, started: Started) -> None:
        super().__init__()
        self.started = started


class _OwnLoop(BaseException):
    """The ServerApp sends messages without a strategy; see :class:`_Caught`."""


class _Nodes(LocalGrid):
    """The first clients of a federation, whose replies are kept.

    Only a few take part, so that a check is quick. The app is still told the number of
    all clients, so that each has the share of the data that it has in a run.
    """

    def __init__(
        self,
        client_app: ClientApp,
        num_supernodes: int,
        run_config: Mapping[str, ConfigValue],
        most: int,
    ) -> None:
        super().__init__(client_app, num_supernodes, dict(run_config))
        self._most = most
        self.seen: list[Message] = []

    def get_node_ids(self) -> Iterable[int]:
        return list(super().get_node_ids())[: self._most]

    def get_nodes(self) -> Iterable[NodeInfo]:
        return list(super().get_nodes())[: self._most]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.seen += replies
        return replies


class _NoMessages(_Nodes):
    """The grid before the start: whoever sends here has no strategy to swap."""

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise _OwnLoop


# The app --------------------------------------------------------------------------


@contextmanager
def imported(folder: Path, run_config: Mapping[str, ConfigValue]) -> Iterator[App]:
    """Import a Flower app, its folder before everything else, and forget it again.

    Raises
    ------
    ValueError
        If the folder holds no Flower app, or a component cannot be imported.
    """
    folder = folder.expanduser().resolve()
    file = folder / "pyproject.toml"
    if not file.is_file():
        raise ValueError(f"{folder} is no Flower app: it has no pyproject.toml")
    try:
        config = app_config(folder)
        table = tomllib.loads(file.read_text("utf-8"))["tool"]["flwr"]["app"]
        names = table["components"]
        server, client = (_split(names[key], key) for key in ("serverapp", "clientapp"))
    except KeyError as missing:
        raise ValueError(f"{file} has no {missing}: not a Flower app") from None
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{file} is not that of a Flower app: {error}") from None
    if unknown := sorted(set(run_config) - set(config)):
        raise ValueError(f"run config has no key {unknown}, only {sorted(config)}")
    # Another app checked in this process may have modules of the same names.
    packages = {name.partition(".")[0] for name, _ in (server, client)}
    others = _take_modules(packages)
    path, cwd, written = list(sys.path), Path.cwd(), sys.dont_write_bytecode
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True  # nothing is left in the app's folder
    importlib.invalidate_caches()
    try:
        server_app = _component(folder, *server)
        client_app = _component(folder, *client)
        if not isinstance(server_app, ServerApp):
            refuse("serverapp", server_app, "a ServerApp", f"see {file}")
        if not isinstance(client_app, ClientApp):
            refuse("clientapp", client_app, "a ClientApp", f"see {file}")
        settings = {**config, **run_config}
        yield App(folder, server, client, server_app, client_app, settings)
    finally:
        sys.path[:] = path
        sys.dont_write_bytecode = written
        os.chdir(cwd)
        _take_modules(packages)
        sys.modules.update(others)


def _take_modules(packages: set[str]) -> dict[str, ModuleType]:
    """Remove and return the modules of packages that are already imported."""
    names = [name for name in sys.modules if name.partition(".")[0] in packages]
    return {name: sys.modules.pop(name) for name in names}


def _split(component: str, key: str) -> tuple[str, str]:
    module, _, name = str(component).partition(":")
    if not name:
        raise ValueError(f"{key}={component!r} must be of the form package.module:app")
    return module, name


def _component(folder: Path, module: str, name: str) -> object:
    try:
        return getattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:
        place = _place(folder, "".join(traceback.format_exception(error)))
        raise ValueError(
            f"{module}:{name} cannot be imported: {type(error).__name__}: "
            f"{error}{place}{_missing(folder, error)}"
        ) from error


def _missing(folder: Path, error: BaseException) -> str:
    """Return what to do about a module that is not installed, or not of this Flower."""
    if not isinstance(error, ImportError) or not error.name:
        return ""
    package = error.name.partition(".")[0]
    if package == "flwr":
        return f": the app is for another Flower than {version('flwr')}, which is here"
    if find_spec(package):
        return ""
    return (
        ": if the app needs it, install the app in the environment of this command, "
        f"`pip install -e {folder}`"
    )


def _place(folder: Path, report: str) -> str:
    """Return the last line of the app in a traceback."""
    places = re.findall(r'File "([^"]+)", line (\d+)', report)
    own = [(f, n) for f, n in places if Path(f).is_relative_to(folder)]
    if not own:
        return ""
    file, number = own[-1]
    return f" ({Path(file).relative_to(folder)}, line {number})"


def warnings(app: App, num_cpus: int, num_gpus: float) -> list[str]:
    """Return what would go wrong in a simulation, but does not in this process."""
    found = []
    try:
        require_own(app.folder, [app.server[0], app.client[0]], [Path.cwd()])
    except ValueError as error:
        found.append(str(error))
    cpus, gpus = os.cpu_count() or 1, torch.cuda.device_count()
    table = tomllib.loads((app.folder / "pyproject.toml").read_text("utf-8"))
    asked = {"the command line": {"num-cpus": num_cpus, "num-gpus": num_gpus}}
    federations = _table(table["tool"]["flwr"], "federations")
    for name in federations:
        backend = _table(_table(_table(federations, name), "options"), "backend")
        asked[f"federation {name!r}"] = _table(backend, "client-resources")
    for where, resources in asked.items():
        wrong = {k: x for k, x in resources.items() if not isinstance(x, int | float)}
        if wrong:
            found.append(f"{where}: client-resources {wrong} must be numbers")
            continue
        if resources.get("num-cpus", 1) > cpus:
            found.append(
                f"{where}: num-cpus={resources['num-cpus']} for each client, the "
                f"machine has {cpus}: no client could ever start"
            )
        if resources.get("num-gpus", 0) > gpus:
            found.append(
                f"{where}: num-gpus={resources['num-gpus']} for each client, torch "
                f"sees {gpus} GPUs: no client could ever start"
            )
        elif gpus and not resources.get("num-gpus", 0):
            found.append(
                f"{where}: num-gpus=0, so that clients in workers see none of the "
                f"{gpus} GPUs; a fraction lets several share one, see `python -m "
                "flower_ext.simulation.gpus`"
            )
    return found


def _table(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a table within a table, empty where there is none."""
    found = table.get(name)
    return found if isinstance(found, dict) else {}


# Rounds ---------------------------------------------------------------------------


def _is_own(kind: type[Strategy]) -> bool:
    """Whether a strategy is the app's, neither Flower's nor of the pack."""
    return not kind.__module__.startswith(("flwr.", "flower_ext."))


def _all(kind: type[Strategy]) -> Iterator[type[Strategy]]:
    yield kind
    for derived in kind.__subclasses__():
        yield from _all(derived)


@contextmanager
def _caught_at_start() -> Iterator[None]:
    """Let every strategy raise :class:`_Caught` at its start.

    Where a loop of the app, or ``run_rounds``, takes the place of ``start``, the
    strategy raises at its first round. A ``start`` that the app defines itself runs
    until it calls one of these.
    """

    def start(
        self: Strategy,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: object = None,
        **_: object,
    ) -> None:
        raise _Caught(
            Started(self, grid, initial_arrays, train_config, evaluate_config)
        )

    def configure_train(
        self: Strategy,
        server_round: int,
        arrays: ArrayRecord,
        config: ConfigRecord,
        grid: Grid,
    ) -> None:
        raise _Caught(Started(self, grid, arrays, config, None))

    # In every class that defines one: a subclass' method would hide its parent's.
    real = {
        (kind, method.__name__): (vars(kind)[method.__name__], method)
        for kind in _all(Strategy)  # type: ignore[type-abstract]
        for method in (start, configure_train)
        if method.__name__ in vars(kind) and (method is not start or not _is_own(kind))
    }
    try:
        for (kind, name), (_, method) in real.items():
            setattr(kind, name, method)
        yield
    finally:
        for (kind, name), (original, _) in real.items():
            setattr(kind, name, original)


@contextmanager
def _unheard() -> Iterator[None]:
    """Drop what the app prints, progress bars above all; see :func:`_quiet`."""
    # Not a file that is closed: a handler of logs that the app makes here stays.
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
        yield


def started(app: App, num_supernodes: int) -> Started:
    """Run the ServerApp until it starts a strategy.

    Raises
    ------
    ValueError
        If it fails before, or never starts one.
    """
    grid = _NoMessages(app.client_app, num_supernodes, app.config, num_supernodes)
    context = Context(
        run_id=1,
        node_id=1,
        node_config={},
        state=RecordDict(),
        run_config=dict(app.config),
    )
    try:
        with _caught_at_start(), _unheard():
            app.server_app(grid, context)
    except _Caught as caught:
        return caught.started
    except _OwnLoop:
        raise ValueError(
            "the ServerApp sends messages itself, or Flower's older API, flwr.server, "
            "does so for it: there is no strategy of flwr.serverapp to replace"
        ) from None
    except (Exception, SystemExit) as error:
        place = _place(app.folder, traceback.format_exc())
        raise ValueError(
            f"the ServerApp fails before strategy.start: {type(error).__name__}: "
            f"{error}{place}"
        ) from error
    raise ValueError(
        "the ServerApp ends without a call of strategy.start; one of Flower's older "
        "API, with a server_fn, has none"
    )


def one_round(
    app: App,
    client_app: ClientApp,
    strategy: Strategy,
    start: Started,
    num_supernodes: int,
    most: int,
) -> Outcome:
    """Run one round of the app with a strategy; clients have no state from before."""
    # A strategy may write into what it was given: every trial gets copies.
    grid = _Nodes(client_app, num_supernodes, app.config, most)
    begin = strategy.start
    if "initial_arrays" not in inspect.signature(begin).parameters:
        begin = partial(Strategy.start, strategy)  # its own wants something else
    try:
        with _unheard():
            result = begin(
                grid=grid,
                initial_arrays=copy.deepcopy(start.arrays),
                num_rounds=1,
                train_config=copy.deepcopy(start.train_config),
                evaluate_config=copy.deepcopy(start.evaluate_config),
            )
    except (Exception, SystemExit) as error:
        # Where clients failed, the strategy's own error only says that none is left.
        reason = _first_error(app, grid.seen) or f"{type(error).__name__}: {error}"
        return Outcome(reason.splitlines()[0])
    trained = [
        message
        for message in grid.seen
        if message.metadata.message_type == MessageType.TRAIN
    ]
    usable = [message for message in trained if not message.has_error()]
    outcome = Outcome(
        _first_error(app, grid.seen), len(usable), measure(usable).serialized
    )
    if not outcome.problem and not usable:
        outcome.problem = "no client was asked to train"
    moves = getattr(strategy, "drop_in", DropIn()).moves
    if not outcome.problem and moves and _same(result.arrays, start.arrays):
        outcome.problem = "the model is the same after the round: nothing was trained"
    return outcome


def _first_error(app: App, replies: Sequence[Message]) -> str:
    """Return the first client's error in one line, with the app's own line."""
    failed = next((message for message in replies if message.has_error()), None)
    if failed is None:
        return ""
    phase = failed.metadata.message_type
    asked = [m.has_error() for m in replies if m.metadata.message_type == phase]
    reason = failed.error.reason or "no reason given"
    return (
        f"{sum(asked)} of {len(asked)} clients fail in {phase}, the first with "
        f"{reason.splitlines()[0]}{_place(app.folder, reason)}"
    )


def _same(one: ArrayRecord, other: ArrayRecord) -> bool:
    return one.keys() == other.keys() and all(
        one[name].data == other[name].data for name in one
    )


# Strategies -----------------------------------------------------------------------


def strategies() -> list[type[RoundStrategy]]:
    """Return the strategies of the pack, the plainest first."""
    package = importlib.import_module("flower_ext.strategies")
    found = [getattr(package, name) for name in package.__all__]
    kinds = [k for k in found if isinstance(k, type) and issubclass(k, RoundStrategy)]
    return [AdditiveStrategy, *sorted(kinds, key=lambda kind: kind.__name__.lower())]


def check_strategy(
    app: App,
    kind: type[RoundStrategy],
    start: Started,
    num_supernodes: int,
    most: int,
) -> Verdict:
    """Try a strategy with the app's clients as they are, then with its lines added."""
    needs = kind.drop_in
    server = _server_lines(app, kind, start)
    if needs.explained:
        server[_ONLY_YOU] = needs.explained.splitlines()

    def attempt(client_app: ClientApp) -> Outcome:
        try:
            strategy = _like(kind, _inmost(start.strategy), needs.arguments(most))
        except (TypeError, ValueError) as error:
            return Outcome(str(error))
        return one_round(app, client_app, strategy, start, num_supernodes, most)

    # The clients as they are: a strategy that asks nothing of them ends here.
    first = attempt(app.client_app)
    if not first.problem and not needs.silent:
        return Verdict(kind.__name__, _fits("drops in", first), server, fits=True)
    # An app of client_app(task, ...) says so when it lacks the half, and needs its name
    # only. In any other app the strategy's lines go into the train function.
    file, source = app.source(app.client[0])
    half = kind.client_half
    try:
        if WRONG_HALF in first.problem and half:
            edited = add_half(source, app.client[1], half.__name__, half.__module__)
        elif needs:
            edited = edit(source, app.client[1], needs)
        else:
            return Verdict(kind.__name__, f"does not fit: {first.problem}")
    except NoPlace as reason:
        lines = {**server, "in the client": needs.lines()}
        return Verdict(kind.__name__, f"not tried: {reason}", lines)
    lines = {**server, _name(app, file): changes(source, edited)}
    if needs.fill_in and WRONG_HALF not in first.problem:
        lines[_ONLY_YOU] = needs.fill_in.splitlines()
        return Verdict(kind.__name__, "needs these lines, to be completed", lines)
    try:
        client_app = _run_source(app, file, edited)
    except (Exception, SystemExit) as error:
        text = f"not tried: {file.name} does not run twice in a process: {error!r}"
        return Verdict(kind.__name__, text, lines)
    second = attempt(client_app)
    if second.problem:
        return Verdict(kind.__name__, f"does not fit: {second.problem}", lines)
    text = _fits("drops in with these lines, which were tried", second)
    return Verdict(kind.__name__, text, lines, fits=True)


def _fits(text: str, outcome: Outcome) -> str:
    return f"{text} ({outcome.replies} clients, {outcome.bytes_up / 1000:.1f} kB up)"


def _inmost(strategy: Strategy) -> Strategy:
    """Return the strategy inside Flower's wrappers, such as those for privacy."""
    while isinstance(inner := getattr(strategy, "strategy", None), Strategy):
        strategy = inner
    return strategy


def _like(
    kind: type[RoundStrategy],
    strategy: Strategy,
    arguments: Mapping[str, object],
) -> RoundStrategy:
    """Make a strategy with the Flower options that another one has."""
    options = {
        name: getattr(strategy, name)
        for name in FedAvgOptions.__annotations__
        if hasattr(strategy, name)
    }
    if "num_sampled_clients" in arguments:
        options = {k: v for k, v in options.items() if k not in _OF_THE_MECHANISM}
    return cast("RoundStrategy", cast(Any, kind)(**options, **arguments))


def _server_lines(
    app: App, kind: type[RoundStrategy], start: Started
) -> dict[str, list[str]]:
    """Return the lines of the ServerApp that change."""
    file, source = app.source(app.server[0])
    old, new = type(start.strategy).__name__, kind.__name__
    if old == new:
        return {}
    written = kind.drop_in.written
    known = set(AdditiveOptions.__annotations__)
    if "num_sampled_clients" in written:
        known -= {*_OF_THE_MECHANISM}
    try:
        edited = replace_strategy(source, old, new, written, known)
    except NoPlace:
        line = f"{new}({written}) in place of {old}"
        return {"in the server": [line]}
    return {_name(app, file): changes(source, edited)}


def _name(app: App, file: Path) -> str:
    return str(
        file.relative_to(app.folder) if file.is_relative_to(app.folder) else file
    )


def _run_source(app: App, file: Path, source: str) -> ClientApp:
    """Run changed source of the client's module and return the ClientApp it makes."""
    name, attribute = app.client
    module = ModuleType(name)
    module.__file__, module.__package__ = str(file), name.rpartition(".")[0]
    # In the module's place while it runs: a dataclass, for one, looks for its module
    # there. The rest of the app gets the real one back.
    real = sys.modules[name]
    sys.modules[name] = module
    try:
        exec(compile(source, str(file), "exec"), vars(module))
    finally:
        sys.modules[name] = real
    return cast(ClientApp, getattr(module, attribute))


def _own_notes(strategy: Strategy) -> Iterator[str]:
    """Say what the app's own strategy does that a replacement would not do."""
    kind = type(strategy)
    if kind.__module__.startswith("flwr.") and kind is not FedAvg:
        yield (
            f"what {kind.__name__} does besides averaging, the trials below do not. "
            "Each strategy takes server_optimizer= in place of Flower's optimizers, "
            "and mechanism= in place of its privacy wrappers"
        )
    if not _is_own(kind):
        return
    if own := [name for name in _HOOKS if name in vars(kind)]:
        yield (
            f"{kind.__name__} has its own {', '.join(own)}, which the trials below do "
            "not have: derive it from a strategy of the pack instead of "
            f"{kind.__mro__[1].__name__}, and it stays"
        )


# The command ----------------------------------------------------------------------


def check(
    folder: Path,
    *,
    run_config: Mapping[str, ConfigValue] | None = None,
    num_supernodes: int = 10,
    num_cpus: int = 1,
    num_gpus: float = 0.0,
    only: Sequence[str] = (),
) -> bool:
    """Check an app and print what was found; see the module.

    Parameters
    ----------
    folder : Path
        The folder of the app's ``pyproject.toml``.
    run_config : Mapping, optional
        Overrides of its run config.
    num_supernodes : int (default: 10)
        Clients of the federation; as many take part as the app's strategy needs.
    num_cpus, num_gpus
        Resources of a client, as they would be asked for in a simulation.
    only : sequence of str, optional
        Names of the strategies to try; all of them if there are none.

    Returns
    -------
    bool
        Whether the app works as it is and nothing was found that would keep it from
        working in a simulation.

    Raises
    ------
    ValueError
        If the folder holds no app that can be imported and starts a strategy, or a
        strategy is not one of the pack.
    """
    kinds = {kind.__name__: kind for kind in strategies()}
    for name in only:
        one_of("strategy", name, tuple(kinds))
    tried = [kinds[name] for name in only or kinds]
    with imported(folder, run_config or {}) as app:
        print(f"Checking {app.folder}: {':'.join(app.server)}, {':'.join(app.client)}")
        problems = warnings(app, num_cpus, num_gpus)
        for problem in problems:
            print(f"  problem: {problem}")
        return _check(app, num_supernodes, tried) and not problems


def _check(app: App, num_supernodes: int, tried: Sequence[type[RoundStrategy]]) -> bool:
    """Try the app as it is, then with each strategy; return whether it works."""
    start = started(app, num_supernodes)
    needed = [getattr(_inmost(start.strategy), name, 2) for name in _MINIMA]
    most = max(2, *needed)
    if most > num_supernodes:
        raise ValueError(
            f"the strategy asks for {most} nodes, num_supernodes={num_supernodes} has "
            "fewer: a run would wait for ever"
        )
    name = type(start.strategy).__name__
    outcome = one_round(
        app, app.client_app, start.strategy, start, num_supernodes, most
    )
    for note in _own_notes(start.strategy):
        print(f"  note: {note}")
    if outcome.problem:
        print(f"\n{name}, the app as it is: fails\n    {outcome.problem}")
        return False
    print(f"\n{_fits(f'{name}, the app as it is: works', outcome)}")
    for kind in tried:
        if kind is not type(start.strategy):
            _show(check_strategy(app, kind, start, num_supernodes, most))
    return True


def _show(verdict: Verdict) -> None:
    print(f"\n{verdict.name}: {verdict.text}")
    for place, lines in verdict.lines.items():
        if not lines:
            continue
        print(f"    {place}")
        for line in lines:
            print(f"      {line}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the log of the trial rounds; the verdicts say what matters."""
    # Not by its level, which some apps set themselves.
    log, threads = logging.getLogger("flwr"), torch.get_num_threads()
    disabled, log.disabled = log.disabled, True
    torch.set_num_threads(1)
    try:
        yield
    finally:
        log.disabled = disabled
        torch.set_num_threads(threads)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 if the app has a problem, 2 for bad input."""
    parser = argparse.ArgumentParser(
        prog="python -m flower_ext.check",
        description="Say which strategies drop into a Flower app, and what to add.",
    )
    parser.add_argument("app", type=Path, help="folder of the Flower app")
    parser.add_argument(
        "-c", "--run-config", action="append", default=[], metavar="'KEY=VALUE ...'"
    )
    parser.add_argument("--num-supernodes", type=int, default=10)
    parser.add_argument("--num-cpus", type=int, default=1)
    parser.add_argument("--num-gpus", type=float, default=0.0)
    parser.add_argument(
        "--strategy",
        action="append",
        default=[],
        metavar="NAME",
        help="try this one only, such as FedFish; may be given several times",
    )
    args = parser.parse_args(argv)
    try:
        with _quiet():
            works = check(
                args.app,
                run_config=parse_run_config(args.run_config),
                num_supernodes=args.num_supernodes,
                num_cpus=args.num_cpus,
                num_gpus=args.num_gpus,
                only=args.strategy,
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads, `head` for one, has seen enough
        # Python flushes at exit, and would fail there once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0 if works else 1


if __name__ == "__main__":
    sys.exit(main())
