"""MosT: its limits, two populations, and what it takes from clients."""

import logging
import re
from math import inf, nan

import numpy as np
import pytest

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.several import stack, unstack
from flower_ext.server.optimal_transport import transport
from flower_ext.strategies import FedMGDA, MosT, MosTClient
from flower_ext.strategies.most import LOSSES, marginals

ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}
STEP = {"lr": 0.2, "batch-size": 100, "local-steps": 2}
# Transport that is no choice, and no descent: as many averages as there are models.
AVERAGES = {"regularization": 1e12, "max_deviation": 0.0}


class Equal(AdditiveStrategy):
    """Federated averaging whose clients all count once."""

    equal_weights = True


def starts(*points):
    return stack({"w": np.asarray(x)} for x in points)


# Limits -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{}, {"warmup_rounds": 2, "marginals": "scheduled"}]
)
def test_one_model_is_fedmgda(quadratics, play, options):
    task = quadratics.task()
    start = np.array([4.0, -3.0])
    most = MosT(num_models=1, **options, **ALL)
    app = client_app(task, MosTClient)
    several = play(most, app, 3, starts(start), 4, STEP)
    one = play(FedMGDA(**ALL), client_app(task), 3, {"w": start}, 4, STEP)
    found = [model["0/w"] for model in several.models]
    expected = [model["w"] for model in one.models]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert not np.allclose(found[0], found[-1])


def test_no_choice_and_no_descent_are_as_many_averages(quadratics, play):
    task = quadratics.task(copies=[1, 3, 2])
    points = [np.array([4.0, -3.0]), np.zeros(2), np.array([-1.0, 6.0])]
    config = {"lr": 0.1, "local-epochs": 2, "batch-size": 1}
    most = MosT(num_models=3, warmup_rounds=1, **AVERAGES, **ALL)
    app = client_app(task, MosTClient)
    found = play(most, app, 3, starts(*points), 4, config).models[-1]
    for j, start in enumerate(points):
        own = play(Equal(**ALL), client_app(task), 3, {"w": start}, 4, config)
        assert found[f"{j}/w"] == pytest.approx(own.models[-1]["w"], rel=1e-10)


def test_as_many_models_as_clients_are_a_permutation(point_task, play):
    # Each model starts at the minimum of a client of its own, and stays there.
    minima = [0.0, 3.0, 9.0]
    app = client_app(point_task([{"c": [c]} for c in minima]), MosTClient)
    most = MosT(num_models=3, regularization=0.01, warmup_rounds=0, **ALL)
    start = starts(9.0, 0.0, 3.0)
    run = play(most, app, 3, start, 4, STEP)
    ends = [float(model["w"]) for model in unstack(run.models[-1])]
    assert ends == pytest.approx([9.0, 0.0, 3.0], abs=1e-6)
    assert run.train(4)["assigned"] == pytest.approx(1.0, abs=1e-9)
    assert run.train(4)["transport-cost"] == pytest.approx(0.0, abs=1e-9)


# What several models are for ----------------------------------------------------------

CENTERS = [0.0, 0.2, 0.4, 8.0, 8.2, 8.4]


@pytest.fixture(scope="session")
def populations(point_task):
    """Six clients of two populations."""
    return client_app(point_task([{"c": [c]} for c in CENTERS]), MosTClient)


@pytest.mark.parametrize("descent", [0.0, 1.0])
def test_two_populations_are_separated(populations, play, descent):
    most = MosT(2, warmup_rounds=1, max_deviation=descent, min_train_nodes=6)
    run = play(most, populations, 6, starts(4.0, 4.3), 25, STEP)
    low, high = (float(model["w"]) for model in unstack(run.models[-1]))
    assert -0.05 < low < 0.45 and 7.95 < high < 8.45
    metrics, found = run.train(25), run.evaluate(25)
    assert metrics["assigned"] > 0.9
    shares = [metrics[f"model-share-{j}"] for j in range(2)]
    assert sum(shares) == pytest.approx(1) and min(shares) > 0.3
    # Each client predicts with the better of the two.
    losses = [min(0.5 * (w - c) ** 2 for w in (low, high)) for c in CENTERS]
    assert found["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert found["loss-seen-p90"] == pytest.approx(np.percentile(losses, 90), rel=1e-4)


def test_scheduled_marginals_give_most_to_the_model_that_is_worst(populations, play):
    shares = []
    for kind in ("equal", "scheduled"):
        most = MosT(2, marginals=kind, warmup_rounds=0, **ALL)
        run = play(most, populations, 6, starts(0.5, 6.0), 1, STEP)
        shares.append(run.train()["model-share-1"])
    # Losses of their best clients are 0.5 * 0.1^2 and 0.5 * 2^2.
    assert shares == pytest.approx([0.5, 4 / 4.01], rel=1e-5)


def test_the_warm_up_is_the_mean_of_all(populations, play):
    most = MosT(2, warmup_rounds=2, **ALL)
    run = play(most, populations, 6, starts(4.0, 4.3), 3, STEP)
    shrink = 0.8**2  # two steps of 0.2 towards each center
    for round in (1, 2):
        for key in ("0/w", "1/w"):
            expected = shrink * (run.models[round - 1][key] - 4.2) + 4.2
            assert run.models[round][key] == pytest.approx(expected, rel=1e-5)
        assert run.train(round)["model-share-0"] == pytest.approx(0.5)
        assert run.train(round)["assigned"] == pytest.approx(0.5)
    assert run.train(3)["assigned"] > 0.9


# The strategy on given replies --------------------------------------------------------

SENT = starts([1.0, -1.0], [2.0, 0.0])
MOVES = np.array(
    [[[3.0, 1.0], [0.0, 2.0]], [[-1.0, 1.0], [1.0, 1.0]], [[2, 2], [4, 0]]]
)


@pytest.fixture(scope="session")
def cohort(reply):
    """Make the replies of three clients with given losses of two models."""

    def make(losses, sizes=(1, 5, 2)):
        return [
            reply(
                {k: x + move[int(k[0])] for k, x in SENT.items()},
                n,
                **({} if loss is None else {LOSSES: loss}),
            )
            for move, n, loss in zip(MOVES, sizes, losses, strict=True)
        ]

    return make


LOSS = np.array([[0.2, 0.9], [0.8, 0.3], [0.5, 0.6]])


def rounds(most, aggregate, replies, count):
    """Return what each of some equal rounds does."""
    return [aggregate(most, SENT, replies, k + 1) for k in range(count)]


def test_a_model_moves_by_its_part_or_by_common_descent(cohort, aggregate):
    most = MosT(2, warmup_rounds=0, regularization=4.0, **ALL)
    cost = LOSS - LOSS.mean(1, keepdims=True)
    plan = transport(cost / cost.std(), np.full(3, 2 / 3), np.ones(2), 4.0)
    assert plan.min() > 1 / 6  # each has half of an equal part of each
    first, second, third = (
        aggregate(most, SENT, cohort((LOSS - fall).tolist()), k + 1)
        for k, fall in enumerate((0.0, 0.01, -0.5))
    )
    # Nothing to compare with, a cost below the average, and one above it.
    assert [x[1]["common-descent"] for x in (first, second, third)] == [0, 1, 0]
    for new, metrics in (first, third):
        for j, (key, x) in enumerate(SENT.items()):
            expected = plan[:, j] @ MOVES[:, j]
            assert new[key] - x == pytest.approx(expected, abs=1e-9)
        assert metrics["assigned"] == pytest.approx(plan.max(1).sum() / 2)
    assert first[1]["transport-cost"] == pytest.approx((plan * LOSS).sum() / 2)
    # Of the vectors plan * move the least combination, with the moves themselves.
    new, _ = second
    for j, (key, x) in enumerate(SENT.items()):
        scaled = plan[:, [j]] * MOVES[:, j]
        moved = new[key] - x
        weights, *_ = np.linalg.lstsq(
            np.vstack([MOVES[:, j].T, np.ones(3)]), np.r_[moved, 1.0], rcond=None
        )
        least = weights @ scaled
        assert np.all(weights > -1e-9)
        assert np.all(scaled @ least >= least @ least - 1e-9)


def test_a_client_of_whom_a_model_has_next_to_nothing_does_not_move_it(
    cohort, aggregate
):
    # The third client is shared. Of model 1 its change is no shorter than the second's.
    losses = np.array([[0.0, 9.0], [9.0, 0.0], [4.0, 5.0]])
    most = MosT(2, warmup_rounds=0, regularization=0.5, **ALL)
    aggregate(most, SENT, cohort((losses + 1).tolist()))
    new, metrics = aggregate(most, SENT, cohort(losses.tolist()), 2)
    assert metrics["common-descent"] == 1
    assert new["1/w"] - SENT["1/w"] == pytest.approx(MOVES[1, 1], abs=0.05)


def test_marginals_begin_with_the_models_choice_and_end_with_the_clients():
    # The best tenth of ten clients is one, the best of each client its minimum.
    cost = np.full((10, 2), 4.0)
    cost[0], cost[1] = [1.0, 9.0], [6.0, 3.0]
    rows, columns = marginals(cost, uniform=1.0)
    assert rows == pytest.approx(np.full(10, 0.2))
    assert columns == pytest.approx([0.5, 1.5])
    rows, columns = marginals(cost, uniform=0.0)
    best = np.r_[1.0, 3.0, np.full(8, 4.0)]
    assert rows == pytest.approx(2 * best / best.sum())
    assert columns == pytest.approx([1.0, 1.0])
    for uniform in (0.0, 0.3, 1.0):
        for part in marginals(cost, uniform):
            assert part.sum() == pytest.approx(2.0)
    rows, columns = marginals(np.zeros((4, 2)), uniform=0.3)
    assert rows == pytest.approx(np.full(4, 0.5)) and columns == pytest.approx([1, 1])


@pytest.mark.parametrize("shift", [-3.0, -1e9, 1e30])
def test_losses_of_any_size_and_sign_are_shared_out(cohort, aggregate, shift):
    losses = (LOSS + shift).tolist()
    most = MosT(2, warmup_rounds=0, **ALL)
    for new, metrics in rounds(most, aggregate, cohort(losses), 3):
        assert metrics["num-replies"] == 3
        assert all(np.isfinite(x).all() for x in new.values())
        shares = [metrics[f"model-share-{j}"] for j in range(2)]
        assert sum(shares) == pytest.approx(1)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        ([0.1, nan], r"metric 'most-losses'=\[0.1, nan\] must be 2 finite number"),
        ([0.1, inf], r"metric 'most-losses'=\[0.1, inf\] must be 2 finite"),
        ([0.1], r"metric 'most-losses'=\[0.1\] must be 2 finite"),
        (None, "no metric 'most-losses'"),
    ],
)
@pytest.mark.parametrize("warmup", [0, 5])
def test_a_reply_without_usable_losses_is_dropped(
    cohort, aggregate, caplog, loss, reason, warmup
):
    caplog.set_level(logging.WARNING, logger="flwr")
    most = MosT(2, warmup_rounds=warmup, **AVERAGES, **ALL)
    new, metrics = aggregate(most, SENT, cohort([LOSS[0].tolist(), loss, [0.5, 0.6]]))
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert re.search(reason, caplog.text)
    for j, (key, x) in enumerate(SENT.items()):
        assert new[key] - x == pytest.approx(MOVES[[0, 2], j].mean(0))


def test_who_has_no_examples_is_left_out(cohort, aggregate, point_task, play):
    most = MosT(2, **AVERAGES, **ALL)
    new, _ = aggregate(most, SENT, cohort(LOSS.tolist(), sizes=(1, 0, 1)))
    assert new["0/w"] - SENT["0/w"] == pytest.approx(MOVES[[0, 2], 0].mean(0))
    new, _ = aggregate(most, SENT, cohort(LOSS.tolist(), sizes=(0, 0, 0)), 2)
    assert new["0/w"].tolist() == SENT["0/w"].tolist()
    app = client_app(point_task([{"c": [1.0]}, {"c": []}]), MosTClient)
    run = play(MosT(2, **ALL), app, 2, starts(0.0, 0.5), 1, STEP)
    assert run.train()["num-replies"] == 2
    assert float(run.models[1]["0/w"]) == pytest.approx(1 - 0.64)


def test_a_cohort_of_fewer_clients_than_models_is_shared(cohort, aggregate):
    most = MosT(2, warmup_rounds=0, **ALL)
    replies = [cohort(LOSS.tolist())[0], RuntimeError("away"), RuntimeError("away")]
    new, metrics = aggregate(most, SENT, replies)
    assert metrics["num-errors"] == 2
    for j, (key, x) in enumerate(SENT.items()):
        assert new[key] - x == pytest.approx(MOVES[0, j])


def test_the_average_cost_is_saved(cohort, aggregate):
    most = MosT(2, warmup_rounds=0, **ALL)
    rounds(most, aggregate, cohort(LOSS.tolist()), 1)
    again = MosT(2, warmup_rounds=0, **ALL)
    again.load_state_dict(most.state_dict())
    lower = cohort((LOSS - 0.01).tolist())
    for strategy, descends in ((most, 1), (again, 1), (MosT(2, **ALL), 0)):
        assert aggregate(strategy, SENT, lower, 2)[1]["common-descent"] == descends


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_models": 0}, "num_models=0 must be an integer >= 1"),
        ({"marginals": "uniform"}, "marginals='uniform' must be one of"),
        ({"marginal_decay": 1.5}, "marginal_decay=1.5 must be between 0 and 1"),
        ({"regularization": 0}, "regularization=0 must be a finite number > 0"),
        ({"warmup_rounds": -1}, "warmup_rounds=-1 must be an integer >= 0"),
        ({"max_deviation": 2}, "max_deviation=2 must be between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        MosT(**{"num_models": 2, **options})


def test_what_cannot_start_is_refused(populations, play):
    with pytest.raises(
        ValueError, match=r"num_models=2 models of one form, '0/\.\.\.'"
    ):
        play(MosT(2, **ALL), populations, 6, {"w": 0.0}, 1, STEP)
    many = starts(*range(7))
    words = "num_models=7 must be <= 6 clients: each would have less than a client"
    with pytest.raises(ValueError, match=words):
        play(MosT(7, **ALL), populations, 6, many, 1, STEP)
