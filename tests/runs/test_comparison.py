"""Runs side by side: the same start, one table, Flower's own strategies among them."""

import json

import pytest
from flwr.app import ArrayRecord, Context, RecordDict
from flwr.serverapp.strategy import FedAvg
from safetensors.torch import load_file

from flower_ext.client.app import client_app
from flower_ext.client.half import ClientHalf
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
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import read_metrics
from flower_ext.simulation.local import LocalGrid


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


class Counting(ClientHalf):
    """Counts its trainings in the client's personal state."""

    name = "counting"

    def after_training(self, local):
        local.personal.save(visits=local.personal.number("visits", 0) + 1)

    def records(self, local):
        return {}, {"visits": local.personal.number("visits", 0)}


class Counted(AdditiveStrategy):
    client_half = Counting


def test_no_client_remembers_the_run_before(task, initial, tmp_path):
    grid = LocalGrid(client_app(task, Counting), 4, {"batch-size": 8})
    compare(
        grid,
        {"a": Counted(), "b": Counted(min_train_nodes=3, fraction_train=0.5)},
        initial,
        num_rounds=2,
        results=tmp_path,
        columns={"train/visits": "visits"},
        panels=["train/visits"],
    )
    for name in ("a", "b"):
        counted = [row["train/visits"] for row in read_metrics(tmp_path / name)]
        assert counted[0] == 1 < counted[1] <= 2, name
    # Other runs on the same grid go on with what clients keep.
    result = Counted().start(grid, initial, num_rounds=1)
    assert result.train_metrics_clientapp[1]["visits"] > 2
    with pytest.raises(ValueError, match="new_clients=True must be False"):
        run_rounds(
            Counted(), grid, initial, checkpoint=tmp_path / "c", new_clients=True
        )
