"""Runs side by side: the same start, one table, Flower's own strategies among them."""

import json

import pytest
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

from flower_ext.client.task import evaluate
from flower_ext.runs.comparison import (
    COMPARISON_FILE,
    MODEL_FILE,
    central_evaluation,
    compare,
)
from flower_ext.runs.report import SUMMARY_FILE, table
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.callbacks import KeepBest, StopWhen
from flower_ext.server.tracking import read_metrics


@pytest.fixture
def central(task):
    """Test data of the first client."""
    return task.data(Context(1, 1, {"partition-id": 0}, RecordDict(), {}))[1]


def test_each_starts_anew_and_is_in_the_table(task, grid, initial, central, tmp_path):
    run_config = {"batch-size": 4, "lr": 0.1}
    before = [array.numpy().copy() for array in initial.values()]
    compare(
        grid,
        {"ours": AdditiveStrategy(), "flowers": FedAvg(), "again": AdditiveStrategy()},
        initial,
        num_rounds=2,
        results=tmp_path,
        columns={"central/loss": "loss", "evaluate/loss": "clients"},
        panels=["central/loss"],
        config=run_config,
        evaluate_fn=central_evaluation(task, central, run_config),
    )
    rows = {name: read_metrics(tmp_path / name) for name in ("ours", "again")}
    losses = [[row["central/loss"] for row in found] for found in rows.values()]
    assert losses[0] == losses[1]
    assert losses[0][0] != losses[0][1]
    model = task.model(run_config)
    model.load_state_dict(load_file(tmp_path / "again" / MODEL_FILE))
    assert evaluate(task, model, central)["loss"] == losses[1][-1]
    summary = json.loads((tmp_path / SUMMARY_FILE).read_text())
    flowers = summary["runs"]["flowers"]["central/loss"]
    assert flowers == pytest.approx(summary["runs"]["ours"]["central/loss"], abs=1e-6)
    assert summary["config"] == run_config
    assert "flowers" in table(tmp_path)
    assert (tmp_path / COMPARISON_FILE).stat().st_size > 5000
    for array, old in zip(initial.values(), before, strict=True):
        assert (array.numpy() == old).all()


def test_each_run_has_callbacks_of_its_own(task, grid, initial, central, tmp_path):
    made = {}

    def make(name):
        made[name] = KeepBest("central/loss", folder=tmp_path / name / "best")
        return [made[name], StopWhen("central/loss", at_most=100.0)]

    compare(
        grid,
        {"ours": AdditiveStrategy(), "flowers": FedAvg()},
        initial,
        num_rounds=3,
        results=tmp_path,
        columns={"central/loss": "loss"},
        panels=["central/loss"],
        evaluate_fn=central_evaluation(task, central, {}),
        callbacks=make,
    )
    assert {name: best.number for name, best in made.items()} == {
        "ours": 1,
        "flowers": 1,
    }
    for name in made:
        assert [row["round"] for row in read_metrics(tmp_path / name)] == [1]
        assert (tmp_path / name / "best" / "best.safetensors").exists()
    assert "flowers" in table(tmp_path)


def test_the_server_evaluates_the_arrays_that_it_is_given(task, central):
    judge = central_evaluation(task, central, {})
    for _ in range(2):
        model = task.model({})
        for parameter in model.parameters():
            parameter.data.normal_()
        metrics = judge(1, ArrayRecord(model.state_dict()))
        assert dict(metrics) == evaluate(task, model, central)
