"""Run one Flower app by ``flwr run``, isolated from every other Flower run.

``flwr run`` alone shares a SuperLink with whatever else answers on its port, leaves
it running, installs the app's dependencies anew in every run, and returns 0 when the
run failed. `run_app` starts a SuperLink of its own, in a Flower home of its own, asks
Flower how the run ended, and leaves nothing behind.

From a shell::

    python -m flower_ext.runs.launch APP --run-config "num-server-rounds=3"
"""

import argparse
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import psutil

from flower_ext.runs.processes import exit_on_signal, kills, signals, stop_all
from flower_ext.runs.report import SUMMARY_FILE, pool, table
from flower_ext.runs.run_log import (
    ANSI,
    print_line,
    print_progress,
    tail,
)
from flower_ext.runs.shadows import require_own

ConfigValue = str | int | float | bool
Start = Callable[[Sequence[str], BinaryIO | int], subprocess.Popen[bytes]]

RESULTS_KEY = "results"  # in an app's run config
SEED_KEY = "seed"
SUPERLINK = "launch"  # name of the connection in the temporary Flower home
START_SECONDS = 60.0  # a SuperLink takes 2 to 3 s to listen on an idle machine

_ROOT = Path(__file__).resolve().parents[2]
# What Flower's strategies log of every round.
_RECEIVED = re.compile(r"aggregate_train: Received (\d+) results and (\d+) failures")
_REASON = "Received error in reply from node "
_SETTING = re.compile(r"(\S+?)=('[^']*'|\"[^\"]*\"|\S+)")  # Flower's own grammar


class RunFailed(RuntimeError):
    """The run did not complete; the message ends with the tail of its log."""


@dataclass(frozen=True)
class RunOutcome:
    """How a run ended.

    Attributes
    ----------
    status : str
        Flower's final status, ``"finished:completed"``.
    seconds : float
        Wall time from the start of the SuperLink to the end of the run.
    log : str
        Everything the run logged, without colour codes.
    """

    status: str
    seconds: float
    log: str


def run_app(
    app_dir: str | Path,
    *,
    run_config: Mapping[str, ConfigValue] | None = None,
    num_supernodes: int = 10,
    num_cpus: int = 1,
    num_gpus: float = 0.0,
    timeout: float | None = None,
    log_file: str | Path | None = None,
    on_line: Callable[[str], None] | None = None,
) -> RunOutcome:
    """Run a Flower app on the simulation engine and wait for its end.

    The app's processes use this interpreter and this ``flower_ext``; they start in
    the current folder. Everything started is stopped on return, on any exception, and
    on SIGINT, SIGTERM and SIGHUP when called from the main thread.

    Parameters
    ----------
    app_dir : str or Path
        Folder that holds the app's ``pyproject.toml``.
    run_config : Mapping[str, str | int | float | bool], optional
        Overrides of keys of the app's ``[tool.flwr.app.config]``.
    num_supernodes : int
        Number of virtual clients, at least 1.
    num_cpus : int
        CPUs per client; as many clients run at a time as fit the machine.
    num_gpus : float
        GPUs per client, a fraction if clients share one.
    timeout : float, optional
        Seconds after which the run is stopped and counted as failed. Default: never.
    log_file : str or Path, optional
        Where the full log goes. Default: a temporary file, kept if the run failed.
    on_line : Callable[[str], None], optional
        Called with each line of the log as it arrives, without colour codes. Default:
        `print_line`, which prints what `readable_line` makes of it.

    Returns
    -------
    RunOutcome
        Status, seconds and log of the completed run.

    Raises
    ------
    ValueError
        If an argument is out of range, the folder holds no Flower app, the app knows
        no such run-config key, or the current folder has a module of the same name as
        one of the app.
    FileNotFoundError
        If this environment has no ``flwr`` or ``flower-superlink``.
    RunFailed
        If the run failed, its ServerApp raised, every client failed in every round, or
        `timeout` passed.
    """
    app_dir = Path(app_dir).expanduser().resolve()
    run_config = dict(run_config or {})
    _check_positive(num_supernodes=num_supernodes, num_cpus=num_cpus)
    if not num_gpus >= 0:
        raise ValueError(f"num_gpus={num_gpus} must be >= 0")
    if timeout is not None and not timeout > 0:
        raise ValueError(f"timeout={timeout} must be > 0 seconds: None waits for ever")
    _check_app(app_dir, run_config)
    flwr, superlink = _executable("flwr"), _executable("flower-superlink")

    home = Path(tempfile.mkdtemp(prefix="flwr-", dir=_short_temp_dir()))
    log_path = home / "run.log" if log_file is None else Path(log_file).expanduser()
    lines: list[str] = []
    begin = time.monotonic()
    processes: list[subprocess.Popen[bytes]] = []
    # Signals that would end this process at once, so that nothing would be cleaned up.
    # Those that nohup or the caller handle stay as they are.
    fatal = [n for n in (signal.SIGTERM, signal.SIGHUP) if kills(n)]
    with signals(exit_on_signal, *fatal):
        try:
            log_path.parent.mkdir(parents=True, exist_ok=True)
            env = _environment(home)
            _start_superlink(superlink, functools.partial(_start, processes, env), home)
            command = [flwr, "run", str(app_dir), SUPERLINK, "--stream"]
            command += ["--federation-config", f"num-supernodes={num_supernodes}"]
            command[-1] += f" client-resources-num-cpus={num_cpus}"
            command[-1] += f" client-resources-num-gpus={float(num_gpus)}"
            if run_config:
                (home / "run.toml").write_text(_to_toml(run_config), "utf-8")
                command += ["--run-config", str(home / "run.toml")]
            with log_path.open("w", encoding="utf-8") as log:
                # Wide: a refusal comes in a box, whose text we want on one line.
                start = functools.partial(_start, processes, {**env, "COLUMNS": "500"})
                for line in _stream(command, start, timeout):
                    lines.append(line)
                    print(line, file=log, flush=True)
                    (on_line or print_line)(line)
            status = _completed(flwr, env)
            _require_a_client(lines)
        except RunFailed as error:
            # The home goes, and the log in it: a copy is left where a user can look.
            if not (end := tail(lines)):
                raise
            kept = _keep(log_path) if log_file is None else log_path
            raise RunFailed(f"{error}\n{end}\nfull log: {kept}") from None
        finally:
            # A second Ctrl-C now would leave processes behind.
            with signals(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                stop_all(home)
                for process in processes:  # reaped already: this takes note of it
                    process.poll()
                shutil.rmtree(home, ignore_errors=True)
    return RunOutcome(status, time.monotonic() - begin, "\n".join(lines))


def parse_run_config(settings: Sequence[str]) -> dict[str, ConfigValue]:
    """Parse ``"a=1 b='text'"`` as ``flwr run --run-config`` does, refusing leftovers.

    Raises
    ------
    ValueError
        If part of the text is no ``key=value`` with a TOML value.

    Examples
    --------
    >>> parse_run_config(["lr=0.1 rounds=3", "name='a b'"])
    {'lr': 0.1, 'rounds': 3, 'name': 'a b'}
    """
    parsed: dict[str, ConfigValue] = {}
    for text in settings:
        if rest := _SETTING.sub("", text).strip():
            raise ValueError(f"run config {rest!r} is not of the form key=value")
        for key, value in _SETTING.findall(text):
            try:
                parsed[key] = tomllib.loads(f"value = {value}")["value"]
            except tomllib.TOMLDecodeError:
                raise ValueError(
                    f"run config {key}={value} is no TOML value: write {key}='{value}'"
                ) from None
    return parsed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, 1 for a failed run, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(
        prog="python -m flower_ext.runs.launch",
        description="Run a Flower app by `flwr run`, isolated, leaving nothing behind.",
    )
    parser.add_argument("app", type=Path, help="folder of the Flower app")
    parser.add_argument(
        "-c", "--run-config", action="append", default=[], metavar="'KEY=VALUE ...'"
    )
    parser.add_argument("--num-supernodes", type=int, default=10)
    parser.add_argument(
        "--num-cpus", "--client-resources-num-cpus", type=int, default=1
    )
    parser.add_argument(
        "--num-gpus", "--client-resources-num-gpus", type=float, default=0.0
    )
    parser.add_argument("--timeout", type=float, help="seconds; default: none")
    parser.add_argument(
        "--seeds",
        type=int,
        nargs="+",
        metavar="SEED",
        help="run once per value of the run-config key 'seed', and pool the tables",
    )
    parser.add_argument(
        "--results",
        type=Path,
        help="folder for the log and, if the app's run config has a key 'results', for "
        "what the app writes; by default results/APP-TIME for such an app",
    )
    shown = parser.add_mutually_exclusive_group()
    shown.add_argument("--verbose", action="store_true", help="print every line")
    shown.add_argument(
        "--progress", action="store_true", help="print rounds, warnings and errors only"
    )
    args = parser.parse_args(argv)
    show = print if args.verbose else print_progress if args.progress else print_line
    try:
        run_config = parse_run_config(args.run_config)
        results = _results_folder(args.app, args.results, run_config)
        if args.progress:
            print(f"Starting {args.num_supernodes} virtual clients on Ray", flush=True)
        run = functools.partial(
            run_app,
            args.app,
            num_supernodes=args.num_supernodes,
            num_cpus=args.num_cpus,
            num_gpus=args.num_gpus,
            timeout=args.timeout,
            on_line=show,
        )
        if args.seeds:
            outcome = _run_seeds(run, args.seeds, run_config, results)
        else:
            log = results and results / "flower.log"
            outcome = run(run_config=run_config, log_file=log)
    except RunFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    if results and (results / SUMMARY_FILE).exists():
        print(f"\n{table(results)}\n")
    print(f"{outcome.status} in {outcome.seconds:.0f} s")
    if results:
        print(f"results: {results}")
    return 0


def _run_seeds(
    run: Callable[..., RunOutcome],
    seeds: Sequence[int],
    run_config: Mapping[str, ConfigValue],
    results: Path | None,
) -> RunOutcome:
    """Run once per seed, each in a folder of its own, and pool their summaries."""
    if results is None or RESULTS_KEY not in run_config:
        raise ValueError("--seeds needs an app with the run-config key 'results'")
    outcomes = []
    for seed in seeds:
        folder = results / f"seed-{seed}"
        config = {**run_config, SEED_KEY: seed, RESULTS_KEY: str(folder)}
        outcomes.append(run(run_config=config, log_file=folder / "flower.log"))
    pool([results / f"seed-{seed}" for seed in seeds], results)
    seconds = sum(outcome.seconds for outcome in outcomes)
    return replace(outcomes[-1], seconds=seconds)


def _results_folder(
    app_dir: Path, asked: Path | None, run_config: dict[str, ConfigValue]
) -> Path | None:
    """Choose the results folder; an app whose run config has the key is told it."""
    # What the user asks for in the run config counts more than --results.
    if RESULTS_KEY in run_config:
        return Path(str(run_config[RESULTS_KEY])).expanduser().resolve()
    config = _app_table(app_dir).get("config", {})
    has_key = isinstance(config, dict) and RESULTS_KEY in config
    if asked is None and has_key:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        asked = Path("results", f"{app_dir.resolve().name}-{stamp}")
    if asked is not None and has_key:
        run_config[RESULTS_KEY] = str(asked.resolve())
    return asked and asked.resolve()


def _check_positive(**numbers: int) -> None:
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be >= 1")


def _check_app(app_dir: Path, run_config: Mapping[str, ConfigValue]) -> None:
    """Refuse what Flower would refuse later and less clearly."""
    table = _app_table(app_dir)
    config = table.get("config", {})
    known = set(_flat_keys(config if isinstance(config, dict) else {}))
    if unknown := sorted(set(run_config) - known):
        raise ValueError(
            f"run config has no key {', '.join(unknown)}: {app_dir}/pyproject.toml "
            f"lists {', '.join(sorted(known)) or 'none'}"
        )
    components = table.get("components", {})
    named = components.values() if isinstance(components, dict) else ()
    modules = [str(reference).partition(":")[0] for reference in named]
    # Ray's workers look in the current folder first. Neither a module of the app nor
    # this package may be hidden by one that lies there.
    require_own(app_dir, modules, [Path.cwd()])
    require_own(_ROOT, ["flower_ext"], [Path.cwd()], imported=False)


def _app_table(app_dir: Path) -> Mapping[str, object]:
    """Return ``[tool.flwr.app]`` of an app."""
    file = app_dir / "pyproject.toml"
    if not file.is_file():
        raise ValueError(f"{app_dir} is no Flower app: it has no pyproject.toml")
    try:
        app: dict[str, object] = tomllib.loads(file.read_text("utf-8"))["tool"]["flwr"][
            "app"
        ]
    except (KeyError, TypeError):
        raise ValueError(f"{file} has no [tool.flwr.app]: not a Flower app") from None
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{file} is not valid TOML: {error}") from None
    return app


def _flat_keys(table: Mapping[str, object], prefix: str = "") -> Iterator[str]:
    """Yield the keys of a nested table as Flower does, joined by dots."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat_keys(value, f"{prefix}{key}.")
        else:
            yield prefix + key


def _to_toml(run_config: Mapping[str, ConfigValue]) -> str:
    """Write a flat table; a JSON string, number or boolean is also a TOML one."""
    # Except for floats: an infinity is ``inf`` in TOML and in Python, not in JSON.
    return "".join(
        f"{key} = {repr(value) if isinstance(value, float) else text}\n"
        for key, value in run_config.items()
        for text in [json.dumps(value, ensure_ascii=False)]
    )


def _search_path() -> str:
    """PATH with the scripts of this interpreter's environment first."""
    return os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", "")])


def _executable(name: str) -> str:
    if found := shutil.which(name, path=_search_path()):
        return found
    raise FileNotFoundError(
        f"{name} is not installed in {sysconfig.get_path('scripts')}: "
        "pip install 'flwr[simulation]'"
    )


def _short_temp_dir() -> str:
    """Leave room for Ray's socket paths, at most 103 bytes long on macOS."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= 20 else "/tmp"


def _environment(home: Path) -> dict[str, str]:
    env = {
        **os.environ,
        "PATH": _search_path(),
        "FLWR_HOME": str(home),  # also marks our processes, see processes
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        # By default its SuperExec looks for a run once a second.
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        "RAY_ADDRESS": "local",  # never join a cluster that happens to be there
        "RAY_TMPDIR": str(home),
        "RAY_USAGE_STATS_ENABLED": "0",
        # None beforehand, as Flower's engine uses none: its have a runtime_env.
        "RAY_prestart_worker_first_driver": "0",
        "PYTHONUNBUFFERED": "1",
        "PYTHONIOENCODING": "utf-8",
    }
    # A checkout is not among the installed packages, where the processes would look.
    if Path(sysconfig.get_path("purelib")).resolve() != _ROOT:
        paths = [str(_ROOT), os.environ.get("PYTHONPATH", "")]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    return env


def _start(
    processes: list[subprocess.Popen[bytes]],
    env: Mapping[str, str],
    command: Sequence[str],
    out: BinaryIO | int,
) -> subprocess.Popen[bytes]:
    """Start a process that a Ctrl-C in the terminal does not reach: we stop it."""
    process = subprocess.Popen(
        command,
        env=env,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    processes.append(process)
    return process


def _start_superlink(superlink: str, start: Start, home: Path) -> None:
    """Start a SuperLink on a free port and name it in the home's configuration."""
    log = home / "superlink.log"
    deadline = time.monotonic() + START_SECONDS
    for _ in range(3):  # another process may take the port before we do
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [superlink, "--insecure", "--simulation", "--isolation", "subprocess"]
        command += ["--host", "127.0.0.1", "--port", str(port)]
        command += ["--disable-runtime-dependency-installation"]
        with log.open("wb") as out:
            process = start(command, out)
        while process.poll() is None:
            if _listens(process.pid, port):
                (home / "config.toml").write_text(
                    f'[superlink]\ndefault = "{SUPERLINK}"\n[superlink.{SUPERLINK}]\n'
                    f'address = "127.0.0.1:{port}"\ninsecure = true\n',
                    "utf-8",
                )
                return
            if time.monotonic() > deadline:
                raise RunFailed(f"no SuperLink listens after {START_SECONDS:.0f} s")
            time.sleep(0.1)
    end = tail(log.read_text("utf-8", errors="replace").splitlines())
    raise RunFailed(f"the SuperLink ended with code {process.returncode}\n{end}")


def _listens(pid: int, port: int) -> bool:
    """Whether this very process listens, and not another one that took the port."""
    try:
        sockets = psutil.Process(pid).net_connections(kind="tcp")
    except psutil.Error:
        return False
    return any(s.status == psutil.CONN_LISTEN and s.laddr.port == port for s in sockets)


def _stream(
    command: Sequence[str], start: Start, timeout: float | None
) -> Iterator[str]:
    """Yield the lines of ``flwr run``, which returns 0 once a run was submitted."""
    process = start(command, subprocess.PIPE)
    timer = threading.Timer(timeout or 0, process.terminate)
    timer.daemon = True
    if timeout is not None:
        timer.start()
    refusal: list[str] = []
    submitted = False
    assert process.stdout is not None
    with process.stdout as stdout:
        for raw in stdout:
            line = ANSI.sub("", raw.decode("utf-8", errors="replace")).rstrip()
            # A box before the run is submitted is flwr's refusal of it. Boxes that come
            # later are the app's own output.
            submitted = submitted or line.startswith("Successfully started run")
            if submitted or not line.startswith(("╭", "│", "╰")):
                yield line
            elif text := line.strip("╭╮╰╯─│ "):
                refusal.append(text)
    code = process.wait()
    timer.cancel()
    if timeout is not None and code == -signal.SIGTERM:
        raise RunFailed(f"the run was stopped after timeout={timeout} s")
    if code:
        message = " ".join(refusal[1:]) or f"exit code {code}"
        raise RunFailed(f"flwr run: {message}")


def _completed(flwr: str, env: Mapping[str, str]) -> str:
    """Ask the SuperLink, which has seen one run, how that run ended."""
    command = [flwr, "list", SUPERLINK, "--format", "json"]
    reply = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    try:
        run = json.loads(reply.stdout)["runs"][0]
        status, details = str(run["status"]), str(run["status-details"])
    except (ValueError, LookupError):
        status, details = "unknown", f"flwr list says {reply.stdout.strip()!r}"
    if status != "finished:completed":
        raise RunFailed(f"the run ended as {status}: {details}")
    return status


def _require_a_client(lines: Sequence[str]) -> None:
    """Raise if every client failed in every round."""
    # Flower's own strategies go on without any reply, and the run ends as completed.
    counts = [m.groups() for m in map(_RECEIVED.search, lines) if m]
    if counts and all(good == "0" and bad != "0" for good, bad in counts):
        reasons = (line.partition(_REASON)[2] for line in lines)
        reason = next(filter(None, reasons), "see the log")
        raise RunFailed(f"every client failed in every round; the first: node {reason}")


def _keep(log: Path) -> Path:
    """Copy a log out of the temporary home."""
    handle, name = tempfile.mkstemp(prefix="flwr-run-", suffix=".log")
    os.close(handle)
    return Path(shutil.copyfile(log, name))


if __name__ == "__main__":
    sys.exit(main())
