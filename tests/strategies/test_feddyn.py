"""FedDyn: the minimum that FedAvg misses, and the algorithm in the paper's words."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, RecordDict
from plain_loop import plain_loop

from flower_ext import client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.personal import Personal
from flower_ext.core.arrays import to_record
from flower_ext.privacy.silo_budget import SiloPrivacy
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FedDyn, FedDynClient
from flower_ext.strategies.feddyn import ALPHA_KEY, MOVES, dynamic, keep_move

ETA, STEPS = 0.2, 5
own_loop = partial(plain_loop, rate=ETA, steps=STEPS)
CONFIG = {"lr": ETA, "local-steps": STEPS}
ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}


def simulate(quadratics, cohorts, alpha, steps=(STEPS,) * 3, eta=ETA):
    """Compute Algorithm 1 of the paper with h and h_k, with NumPy."""
    x, h, own = np.zeros(2), np.zeros(2), np.zeros((3, 2))
    for cohort in cohorts:
        ends = []
        for k in cohort:
            y = x.copy()
            for _ in range(steps[k]):
                slope = quadratics.hessians[k] @ (y - quadratics.centers[k])
                y -= eta * (slope - own[k] + alpha * (y - x))
            own[k] -= alpha * (y - x)
            ends.append(y)
        h = h - alpha / 3 * np.sum([y - x for y in ends], 0)
        x = np.mean(ends, 0) - h / alpha
    return x, h, own


def test_fedavg_is_biased_and_feddyn_is_not(quadratics, play):
    app = client_app(quadratics.task(), FedDynClient)
    biased = quadratics.fixed_point(ETA, STEPS)
    assert np.abs(biased - quadratics.minimizer).max() > 0.1
    found = play(
        FedDyn(alpha=1.0, **ALL), app, 3, quadratics.start, rounds=28, config=CONFIG
    )
    assert found.models[-1]["w"] == pytest.approx(quadratics.minimizer, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.05, 2.0])
def test_rounds_are_those_of_the_algorithm(quadratics, play, spied, alpha):
    app, calls = spied(client_app(quadratics.task(), FedDynClient))
    strategy = FedDyn(alpha=alpha, **{**ALL, "fraction_train": 0.67})
    found = play(strategy, app, 3, quadratics.start, rounds=5, config=CONFIG)
    cohorts = [
        sorted(c.client for c in calls if c.server_round == n) for n in range(1, 6)
    ]
    assert len({tuple(c) for c in cohorts}) > 1
    x, h, own = simulate(quadratics, cohorts, alpha)
    assert found.models[-1]["w"] == pytest.approx(x, abs=1e-11)
    moves = strategy.state_dict()["moves"]["w"]
    assert -alpha * moves == pytest.approx(h, abs=1e-11)
    for call in calls:
        like = {"w": torch.zeros(2)}
        kept = Personal(call.state).arrays(MOVES, like=like)["w"].numpy()
        if call is [c for c in calls if c.client == call.client][-1]:
            assert -alpha * kept == pytest.approx(own[call.client], abs=1e-11)
        assert set(call.reply.array_records) == {"arrays"}
    # Where it ends up does not depend on who was asked when.
    x, _, _ = simulate(quadratics, cohorts * 200, 1.0)
    assert x == pytest.approx(quadratics.minimizer, abs=1e-6)


def test_steps_and_examples_may_differ_and_be_none(quadratics, play):
    task = quadratics.task(copies=[1, 3, 0])
    app = client_app(task, FedDynClient)
    config = {"lr": ETA, "local-epochs": 2, "batch-size": 1}
    found = play(FedDyn(alpha=0.5, **ALL), app, 3, quadratics.start, 3, config)
    x, _, _ = simulate(quadratics, [(0, 1)] * 3, 0.5, steps=(2, 6, 0))
    assert found.models[-1]["w"] == pytest.approx(x, abs=1e-12)


def test_towards_alpha_0_the_server_adds_all_past_moves(quadratics, play):
    """The limit is no FedAvg: clients train as there, and the server goes on."""
    app = client_app(quadratics.task(), FedDynClient)
    run = partial(play, app=app, clients=3, initial=quadratics.start, config=CONFIG)
    found = run(FedDyn(alpha=1e-9, **ALL), rounds=3).models
    one, moves = np.eye(2), np.zeros(2)
    x = np.zeros(2)
    for number in range(1, 4):
        ends = [
            a + np.linalg.matrix_power(one - ETA * h, STEPS) @ (x - a)
            for h, a in zip(quadratics.hessians, quadratics.centers, strict=True)
        ]
        moves = moves + np.mean(ends, 0) - x
        x = np.mean(ends, 0) + moves
        assert found[number]["w"] == pytest.approx(x, abs=1e-6)


@pytest.mark.parametrize("alpha", [0.0, -1.0, float("inf")])
def test_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match=r"alpha=.* must be a finite number > 0"):
        FedDyn(alpha=alpha)


def test_an_alpha_that_sgd_cannot_follow_is_refused(quadratics, play):
    app = client_app(quadratics.task(), FedDynClient)
    with pytest.raises(Exception, match=r"alpha=10\.0 must be < 10 at a learning"):
        play(FedDyn(alpha=10.0, **ALL), app, 2, quadratics.start, config=CONFIG)


def test_moves_that_diverge_are_dropped(quadratics, spied, caplog):
    app, calls = spied(client_app(quadratics.task(), FedDynClient))
    strategy, grid = FedDyn(alpha=1.0, **ALL), LocalGrid(app, 3, CONFIG)
    model = strategy.start(grid, to_record(quadratics.start), num_rounds=1).arrays
    good = strategy.state_dict()["moves"]["w"].copy()
    wild = ConfigRecord({"weight-decay": 1e200})
    with caplog.at_level(logging.WARNING):
        strategy.start(grid, model, num_rounds=1, train_config=wild)
    assert "the moves are not finite" in caplog.text
    assert np.array_equal(strategy.state_dict()["moves"]["w"], good)
    first, second = (calls[i].state["personal/" + MOVES]["w"] for i in (0, 3))
    assert np.array_equal(first.numpy(), second.numpy())


def test_moves_beyond_the_models_type_are_not_taken(caplog, reply, exchange):
    strategy, sent = FedDyn(**ALL), {"w": np.float16([0.0])}
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            contents = [reply({"w": np.float16([30000.0])}, **{ALPHA_KEY: 0.1})]
            replies = exchange(strategy, sent, contents, server_round=number)
            new, _ = strategy.aggregate_train(number, replies)
    assert "the moves would not be finite" in caplog.text
    assert strategy.state_dict()["moves"]["w"] == 30000.0
    assert float(new["w"].numpy()[0]) == 60000.0


def test_a_loop_of_ones_own_is_the_half(quadratics, play):
    task = quadratics.task()
    run = partial(play, clients=3, initial=quadratics.start, config=CONFIG, rounds=3)
    half = run(FedDyn(alpha=0.7, **ALL), client_app(task, FedDynClient)).models
    own = run(FedDyn(alpha=0.7, **ALL), own_loop(task, dynamic())).models
    for left, right in zip(half, own, strict=True):
        assert left["w"] == pytest.approx(right["w"], abs=1e-12)
    # Without the mod nobody has the regularizer.
    with pytest.raises(Exception, match="'feddyn-alpha'"):
        run(FedDyn(alpha=0.7, **ALL), own_loop(task))


def test_a_new_run_on_a_used_grid_begins_at_0(quadratics, play):
    for app in (
        client_app(quadratics.task(), FedDynClient),
        own_loop(quadratics.task(), dynamic()),
    ):
        grid = LocalGrid(app, 3, CONFIG)
        run = partial(play, app=grid, clients=3, initial=quadratics.start)
        run(FedDyn(alpha=1.0, **ALL), rounds=2)
        strategy = FedDyn(alpha=1.0, **ALL)
        found = run(strategy, rounds=14).models[-1]["w"]
        # The same strategy goes on, also as one that was saved and loaded.
        loaded = FedDyn(alpha=1.0, **ALL)
        loaded.load_state_dict(strategy.state_dict())
        found = play(loaded, grid, 3, {"w": found}, rounds=14).models[-1]["w"]
        assert found == pytest.approx(quadratics.minimizer, abs=1e-6)


@pytest.mark.parametrize(
    ("alpha", "how", "words"),
    [
        (1.0, {"by_hand": True}, "without a step of a torch optimizer"),
        (10.0, {}, r"alpha=10\.0 must be < 10 at a learning"),
    ],
)
def test_loops_that_the_term_cannot_serve_are_refused(
    quadratics, play, alpha, how, words
):
    app = own_loop(quadratics.task(), dynamic(), **how)
    with pytest.raises(Exception, match=words):
        play(FedDyn(alpha=alpha, **ALL), app, 2, quadratics.start)


def test_small_moves_in_half_precision_add_up():
    personal, start = Personal(RecordDict()), torch.ones(1, dtype=torch.float16)
    step = torch.finfo(torch.float16).eps
    for _ in range(5000):
        keep_move(personal, {"w": start}, {"w": start + step})
    kept = personal.arrays(MOVES, like={"w": start})["w"]
    assert float(kept) == pytest.approx(5000 * step, rel=1e-6)


def test_dpsgd_takes_it(linear_task, play):
    rng = np.random.default_rng(0)
    clients = [
        {"x": rng.standard_normal((20, 2)), "y": rng.standard_normal(20)}
        for _ in range(2)
    ]
    privacy = SiloPrivacy(epsilon=3.0, delta=1e-2, num_rounds=2, clipping_norm=1.0)
    app = client_app(linear_task(clients, 2), FedDynClient, trainer=DPSGD(privacy))
    initial = {"weight": np.zeros((1, 2), np.float32)}
    config = {"lr": 0.1, "batch-size": 10}
    found = play(FedDyn(**ALL), app, 2, initial, rounds=2, config=config)
    assert found.train(2)["num-errors"] == 0
