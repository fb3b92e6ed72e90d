"""The mean of the last models: by hand, over a checkpoint, and as it is measured."""

import numpy as np
import pytest
from flwr.app import MetricRecord

from flower_ext import AverageLast, LocalGrid, client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.finished import FinishedRound, RunInfo
from flower_ext.server.optimizers import FedExP

CONFIG = {"batch-size": 4, "lr": 0.1}


def record(w, n=0):
    return to_record({"w": np.float32([w]), "n": np.array(n)})


@pytest.mark.parametrize(
    ("num_models", "expected"), [(1, 8.0), (2, 6.0), (3, 14 / 3), (9, 15 / 4)]
)
def test_the_mean_of_the_last(num_models, expected):
    average = AverageLast(num_models)
    for number, w in enumerate([1.0, 2.0, 4.0, 8.0], 1):
        average.round(FinishedRound(number, arrays=record(w, number)))
    found = from_record(average.arrays)
    assert found["w"].dtype == np.float32
    assert found["w"][0] == pytest.approx(expected)
    assert found["n"].dtype.kind == "i"


def test_counters_are_rounded():
    average = AverageLast(3)
    for number, n in enumerate([4, 5, 5], 1):
        average.round(FinishedRound(number, arrays=record(0, n)))
    assert from_record(average.arrays)["n"] == 5


def test_a_new_run_starts_anew():
    average = AverageLast()
    average.round(FinishedRound(1, arrays=record(1.0)))
    average.begin(RunInfo(1))
    with pytest.raises(ValueError, match="no round was finished yet"):
        _ = average.arrays


def train(task, initial, average, rounds, measured, **options):
    def evaluate(server_round, arrays):
        measured.append({n: x.copy() for n, x in from_record(arrays).items()})
        return MetricRecord({"number": float(server_round)})

    strategy = AdditiveStrategy(server_optimizer=FedExP(1e-6), fraction_evaluate=0.0)
    return strategy.start(
        LocalGrid(client_app(task), 4, CONFIG),
        initial,
        num_rounds=rounds,
        evaluate_fn=average.evaluated(evaluate),
        callbacks=[average],
        **options,
    )


def test_what_is_measured_is_the_mean_and_the_run_goes_on(task, initial, tmp_path):
    models = [from_record(initial)]
    for rounds in (1, 2, 3, 4):
        average, found = AverageLast(1), []
        models.append(from_record(train(task, initial, average, rounds, found).arrays))
        assert from_record(average.arrays)["out.bias"].tobytes() == (
            models[-1]["out.bias"].tobytes()
        )
    average, measured = AverageLast(2), []
    result = train(task, initial, average, 4, measured)
    assert from_record(result.arrays)["out.bias"].tobytes() == (
        models[4]["out.bias"].tobytes()
    )
    for i, found in enumerate(measured):
        last = [models[i]] if i < 2 else [models[i - 1], models[i]]
        mean = np.mean([np.float64(m["hidden.weight"]) for m in last], axis=0)
        assert np.array_equal(found["hidden.weight"], np.float32(mean))
    first, again = [], []
    train(task, initial, AverageLast(2), 3, first, checkpoint=tmp_path)
    continued = AverageLast(2)
    train(task, initial, continued, 4, again, checkpoint=tmp_path)
    assert continued.arrays == average.arrays
    assert again[-1]["out.bias"].tobytes() == measured[-1]["out.bias"].tobytes()


@pytest.mark.parametrize("bad", [0, -1, 1.5, True, None])
def test_a_bad_number_is_refused(bad):
    with pytest.raises(ValueError, match=f"^num_models={bad!r} must be an integer"):
        AverageLast(bad)


def test_what_is_no_function_is_refused():
    with pytest.raises(ValueError, match="^evaluate_fn=None must be a function"):
        AverageLast().evaluated(None)
