"""The baselines on real data: in this process, and one under ``flwr run``, too.

That the two ways give the same is tested with that one.
"""

import importlib
import json
import pkgutil
import statistics
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from flwr.app import ArrayRecord

from flower_ext.runs.launch import run_app
from flower_ext.runs.report import SUMMARY_FILE, table
from flower_ext.server.byte_log import SERVER, read_bytes
from flower_ext.server.tracking import read_metrics
from flower_ext.simulation.local import app_config, run_local

BASELINES = Path(__file__).parents[1] / "baselines"
Value = str | int | float | bool
pytestmark = pytest.mark.slow


@pytest.fixture
def importable(request: pytest.FixtureRequest) -> Iterator[Path]:
    """Return a baseline's folder, whose package can be imported meanwhile."""
    folder = BASELINES / str(request.param)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for module in [name for name in sys.modules if name.split(".")[0] == folder.name]:
        del sys.modules[module]


def run_here(
    folder: Path, config: Mapping[str, Value], num_supernodes: int, results: Path
) -> None:
    """Run a baseline in this process: the apps that its pyproject.toml names."""
    project = tomllib.loads((folder / "pyproject.toml").read_text("utf-8"))
    apps = project["tool"]["flwr"]["app"]["components"]
    run_local(
        pkgutil.resolve_name(apps["serverapp"]),
        pkgutil.resolve_name(apps["clientapp"]),
        num_supernodes=num_supernodes,
        run_config={**app_config(folder), **config, "results": str(results)},
    )


@pytest.mark.parametrize("importable", ["fedfish"], indirect=True)
def test_in_process_and_ray_give_the_same_metrics(
    importable: Path, tmp_path: Path
) -> None:
    config = {
        "dataset": "shakespeare",
        "num-server-rounds": 2,
        "fraction-train": 0.5,
        "local-epochs": 2,
        "hidden-size": 16,
    }
    ray, local = tmp_path / "ray", tmp_path / "local"
    run_app(importable, run_config={**config, "results": str(ray)}, num_supernodes=4)
    run_here(importable, config, 4, local)
    for strategy in ("fedavg", "fedfish"):
        theirs, ours = read_metrics(ray / strategy), read_metrics(local / strategy)
        assert len(theirs) == len(ours) == 2
        for left, right in zip(theirs, ours, strict=True):
            for row in (left, right):
                assert row.pop("seconds/train") and row.pop("seconds/evaluate")
            assert left == pytest.approx(right, rel=1e-5, abs=1e-5)
    assert (ray / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize("importable", ["fedfish"], indirect=True)
def test_a_quarter_of_the_main_job_shows_what_fedfish_is_for(
    importable: Path, tmp_path: Path
) -> None:
    run_here(importable, {"num-server-rounds": 10}, 100, tmp_path)
    fedavg, fedfish = (
        statistics.mean(
            row["central/loss"] for row in read_metrics(tmp_path / name)[-5:]
        )
        for name in ("fedavg", "fedfish")
    )
    assert fedfish < fedavg - 0.1


@pytest.mark.parametrize("importable", ["fedfish"], indirect=True)
def test_fedfish_on_images_with_held_out_clients(
    importable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = {
        "dataset": "fashion-mnist",
        "strategies": "fedavg@1 fedfish@3",
        "num-training-clients": 15,
        "num-clients": 20,
        "num-server-rounds": 2,
        "fraction-train": 0.2,
        "batch-size": 128,
        "learning-rate": 0.05,
        "hidden-size": 16,
        "finetune-steps": 3,
        "finetune-learning-rate": 0.05,
    }
    run_here(importable, config, 20, tmp_path)
    once, thrice = (
        read_metrics(tmp_path / name) for name in config["strategies"].split()
    )
    for row in (once[-1], thrice[-1]):
        for kind in ("same", "shifted"):
            before = row[f"central/accuracy-{kind}"]
            assert 0 < before != row[f"central/finetuned-accuracy-{kind}"] < 1
        assert row["evaluate/client-server-barrier"] > 0
    assert thrice[-1]["bytes/up"] > 1.9 * once[-1]["bytes/up"]
    # Clients too small to have test images are left out.
    module = importlib.import_module("fedfish.personalization")
    images = module.client_data

    def with_and_without(context):
        train, test = images(context)
        if context.node_config["partition-id"] % 2:
            test = {name: column[:0] for name, column in test.items()}
        return train, test

    monkeypatch.setattr(module, "client_data", with_and_without)
    settings = {**app_config(importable), **config}
    model = importlib.import_module("fedfish.model").make_model(settings)
    found = module.personalized(ArrayRecord(model.state_dict()), settings)
    assert set(found) == {
        f"{prefix}accuracy-{kind}"
        for prefix in ("", "finetuned-")
        for kind in ("same", "shifted")
    }
    drawn = importlib.import_module("fedfish.plot").plot_epochs(tmp_path)
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("importable", "num_supernodes", "config", "metric"),
    [
        (
            "maxfl",
            4,
            {
                "strategies": "fedavg maxfl",
                "alpha": 0.5,
                "temperature": 1.0,
                "warmup-steps": 5,
                "fraction-train": 1.0,
            },
            "evaluate/gm-appeal-seen",
        ),
        (
            "bounded_group_loss",
            15,
            {"upper-bounds": "0.5", "minimax": False},
            "central/worst-group-loss",
        ),
    ],
    indirect=["importable"],
)
def test_a_round_of_each_baseline(
    importable: Path,
    num_supernodes: int,
    config: dict[str, Value],
    metric: str,
    tmp_path: Path,
) -> None:
    run_here(importable, {**config, "num-server-rounds": 1}, num_supernodes, tmp_path)
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text("utf-8"))
    assert len(summary["runs"]) == 2
    for values in summary["runs"].values():
        assert 0 <= values[metric] < 10
    for run in summary["runs"]:
        row = read_metrics(tmp_path / run)[-1]
        assert 0.2 < row["evaluate/accuracy"] < 1
        if (
            importable.name == "bounded_group_loss"
        ):  # by fairlearn, and by clients' sums
            theirs = row["central/worst-group-loss"]
            assert theirs == pytest.approx(row["evaluate/worst-group-loss"], rel=1e-5)
    assert "fedavg" in table(tmp_path)


@pytest.mark.parametrize("importable", ["dpftrl"], indirect=True)
def test_two_rounds_of_dpftrl(importable: Path, tmp_path: Path) -> None:
    config = {"mechanisms": "none blt", "epsilons": "8", "central-examples": 500}
    run_here(importable, {**config, "num-server-rounds": 2}, 20, tmp_path)
    runs = json.loads((tmp_path / SUMMARY_FILE).read_text("utf-8"))["runs"]
    assert list(runs) == ["none", "blt-8"]
    last = read_metrics(tmp_path / "blt-8")[-1]
    assert 7.9 < last["train/epsilon"] <= 8.0
    assert last["train/simulated-cohort"] == 20
    assert "train/train-loss" not in last
    for name in ("comparison.png", "epsilon.png"):
        assert (tmp_path / name).stat().st_size > 10_000


@pytest.mark.parametrize("importable", ["flasc"], indirect=True)
def test_a_round_of_flasc(
    importable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = importlib.import_module("flasc.server_app")
    few = {name: column[:32] for name, column in server.mail_tokens("test", 8).items()}
    monkeypatch.setattr(server, "mail_tokens", lambda split, tokens: few)
    names = ("lora", "lora-bfloat16", "lora-nf4", "lora-nf4+", "flasc")
    config = {"strategies": " ".join(names), "num-server-rounds": 1, "tokens": 8}
    run_here(importable, config, 12, tmp_path)
    bytes_ = {}
    for name in names:
        [row] = read_metrics(tmp_path / name)
        assert (row["train/num-replies"], row["train/num-errors"]) == (3, 0)
        assert 0 < row["central/accuracy"] < 1
        bytes_[name] = row["bytes/down"] + row["bytes/up"]
        assert (tmp_path / name / "model" / "adapter_model.safetensors").is_file()
    assert bytes_["lora"] > 1.9 * bytes_["lora-bfloat16"]
    assert bytes_["lora"] > 7 * bytes_["lora-nf4"]
    assert bytes_["lora-nf4"] > 1.5 * bytes_["flasc"]
    assert bytes_["lora-nf4+"] == pytest.approx(bytes_["lora-nf4"], rel=0.01)
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize("importable", ["silo_privacy"], indirect=True)
def test_two_rounds_of_silo_privacy(importable: Path, tmp_path: Path) -> None:
    config = {
        "strategies": "local mrmtl@0.5 fedavg",
        "num-server-rounds": 2,
        "evaluate-every": 2,
    }
    run_here(importable, config, 4, tmp_path)
    runs = json.loads((tmp_path / SUMMARY_FILE).read_text("utf-8"))["runs"]
    errors = {name: values["evaluate/mse"] for name, values in runs.items()}
    assert all(0.2 < error < 3 for error in errors.values())
    assert len(set(errors.values())) == 3
    # All spend the same, and each its own: schools begin anew with every strategy.
    for name in errors:
        rows = read_metrics(tmp_path / name)
        assert [row["train/num-errors"] for row in rows] == [0, 0]
        assert "evaluate/mse" not in rows[0]
        assert 0.97 < rows[-1]["train/example-epsilon"] <= 1.0
    module = importlib.import_module("silo_privacy.plot")
    found = module.errors([tmp_path])
    assert found == {1.0: {name: [error] for name, error in errors.items()}}
    assert f"{errors['local']:.4f}" in module.table(found)
    drawn = module.plot_strengths(found, tmp_path / "strength.png")
    assert drawn.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("importable", ["compression"], indirect=True)
def test_two_rounds_of_compression(importable: Path, tmp_path: Path) -> None:
    codecs = "none bfloat16 one-bit+ eden:1 universal:2 topk-nf4:0.03+ random-k:0.25 "
    codecs += "rows:0.25"
    config = {
        "codecs": codecs,
        "num-server-rounds": 2,
        "fraction-train": 0.5,
        "local-steps": 1,
        "hidden-size": 8,
        "window": 8,
        "central-windows": 1,
        "evaluate-every": 2,
    }
    run_here(importable, config, 4, tmp_path)
    up, accuracy = {}, {}
    for name in codecs.split():
        rows = read_metrics(tmp_path / name)
        assert [row["train/num-dropped"] for row in rows] == [0, 0]
        assert "central/accuracy" not in rows[0]
        up[name], accuracy[name] = (rows[1][k] for k in ("bytes/up", "central/loss"))
    assert up["none"] > 1.5 * up["bfloat16"] > 4 * up["eden:1"]
    assert up["one-bit+"] > up["topk-nf4:0.03+"]
    assert len(set(accuracy.values())) == len(accuracy)
    strategy = importlib.import_module("compression.strategy")
    with pytest.raises(ValueError, match="must name some of none"):
        strategy.make_codec("zip")


@pytest.mark.parametrize("importable", ["compression"], indirect=True)
def test_a_round_of_compression_on_mails(
    importable: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = importlib.import_module("compression.dataset")
    few = {name: column[:32] for name, column in data.mail_tokens("test", 8).items()}
    monkeypatch.setattr(data, "mail_tokens", lambda split, tokens: few)
    codecs = "none nf4 topk:0.03"
    config = {
        "codecs": codecs,
        "data": "mails",
        "num-server-rounds": 1,
        "fraction-train": 0.25,
        "local-steps": 1,
        "tokens": 8,
    }
    run_here(importable, config, 12, tmp_path)
    up = {}
    for name in codecs.split():
        [row] = read_metrics(tmp_path / name)
        assert (row["train/num-replies"], row["train/num-errors"]) == (3, 0)
        assert 0 < row["central/accuracy"] < 1
        up[name] = row["bytes/up"]
    assert up["none"] > 6 * up["nf4"] > 12 * up["topk:0.03"]  # of the head, too
    with pytest.raises(ValueError, match="data='mail' must be one of"):
        run_here(importable, {**config, "data": "mail"}, 12, tmp_path)


@pytest.mark.parametrize("importable", ["diloco"], indirect=True)
def test_a_few_steps_of_diloco(importable: Path, tmp_path: Path) -> None:
    config = {
        "num-clients": 2,
        "inner-steps": 8,
        "steps-between": 4,
        "batch-size": 2,
        "window": 8,
        "hidden-size": 8,
        "central-windows": 8,
        "evaluate-every": 8,
    }
    run_here(importable, config, 2, tmp_path)
    names = [
        x.replace("/", "-") for x in str(app_config(importable)["methods"]).split()
    ]
    last = {name: read_metrics(tmp_path / name)[-1] for name in names}
    for row in last.values():
        assert (row["train/num-replies"], row["train/num-errors"]) == (2, 0)
        assert row["central/tokens"] == 2 * 8 * 2 * 8
    losses = {row["central/loss"] for row in last.values()}
    assert len(losses) == len(names)  # all do something else
    assert last["sync"]["round"] == 8 and last["diloco-4"]["round"] == 8
    assert last["diloco"]["bytes/up"] > 3 * last["diloco-4"]["bytes/up"]
    assert last["diloco"]["bytes/up"] > 2 * last["diloco:2+"]["bytes/up"]
    told = importlib.import_module("diloco.claims").claims(tmp_path)
    assert [line.split("|")[1].strip() for line in told.splitlines()[2:]] == names


@pytest.mark.parametrize("importable", ["drift"], indirect=True)
def test_two_rounds_of_drift(importable: Path, tmp_path: Path) -> None:
    config = {
        "num-images": 600,
        "num-clients": 3,
        "num-server-rounds": 2,
        "local-epochs": "1-2",
        "hidden-size": 8,
    }
    run_here(importable, config, 3, tmp_path)
    names = str(app_config(importable)["strategies"]).split()
    last = {name: read_metrics(tmp_path / name)[-1] for name in names}
    assert len(last) == 6
    for row in last.values():
        assert (row["train/num-replies"], row["train/num-errors"]) == (3, 0)
        assert 0 < row["central/accuracy"] < 1
    losses = {row["central/loss"] for row in last.values()}
    assert len(losses) == 6  # all do something else
    assert last["fedcurv"]["bytes/down"] > 2.9 * last["fedavg"]["bytes/down"]
    assert last["scaffold"]["bytes/up"] > 1.9 * last["fedavg"]["bytes/up"]
    told = importlib.import_module("drift.claims").claims(tmp_path)
    assert [line.split("|")[1].strip() for line in told.splitlines()[2:]] == names
    make = importlib.import_module("drift.strategy").make_strategy
    assert make("scaffold@16", app_config(importable)).local_epochs == (16, 16)
    assert make("fednova@1-16", app_config(importable)).local_epochs == (1, 16)
    with pytest.raises(ValueError, match="must name one of"):
        make("fedsgd", app_config(importable))


@pytest.mark.parametrize("importable", ["unequal_clients"], indirect=True)
def test_two_rounds_of_unequal_clients(importable: Path, tmp_path: Path) -> None:
    config = {
        "num-images": 300,
        "num-clients": 3,
        "tiers": "1 1 1",
        "num-server-rounds": 2,
        "local-epochs": 1,
        "channels": 8,
        "num-public": 20,
        "num-test": 100,
        "server-steps": 2,
    }
    run_here(importable, config, 3, tmp_path)
    names = str(app_config(importable)["strategies"]).split()
    last = {name: read_metrics(tmp_path / name)[-1] for name in names}
    replies = {name: row["train/num-replies"] for name, row in last.items()}
    assert replies == {"all": 3, "large": 1, "small": 3, "heterofl": 3, "fedconv": 3}
    for width in ("1", "0.5", "0.25"):
        assert 0 < last["heterofl"][f"evaluate/accuracy-width-{width}"] < 1
    losses = {row["evaluate/loss"] for row in last.values()}
    assert len(losses) == 5  # all do something else
    up = {name: row["parameters/up"] for name, row in last.items()}
    assert up["heterofl"] == up["fedconv"] < 0.6 * up["all"]
    assert up["all"] == 3 * up["large"] > 4 * up["small"]
    told = importlib.import_module("unequal_clients.claims").claims(tmp_path)
    assert [line.split("|")[1].strip() for line in told.splitlines()[2:]] == names
    flops = importlib.import_module("unequal_clients.utils").training_flops
    whole, half = (flops(width, app_config(importable)) for width in (1.0, 0.5))
    assert 0.2 < half / whole < 0.4
    make = importlib.import_module("unequal_clients.strategy").make_strategy
    with pytest.raises(ValueError, match="must name one of"):
        make("fedavg", app_config(importable))


@pytest.mark.parametrize("importable", ["personalization"], indirect=True)
def test_two_rounds_of_personal_models(importable: Path, tmp_path: Path) -> None:
    config = {
        "strategies": "local ditto fedper hypcluster knnper",
        "num-clients": 30,  # of which ten are here
        "num-training-clients": 8,
        "num-server-rounds": 2,
        "evaluate-every": 2,
        "fraction-train": 0.4,
        "local-epochs": 1,
        "batch-size": 256,
    }
    run_here(importable, config, 10, tmp_path)
    runs = json.loads((tmp_path / SUMMARY_FILE).read_text("utf-8"))["runs"]
    assert list(runs) == str(config["strategies"]).split()
    for name, values in runs.items():
        seen, unseen = (values[f"evaluate/accuracy-{x}"] for x in ("seen", "unseen"))
        assert 0 <= unseen <= 1 and 0.2 < seen < 1, name
    assert runs["knnper"]["evaluate/accuracy-seen-hurt"] < 0.5
    first, last = read_metrics(tmp_path / "ditto")
    assert "evaluate/loss" in last and "evaluate/loss" not in first
    assert runs["fedper"]["bytes/up"] < runs["ditto"]["bytes/up"]
    assert (tmp_path / "comparison.png").stat().st_size > 10_000


@pytest.mark.parametrize("importable", ["pfl_docvqa"], indirect=True)
def test_a_round_of_pfl_docvqa(importable: Path, tmp_path: Path) -> None:
    names = ["full", "lora", "lora-nf4", "few-nf4"]
    config = {
        "strategies": " ".join(names),
        "num-server-rounds": 1,
        "num-server-rounds-few": 2,
        "epochs-few": 1,
        "base-steps": 20,
    }
    run_here(importable, config, 10, tmp_path)
    sent = {}
    for name in names:
        rows = read_metrics(tmp_path / name)
        assert all(row["train/num-errors"] == 0 for row in rows)
        assert 0 < rows[-1]["central/anls"] < 1
        logged = read_bytes(tmp_path / name / "bytes.csv")
        for row in rows:
            ours = {"up": 0, "down": 0}
            for line in logged:
                if line["round"] == row["round"]:
                    way = "up" if line["receiver"] == SERVER else "down"
                    ours[way] += line["bytes"]
            assert ours == {way: row[f"bytes/{way}"] for way in ours}
        sent[name] = sum(line["bytes"] for line in logged)
    assert sent["full"] > 25 * sent["lora"] > 125 * sent["lora-nf4"]
    # One client twice in the place of two clients once.
    assert sent["few-nf4"] == pytest.approx(sent["lora-nf4"], rel=0.01)
    told = json.loads((tmp_path / "references.json").read_text("utf-8"))
    assert told["usual"]["anls"] < 0.5
    assert (tmp_path / "lora" / "model" / "adapter_model.safetensors").is_file()
