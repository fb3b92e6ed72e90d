"""AgnosticFL: the worst mixture of clients, whose weights follow their losses."""

import logging
import re
from math import inf, nan

import numpy as np
import pytest
from scipy.optimize import minimize

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import from_record
from flower_ext.server.saddle import SimplexWeights, project_to_simplex
from flower_ext.strategies import AgnosticFL, AgnosticFLClient
from flower_ext.strategies.agnostic_fl import LOSS

ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}
STEP = {"lr": 0.2, "batch-size": 100, "local-steps": 1}
SENT = {"w": np.array([1.0, -1.0])}
WS = np.array([[3.0, 0.0], [5.0, 2.0], [1.0, 4.0]])


# The projection -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("point", "found"),
    [
        ([5.0], [1.0]),
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.9, 0.4], [0.75, 0.25]),  # clip((1 + x - y) / 2, 0, 1), of two
        ([3.0, 1.0], [1.0, 0.0]),
        ([0.5, 0.5, 0.3], [0.4, 0.4, 0.2]),
        ([1e80, 1.0, 1e80], [0.5, 0.0, 0.5]),
        ([-1e80, 0.0, 0.4], [0.0, 0.3, 0.7]),
    ],
)
def test_projection_in_closed_form(point, found):
    assert project_to_simplex(np.array(point)) == pytest.approx(found, abs=1e-15)


@pytest.mark.parametrize("size", [2, 3, 7])
def test_projection_is_the_nearest_point(size):
    rng = np.random.default_rng(size)
    for _ in range(5):
        point = rng.normal(0.3, 0.7, size)
        exact = minimize(
            lambda x, point=point: ((x - point) ** 2).sum(),
            np.full(size, 1 / size),
            bounds=[(0, 1)] * size,
            constraints={"type": "eq", "fun": lambda x: x.sum() - 1},
            options={"ftol": 1e-14},
        ).x
        found = project_to_simplex(point)
        assert found == pytest.approx(exact, abs=1e-6)
        assert found.sum() == pytest.approx(1, abs=1e-15) and found.min() >= 0
        assert project_to_simplex(point + 5.0) == pytest.approx(found, abs=1e-12)


def test_weights_of_who_comes_later_and_who_is_silent():
    weights = SimplexWeights("rate", 0.1)
    assert weights.of(2).tolist() == [0.5, 0.5]
    weights.step(np.array([1.0, nan]))  # the mean of the known is that one
    assert weights.weights.tolist() == [0.5, 0.5]
    weights.step(np.array([nan, 3.0]))  # the first one's last loss counts
    assert weights.weights == pytest.approx([0.4, 0.6])
    assert weights.of(4) == pytest.approx([0.2, 0.3, 0.25, 0.25])
    weights.step(np.array([nan, nan, nan, 2.0]))
    assert weights.weights == pytest.approx([0.1, 0.4, 0.25, 0.25])
    weights.step(np.array([1e300, 0.0, 0.0, 0.0]))
    assert weights.weights.tolist() == [1.0, 0.0, 0.0, 0.0]
    weights.step(np.array([0.0, 3.0, 3.0, 3.0]))  # and back
    assert weights.weights == pytest.approx([0.775, 0.075, 0.075, 0.075])


# The saddle point ---------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_two_clients_end_at_the_minimax_point(point_task, play, scale):
    # Losses h (w - c)^2 / 2: they are equal at the point, and the gradients cancel.
    c = np.array([0.0, 3.0])
    data = [{"c": [c[0]]}, {"c": [c[1]] * 5}]  # examples do not count
    app = client_app(point_task(data, scale=scale / 2), AgnosticFLClient)
    strategy = AgnosticFL(weight_learning_rate=0.05 / scale, **ALL)
    config = {**STEP, "lr": 0.2 / scale}
    run = play(strategy, app, 2, {"w": 0.5}, 70, config)
    assert float(run.models[-1]["w"]) == pytest.approx(1.5, abs=1e-2)
    assert strategy.weights.weights == pytest.approx([0.5, 0.5], abs=1e-2)
    # The average is that of all models sent.
    sent = np.mean([m["w"] for m in run.models[:-1]])
    found = {k: float(from_record(x)["w"]) for k, x in strategy.iterates().items()}
    assert found["average"] == pytest.approx(sent, rel=1e-6)
    best = min((m["w"] for m in run.models[:-1]), key=lambda w: max(w**2, (3 - w) ** 2))
    assert found["best"] == pytest.approx(float(best), rel=1e-6)


def test_clients_of_different_curvature(quadratics, play):
    centers, hessians = np.array([[0.0], [3.0]]), np.array([[[4.0]], [[1.0]]])
    task = type(quadratics)(centers, hessians).task()
    strategy = AgnosticFL(weight_learning_rate=0.02, **ALL)
    app = client_app(task, AgnosticFLClient)
    run = play(strategy, app, 2, {"w": np.array([0.0])}, 120, {**STEP, "lr": 0.1})
    # sqrt(h1) w = sqrt(h2) (3 - w), and weights by which the gradients cancel.
    assert run.models[-1]["w"] == pytest.approx([1.0], abs=1e-2)
    assert strategy.weights.weights == pytest.approx([1 / 3, 2 / 3], abs=1e-2)
    metrics = run.train(120)
    assert metrics["worst-client-loss"] == pytest.approx(2.0, abs=1e-2)
    assert metrics["mean-client-loss"] == pytest.approx(2.0, abs=1e-2)
    assert metrics["clients-with-weight"] == 2


def test_a_client_that_is_never_the_worst_loses_its_weight(point_task, play):
    app = client_app(point_task([{"c": [x]} for x in (0, 1, 3)]), AgnosticFLClient)
    strategy = AgnosticFL(weight_learning_rate=0.05, **ALL)
    run = play(strategy, app, 3, {"w": 0.0}, 70, STEP)
    assert float(run.models[-1]["w"]) == pytest.approx(1.5, abs=1e-2)
    assert strategy.weights.weights == pytest.approx([0.5, 0, 0.5], abs=1e-2)
    assert run.train(70)["clients-with-weight"] == 2


def test_no_step_of_the_weights_is_fedavg_with_equal_weights(quadratics, play):
    config = {"lr": 0.1, "local-epochs": 2, "batch-size": 1}
    task = quadratics.task(copies=[1, 3, 2])

    class Equal(AdditiveStrategy):
        equal_weights = True

    still = AgnosticFL(weight_learning_rate=0.0, **ALL)
    app = client_app(task, AgnosticFLClient)
    found = play(still, app, 3, quadratics.start, 3, config).models[-1]["w"]
    plain = play(Equal(**ALL), client_app(task), 3, quadratics.start, 3, config)
    assert found == pytest.approx(plain.models[-1]["w"], rel=1e-12)


# The strategy on given replies --------------------------------------------------------


@pytest.fixture(scope="session")
def cohort(reply):
    """Make the replies of three clients with given losses."""

    def make(losses, sizes=(1, 5, 2)):
        return [
            reply({"w": w}, int(n), **({} if loss is None else {LOSS: loss}))
            for w, n, loss in zip(WS, sizes, losses, strict=True)
        ]

    return make


def test_weights_are_of_the_losses_before(cohort, aggregate):
    strategy = AgnosticFL(weight_learning_rate=0.1, **ALL)
    losses = np.array([1.0, 2.0, 4.0])
    new, _ = aggregate(strategy, SENT, cohort(losses))
    assert new["w"] == pytest.approx(WS.mean(0))
    weights = project_to_simplex(1 / 3 + 0.1 * losses)
    assert strategy.weights.weights == pytest.approx(weights, abs=1e-15)
    new, metrics = aggregate(strategy, SENT, cohort(losses), 2)
    assert new["w"] == pytest.approx(weights @ WS)
    assert metrics["worst-client-loss"] == 4.0
    assert metrics["mean-client-loss"] == pytest.approx(7 / 3)
    assert metrics["largest-weight"] == pytest.approx(weights.max())
    assert LOSS not in metrics


@pytest.mark.parametrize("constant", [5.0, -7.0])
def test_a_constant_in_all_losses_changes_nothing(cohort, aggregate, constant):
    weights = []
    for shift in (0.0, constant):
        strategy = AgnosticFL(weight_learning_rate=0.1, **ALL)
        aggregate(strategy, SENT, cohort(np.array([1.0, 2.0, 4.0]) + shift))
        weights.append(strategy.weights.weights)
    assert weights[0] == pytest.approx(weights[1], abs=1e-15)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (nan, "metric 'agnostic-loss'=nan must be a finite number"),
        (inf, "metric 'agnostic-loss'=inf must be"),
        ([1.0], "metric 'agnostic-loss'="),
        (None, "no metric 'agnostic-loss'"),
    ],
)
def test_a_reply_without_a_usable_loss_is_dropped(
    cohort, aggregate, caplog, loss, reason
):
    caplog.set_level(logging.WARNING, logger="flwr")
    strategy = AgnosticFL(weight_learning_rate=0.1, **ALL)
    new, metrics = aggregate(strategy, SENT, cohort([0.5, loss, 1.5]))
    assert new["w"] == pytest.approx([2, 2])
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert re.search(reason, caplog.text)
    # Nothing is known of it: it keeps up with the mean of the others.
    assert strategy.weights.weights == pytest.approx(
        [1 / 3 - 0.05, 1 / 3, 1 / 3 + 0.05]
    )


def test_who_has_no_examples_moves_nothing(cohort, aggregate):
    strategy = AgnosticFL(**ALL)
    new, metrics = aggregate(strategy, SENT, cohort([9.0, 0.5, 0.5], sizes=[0, 1, 1]))
    assert new["w"] == pytest.approx(WS[1:].mean(0))
    assert metrics["worst-client-loss"] == 0.5
    new, _ = aggregate(strategy, SENT, cohort([1.0] * 3, sizes=[0, 0, 0]), 2)
    assert new is None


def test_a_cohort_without_weight_moves_nothing_and_is_still_heard(cohort, aggregate):
    strategy = AgnosticFL(weight_learning_rate=1.0, **ALL)
    aggregate(strategy, SENT, cohort([9.0, 0.0, 0.0]))
    assert strategy.weights.weights.tolist() == [1.0, 0.0, 0.0]
    replies = cohort([9.0, 9.5, 9.5])
    replies[0] = RuntimeError("away")
    new, metrics = aggregate(strategy, SENT, replies, 2)
    assert new["w"].tolist() == SENT["w"].tolist()
    assert metrics["num-errors"] == 1
    # Two ahead of the third by half a loss: 1 + 9 against 0 + 9.5, twice.
    assert strategy.weights.weights == pytest.approx([2 / 3, 1 / 6, 1 / 6])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weight_learning_rate": -1.0}, "weight_learning_rate=-1.0 must be a finite"),
        ({"weight_learning_rate": inf}, "weight_learning_rate=inf must be a finite"),
        ({"average_iterates": 1}, "average_iterates=1 must be True or False"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        AgnosticFL(**options)
