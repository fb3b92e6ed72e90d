import json
import os
import signal
import stat
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from flwr.app import ArrayRecord
from flwr.serverapp.strategy import FedAvg
from left_behind import home_of, left_of, lives

from flower_ext.runs import launch, processes
from flower_ext.runs.launch import RunFailed, parse_run_config, run_app
from flower_ext.runs.report import write_summary
from flower_ext.runs.run_log import readable_line
from flower_ext.server.tracking import METRICS_FILE

DEADLINE = 120.0

PYPROJECT = """
[project]
name = "tiny"
version = "1.0.0"
description = "two clients that add one"
license = "Apache-2.0"
dependencies = ["flwr[simulation]>=1.41", "no-such-distribution-anywhere>=3"]

[tool.flwr.app]
publisher = "nobody"

[tool.flwr.app.components]
serverapp = "tiny.app:server"
clientapp = "tiny.app:client"

[tool.flwr.app.config]
num-server-rounds = 2
message = ""
table.key = 1.5
"""

FAKE_SUPERLINK = """
import socket, subprocess, sys, time
deaf = "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(600)"
subprocess.Popen([sys.executable, "-c", deaf], start_new_session=True)
server = socket.create_server(
    ("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1]))
)
time.sleep(600)
"""

FAKE_FLWR = """
import json, os, sys, time
if sys.argv[1] == "list":
    status = os.environ.get("FAKE_STATUS", "finished:completed")
    print(json.dumps({"runs": [{"status": status, "status-details": "the reason"}]}))
else:
    print("home", os.environ["FLWR_HOME"], flush=True)
    print("\\x1b[91mERROR \\x1b[0m:     what went wrong", flush=True)
    if sys.argv[-1].endswith(".toml"):
        print(open(sys.argv[-1]).read(), end="", flush=True)
    if lines := os.environ.get("FAKE_LINES"):
        print(lines, flush=True)
    time.sleep(float(os.environ.get("FAKE_SECONDS", "0")))
    sys.exit(int(os.environ.get("FAKE_CODE", "0")))
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    folder = tmp_path / "app"
    (folder / "tiny").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PYPROJECT)
    (folder / "tiny" / "__init__.py").touch()
    (folder / "tiny" / "app.py").touch()
    return folder


@pytest.fixture
def fake_flower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace Flower's programs: its SuperLink starts a detached, deaf process."""
    scripts = tmp_path / "scripts"
    scripts.mkdir()
    for name, code in {"flower-superlink": FAKE_SUPERLINK, "flwr": FAKE_FLWR}.items():
        (scripts / name).write_text(f"#!{sys.executable}\n{code}")
        (scripts / name).chmod(stat.S_IRWXU)
    get_path = sysconfig.get_path
    monkeypatch.setattr(
        sysconfig,
        "get_path",
        lambda name: str(scripts) if name == "scripts" else get_path(name),
    )
    monkeypatch.setattr(processes, "GRACE_SECONDS", 0.1)


def test_completed_run_returns_its_log_and_leaves_nothing(app, fake_flower, tmp_path):
    seen: list[str] = []
    config = {"message": "a 'b' \"c\" ü", "num-server-rounds": 7, "table.key": 1e-7}
    outcome = run_app(
        app, run_config=config, log_file=tmp_path / "r" / "log", on_line=seen.append
    )
    assert outcome.status == "finished:completed"
    assert outcome.log.splitlines() == seen
    assert (tmp_path / "r" / "log").read_text().splitlines() == seen
    assert "ERROR :     what went wrong" in seen
    assert "num-server-rounds = 7" in seen
    assert "table.key = 1e-07" in seen
    assert 'message = "a \'b\' \\"c\\" ü"' in seen
    assert left_of(home_of(outcome.log)) == []


def test_failed_run_raises_with_reason_tail_and_log(app, fake_flower, monkeypatch):
    monkeypatch.setenv("FAKE_STATUS", "finished:failed")
    with pytest.raises(RunFailed, match="the reason") as caught:
        run_app(app, on_line=lambda line: None)
    assert "what went wrong" in str(caught.value)
    log = Path(str(caught.value).rsplit("full log: ")[1])
    assert "what went wrong" in log.read_text()
    assert left_of(home_of(log.read_text())) == []
    log.unlink()


FAILURES = "INFO: aggregate_train: Received 0 results and 3 failures"
SUCCESS = "INFO: aggregate_train: Received 2 results and 1 failures"
REASON = "INFO: > Received error in reply from node 7: KeyError: 'lr'"


def test_a_run_in_which_every_client_failed_is_a_failed_run(
    app, fake_flower, monkeypatch
):
    monkeypatch.setenv("FAKE_LINES", "\n".join([FAILURES, REASON, FAILURES]))
    text = "every client failed in every round; the first: node 7: KeyError: 'lr'"
    with pytest.raises(RunFailed, match=text) as caught:
        run_app(app, on_line=lambda line: None)
    Path(str(caught.value).rsplit("full log: ")[1]).unlink()


def test_flowers_own_strategies_say_it_in_these_words(
    app, fake_flower, monkeypatch, scripted, caplog, capsys
):
    FedAvg(fraction_evaluate=0.0).start(
        scripted([OSError("no data")] * 2), ArrayRecord([np.zeros(3)]), num_rounds=2
    )
    lines = [f"{r.levelname} :      {r.getMessage()}" for r in caplog.records]
    monkeypatch.setenv("FAKE_LINES", "\n".join(lines))
    assert launch.main([str(app)]) == 1
    error = capsys.readouterr().err
    assert "every client failed in every round; the first: node " in error
    assert "no data" in error
    Path(error.rsplit("full log: ")[1].strip()).unlink()


@pytest.mark.parametrize(
    "lines",
    [
        [FAILURES, SUCCESS],
        [SUCCESS, FAILURES],
        ["INFO: aggregate_train: Received 0 results and 0 failures"],
        [FAILURES.replace("train", "evaluate")],
    ],
)
def test_a_run_in_which_some_client_trained_is_complete(
    app, fake_flower, monkeypatch, lines
):
    monkeypatch.setenv("FAKE_LINES", "\n".join(lines))
    assert run_app(app, on_line=lambda line: None).status == "finished:completed"


def test_flwr_that_exits_with_an_error_raises(app, fake_flower, monkeypatch):
    monkeypatch.setenv("FAKE_CODE", "3")
    with pytest.raises(RunFailed, match="exit code 3"):
        run_app(app, log_file=app.parent / "log", on_line=lambda line: None)


def test_timeout_stops_the_run(app, fake_flower, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "600")
    timers = []

    class Timer:
        """Rings with the first line, whenever that is."""

        def __init__(self, seconds, ring):
            timers.append((seconds, ring))

        def start(self):
            pass

        cancel = start

    monkeypatch.setattr(launch.threading, "Timer", Timer)
    with pytest.raises(RunFailed, match=r"timeout=1\.5") as caught:
        run_app(
            app,
            timeout=1.5,
            log_file=app.parent / "log",
            on_line=lambda line: timers[0][1](),
        )
    assert timers[0][0] == 1.5
    assert left_of(home_of(str(caught.value))) == []


def test_exception_in_callback_stops_everything(app, fake_flower, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "600")
    seen: list[str] = []

    def interrupt(line: str) -> None:
        seen.append(line)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_app(app, on_line=interrupt)
    assert left_of(home_of(seen[0])) == []


def test_sigterm_becomes_exit_143_and_handlers_come_back(app, fake_flower, monkeypatch):
    monkeypatch.setenv("FAKE_SECONDS", "600")
    seen: list[str] = []

    def terminate(line: str) -> None:
        seen.append(line)
        os.kill(os.getpid(), signal.SIGTERM)

    # A Ray that another test started in this process has left a handler of its own.
    with processes.signals(signal.SIG_DFL, signal.SIGTERM):
        with pytest.raises(SystemExit) as caught:
            run_app(app, on_line=terminate)
        assert caught.value.code == 143
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert left_of(home_of(seen[0])) == []


def test_superlink_that_cannot_start(app, fake_flower):
    superlink = Path(sysconfig.get_path("scripts")) / "flower-superlink"
    superlink.write_text(f"#!{sys.executable}\nraise SystemExit('no licence')\n")
    with pytest.raises(RunFailed, match="ended with code 1\nno licence"):
        run_app(app)


def test_children_of_the_caller_survive(app, fake_flower):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1) as mine:
        run_app(app)
        assert mine.poll() is None
        mine.kill()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_supernodes": 0}, "num_supernodes=0 must be >= 1"),
        ({"num_cpus": -1}, "num_cpus=-1 must be >= 1"),
        ({"num_gpus": float("nan")}, "num_gpus=nan must be >= 0"),
        ({"timeout": 0}, "timeout=0 must be > 0"),
        ({"run_config": {"rounds": 3}}, "no key rounds: .* lists message, num-server-"),
    ],
)
def test_wrong_arguments(app, options, message):
    with pytest.raises(ValueError, match=message):
        run_app(app, **options)


def test_a_folder_that_hides_the_app_or_this_package_is_refused(
    app, tmp_path, monkeypatch, capsys
):
    for name in ("tiny", "flower_ext"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
        monkeypatch.chdir(tmp_path)
        assert launch.main([str(app)]) == 2
        error = capsys.readouterr().err
        assert f"module {name!r} of the app" in error
        assert str(tmp_path / name / "__init__.py") in error
        (tmp_path / name / "__init__.py").unlink()


def test_what_an_installed_package_imports_may_have_other_names_here(
    app, tmp_path, monkeypatch
):
    """Installed, its neighbours are all packages: following imports takes a minute."""
    installed, here = tmp_path / "installed", tmp_path / "here"
    (installed / "flower_ext").mkdir(parents=True)
    (installed / "flower_ext" / "__init__.py").write_text("import neighbour")
    (installed / "neighbour.py").touch()
    here.mkdir()
    (here / "neighbour.py").touch()
    monkeypatch.chdir(here)
    monkeypatch.setattr(launch, "_ROOT", installed)
    launch._check_app(app, {})
    (here / "flower_ext.py").touch()
    with pytest.raises(ValueError, match="'flower_ext'"):
        launch._check_app(app, {})


def test_folder_without_an_app(tmp_path, capsys):
    assert launch.main([str(tmp_path)]) == 2
    assert "no Flower app: it has no pyproject.toml" in capsys.readouterr().err
    (tmp_path / "pyproject.toml").write_text("[project]\nname = 'x'\n")
    assert launch.main([str(tmp_path)]) == 2
    (tmp_path / "pyproject.toml").write_text("[project\n")
    assert launch.main([str(tmp_path)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert [line.startswith("error: ") for line in errors] == [True, True]
    assert "no [tool.flwr.app]" in errors[0]
    assert "not valid TOML" in errors[1]


def test_seeds_run_one_after_the_other_and_are_pooled(
    app, tmp_path, monkeypatch, capsys
):
    config = 'seed = 1\nresults = ""\n'
    (app / "pyproject.toml").write_text(PYPROJECT + config)
    asked = []

    def fake(folder, *, run_config, log_file, **_):
        asked.append(run_config["seed"])
        out = Path(run_config["results"])
        (out / "fedavg").mkdir(parents=True)
        row = {"round": 1, "evaluate/loss": 2.0 ** run_config["seed"]}
        (out / "fedavg" / METRICS_FILE).write_text(json.dumps(row) + "\n")
        write_summary(out, ["fedavg"], {"evaluate/loss": "loss"})
        return launch.RunOutcome("finished:completed", 10.0, "")

    monkeypatch.setattr(launch, "run_app", fake)
    folder = tmp_path / "out"
    options = ["--results", str(folder), "--seeds", "3", "1"]
    assert launch.main([str(app), *options, "-c", "seed=5"]) == 0
    assert asked == [3, 1]
    shown = capsys.readouterr().out
    # The mean of 8 and 2, and their standard deviation, 6 / sqrt(2).
    assert "fedavg  5.0000 ± 4.2426" in shown
    assert "2 seeds" in shown and "in 20 s" in shown
    assert (folder / "seed-1" / "fedavg" / METRICS_FILE).is_file()


def test_seeds_of_an_app_without_results(app, capsys):
    assert launch.main([str(app), "--seeds", "1"]) == 2
    assert "'results'" in capsys.readouterr().err


def test_flwr_not_installed(app, monkeypatch, capsys):
    monkeypatch.setattr(launch, "_search_path", lambda: str(app))
    assert launch.main([str(app)]) == 2
    assert "flwr is not installed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["a b", "a=1 b", "a=", "a=x", "a=[1", "=1"])
def test_run_config_that_is_no_setting(text):
    with pytest.raises(ValueError, match="run config"):
        parse_run_config([text])


@pytest.mark.parametrize(
    ("line", "text"),
    [
        ("WARNING :   few clients", "WARNING: few clients"),
        ("INFO :      \t└──> Aggregated", "\t└──> Aggregated"),
        ("\x1b[91mERROR \x1b[0m:     broken", "ERROR: broken"),
        ("loss: 0.5", "loss: 0.5"),
        ("(raylet pid=3, ip=10.0.0.1) out of memory", "raylet: out of memory"),
        ("INFO :      ", None),
        ("WARNING :   Since flwr 1.32, default simulated SuperNodes changed", None),
    ],
)
def test_readable_line(line, text):
    assert readable_line(line) == text


def test_a_process_that_nobody_has_waited_for_is_gone():
    with subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE) as child:
        process = psutil.Process(child.pid)
        assert child.stdout
        child.stdout.read()  # until it ends
        end = time.monotonic() + DEADLINE
        while process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
            time.sleep(0.01)
        assert not lives(process)
    assert not lives(process)
    assert lives(psutil.Process())


@pytest.mark.slow
def test_command_line_says_in_one_line_what_is_wrong(tmp_path):
    command = [sys.executable, "-m", "flower_ext.runs.launch", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
