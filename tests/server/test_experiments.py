"""W&B and MLflow, by stand-ins with the signatures of wandb 0.28 and mlflow 3.

Neither library is needed to run these tests. What the stand-ins refuse, a name or an
argument that is not there, is what the libraries themselves would refuse.
"""

import re
import sys
from itertools import count
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

from flower_ext.core.arrays import to_record
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.experiments import MLflow, WandB
from flower_ext.server.finished import RunInfo
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import Tracker, read_metrics
from flower_ext.simulation.local import LocalGrid

INITIAL = to_record({"w": np.zeros(2, np.float32)})


class WandbRun:
    """What ``wandb.init`` returns: it keeps steps, and drops those that it has."""

    def __init__(self, id, config):
        self.id, self.config = id, dict(config)
        self.history = {}
        self.exit_code = None

    def log(self, data, step=None, commit=None):
        assert self.exit_code is None, "the run is finished"
        if step > max(self.history, default=-1):
            self.history[step] = dict(data)

    def finish(self, exit_code=None, quiet=None):
        self.exit_code = exit_code


class Wandb(ModuleType):
    """The module ``wandb``."""

    def __init__(self):
        super().__init__("wandb")
        self.runs = {}
        self.calls = []
        self._ids = count()

    def init(
        self,
        entity=None,
        project=None,
        dir=None,
        id=None,
        name=None,
        notes=None,
        tags=None,
        config=None,
        config_exclude_keys=None,
        config_include_keys=None,
        allow_val_change=None,
        group=None,
        job_type=None,
        mode=None,
        force=None,
        reinit=None,
        resume=None,
        resume_from=None,
        fork_from=None,
        save_code=None,
        tensorboard=None,
        sync_tensorboard=None,
        monitor_gym=None,
        settings=None,
    ):
        self.calls.append({"project": project, "name": name, "mode": mode})
        self.settings = settings
        if id in self.runs:
            assert resume in ("allow", "must")
            run = self.runs[id]
            changed = {k for k, v in config.items() if run.config.get(k, v) != v}
            assert allow_val_change or not changed, "config values are fixed"
            run.config |= config
            run.exit_code = None
            return run
        run = WandbRun(id or f"made-up-{next(self._ids)}", config)
        return self.runs.setdefault(run.id, run)


class Metric:
    """The class ``mlflow.entities.Metric``, with MLflow's own checks."""

    def __init__(self, key, value, timestamp, step):
        assert re.fullmatch(r"[/\w.\- ]*", key) and len(key) <= 250
        assert type(value) is float and type(step) is int and type(timestamp) is int
        self.key, self.value, self.timestamp, self.step = key, value, timestamp, step


class Mlflow(ModuleType):
    """The module ``mlflow``."""

    def __init__(self):
        super().__init__("mlflow")
        self.experiments, self.runs, self.uris = {}, {}, []
        module = self

        class MlflowClient:
            def __init__(self, tracking_uri=None, registry_uri=None):
                module.uris.append(tracking_uri)

            def get_experiment_by_name(self, name):
                number = module.experiments.get(name)
                return number and SimpleNamespace(experiment_id=number)

            def create_experiment(self, name, artifact_location=None, tags=None):
                module.experiments[name] = str(len(module.experiments) + 1)
                return module.experiments[name]

            def create_run(
                self, experiment_id, start_time=None, tags=None, run_name=None
            ):
                run_id = f"run-{len(module.runs)}"
                module.runs[run_id] = SimpleNamespace(
                    experiment=experiment_id,
                    name=run_name,
                    tags=tags,
                    params={},
                    metrics=[],
                    status="RUNNING",
                )
                return SimpleNamespace(info=SimpleNamespace(run_id=run_id))

            def update_run(self, run_id, status=None, name=None):
                module.runs[run_id].status = status

            def log_param(self, run_id, key, value, synchronous=None):
                assert re.fullmatch(r"[/\w.\- ]*", key) and len(value) <= 6000
                params = module.runs[run_id].params
                assert params.setdefault(key, value) == value, "logged twice"

            def log_batch(
                self, run_id, metrics=(), params=(), tags=(), synchronous=None
            ):
                assert len(metrics) <= 1000
                assert module.runs[run_id].status == "RUNNING"
                module.runs[run_id].metrics += metrics

            def set_terminated(self, run_id, status=None, end_time=None):
                module.runs[run_id].status = status

        self.MlflowClient = MlflowClient


@pytest.fixture
def wandb(monkeypatch):
    module = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(monkeypatch):
    module, entities = Mlflow(), ModuleType("mlflow.entities")
    entities.Metric = Metric
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    return module


@pytest.fixture
def grid():
    app = ClientApp()

    @app.train()
    def train(message, context):
        w = message.content["arrays"]["w"].numpy()
        metrics = MetricRecord({"num-examples": 1, "loss": 0.5, "list": [1.0, 2.0]})
        content = {"arrays": to_record({"w": w + 1}), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return LocalGrid(app, 2)


def central(server_round, arrays):
    """A metric that is a list, one that is not finite and a name of odd characters."""
    return MetricRecord({"F1 (macro)": 1.0 * server_round, "nan": float("nan")})


def start(grid, callbacks, rounds=3, make=AdditiveStrategy, **options):
    return run_rounds(
        make(fraction_evaluate=0.0),
        grid,
        INITIAL,
        num_rounds=rounds,
        callbacks=callbacks,
        **{"evaluate_fn": central, **options},
    )


def numbers(rows):
    """The numbers that the tracker has written, by round, but for the clock's."""
    return {
        row["round"]: {
            k: v
            for k, v in row.items()
            if isinstance(v, int | float) and k != "round" and "seconds" not in k
        }
        for row in rows
    }


@pytest.mark.parametrize("make", [AdditiveStrategy, FedAvg])
def test_wandb_has_settings_and_every_number_at_its_round(make, grid, wandb, tmp_path):
    report = WandB("federated", name="first", mode="offline")
    start(grid, [report], make=make, tracker=Tracker(tmp_path, tensorboard=False))
    [run] = wandb.runs.values()
    assert wandb.calls == [{"project": "federated", "name": "first", "mode": "offline"}]
    found = {
        step: {k: v for k, v in row.items() if "seconds" not in k}
        for step, row in run.history.items()
    }
    np.testing.assert_equal(found, numbers(read_metrics(tmp_path)))
    assert (run.config["strategy"], run.config["num-rounds"]) == (make.__name__, 3)
    assert make is FedAvg or run.config["Server optimizer"].startswith("SGD(")
    assert (report.run_id, run.exit_code) == (run.id, 0)


@pytest.mark.parametrize("make", [AdditiveStrategy, FedAvg])
def test_mlflow_has_settings_and_every_number_at_its_round(
    make, grid, mlflow, tmp_path
):
    report = MLflow(
        "federated", tracking_uri="file:store", name="first", tags={"a": "b"}
    )
    start(grid, [report], make=make, tracker=Tracker(tmp_path, tensorboard=False))
    [run] = mlflow.runs.values()
    assert mlflow.uris == ["file:store"]
    assert (run.experiment, run.name, run.tags) == ("1", "first", {"a": "b"})
    found = {1: {}, 2: {}, 3: {}}
    for metric in run.metrics:
        if "seconds" not in metric.key:
            found[metric.step][metric.key] = metric.value
    expected = numbers(read_metrics(tmp_path))
    for row in expected.values():
        row["central/F1 _macro_"] = row.pop("central/F1 (macro)")
    np.testing.assert_equal(found, expected)
    assert (run.params["strategy"], run.params["num-rounds"]) == (make.__name__, "3")
    assert (report.run_id, run.status) == ("run-0", "FINISHED")


def test_an_experiment_that_is_there_is_taken(grid, mlflow):
    for _ in range(2):
        start(grid, [MLflow("federated")], 1)
    assert mlflow.experiments == {"federated": "1"}
    assert {run.experiment for run in mlflow.runs.values()} == {"1"}
    assert len(mlflow.runs) == 2


def test_after_an_error_the_run_is_a_failed_one(grid, wandb, mlflow):
    def broken(server_round, arrays):
        if server_round == 2:
            raise KeyboardInterrupt
        return central(server_round, arrays)

    with pytest.raises(KeyboardInterrupt):
        start(grid, [WandB("a"), MLflow("b")], evaluate_fn=broken)
    assert [run.exit_code for run in wandb.runs.values()] == [1]
    assert [run.status for run in mlflow.runs.values()] == ["FAILED"]


def test_a_continued_run_goes_on_by_its_id(grid, wandb, mlflow, tmp_path):
    for rounds in (2, 4):
        start(grid, [WandB("a"), MLflow("b")], rounds, checkpoint=tmp_path)
    [ours], [theirs] = wandb.runs.values(), mlflow.runs.values()
    assert list(ours.history) == [1, 2, 3, 4]
    assert ours.config["num-rounds"] == 4
    assert sorted({metric.step for metric in theirs.metrics}) == [1, 2, 3, 4]
    assert (ours.exit_code, theirs.status) == (0, "FINISHED")


def test_a_run_goes_on_by_an_id_of_the_users(grid, wandb, mlflow):
    start(grid, [WandB("a", run_id="mine"), MLflow("b")], 1)
    start(grid, [WandB("a", run_id="mine"), MLflow("b", run_id="run-0")], 2)
    assert list(wandb.runs["mine"].history) == [1, 2]
    assert list(mlflow.runs) == ["run-0"]


def test_one_callback_in_two_runs_reports_two(grid, wandb, mlflow):
    callbacks = [WandB("a"), MLflow("b")]
    for _ in range(2):
        start(grid, callbacks, 1)
    assert len(wandb.runs) == len(mlflow.runs) == 2


def test_a_service_that_fails_costs_no_round(grid, mlflow, caplog):
    report = MLflow("b")
    log_batch = report._client.log_batch

    def unreachable(run_id, metrics):
        if metrics[0].step == 2:
            raise ConnectionError("no route to host")
        log_batch(run_id, metrics=metrics)

    report._client.log_batch = unreachable
    result = start(grid, [report])
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    [run] = mlflow.runs.values()
    assert sorted({metric.step for metric in run.metrics}) == [1, 3]
    assert "MLflow failed in round 2" in caplog.text


@pytest.mark.parametrize(("kind", "package"), [(WandB, "wandb"), (MLflow, "mlflow")])
def test_a_package_that_is_missing_is_named(kind, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=f"pip install {package}"):
        kind("project")


def test_settings_are_plain_values_of_a_bounded_length(mlflow, wandb):
    info = RunInfo(3, settings={"long": "x" * 9999, "list (of 2)": [1, 2]})
    report = MLflow("b")
    report.begin(info)
    params = mlflow.runs[report.run_id].params
    assert params["long"] == "x" * 250
    assert params["list _of 2_"] == "[1, 2]"
    WandB("a").begin(info)
    [run] = wandb.runs.values()
    assert run.config["list (of 2)"] == "[1, 2]"


def test_where_cohorts_are_secret_wandb_takes_neither_console_nor_load(wandb):
    WandB("a").begin(RunInfo(3))
    assert wandb.settings is None
    WandB("a").begin(RunInfo(3, hidden=True))
    assert wandb.settings == {"console": "off", "x_disable_stats": True}
    with pytest.raises(ValueError, match="settings=.* must be left out: cohorts are"):
        WandB("a", settings={"console": "wrap"}).begin(RunInfo(3, hidden=True))
