import logging
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from flwr.serverapp.strategy import FedAvg

from flower_ext import AdditiveStrategy, check, strategies
from flower_ext.check import main

QUICKSTART = Path(__file__).parent / "quickstart"

TASK_CLIENT = """
    import torch
    from torch import nn

    from flower_ext import Task, client_app

    def loss(model, batch):
        logits = model(batch["x"])
        return nn.functional.cross_entropy(logits, batch["y"], reduction="none")

    def data(context):
        x = torch.randn(20, 8)
        columns = {"x": x, "y": (x[:, 0] > 0).long(), "group": (x[:, 1] > 0).long()}
        return columns, columns

    app = client_app(Task(lambda config: nn.Linear(8, 3), data, loss))
"""
TASK_SERVER = """
    from flwr.app import ArrayRecord
    from flwr.serverapp import ServerApp
    from flwr.serverapp.strategy import FedAvg
    from torch import nn

    app = ServerApp()

    @app.main()
    def main(grid, context):
        arrays = ArrayRecord(nn.Linear(8, 3).state_dict())
        FedAvg(min_train_nodes=3).start(grid=grid, initial_arrays=arrays)
"""


STRATEGY = 'FedAvg(fraction_evaluate=context.run_config["fraction-evaluate"])'


@pytest.fixture
def app(tmp_path):
    """Return a copy of the quickstart to be spoilt."""
    folder = tmp_path / "app"
    shutil.copytree(QUICKSTART, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def rewrite(app, file, old, new):
    path = app / "quickstart" / file
    text = path.read_text("utf-8")
    assert old in text
    path.write_text(text.replace(old, new), "utf-8")


def use_task(app):
    for name, text in (("client_app", TASK_CLIENT), ("server_app", TASK_SERVER)):
        path = app / "quickstart" / f"{name}.py"
        path.write_text(textwrap.dedent(text), "utf-8")


def said(capsys, *arguments):
    """Return exit code, output by strategy and errors."""
    code = main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    parts = {part.partition(":")[0]: part for part in out.split("\n\n")}
    return code, parts, err


def everything(folder):
    return {p: p.read_bytes() for p in folder.rglob("*.py")}


def test_a_stock_app_is_told_the_lines_that_work(app, capsys):
    before, modules, path = everything(app), dict(sys.modules), list(sys.path)
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert "works (2 clients" in parts["FedAvg, the app as it is"]
    assert "drops in (2 clients" in parts["AdditiveStrategy"]
    assert "drops in (2 clients" in parts["DPFTRL"]
    fish = parts["FedFish"]
    assert "which were tried (2 clients" in fish
    assert "+    fisher = watch_fisher(model, batches_per_epoch=" in fish
    flasc = parts["FLASC"]
    assert "which were tried (2 clients" in flasc
    assert "mods=[encoded()]" in flasc
    assert "describe_arrays=True" in flasc
    assert "needs these lines, to be completed" in parts["MaxFL"]
    # Without their lines, clients of a personal strategy would be those of FedAvg.
    for name, mod in {"Ditto": "paired()", "LocalOnly": "alone()"}.items():
        assert "which were tried (2 clients" in parts[name]
        assert f"mods=[{mod}]" in parts[name]
    for name, part in parts.items():
        half = getattr(getattr(strategies, name, None), "client_half", None)
        if "drops in (" in part:  # as it is: what has a half of its own does not
            assert half is None, name
    assert "to be completed" in parts["FineTuned"]
    assert "test the received model" in parts["FineTuned"]
    per = parts["FedPer"]
    assert "which were tried (2 clients" in per
    assert "+app = ClientApp(mods=[keep_at_home()])" in per
    babu = parts["FedBABU"]
    assert "which were tried (2 clients" in babu
    assert "+    freeze(model)" in babu
    assert everything(app) == before
    assert sys.path == path
    assert "quickstart.client_app" not in sys.modules.keys() - modules.keys()
    assert FedAvg.start is not AdditiveStrategy.start


def test_lines_are_shown_where_they_belong(app, capsys):
    _, parts, _ = said(capsys, app, "--strategy", "FedFish", "--strategy", "TERM")
    assert (
        "           )\n"
        "      +    fisher = watch_fisher(model, batches_per_epoch=len(trainloader))\n"
        "           train_loss = train_fn(\n"
    ) in parts["FedFish"]
    # What replaces a line needs no neighbours.
    assert "from flwr.serverapp import Grid" not in parts["FedFish"]


def test_only_strategies_that_are_named_are_tried(app, capsys):
    code, parts, _ = said(capsys, app, "--strategy", "FedFish")
    assert code == 0
    assert parts.keys() - {"FedAvg, the app as it is", "FedFish"} <= {next(iter(parts))}
    code, _, err = said(capsys, app, "--strategy", "FedFisch")
    assert code == 2
    assert "strategy='FedFisch' must be one of ('AdditiveStrategy'," in err


def test_what_the_server_must_be_given_is_explained(app, capsys):
    _, parts, _ = said(capsys, app, "--strategy", "AdaDPS", "--strategy", "DiLoCo")
    assert "public_statistics=...)" in parts["AdaDPS"]
    assert "PublicGradients(task, public) of\n" in parts["AdaDPS"]
    # A file in which nothing is changed by a tool is not named.
    assert "client_app.py" not in parts["DiLoCo"]


def test_strategies_that_are_no_sums_are_tried(app, capsys):
    names = ("FedMGDA", "FlexLoRA", "MosT")
    _, parts, _ = said(capsys, app, *(x for n in names for x in ("--strategy", n)))
    assert "drops in (2 clients" in parts["FedMGDA"]
    assert "a model with adapters of LoRA" in parts["FlexLoRA"]
    assert "starts from initial_models(Net, num_models)" in parts["MosT"]


def test_a_task_is_told_its_half(app, capsys):
    use_task(app)
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert "works (3 clients" in parts["FedAvg, the app as it is"]
    assert "+app = client_app(" in parts["FedFish"]
    for name in ("FedFish", "MaxFL", "FLASC", "BoundedGroupLoss", "LocalOnly"):
        assert "which were tried (3 clients" in parts[name], name


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "client_app.py",
            'msg.content["config"]["lr"]',
            'msg.content["config"]["rate"]',
            "KeyError: 'rate' (quickstart/client_app.py, line 29)",
        ),
        (
            "client_app.py",
            'model.load_state_dict(msg.content["arrays"]',
            'model.load_state_dict(msg.content["model"]',
            "KeyError: 'model' (quickstart/client_app.py, line 18)",
        ),
        ("task.py", "optimizer.step()", "pass", "nothing was trained"),
        (
            "client_app.py",
            '{"metrics": metrics}), reply_to',
            '{"metrics": metricks}), reply_to',
            "clients fail in evaluate, the first with NameError",
        ),
        ("server_app.py", "FedAvg(", "FedAvg(fraction_train=0.0, ", "no client was"),
    ],
)
def test_an_app_that_does_not_work_is_told_why(app, capsys, file, old, new, says):
    rewrite(app, file, old, new)
    code, parts, _ = said(capsys, app)
    assert code == 1
    assert says in parts["FedAvg, the app as it is"]
    assert "FedFish" not in parts


@pytest.mark.parametrize(
    ("file", "old", "new", "says"),
    [
        (
            "task.py",
            "import torch\n",
            "import torsch\n",
            "No module named 'torsch' (quickstart/task.py, line 3): if the app needs "
            "it, install the app",
        ),
        (
            "task.py",
            "import torch\n",
            "from flwr.client.typing import ClientAppCallable\n",
            "(quickstart/task.py, line 3): the app is for another Flower than",
        ),
        (
            "task.py",
            "import torch\n",
            "import quickstart.tasks\n",
            "No module named 'quickstart.tasks' (quickstart/task.py, line 3)\n",
        ),
        ("server_app.py", "Net()", "Nett()", "before strategy.start: NameError"),
        (
            "server_app.py",
            "result = strategy.start(",
            "return None\n    result = dict(",
            "without a call of",
        ),
        (
            "server_app.py",
            "result = strategy.start(",
            "grid.send_and_receive([]); grid.push_messages([])\n    result = dict(",
            "sends messages itself",
        ),
        ("server_app.py", "FedAvg(", "FedAvg(min_available_nodes=11, ", "11 nodes"),
        ("client_app.py", "app = ", "import sys\nsys.exit(3)\napp = ", "SystemExit: 3"),
        (
            "server_app.py",
            "result = strategy.start(",
            "raise SystemExit(4)\n    result = dict(",
            "before strategy.start: SystemExit: 4 (quickstart/server_app.py, line",
        ),
    ],
)
def test_an_app_that_starts_no_strategy_is_refused(app, capsys, file, old, new, says):
    rewrite(app, file, old, new)
    code, _, err = said(capsys, app)
    assert code == 2
    assert says in err


def test_a_folder_or_a_key_that_is_not_there_is_refused(app, tmp_path, capsys):
    assert said(capsys, tmp_path)[::2] == (
        2,
        f"error: {tmp_path} is no Flower app: it has no pyproject.toml\n",
    )
    code, _, err = said(capsys, app, "-c", "rounds=1")
    assert code == 2
    assert "rounds" in err


def test_a_second_package_of_the_same_name_is_found(app, tmp_path, capsys, monkeypatch):
    other = tmp_path / "elsewhere"
    shutil.copytree(QUICKSTART, other)
    monkeypatch.chdir(other)
    code, parts, _ = said(capsys, app)
    assert code == 1
    shown = next(iter(parts.values()))
    assert str(other / "quickstart") in shown
    assert str(app / "quickstart") in shown


def test_resources_that_no_machine_here_has_are_found(app, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    (app / "pyproject.toml").open("a").write(
        "\n[tool.flwr.federations.gpu]\n"
        "options.backend.client-resources.num-gpus = 0.5\n"
    )
    code, parts, _ = said(capsys, app, "--num-cpus", 10_000)
    assert code == 1
    shown = next(iter(parts.values()))
    assert "federation 'gpu': num-gpus=0.5" in shown
    assert "the command line: num-cpus=10000" in shown


def test_gpus_that_clients_would_not_see_are_found(app, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    shown = next(iter(said(capsys, app)[1].values()))
    assert "see none of the 2 GPUs" in shown


def test_hooks_of_the_apps_own_strategy_are_named(app, capsys):
    rewrite(
        app,
        "server_app.py",
        "@app.main()",
        "class Mine(FedAvg):\n"
        "    def configure_train(self, *args):\n"
        "        return super().configure_train(*args)\n\n\n@app.main()",
    )
    rewrite(app, "server_app.py", "strategy = FedAvg(", "strategy = Mine(")
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert "Mine has its own configure_train" in next(iter(parts.values()))
    assert "drops in (2 clients" in parts["AdditiveStrategy"]


def test_a_start_by_run_rounds_is_found(app, capsys):
    rewrite(app, "server_app.py", "strategy.start(", "run_rounds(strategy, ")
    rewrite(
        app,
        "server_app.py",
        "from quickstart.task import Net",
        "from flower_ext.server.rounds import run_rounds\n"
        "from quickstart.task import Net",
    )
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert "drops in (2 clients" in parts["AdditiveStrategy"]


def test_every_strategy_of_the_pack_is_tried():
    names = {kind.__name__ for kind in check.strategies()}
    assert {"AdditiveStrategy", "DPFTRL", "FLASC", "FedFish", "MaxFL"} <= names


# Apps as people write them --------------------------------------------------------


def test_what_the_app_logs_and_prints_is_not_among_the_verdicts(app, capsys):
    """As Flower's example with Opacus does."""
    lines = 'import logging\n\nlogging.getLogger("flwr").setLevel(logging.INFO)\n'
    rewrite(app, "server_app.py", "import torch\n", f"import torch\n{lines}")
    rewrite(app, "server_app.py", "torch.manual_seed(0)", 'print("a server")')
    rewrite(
        app,
        "client_app.py",
        "    model = Net()\n",
        '    import sys\n\n    print("a client")\n'
        '    print("and its bar", file=sys.stderr)\n    model = Net()\n',
    )
    log = logging.getLogger("flwr")
    records, level = [], log.level
    handler = logging.Handler()
    handler.emit = records.append
    log.addHandler(handler)
    try:
        code, parts, err = said(capsys, app, "--strategy", "FedProx")
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    assert code == 0
    assert not records
    assert not log.disabled
    assert not err
    assert not any(
        x in part for part in parts.values() for x in ("a server", "a client")
    )


def test_a_strategy_that_cannot_be_copied_and_starts_its_own_way(app, capsys):
    rewrite(
        app,
        "server_app.py",
        "@app.main()",
        "import threading\n\n\nclass Mine(FedAvg):\n"
        "    def begin(self):\n        self.lock = threading.Lock()\n"
        "        return self\n\n"
        "    def start(self, model, **options):\n"
        "        return super().start(initial_arrays=model, **options)\n\n\n"
        "@app.main()",
    )
    rewrite(app, "server_app.py", STRATEGY, "Mine().begin()")
    rewrite(app, "server_app.py", "initial_arrays=arrays", "model=arrays")
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert "Mine has its own start" in next(iter(parts.values()))
    assert "drops in (2 clients" in parts["AdditiveStrategy"]


def test_server_and_client_in_one_module_with_imports_throughout(app, capsys):
    """As a notebook is exported: what is added is imported above its use."""
    files = [app / "quickstart" / f"{x}.py" for x in ("task", "client_app")]
    whole = "\ntest_fn, train_fn = test, train\n".join(
        file.read_text("utf-8") for file in files
    )
    lines = (x for x in whole.splitlines() if "from quickstart.task" not in x)
    files[1].write_text("\n".join(lines) + "\nimport json\n", "utf-8")
    code, parts, _ = said(capsys, app)
    assert code == 0
    for name in ("FedFish", "FLASC"):
        assert "which were tried (2 clients" in parts[name]


def test_a_module_that_runs_once_is_not_tried_again(app, capsys, monkeypatch):
    monkeypatch.setenv("RAN", "")
    rewrite(
        app,
        "client_app.py",
        "app = ",
        "import os\n\nif os.environ['RAN']:\n    raise SystemExit\n"
        "os.environ['RAN'] = 'yes'\n\napp = ",
    )
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert "client_app.py does not run twice in a process" in parts["FedFish"]


def test_a_source_in_another_encoding_is_read(app, capsys):
    file = app / "quickstart" / "client_app.py"
    text = "# coding: latin-1\n# \xe9\n" + file.read_text("utf-8")
    file.write_bytes(text.encode("latin-1"))
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert "which were tried (2 clients" in parts["FedFish"]


@pytest.mark.parametrize(
    ("made", "left"),
    [
        ("FedProx(proximal_mu=0.1)", "AdditiveStrategy()"),
        (
            "FedAdam(eta=0.1, fraction_train=0.5)",
            "AdditiveStrategy(fraction_train=0.5)",
        ),
        (
            "DifferentialPrivacyServerSideFixedClipping(FedAvg(), 1.0, 1.0, 2)",
            "AdditiveStrategy() in place of DifferentialPrivacyServerSideFixedClipping",
        ),
    ],
)
def test_lines_have_no_option_that_the_strategy_refuses(app, capsys, made, left):
    name = made.partition("(")[0]
    rewrite(app, "server_app.py", "import FedAvg", f"import FedAvg, {name}")
    rewrite(app, "server_app.py", STRATEGY, made)
    code, parts, _ = said(capsys, app)
    assert code == 0
    assert f"what {name} does besides averaging" in next(iter(parts.values()))
    assert parts["AdditiveStrategy"].rstrip().endswith(left)
    assert "DPFTRL(num_rounds=" in parts["DPFTRL"]


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (
            "federations.gpu.options.backend.client-resources.num-cpus = '2'",
            "federation 'gpu': client-resources {'num-cpus': '2'} must be numbers",
        ),
        ("federations.gpu.options = 3", ""),
        ("federations = 'gpu'", ""),
    ],
)
def test_federations_of_any_form_are_read(app, capsys, table, says):
    (app / "pyproject.toml").open("a").write(f"\n[tool.flwr]\n{table}\n")
    code, parts, _ = said(capsys, app)
    assert code == (1 if says else 0)
    assert says in next(iter(parts.values()))


def test_components_that_are_no_table_are_refused(app, capsys):
    (app / "pyproject.toml").write_text("[tool.flwr.app]\ncomponents = 'x'\n")
    code, _, err = said(capsys, app)
    assert code == 2
    assert "is not that of a Flower app" in err


def test_nothing_is_left_in_the_folder_or_the_process(app, capsys, monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", False)
    rewrite(app, "server_app.py", "app = ", "import os\n\nos.chdir('/')\napp = ")
    before, cwd = sorted(app.rglob("*")), Path.cwd()
    assert said(capsys, app)[0] == 0
    assert sorted(app.rglob("*")) == before
    assert Path.cwd() == cwd


def test_a_reader_that_leaves_ends_it_quietly():
    command = [sys.executable, "-u", "-m", "flower_ext.check", str(QUICKSTART)]
    checks = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert checks.stdout.readline().startswith("Checking")
    checks.stdout.close()
    assert checks.stderr.read() == ""
    assert checks.wait() == 1
