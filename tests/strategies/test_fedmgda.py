"""FedMGDA: a step that is good for all, its limits, and where it stops."""

import logging

import numpy as np
import pytest

from flower_ext import AdditiveStrategy, client_app
from flower_ext.strategies import FedMGDA

ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}
STEP = {"lr": 0.1, "batch-size": 100, "local-steps": 1}
SENT = {"w": np.array([1.0, -1.0]), "steps": np.array(3)}


@pytest.fixture(scope="session")
def cohort(reply):
    """Make the replies of clients that moved by some vectors, and counted a step."""

    def make(moves, sizes=None):
        sizes = sizes or [1] * len(moves)
        return [
            reply({"w": SENT["w"] + move, "steps": np.array(5)}, n)
            for move, n in zip(moves, sizes, strict=True)
        ]

    return make


def test_the_weights_of_two_are_those_of_the_closed_form(cohort, aggregate):
    v1, v2 = np.array([3.0, 1.0]), np.array([-1.0, 1.0])
    share = np.clip((v2 - v1) @ v2 / ((v1 - v2) @ (v1 - v2)), 0, 1)
    new, metrics = aggregate(FedMGDA(**ALL), SENT, cohort([v1, v2], sizes=[9, 1]))
    move = share * v1 + (1 - share) * v2
    assert 0 < share < 1
    assert new["w"] - SENT["w"] == pytest.approx(move, abs=1e-12)
    assert new["steps"] == 5  # integers and statistics are averaged by the same weights
    assert metrics["largest-weight"] == pytest.approx(max(share, 1 - share))
    assert metrics["clients-with-weight"] == 2
    mean = (v1 @ v1 + v2 @ v2) / 2
    assert metrics["common-descent"] == pytest.approx(move @ move / mean)


def test_no_client_loses_by_a_step(quadratics, play):
    # One small step from afar: all losses fall; the mean of them is not what is asked.
    app = client_app(quadratics.task())
    start = {"w": np.array([9.0, -7.0])}
    run = play(FedMGDA(**ALL), app, 3, start, 1, {**STEP, "lr": 1e-3})
    losses = []
    for model in run.models:
        away = model["w"] - quadratics.centers
        losses.append(np.einsum("ki,kij,kj->k", away, quadratics.hessians, away))
    assert np.all(losses[1] < losses[0])


def test_it_stops_where_nothing_is_good_for_all(point_task, play):
    # Between the minima of two clients every step is bad for one of them.
    app = client_app(point_task([{"c": [0.0]}, {"c": [3.0] * 50}]))
    for start, end in ((-2.0, 0.0), (1.0, 1.0), (8.0, 3.0)):
        run = play(FedMGDA(**ALL), app, 2, {"w": start}, 60, {**STEP, "lr": 0.2})
        assert float(run.models[-1]["w"]) == pytest.approx(end, abs=1e-4)
    assert run.train(60)["common-descent"] == pytest.approx(0.0, abs=1e-6)


def test_no_deviation_is_fedavg(quadratics, play):
    task = quadratics.task(copies=[1, 3, 2])
    config = {"lr": 0.1, "local-epochs": 2, "batch-size": 1}
    runs = [
        play(strategy, client_app(task), 3, quadratics.start, 3, config)
        for strategy in (FedMGDA(max_deviation=0.0, **ALL), AdditiveStrategy(**ALL))
    ]
    found, average = (run.models[-1]["w"] for run in runs)
    assert found == pytest.approx(average, rel=1e-13)


def test_a_bounded_deviation_lets_no_client_stop_the_others(cohort, aggregate):
    moves = np.array([[2.0, 0.0], [2.0, 1.0], [0.0, 0.0]])
    stopped, _ = aggregate(FedMGDA(**ALL), SENT, cohort(moves))
    assert stopped["w"] == pytest.approx(SENT["w"], abs=1e-9)
    strategy = FedMGDA(max_deviation=0.1, **ALL)
    new, metrics = aggregate(strategy, SENT, cohort(moves))
    # The third as much as it may, of the others the shorter one.
    weights = np.array([1 / 3, 1 / 3 - 0.1, 1 / 3 + 0.1])
    assert new["w"] - SENT["w"] == pytest.approx(weights @ moves, abs=1e-12)
    assert metrics["largest-weight"] == pytest.approx(1 / 3 + 0.1)


def test_normalized_changes_are_of_one_length(cohort, aggregate):
    # A thousand times one of them changes only the common length.
    v1, v2 = np.array([3.0, 4.0]), np.array([5.0, 0.0])
    strategy = FedMGDA(normalize=True, **ALL)
    moves = []
    for factor in (1.0, 1000.0):
        new, _ = aggregate(strategy, SENT, cohort([v1, factor * v2]))
        length = (5 + 5 * factor) / 2
        moves.append((new["w"] - SENT["w"]) / length)
        assert new["steps"] == 5
    assert moves[0] == pytest.approx(moves[1], rel=1e-9)
    # Of two unit vectors the least combination is their middle.
    assert moves[0] == pytest.approx([0.8, 0.4])


@pytest.mark.parametrize("normalize", [False, True])
def test_who_has_no_examples_is_left_out(cohort, aggregate, normalize):
    moves = [[2.0, 0.0], [1.0, 1.0], [0.0, 0.0]]
    strategy = FedMGDA(normalize=normalize, **ALL)
    some, metrics = aggregate(strategy, SENT, cohort(moves, [1, 1, 0]))
    two, _ = aggregate(strategy, SENT, cohort(moves[:2]))
    assert some["w"] == pytest.approx(two["w"])
    assert metrics["num-replies"] == 3
    nobody, _ = aggregate(strategy, SENT, cohort(moves, [0, 0, 0]))
    assert nobody["w"].tolist() == SENT["w"].tolist()


def test_a_change_that_no_model_can_hold_is_dropped(cohort, aggregate, caplog):
    caplog.set_level(logging.WARNING, logger="flwr")
    replies = cohort([[2.0, 0.0], [1e200, 0.0], [2.0, 0.0]])
    new, metrics = aggregate(FedMGDA(**ALL), SENT, replies)
    assert new["w"].tolist() == [3.0, -1.0]
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert "the contribution is not finite, or beyond" in caplog.text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_deviation": -0.1}, "max_deviation=-0.1 must be between 0 and 1"),
        ({"max_deviation": float("nan")}, "max_deviation=nan must be between"),
        ({"normalize": "yes"}, "normalize='yes' must be True or False"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        FedMGDA(**options)
