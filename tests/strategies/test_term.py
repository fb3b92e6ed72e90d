"""TERM: its limits, its gradient, and weights that neither overflow nor vanish."""

import logging
import re
from math import inf, nan

import numpy as np
import pytest
import torch
from adding_grid import AddingGrid
from scipy.special import logsumexp, softmax

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import Mechanism
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import TERM, TERMClient
from flower_ext.strategies.term import LOSS, tilted_loss

ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}
STEP = {"lr": 1.0, "batch-size": 100, "local-steps": 1}
SENT = {"w": np.array([1.0, -1.0])}
WS = np.array([[3.0, 0.0], [5.0, 2.0], [1.0, 4.0]])
SIZES = np.array([1, 5, 2])


@pytest.fixture(scope="session")
def cohort(reply):
    """Make the replies of three clients of 1, 5 and 2 examples with given losses."""

    def make(losses, sizes=SIZES):
        return [
            reply({"w": w}, int(n), **({} if loss is None else {LOSS: loss}))
            for w, n, loss in zip(WS, sizes, losses, strict=True)
        ]

    return make


# The server: weights by losses --------------------------------------------------------


@pytest.mark.parametrize("tilt", [-5.0, -0.1, 1e-6, 1.0, 10.0, 300.0])
@pytest.mark.parametrize("shift", [0.0, 7.0, -3.0])
def test_direction_is_that_of_the_softmax(cohort, aggregate, tilt, shift):
    losses = np.array([0.3, 0.5, 1.2]) + shift
    new, metrics = aggregate(TERM(client_tilt=tilt, **ALL), SENT, cohort(losses))
    share = softmax(np.log(SIZES) + tilt * losses)
    assert new["w"] == pytest.approx(share @ WS, rel=1e-9)
    mean = logsumexp(tilt * losses, b=SIZES / SIZES.sum()) / tilt
    assert metrics["tilted-loss"] == pytest.approx(mean, rel=1e-6)
    assert LOSS not in metrics


def test_no_tilt_is_fedavg_bit_for_bit(cohort, aggregate):
    replies = cohort([None, 1.0, nan])  # nobody looks at them
    average, _ = aggregate(AdditiveStrategy(**ALL), SENT, replies)
    new, metrics = aggregate(TERM(client_tilt=0.0, **ALL), SENT, replies)
    assert new["w"].tobytes() == average["w"].tobytes()
    assert metrics["num-replies"] == 3 and "tilted-loss" not in metrics


@pytest.mark.parametrize("loss", [0.0, 0.7, -2.0, 1e5])
def test_equal_losses_are_fedavg(cohort, aggregate, loss):
    average, _ = aggregate(AdditiveStrategy(**ALL), SENT, cohort([1.0] * 3))
    new, _ = aggregate(TERM(client_tilt=5.0, **ALL), SENT, cohort([loss] * 3))
    assert new["w"] == pytest.approx(average["w"], rel=1e-14)


@pytest.mark.parametrize("losses", [[0.3, 0.5, 1.2], [-9.0, 4.0, 8e3], [1, 2, 3e37]])
@pytest.mark.parametrize(("tilt", "client"), [(1e6, 2), (-1e6, 0)])
def test_large_tilts_follow_the_worst_or_the_best(
    cohort, aggregate, losses, tilt, client
):
    new, _ = aggregate(TERM(client_tilt=tilt, **ALL), SENT, cohort(losses))
    assert new["w"].tolist() == WS[client].tolist()


@pytest.mark.parametrize("tilt", [3.0, 500.0, -70.0])
def test_a_sum_does_not_depend_on_the_packing(cohort, scripted, tilt):
    # Exponents on both sides of the border between two sums, and far apart.
    found = []
    for kind in (LocalGrid, AddingGrid):
        for order in ([0, 1, 2], [2, 0, 1]):
            replies = cohort([0.12, 0.14, 21.4])
            grid = scripted([replies[i] for i in order], kind)
            result = TERM(client_tilt=tilt, **ALL).start(grid, to_record(SENT), 1)
            found.append(from_record(result.arrays)["w"])
    share = softmax(np.log(SIZES) + tilt * np.array([0.12, 0.14, 21.4]))
    for w in found:
        assert w == pytest.approx(share @ WS, rel=1e-9)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (nan, "metric 'term-loss'=nan must be a finite number"),
        (inf, "metric 'term-loss'=inf must be"),
        (-inf, "metric 'term-loss'=-inf must be"),
        (1e39, "metric 'term-loss'=1e[+]39 must be"),
        ([1.0, 2.0], "metric 'term-loss'="),
        (None, "no metric 'term-loss'"),
    ],
)
def test_a_reply_without_a_usable_loss_is_dropped(
    cohort, aggregate, caplog, loss, reason
):
    caplog.set_level(logging.WARNING, logger="flwr")
    new, metrics = aggregate(TERM(**ALL), SENT, cohort([0.5, loss, 0.5]))
    assert new["w"] == pytest.approx([5 / 3, 8 / 3])
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert re.search(reason, caplog.text)


def test_a_cap_bounds_what_a_claim_is_worth(cohort, aggregate):
    strategy = TERM(client_tilt=2.0, loss_cap=1.0, **ALL)
    new, _ = aggregate(strategy, SENT, cohort([-5.0, 0.5, 1e30]))
    share = softmax(np.log(SIZES) + 2 * np.array([0, 0.5, 1]))
    assert new["w"] == pytest.approx(share @ WS, rel=1e-12)


def test_who_has_no_examples_has_no_weight(cohort, aggregate):
    replies = cohort([9.0, 0.5, 0.5], sizes=[0, 1, 1])
    new, _ = aggregate(TERM(client_tilt=1e3, **ALL), SENT, replies)
    assert new["w"] == pytest.approx(WS[1:].mean(0))
    new, _ = aggregate(TERM(**ALL), SENT, cohort([1.0] * 3, sizes=[0, 0, 0]))
    assert new is None


def test_under_a_mechanism_the_weight_is_at_most_one(cohort, aggregate):
    plan = {"num_rounds": 1, "num_sampled_clients": 3, "population_size": 3, "seed": 0}
    plan |= {"noise_multiplier": 0.0, "clipping": inf, "target_delta": 1e-2}
    for tilt in (2.0, -2.0):
        mechanism = Mechanism(**plan, factorization="tree")
        strategy = TERM(client_tilt=tilt, loss_cap=1.5, mechanism=mechanism)
        weights = []
        update = strategy.update

        def spy(total, round, update=update, weights=weights):
            weights.append(total.weight)
            return update(total, round)

        strategy.update = spy
        losses = np.array([0.0, 0.5, 9.0])
        new, metrics = aggregate(strategy, SENT, cohort(losses))
        e = np.exp(tilt * np.minimum(losses, 1.5) - max(0, tilt * 1.5))
        assert weights[0] == pytest.approx(e.sum()) and e.max() == 1
        # All weigh the same before their losses are looked at.
        assert new["w"] == pytest.approx(e @ WS / e.sum())
        mean = logsumexp(tilt * np.minimum(losses, 1.5), b=1 / 3) / tilt
        assert metrics["tilted-loss"] == pytest.approx(mean)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"client_tilt": inf}, "client_tilt=inf must be a finite number"),
        ({"client_tilt": nan}, "client_tilt=nan must be a finite number"),
        ({"example_tilt": "1"}, "example_tilt='1' must be a finite number"),
        ({"client_tilt": -2e6}, r"at most 1e\+06 in size: losses that differ by 1e-3"),
        ({"loss_cap": 0.0}, "loss_cap=0.0 must be a finite number > 0"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TERM(**options)


# The clients: tilted examples ---------------------------------------------------------


@pytest.mark.parametrize("tilt", [-1e4, -2.0, -1e-4, 0.0, 1e-4, 0.5, 1e4])
def test_tilted_loss_and_its_gradient(tilt):
    losses = torch.tensor([0.3, 0.5, 1.2], dtype=torch.float64, requires_grad=True)
    found = tilted_loss(losses, tilt)
    found.backward()
    x = losses.detach().numpy()
    mean = logsumexp(tilt * x, b=1 / 3) / tilt if tilt else x.mean()
    assert found.item() == pytest.approx(mean, rel=1e-9)
    assert losses.grad.numpy() == pytest.approx(softmax(tilt * x), rel=1e-12)


CLIENTS = [[0.0, 1.0], [2.0], [-1.0, 0.5, 4.0]]


def objective(w, outer, inner):
    """Hierarchical tilted loss of points on a line, by clients and examples."""
    losses = [0.5 * (w - np.array(c)) ** 2 for c in CLIENTS]
    inside = [
        logsumexp(inner * x, b=1 / len(x)) / inner if inner else x.mean()
        for x in losses
    ]
    p = np.array([len(x) for x in losses]) / sum(map(len, losses))
    inside = np.array(inside)
    return logsumexp(outer * inside, b=p) / outer if outer else p @ inside


@pytest.fixture(scope="session")
def points(point_task):
    """Clients of points on a line."""
    return client_app(point_task([{"c": c} for c in CLIENTS]), TERMClient)


def step_of(play, app, w=0.3, lr=0.1, **options):
    """Return where one step of every client leads."""
    found = play(TERM(**options, **ALL), app, 3, {"w": w}, config={**STEP, "lr": lr})
    return float(found.models[1]["w"]), found.train()


@pytest.mark.parametrize("outer", [0.0, 1.5, -2.0])
@pytest.mark.parametrize("inner", [0.0, 0.7, -1.0])
def test_a_step_follows_the_gradient_of_the_objective(points, play, outer, inner):
    w, h = 0.3, 1e-5
    new, metrics = step_of(play, points, client_tilt=outer, example_tilt=inner)
    rise = objective(w + h, outer, inner) - objective(w - h, outer, inner)
    assert (w - new) / 0.1 == pytest.approx(rise / (2 * h), rel=1e-5)
    if outer:
        expected = objective(w, outer, inner)
        assert metrics["tilted-loss"] == pytest.approx(expected, rel=1e-6)


def test_equal_tilts_are_one_tilt_over_all_examples(points, play):
    new, metrics = step_of(play, points, client_tilt=1.3, example_tilt=1.3)
    c = np.concatenate(CLIENTS)
    losses = 0.5 * (0.3 - c) ** 2
    share = softmax(1.3 * losses)
    assert new == pytest.approx(0.3 - 0.1 * share @ (0.3 - c), rel=1e-6)
    whole = logsumexp(1.3 * losses, b=1 / len(c)) / 1.3
    assert metrics["tilted-loss"] == pytest.approx(whole, rel=1e-6)


def test_a_vanishing_tilt_is_none(points, play):
    for tiny, none in (
        ({"client_tilt": 1e-9, "example_tilt": 0.8}, {"client_tilt": 0.0}),
        ({"client_tilt": 0.8, "example_tilt": 1e-7}, {"example_tilt": 0.0}),
    ):
        limit, _ = step_of(play, points, **tiny)
        exact, _ = step_of(play, points, **{**tiny, **none})
        assert limit == pytest.approx(exact, rel=1e-5)


def test_no_tilts_are_fedavg_bit_for_bit(points, play):
    new, metrics = step_of(play, points, client_tilt=0.0)
    average = play(
        AdditiveStrategy(**ALL), points, 3, {"w": 0.3}, config=STEP | {"lr": 0.1}
    )
    assert new == float(average.models[1]["w"])
    assert metrics["train-loss"] == average.train()["train-loss"]


def test_the_larger_the_tilt_the_less_the_worst_loses(point_task, play):
    centers = [0.0, 1.0, 5.0]
    app = client_app(point_task([{"c": [c]} for c in centers]), TERMClient)
    config, worst = {**STEP, "lr": 0.1}, []
    for tilt in (-1.0, 0.0, 0.3, 1.0):
        strategy = TERM(client_tilt=tilt, **ALL)
        run = play(strategy, app, 3, {"w": 0.3}, 40, config)
        w = float(run.models[-1]["w"])
        worst.append(max(0.5 * (w - c) ** 2 for c in centers))
    assert worst == sorted(worst, reverse=True)
    # Nearly in the middle of the outermost clients, where both lose 3.125.
    assert worst[-1] == pytest.approx(3.125, rel=0.05)


def test_a_client_without_examples_takes_part(point_task, play):
    task = point_task([{"c": [1.0]}, {"c": []}])
    app = client_app(task, TERMClient)
    for options in ({}, {"example_tilt": 1.0}):
        strategy = TERM(**options, **ALL)
        found = play(strategy, app, 2, {"w": 0.0}, config=STEP)
        assert float(found.models[1]["w"]) == pytest.approx(1.0)
        assert found.train()["num-replies"] == 2
