"""The baselines: the form that Flower's programme asks for, and their own code."""

import doctest
import email
import importlib
import io
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from flwr.cli.build import build_fab_from_disk
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import QFedAvg

from flower_ext.client.half import Proximal
from flower_ext.core.arrays import to_record
from flower_ext.core.protocol import Round
from flower_ext.core.several import stack
from flower_ext.data import load
from flower_ext.privacy import InstanceAccount, InstanceReport, Workload, epsilon_for
from flower_ext.runs.report import write_summary
from flower_ext.server.optimizers import (
    SGD,
    OneShotSparsity,
    PeriodicSparsity,
    PolynomialSparsity,
)
from flower_ext.server.tracking import read_metrics
from flower_ext.simulation.local import LocalGrid, app_config, run_local

BASELINES = Path(__file__).parents[1] / "baselines"
NAMES = [
    "bounded_group_loss",
    "compression",
    "diloco",
    "dpftrl",
    "drift",
    "fair_objectives",
    "federated_lora",
    "fedfish",
    "flasc",
    "maxfl",
    "personalization",
    "pfl_docvqa",
    "private_mails",
    "private_optimizers",
    "pruning",
    "silo_privacy",
    "unequal_clients",
]
FILES = ["client_app", "dataset", "model", "server_app", "strategy", "utils"]
SECTIONS = [
    "About this baseline",
    "Experimental Setup",
    "Environment Setup",
    "Running the Experiments",
    "What is the same as in the paper, and what is not",
]
SENT = {"a": np.array([1.0, 2.0]), "b": np.array([[0.5]])}


@pytest.fixture
def baseline(request):
    """Import a module of a baseline, ``maxfl.strategy``; forget the package after."""
    name = request.param.split(".")[0]
    sys.path.insert(0, str(BASELINES / name))
    yield importlib.import_module(request.param)
    sys.path.remove(str(BASELINES / name))
    for module in [m for m in sys.modules if m.split(".")[0] == name]:
        del sys.modules[module]


def test_every_baseline_is_here():
    assert sorted(p.parent.name for p in BASELINES.glob("*/pyproject.toml")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_form(name):
    folder = BASELINES / name
    for file in ["__init__", *FILES]:
        assert (folder / name / f"{file}.py").is_file(), file
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["name"].replace("-", "_") == name
    # `flwr run` takes no other.
    assert re.fullmatch("[a-zA-Z][a-zA-Z0-9-]{0,31}", project["name"])
    assert 0 < len(project["description"]) <= 200
    readme = (folder / "README.md").read_text("utf-8")
    front = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)[1]
    fields = dict(re.findall(r"^(\w+): (.+)$", front, re.MULTILINE))
    assert sorted(fields) == ["dataset", "labels", "title", "url"]
    assert 4 <= len(fields["labels"].split(",")) <= 10
    assert re.findall(r"^## (.+)$", readme, re.MULTILINE) == SECTIONS
    for word in ("**Paper:**", "**Authors:**", "**In short:**", "**Hardware:**"):
        assert word in readme, word
    for picture in re.findall(r"!\[.*?\]\((.+?)\)", readme):
        assert (folder / picture).is_file()


@pytest.mark.parametrize("name", NAMES)
def test_bundle_is_one_that_flowers_hub_takes(name):
    folder = BASELINES / name
    project = tomllib.loads((folder / "pyproject.toml").read_text())
    assert project["tool"]["flwr"]["app"]["fab-format-version"] == 1
    # Building it also checks the format: the license, Flower's version and the like.
    bundle = zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder)))
    files = {x.filename: x.file_size for x in bundle.infolist()}
    assert {"LICENSE", "README.md", f"{name}/server_app.py"} <= files.keys()
    assert len(files) <= 1_000
    assert max(files.values()) <= 2**20
    for file in files:  # the hub takes text
        bundle.read(file).decode("utf-8")
    assert bundle.read("LICENSE") == (BASELINES.parent / "LICENSE").read_bytes()


@pytest.mark.slow
def test_flwr_builds_a_bundle(tmp_path):
    command = [Path(sys.executable).parent / "flwr", "build"]
    command += ["--app", str(BASELINES / "drift")]
    subprocess.run(command, cwd=tmp_path, check=True)
    assert len(list(tmp_path.glob("flower-ext.drift.*.fab"))) == 1


@pytest.mark.parametrize("name", NAMES)
def test_settings_of_the_readme_are_those_of_the_app(name):
    config = app_config(BASELINES / name)
    readme = (BASELINES / name / "README.md").read_text("utf-8")
    setup = readme.split("## Experimental Setup")[1].split("## Environment")[0]
    rows = re.findall(r"^\|[^|]+\| (`.+?`) \| (.+?) \|$", setup, re.MULTILINE)
    assert rows
    for keys, values in rows:
        for key in re.findall(r"`([\w-]+)`", keys):
            told = config[key]
            shown = str(told).lower() if isinstance(told, bool) else f"{told}"
            assert shown in values.replace("`", "").replace(",", ""), key


@pytest.mark.parametrize(
    "baseline",
    [f"{name}.dataset" for name in NAMES if name != "private_optimizers"],
    indirect=True,
)
def test_a_client_that_the_data_does_not_have_is_refused(baseline):
    """More nodes than clients, or a SuperNode with a wrong ``--node-config``."""
    name = baseline.__name__.split(".")[0]
    data_of = {
        "compression": getattr(baseline, "speaker_data", None),
        "diloco": getattr(baseline, "worker_data", None),
        "private_mails": lambda context: baseline.client_data("words", context),
    }.get(name) or baseline.client_data
    for number in (-1, 10_000):
        node = {"partition-id": number, "num-partitions": 4}
        context = SimpleNamespace(
            node_config=node, run_config=app_config(BASELINES / name)
        )
        refused = f"partition.id={number} must be from 0 to"
        with pytest.raises(ValueError, match=refused):
            data_of(context)


@pytest.mark.parametrize("baseline", ["fedfish.words"], indirect=True)
@pytest.mark.parametrize(
    ("accuracy", "said"),
    [
        (0.725, "72.5 % of all test images rightly, FedAvg's 65.0 %: 7.5 points more"),
        (0.625, "62.5 % of all test images rightly, FedAvg's 65.0 %: 2.5 points less"),
    ],
)
def test_words_say_what_the_summary_holds(baseline, tmp_path, accuracy, said):
    runs = {
        "fedavg": {"accuracy": 0.65, "barrier": 0.5, "up": 2.0},
        "fedfish": {"accuracy": accuracy, "barrier": 0.25, "up": 4.0},
    }
    columns = {
        "accuracy": "central/accuracy",
        "barrier": "evaluate/client-server-barrier",
        "up": "bytes/up",
    }
    for name, values in runs.items():
        (tmp_path / name).mkdir()
        row = {"round": 1, **{columns[key]: x for key, x in values.items()}}
        (tmp_path / name / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    write_summary(tmp_path, runs, {x: x for x in columns.values()})
    words = " ".join(baseline.words(tmp_path).split())
    assert said in words
    assert "costs the clients 0.25 nats instead of 0.50" in words
    assert "2.0 times the bytes up" in words
    for page in re.findall(r"[\w/]+\.md", words):
        assert (BASELINES.parent / page).is_file()


@pytest.mark.parametrize("baseline", ["fedfish.strategy"], indirect=True)
def test_fedfish_takes_its_settings(baseline):
    config = app_config(BASELINES / "fedfish")
    config |= {"damping": 0.5, "estimator": "all-epochs", "normalization": "client"}
    fedfish = baseline.make_strategy("fedfish@3", config)
    told = (fedfish.damping, fedfish.estimator, fedfish.normalization)
    assert told == (0.5, "all-epochs", "client")
    assert fedfish.local_epochs == 3


@pytest.mark.parametrize("baseline", ["federated_lora.strategy"], indirect=True)
def test_adapters_have_the_ranks_of_their_tiers(baseline):
    config = app_config(BASELINES / "federated_lora")
    made = {name: baseline.make_strategy(name, config) for name in baseline.NAMES}
    for name in ("stacked-tiers", "flex-tiers"):
        assert made[name].ranks == (2, 4, 8), name
        assert made[name].scaling_of(2) == config["lora-alpha"] / 2
    for name in ("het-lora", "het-lora-sorted"):
        assert [tier.rank for tier in made[name].tiers] == [2, 4, 8], name
    for name in ("stacked", "flex"):
        assert made[name].ranks == (), name
    assert not made["het-lora-sorted"].server_optimizer.keeps_coordinates
    with pytest.raises(ValueError, match="must name some of"):
        baseline.make_strategy("lora+", config)


@pytest.mark.parametrize("baseline", ["private_mails.strategy"], indirect=True)
def test_methods_train_what_their_names_say(baseline):
    config = app_config(BASELINES / "private_mails")
    factors = ["layer.q.lora_A.x.weight", "layer.q.lora_B.x.weight"]
    names = ["layer.q.base_layer.weight", *factors, "head.weight", "head.bias"]
    sent = {name: np.array([i, 1.0]) for i, name in enumerate(names)}
    trained = {
        "scratch": names,
        "lora": names[1:],
        "lora-ffa": names[2:],
        "probe": names[3:],
        "probe@64": names[3:],
    }
    assert set(trained) == set(str(config["strategies"]).split())
    for name, expected in trained.items():
        made = baseline.make_strategy(name, config)
        assert list(made.head(sent)) == expected
        assert baseline.learning_rate(name, config) > 0
    assert baseline.learning_rate("lora", {"learning-rate": 0.5}) == 0.5
    with pytest.raises(ValueError, match="strategies='full' must name some of"):
        baseline.make_strategy("full", config)


@pytest.mark.parametrize("baseline", ["private_mails.utils"], indirect=True)
def test_accounts_of_single_mails_are_summed_up(baseline, tmp_path):
    """Of two silos with one watched mail each: the Gaussian's divergences."""
    report = InstanceReport(tmp_path, (0,))
    assert "no accounts" in baseline.told(tmp_path, 1, 1e-3)  # but on other machines
    epsilons = []
    for client, length in enumerate((0.5, 1.0)):
        account = InstanceAccount((0,))
        own = np.array([length])
        account.add(0, with_it=own, own=own, deviation=2.0)
        account.save(report.path(client))
        epsilons.append(account.epsilon(0, 1e-3))
    said = baseline.told(tmp_path, 1, 1e-3)
    assert f"epsilon {sum(epsilons) / 2:.3f} on average, {epsilons[1]:.3f} at" in said
    assert said.endswith("Fisher information loss 0.375")  # (0.5 + 1) / 2 / 2


@pytest.mark.parametrize("baseline", ["dpftrl.strategy"], indirect=True)
@pytest.mark.parametrize(("simulated", "seed"), [(20, 1), (0, None)])
def test_clients_that_stand_for_themselves_have_secret_noise(baseline, simulated, seed):
    """In a deployment; who knows the seed can take the noise away."""
    config = app_config(BASELINES / "dpftrl") | {"simulated-cohort": simulated}
    for name in ("amplified", "tree"):
        assert baseline.make_strategy(name, 8.0, config).mechanism.seed == seed


@pytest.mark.parametrize("baseline", ["private_optimizers.utils"], indirect=True)
def test_a_method_without_a_setting_for_the_data_is_told(baseline):
    config = app_config(BASELINES / "private_optimizers") | {"data": "images"}
    with pytest.raises(ValueError, match="methods='ada-dps-words' must be one with"):
        baseline.setting("ada-dps-words", config)


@pytest.mark.parametrize("baseline", ["dpftrl.strategy"], indirect=True)
def test_every_mechanism_can_plan_a_single_round(baseline):
    config = app_config(BASELINES / "dpftrl") | {"num-server-rounds": 1}
    for name in baseline.NAMES:
        made = baseline.make_strategy(name, None if name == "none" else 8.0, config)
        assert made.mechanism.num_rounds == 1


@pytest.mark.parametrize("baseline", ["maxfl.strategy"], indirect=True)
def test_q_fedavg_is_flowers(baseline, reply, aggregate, exchange):
    losses, rate, q = [0.7, 2.0, 1.2], 0.1, 2.0
    clients = [
        {"a": np.array([0.0, 1.0]), "b": np.array([[1.0]])},
        {"a": np.array([2.0, 5.0]), "b": np.array([[0.0]])},
        {"a": np.array([1.0, 2.5]), "b": np.array([[0.2]])},
    ]
    replies = []
    for arrays, loss in zip(clients, losses, strict=True):
        metrics = {"received-loss": loss, "appealed": 0.0, "appeal-weight": 0.1}
        replies.append(reply(arrays, 5, **metrics))
    ours, _ = aggregate(baseline.QFedAvg(q, rate), SENT, replies)
    theirs = QFedAvg(client_learning_rate=rate, q=q, train_loss_key="received-loss")
    asked = exchange(theirs, SENT, replies)
    expected, _ = theirs.aggregate_train(1, asked)
    for name, array in expected.items():
        np.testing.assert_allclose(ours[name], array.numpy(), rtol=1e-9)


@pytest.mark.parametrize("baseline", ["maxfl.client_app"], indirect=True)
def test_proximal_term_is_half_mu_times_the_squared_distance(baseline):
    half, model = baseline.Client(), torch.nn.Linear(2, 1, bias=False)
    torch.nn.init.constant_(model.weight, 1.0)
    half._term = Proximal({"weight": torch.tensor([[0.0, -1.0]])}, 0.5)
    term = half.regularizer(model)
    assert float(term) == pytest.approx(0.25 * 5.0)
    term.backward()
    assert model.weight.grad.tolist() == [pytest.approx([0.5, 1.0])]


@pytest.mark.parametrize("baseline", ["maxfl.dataset"], indirect=True)
def test_clients_that_conflict_are_as_many_among_seen_and_unseen(baseline):
    shifts = baseline.shifts(100, 70, 0.3, 1)
    assert [sum(c < 70 for c in shifts), sum(c >= 70 for c in shifts)] == [21, 9]
    assert sorted(shifts.values()) == [3] * 15 + [7] * 15
    assert shifts != baseline.shifts(100, 70, 0.3, 2)
    assert baseline.shifts(100, 70, 0.0, 1) == {}
    assert len(baseline.shifts(100, 100, 0.3, 1)) == 30


@pytest.mark.parametrize("baseline", ["maxfl.strategy"], indirect=True)
def test_who_leaves_has_no_weight_in_any_strategy(baseline, reply, aggregate):
    config = app_config(BASELINES / "maxfl")
    away = {name: x + 9 for name, x in SENT.items()}
    for name in str(config["strategies"]).split():
        models = []
        for leavers in (0, 2):
            here = {"appeal-weight": 0.1, "appealed": 1.0, "received-loss": 1.0}
            gone = {**here, "appeal-weight": 0.0, "appealed": 0.0, "opted-out": 1.0}
            replies = [reply(away, 5, **here)] * 2 + [reply(away, 0, **gone)] * leavers
            all_train = {"fraction-train": 1.0, "num-training-clients": len(replies)}
            made = baseline.make_strategy(name, {**config, **all_train})
            models.append(aggregate(made, SENT, replies)[0])
        for array, alone in zip(models[1].values(), models[0].values(), strict=True):
            np.testing.assert_array_equal(array, alone)


@pytest.mark.parametrize("baseline", ["fair_objectives.utils"], indirect=True)
def test_losses_of_schools_are_spread(baseline, monkeypatch):
    # Half squared distances from the bias, where nothing is known of a pupil.
    scores = [0.0, 1.0, 3.0, 5.0]

    def school(number, config):
        columns = {"x": torch.zeros(2, 4), "y": torch.full((2,), scores[number])}
        return columns, {**columns, "y": columns["y"] + 1}

    monkeypatch.setattr(baseline, "school", school)
    monkeypatch.setattr(baseline, "num_schools", lambda _: 4)
    config = {"wrong-schools": 0}

    def model(bias):
        return {"weight": np.zeros((1, 4), np.float32), "bias": np.float32([bias])}

    found = baseline.evaluate_schools(config)(1, to_record(model(1.0)))
    train, test = np.array([0.5, 0, 2, 8]), np.array([0, 0.5, 4.5, 12.5])
    for split, losses in (("train", train), ("test", test)):
        assert found[f"{split}-mean"] == pytest.approx(losses.mean())
        assert found[f"{split}-worst"] == found[f"{split}-worst-tenth"] == losses.max()
        assert found[f"{split}-std"] == pytest.approx(losses.std())
    # Of two models each school takes the one that fits its training data.
    both = to_record(stack([model(1.0), model(4.0)]))
    found = baseline.evaluate_schools(config)(1, both)
    assert found["train-mean"] == pytest.approx(np.mean([0.5, 0, 0.5, 0.5]))
    assert found["test-mean"] == pytest.approx(np.mean([0, 0.5, 0, 2]))
    found = baseline.evaluate_schools({"wrong-schools": 2})(1, to_record(model(1.0)))
    assert found["train-mean"] == pytest.approx(train[2:].mean())


@pytest.mark.parametrize("baseline", ["fair_objectives.dataset"], indirect=True)
def test_wrong_scores_are_in_training_only(baseline):
    config = {**app_config(BASELINES / "fair_objectives"), "min-pupils": 100}
    right, wrong = (baseline.school(0, {**config, "wrong-schools": n}) for n in (0, 1))
    assert torch.equal(right[1]["y"], wrong[1]["y"])
    assert torch.equal(right[0]["x"], wrong[0]["x"])
    assert torch.equal(3 * right[0]["y"].sort().values, wrong[0]["y"].sort().values)
    assert not torch.equal(3 * right[0]["y"], wrong[0]["y"])
    assert len(right[1]["y"]) == round(0.3 * (len(right[0]["y"]) + len(right[1]["y"])))
    other = baseline.school(1, {**config, "wrong-schools": 1})
    assert other[0]["group"].unique().tolist() == [1]


@pytest.mark.parametrize("baseline", ["fair_objectives.server_app"], indirect=True)
def test_every_fair_objective_is_another_one(baseline, tmp_path):
    app = importlib.import_module("fair_objectives.client_app").app
    config = {**app_config(BASELINES / "fair_objectives"), "min-pupils": 100}
    config |= {"num-server-rounds": 2, "warmup-rounds": 1, "results": str(tmp_path)}
    number = importlib.import_module("fair_objectives.dataset").num_schools(config)
    run_local(baseline.app, app, num_supernodes=number, run_config=config)
    runs = json.loads((tmp_path / "summary.json").read_text("utf-8"))["runs"]
    assert list(runs) == str(config["strategies"]).split()
    losses = {name: row["central/train-mean"] for name, row in runs.items()}
    assert all(0 < loss < 1.5 for loss in losses.values())
    assert len(set(losses.values())) == len(losses)
    with pytest.raises(ValueError, match="strategies='fedavgg' must name one of"):
        baseline.make_strategy("fedavgg", config)


@pytest.mark.parametrize("baseline", ["private_optimizers.dataset"], indirect=True)
def test_users_are_in_one_silo_each_and_none_is_public(baseline):
    config = app_config(BASELINES / "private_optimizers")
    users = baseline.num_users(config)
    silos = [baseline.silo_data(i, 3, config) for i in range(3)]
    of_silos = [set(silo["user"].tolist()) for silo in silos]
    assert sorted(user for silo in of_silos for user in silo) == list(range(users))
    whole = {name: torch.cat([silo[name] for silo in silos]) for name in silos[0]}
    assert torch.equal(
        whole["user"].bincount(),
        torch.tensor([len(baseline.user_data(i, config)["y"]) for i in range(users)]),
    )
    # Validation takes the last mails of every user, and no other.
    less = {**config, "validate": True}
    held_out = baseline.central_data(less)
    kept = baseline.silo_data(0, 1, less)
    assert len(held_out["y"]) + len(kept["y"]) == len(whole["y"])
    first = baseline.user_data(0, less)["x"]
    assert torch.equal(first, baseline.user_data(0, config)["x"][: len(first)])
    # Every mail of a sender of two or more is a user's, or public.
    tests, public = baseline.central_data(config), baseline.public_data(config)
    mails = load("spam-assassin", min_mails=2)
    assert len(whole["y"]) + len(tests["y"]) + len(public["y"]) == sum(
        map(len, mails.values())
    )
    assert baseline.word_frequencies(config).min() > 0


@pytest.mark.parametrize("baseline", ["private_optimizers.server_app"], indirect=True)
def test_all_private_optimizers_end_at_the_same_epsilon(baseline, tmp_path):
    app = importlib.import_module("private_optimizers.client_app").app
    dataset = importlib.import_module("private_optimizers.dataset")
    config = {**app_config(BASELINES / "private_optimizers"), "results": str(tmp_path)}
    config |= {"num-server-rounds": 4, "delay": 1, "evaluate-every": 2}
    users = dataset.num_users(config)
    run_local(baseline.app, app, num_supernodes=users, run_config=config)
    losses = set()
    for name in str(config["methods"]).split():
        rows = read_metrics(tmp_path / name)
        if name != "none":
            spent = rows[-1]["train/epsilon"]
            assert 0.97 * config["epsilon"] < spent <= config["epsilon"], name
            # Without, calibration would hide it: epsilon is the same at more noise.
            mechanism = baseline.make_strategy(name, config).mechanism
            assert mechanism.amplified == (name != "dp-ftrl"), name
        losses.add(rows[-1]["central/loss"])
    assert len(losses) == len(str(config["methods"]).split())
    with pytest.raises(ValueError, match=r"methods='els' must be among .* silos=0"):
        baseline.make_strategy("els", config)


@pytest.mark.parametrize("baseline", ["private_optimizers.server_app"], indirect=True)
def test_all_commands_of_private_optimizers_begin_alike(baseline, monkeypatch):
    app = importlib.import_module("private_optimizers.client_app").app
    starts = []

    def compared(grid, strategies, initial_arrays, **_):
        starts.append({k: x.numpy() for k, x in initial_arrays.items()})

    monkeypatch.setattr(baseline, "compare", compared)
    config = app_config(BASELINES / "private_optimizers")
    commands = ["none", "layers-lamb none", "ada-dps dp-ftrl dp2", "none"]
    for methods, seed in zip(commands, (1, 1, 1, 2), strict=True):
        run_config = {**config, "methods": methods, "seed": seed}
        run_local(baseline.app, app, num_supernodes=2, run_config=run_config)
    first, *others, another = starts
    assert all(np.array_equal(x[k], first[k]) for x in others for k in first)
    assert not any(np.array_equal(another[k], first[k]) for k in first)


@pytest.mark.parametrize("baseline", ["private_optimizers.strategy"], indirect=True)
def test_dp_ftrl_has_the_noise_that_its_server_is_best_with(baseline):
    config = app_config(BASELINES / "private_optimizers")
    errors = {}
    for momentum in (0.0, 0.9):
        run_config = {**config, "server-momentum": momentum}
        strategy = baseline.make_strategy("dp-ftrl", run_config)
        mechanism, sampler = strategy.mechanism, strategy.sampler
        limits = mechanism.participation(sampler)
        errors[momentum] = mechanism.choose(sampler).rms_loss(*limits, Workload(0.9))
        assert strategy.server_optimizer.momentum == momentum
    assert errors[0.9] < 0.95 * errors[0.0]


@pytest.mark.parametrize("baseline", ["private_optimizers.silos"], indirect=True)
def test_silos_have_the_noise_of_the_planned_ones(baseline):
    config = app_config(BASELINES / "private_optimizers")
    config |= {"silos": 2, "group-size": 3, "population-size": 500}
    config |= {"num-sampled-clients": 50}
    users = baseline.num_users(config)
    context = SimpleNamespace(run_config=config, node_config={"partition-id": 1})
    for method, most in (("els", 3), ("uls", 1)):
        counts = [
            baseline.silo_data(i, 2, config)["user"].bincount().clamp(max=3).sum()
            if method == "els"
            else users // 2
            for i in range(2)
        ]
        rate = baseline.batch_size(method, config) / int(min(counts))
        assert rate == pytest.approx(0.1, rel=0.1)
        noise = baseline.promise(method, context).noise_multiplier * 500 / users
        spent = epsilon_for(
            noise,
            config["target-delta"],
            rounds=config["num-server-rounds"],
            sampling_probability=rate,
            group_size=most,
        )
        assert spent == pytest.approx(config["epsilon"], rel=1e-3), method


@pytest.mark.parametrize("baseline", ["private_optimizers.server_app"], indirect=True)
def test_silos_train_by_examples_or_by_users(baseline, tmp_path, monkeypatch):
    app = importlib.import_module("private_optimizers.client_app").app
    silos = importlib.import_module("private_optimizers.silos")
    # All users, no noise: nothing is drawn.
    monkeypatch.setattr(silos, "_planned_noise", lambda *_: 0.0)
    config = {**app_config(BASELINES / "private_optimizers"), "results": str(tmp_path)}
    config |= {"silos": 1, "num-server-rounds": 4, "silo-steps": 2}
    config |= {"population-size": 100, "num-sampled-clients": 100}
    config |= {"methods": "els uls", "clipping-norm": 0.5, "server-learning-rate": 1.0}
    for most in (1, 3):
        chosen = {**config, "group-size": most}
        run_local(baseline.app, app, num_supernodes=1, run_config=chosen)
        els, uls = (read_metrics(tmp_path / name) for name in ("els", "uls"))
        assert els[-1]["central/loss"] < np.log(6)
        # With one example of a user both clip the same.
        same = els[-1]["central/loss"] == uls[-1]["central/loss"]
        assert same == (most == 1)
    with pytest.raises(ValueError, match="silo-steps=3 must divide"):
        baseline.num_rounds({**config, "silo-steps": 3})


@pytest.mark.parametrize("baseline", ["private_optimizers.server_app"], indirect=True)
def test_silos_draw_the_same_in_every_folder_and_command(baseline, tmp_path):
    app = importlib.import_module("private_optimizers.client_app").app
    config = {**app_config(BASELINES / "private_optimizers"), "silos": 1}
    config |= {"num-server-rounds": 4, "silo-steps": 2}

    def ends(methods: str, seed: int) -> float:
        results = tmp_path / f"{len(methods)}-{seed}"
        told = {"methods": methods, "seed": seed, "results": str(results)}
        run_local(baseline.app, app, num_supernodes=1, run_config=config | told)
        first, last = read_metrics(results / "uls")
        # The account goes on.
        assert first["train/user-epsilon"] < last["train/user-epsilon"]
        return last["central/loss"]

    assert ends("uls", 1) == ends("els uls", 1) != ends("uls", 2)


@pytest.mark.parametrize("baseline", ["bounded_group_loss.utils"], indirect=True)
def test_fairlearn_finds_the_worst_group(baseline, monkeypatch):
    # Logits (0, s): the probability of label 1 is the sigmoid of s.
    people = {
        "x": torch.tensor([[2.0], [-1.0], [0.5], [-3.0]]),
        "y": torch.tensor([1, 0, 0, 1]),
        "group": torch.tensor([0, 0, 1, 1]),
    }
    monkeypatch.setattr(baseline, "people", lambda *_: people)
    monkeypatch.setattr(baseline, "make_model", lambda _: torch.nn.Linear(1, 2))
    config = {"dataset": "", "group": "", "evaluate-every": 2, "num-server-rounds": 3}
    judge = baseline.fairness({**config, "by-label": False})
    arrays = to_record(
        {
            "weight": np.array([[0.0], [1.0]], np.float32),
            "bias": np.zeros(2, np.float32),
        }
    )
    assert judge(1, arrays) is None
    found = judge(2, arrays)
    worst = (np.log1p(np.exp(0.5)) + np.log1p(np.exp(3.0))) / 2
    assert found["worst-group-loss"] == pytest.approx(worst, rel=1e-6)
    assert found["accuracy"] == 0.5
    assert found["worst-group-accuracy"] == 0.0
    assert found["equalized-odds-difference"] == 1.0
    paired = baseline.fairness({**config, "by-label": True})(3, arrays)
    assert paired["worst-group-loss"] == pytest.approx(np.log1p(np.exp(3.0)), rel=1e-6)


@pytest.mark.parametrize("baseline", ["personalization.dataset"], indirect=True)
def test_clients_differ_in_how_they_take_their_images(baseline):
    plain = app_config(BASELINES / "personalization")
    images = {"x": torch.arange(4.0).view(1, 1, 2, 2) / 3, "y": torch.tensor([1])}
    same = baseline.shifted(images, 3, plain)
    assert torch.equal(same["x"], images["x"]) and same["y"] is images["y"]
    turned = [
        baseline.shifted(images, client, {**plain, "rotations": 2}) for client in (2, 3)
    ]
    assert torch.equal(turned[0]["x"], images["x"])
    assert torch.equal(turned[1]["x"], images["x"].rot90(1, (2, 3)))
    # Every pixel to a power of the client's own.
    powers = []
    for client in (0, 1):
        darker = baseline.shifted(images, client, {**plain, "gamma": 4.0})["x"]
        ratio = darker[0, 0, 0, 1].log() / images["x"][0, 0, 0, 1].log()
        assert torch.allclose(darker, images["x"] ** ratio)
        powers.append(float(ratio))
    assert 0.25 < min(powers) < max(powers) < 4
    for option in ("rotations", "gamma"):
        with pytest.raises(ValueError, match=option):
            baseline.shifted(images, 3, {**plain, option: 0})


@pytest.mark.parametrize("baseline", ["diloco.strategy"], indirect=True)
def test_synchronous_training_is_adamw_on_the_mean_gradient(baseline):
    w = torch.tensor([1.0, -2.0], requires_grad=True)
    rates = [baseline.Cosine(0.1, 4, 0.01)(step) for step in range(1, 5)]
    theirs = torch.optim.AdamW([w], betas=(0.9, 0.95), weight_decay=0.1)
    ours, sent = baseline.ScheduledAdamW(baseline.Cosine(0.1, 4, 0.01), 0.1), w
    sent = {"w": w.detach().numpy().copy()}
    for step, rate in enumerate(rates, 1):
        gradient = np.array([step, 1.0 / step])
        if step == 3:  # it goes on from what was saved
            saved = ours.state_dict()
            ours = baseline.ScheduledAdamW(baseline.Cosine(0.1, 4, 0.01), 0.1)
            ours.load_state_dict(saved)
        sent = ours.step(sent, {"w": -gradient})
        theirs.param_groups[0]["lr"] = rate
        w.grad = torch.tensor(gradient, dtype=torch.float32)
        theirs.step()
        np.testing.assert_allclose(sent["w"], w.detach(), rtol=1e-6)


@pytest.mark.parametrize("baseline", ["diloco.strategy"], indirect=True)
def test_a_method_is_made_by_its_name(baseline):
    config = app_config(BASELINES / "diloco")
    found = baseline.Method("muloco/4:2+", config)
    assert (found.kind, found.fragments, found.steps) == ("muloco", 4, 2)
    assert found.codec.feedback and not found.codec.unbiased
    assert baseline.Method("diloco:1", config).codec.unbiased
    same = {
        baseline.Method(name, config).tokens * baseline.Method(name, config).rounds
        for name in str(config["methods"]).split()
    }
    assert len(same) == 1
    with pytest.raises(ValueError, match="must begin with one of"):
        baseline.Method("local", config)
    with pytest.raises(ValueError, match="must be a multiple of 8"):
        baseline.Method("diloco", {**config, "inner-steps": 100})


@pytest.mark.parametrize("baseline", ["diloco.dataset"], indirect=True)
def test_shards_are_disjoint_and_are_all_windows(baseline):
    whole = baseline.shards_of("iid", 1, 64, 1)[0]
    rows = sorted(map(bytes, whole.numpy()))
    for kind in ("iid", "speakers"):
        parts = baseline.shards_of(kind, 8, 64, 2)
        assert sorted(bytes(x) for part in parts for x in part.numpy()) == rows
        sizes = [len(part) for part in parts]
        assert max(sizes) < 2 * min(sizes)
    with pytest.raises(ValueError, match="must be 'iid' or 'speakers'"):
        baseline.shards_of("roles", 8, 64, 1)


@pytest.mark.parametrize("baseline", ["drift.strategy"], indirect=True)
def test_epochs_are_drawn_anew_or_last(baseline):
    config = app_config(BASELINES / "drift")
    for lasts in (False, True):
        strategy = baseline.make_strategy(
            "fedavg@1-16", {**config, "epochs-last": lasts}
        )
        drawn = [
            [strategy.variant(client, Round(number, SENT)) for client in range(10)]
            for number in (1, 2)
        ]
        assert (drawn[0] == drawn[1]) == lasts
        assert len(set(drawn[0])) > 3 and {*drawn[0]} <= {*range(1, 17)}


@pytest.mark.parametrize("baseline", ["pruning.strategy"], indirect=True)
def test_names_of_runs_say_how_the_server_prunes(baseline):
    config = {**app_config(BASELINES / "pruning"), "num-server-rounds": 40}
    gradual = PolynomialSparsity(0.8, 10, 30, 2)
    for name, schedule, criterion, distribution in [
        ("magnitude:0.8", gradual, "magnitude", "uniform"),
        ("saliency-erk:0.8", gradual, "saliency", "erk"),
        ("random-once:0.8", OneShotSparsity(0.8, 10), "random", "uniform"),
        ("rigl:0.8", PeriodicSparsity(0.8, 2, end=30), "rigl", "uniform"),
        ("2:4", OneShotSparsity(0.5, 10), "magnitude", "uniform"),
    ]:
        found = baseline.make_optimizer(name, config)
        assert (found.schedule, found.criterion) == (schedule, criterion)
        assert found.distribution == distribution
        assert found.n_of_m == ((2, 4) if name == "2:4" else None)
    assert repr(baseline.make_optimizer("none", config)) == repr(SGD(1.0))
    for bad in ("largest:0.5", "magnitude-often:0.5"):
        with pytest.raises(ValueError, match=f"^runs='{bad}' must name"):
            baseline.make_optimizer(bad, config)


@pytest.mark.parametrize("baseline", ["pruning.claims"], indirect=True)
def test_accuracy_at_as_many_bytes_is_between_evaluations(baseline):
    def row(bytes_, accuracy=None):
        found = {"bytes/down": bytes_ / 2, "bytes/up": bytes_ / 2}
        return found if accuracy is None else found | {"central/accuracy": accuracy}

    rows = [row(10, 0.1), row(10), row(20, 0.4)]
    assert baseline.both_ways(rows) == 40
    found = [baseline.accuracy_at(rows, spent) for spent in (5, 10, 20, 40, 50)]
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.4, 0.4])


@pytest.mark.parametrize("baseline", ["pfl_docvqa.anls"], indirect=True)
def test_anls_is_that_of_its_definition(baseline):
    @cache
    def distance(left, right):
        """Levenshtein's recursion."""
        if not left or not right:
            return len(left) + len(right)
        if left[0] == right[0]:
            return distance(left[1:], right[1:])
        return 1 + min(
            distance(left[1:], right),
            distance(left, right[1:]),
            distance(left[1:], right[1:]),
        )

    generator = np.random.default_rng(1)
    for _ in range(300):
        left, right = (
            "".join(generator.choice([*"abc"], generator.integers(0, 7)))
            for _ in range(2)
        )
        assert baseline.edit_distance(left, right) == distance(left, right)
        longer = max(len(left), len(right), 1)
        share = distance(left, right) / longer
        expected = 1 - share if share < 0.5 else 0.0
        assert baseline.similarity(left, [right]) == pytest.approx(expected)
    # Half of the letters are too many; of several true answers the nearest counts.
    assert baseline.similarity("ab", ["ax"]) == 0.0
    assert baseline.similarity(" Exmh ", ["mutt", "exmh 2"]) == pytest.approx(4 / 6)


@pytest.mark.parametrize("baseline", ["pfl_docvqa.dataset"], indirect=True)
def test_documents_name_nobody_and_mark_their_answers(baseline):
    mail = email.message_from_string(
        "Received: from a.ie by b.ie\nFrom: Ann Other <ann@a.ie>\n"
        "X-Mailer: Microsoft Outlook Express 6.00.2600\nTo: ilug@linux.ie\n"
        'Content-Type: text/plain;\n\tcharset="iso-8859-1"\n'
        "Subject: RE: [ILUG] Re: ask bob@b.ie or http://b.ie now\n"
        "Date: 2 Aug 2002 18:26 +0700 (GMT)\nList-Id: Irish <ilug.linux.ie>\n\nHi"
    )
    found = baseline.read_document(mail)
    answers = {name: found.text[slice(*x)] for name, x in found.answers.items()}
    assert answers == {
        "subject": "ask or now",
        "day": "2 Aug 2002",
        "time": "18:26",
        "program": "Microsoft Outlook Express",
        "charset": "iso-8859-1",
    }
    assert found.provider == "microsoft outlook express, ilug"
    for private in ("Ann", "a.ie", "b.ie", "ilug@", "bob", "Hi"):
        assert private not in found.text
    del mail["Date"]
    assert baseline.read_document(mail) is None
    # The last fifth of a provider's documents is for testing; small ones are public.
    many = [found._replace(when=-i, text=f"{i}") for i in range(10)]
    few = [found._replace(provider="p", text=f"p{i}") for i in range(4)]
    splits = baseline.split_documents([*many, *many, *few], [many[3]])
    assert [len(splits[x]) for x in ("public", "train", "test")] == [5, 8, 2]
    assert [x.text for x in splits["test"]] == ["1", "0"]
    assert not {x.provider for x in splits["train"]} & {x.provider for x in few}


@pytest.mark.parametrize("baseline", ["pfl_docvqa.utils"], indirect=True)
def test_marked_answers_are_read_back(baseline, monkeypatch):
    dataset = importlib.import_module("pfl_docvqa.dataset")
    texts = ["When?\nDate: 22 Aug 2002\nSubject: Fonts\n", "What?\nSubject: A b, c\n"]
    truths = ["22 Aug 2002", "A b, c"]
    begin = [text.index(truth) for text, truth in zip(texts, truths, strict=True)]
    stop = [b + len(truth) for b, truth in zip(begin, truths, strict=True)]
    rows = {"text": texts, "begin": begin, "stop": stop}
    for module in (dataset, baseline):
        monkeypatch.setattr(module, "documents", lambda: {"test": Rows(rows)})
    dataset.tensors.cache_clear()
    marks = dataset.tensors("test")
    dataset.tensors.cache_clear()
    assert marks["attention_mask"].sum(1).tolist() == [13, 10]
    found = [
        baseline.read_answer(*row)
        for row in zip(
            texts, marks["start"].tolist(), marks["end"].tolist(), strict=True
        )
    ]
    assert found == truths == baseline.true_answers("test")
    assert dict(baseline.score(found, truths)) == {"anls": 1.0, "right": 1.0}
    assert dict(baseline.score(["22 aug 2002", ""], truths)) == {
        "anls": 0.5,
        "right": 0.5,
    }


class Rows(dict):
    """Columns whose length is that of any of them, as a data set's."""

    def __len__(self):
        return len(self["text"])


@pytest.mark.parametrize("baseline", ["pfl_docvqa.strategy"], indirect=True)
def test_few_clients_are_asked_few_times_for_many_epochs(baseline):
    config = app_config(BASELINES / "pfl_docvqa")
    asked = {}
    for name in str(config["strategies"]).split():
        grid = LocalGrid(ClientApp(), 10)
        made = baseline.make_strategy(name, config)
        messages = made.configure_train(1, to_record(SENT), ConfigRecord(), grid)
        epochs = baseline.train_config(name, config)["local-epochs"]
        asked[name] = (len(list(messages)), epochs)
    assert asked.pop("few-nf4") == (1, config["epochs-few"])
    assert set(asked.values()) == {(2, 1)}
    with pytest.raises(ValueError, match="strategies='nf5' must name some of"):
        baseline.make_strategy("nf5", config)


@pytest.mark.parametrize(
    "baseline",
    ["pfl_docvqa.anls", "pfl_docvqa.dataset", "pfl_docvqa.utils"],
    indirect=True,
)
def test_examples_run(baseline):
    found = doctest.testmod(baseline)
    assert found.attempted and not found.failed
