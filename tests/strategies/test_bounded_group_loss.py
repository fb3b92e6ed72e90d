"""Bounded group loss: its dual, a problem with a known solution, and sums over all."""

import logging
import pickle
import re
from dataclasses import replace
from functools import partial
from math import inf, nan

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from flower_ext.client.app import client_app
from flower_ext.client.groups import group_sums
from flower_ext.client.task import Task
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.groups import example_multipliers
from flower_ext.core.protocol import Round
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD
from flower_ext.server.saddle import DualityGap, dual_step, dual_weights
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies.bounded_group_loss import (
    BoundedGroupLoss,
    BoundedGroupLossClient,
)

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
SUMS, COUNTS = "group-loss-sums", "group-counts"
STEP = {"lr": 0.1, "batch-size": 100, "local-steps": 1}


# The dual -------------------------------------------------------------------------

thetas = st.lists(st.floats(-1e300, 1e300), min_size=1, max_size=6)


@settings(derandomize=True, deadline=None)
@given(thetas, st.floats(0, 1e6))
def test_duals_are_bounded_whatever_theta(theta, bound):
    dual = dual_weights(np.array(theta), bound)
    assert np.all(dual >= 0)
    assert dual.sum() <= bound * (1 + 1e-12)


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(-15, 15), min_size=1, max_size=6), st.floats(0.001, 1e6))
def test_duals_are_the_formula_with_its_slack(theta, bound):
    dual = dual_weights(np.array(theta), bound)
    slack = 1 / (1 + np.exp(theta).sum())
    assert dual == pytest.approx(bound * np.exp(theta) * slack, rel=1e-9)
    assert dual.sum() < bound


@pytest.mark.parametrize("groups", [1, 2, 5])
def test_duals_start_equal(groups):
    names = [f"g{i}" for i in range(groups)]
    strategy = BoundedGroupLoss(groups=names, upper_bound=0.3, dual_bound=2.0)
    assert strategy.dual == pytest.approx([2.0 / (1 + groups)] * groups)


def test_multipliers_make_the_lagrangian():
    # Groups of 3 and 1 examples: 1/4 sum_i (1 + m_i) l_i = F + sum_a lambda_a L_a.
    dual, counts = np.array([0.5, 2.0]), np.array([3.0, 1.0])
    multipliers = example_multipliers(dual, counts)
    assert multipliers == pytest.approx([0.5 * 4 / 3, 2.0 * 4])
    losses, groups = np.array([1.0, 2.0, 4.0, 8.0]), np.array([0, 0, 1, 0])
    weighted = np.mean((1 + multipliers[groups]) * losses)
    assert weighted == pytest.approx(15 / 4 + 0.5 * (11 / 3) + 2.0 * 4.0)


@pytest.mark.parametrize("scale", [1e-3, 0.1, 1.0, 1e6])
def test_multipliers_need_shares_only(scale):
    dual, counts = np.array([0.5, 2.0]), np.array([3.0, 1.0])
    assert example_multipliers(dual, scale * counts) == pytest.approx(
        example_multipliers(dual, counts)
    )


def test_group_of_no_example_has_no_multiplier():
    dual = np.array([1.0, 1.0])
    assert example_multipliers(dual, np.array([4.0, 0.0])).tolist() == [1.0, 0.0]
    assert example_multipliers(dual, np.zeros(2)).tolist() == [0.0, 0.0]


def test_multipliers_are_capped():
    dual, counts = np.array([0.5, 2.0]), np.array([3.0, 1.0])
    assert example_multipliers(dual, counts, 3.0) == pytest.approx([2 / 3, 3.0])


@settings(derandomize=True, deadline=None)
@given(st.lists(st.floats(-1e300, 1e300), min_size=2, max_size=5), st.randoms())
def test_duals_come_back_whatever_the_steps_were(steps, random):
    theta = np.zeros(3)
    for step in steps:
        theta = dual_step(theta, np.array([random.choice([step, 0.0]) for _ in "abc"]))
        assert np.all(theta >= -40) and np.all(theta <= 10)
    # From wherever that is, steps of 1 lead to all the dual and to none of it.
    up = down = theta
    for _ in range(51):
        up, down = dual_step(up, np.ones(3)), dual_step(down, -np.ones(3))
    assert dual_weights(up, 1.0).sum() > 0.9999
    assert dual_weights(down, 1.0).sum() < 1e-15


def test_dual_step_within_bounds_is_the_plain_one():
    theta, step = np.array([3.0, -7.0, 0.0]), np.array([4.9, -4.9, 0.0])
    assert dual_step(theta, step).tolist() == (theta + step).tolist()
    # Beyond them the ratios of the duals stay.
    high = dual_step(np.array([9.0, 8.0]), np.array([3.0, 3.0]))
    assert high.tolist() == [10.0, 9.0]


def dual_dynamics(bound, zeta, p=0.2, rate=0.05, steps=20_000):
    """The problem of the specification, F halved, by the plain equations."""
    w, theta = p, np.zeros(2)
    for _ in range(steps):
        dual = dual_weights(theta, bound)
        losses = np.array([w**2, (w - 1) ** 2])
        slope = (w - p) + 2 * dual[0] * w + 2 * dual[1] * (w - 1)
        theta = theta + rate * (losses - zeta)
        w -= rate * slope
    return w, dual_weights(theta, bound)


@pytest.mark.parametrize(
    ("bound", "w", "dual"),
    [
        (5.0, 0.4, 1 / 6),
        (1.0, 0.4, 1 / 6),
        (0.2, 0.4, 1 / 6),
        (0.1, 1 / 3, 0.1),
        (0.15, 0.5 / 1.3, 0.15),
    ],
)
def test_dual_reaches_the_closed_form(bound, w, dual):
    found, duals = dual_dynamics(bound, zeta=0.36)
    assert found == pytest.approx(w, abs=1e-5)
    assert duals == pytest.approx([0, dual], abs=1e-5)


# Runs with a known solution -------------------------------------------------------

# Four examples want 0 and are of group a, one wants 1 and is of group b: the losses
# are L_a = w**2 and L_b = (w - 1)**2, and F = 0.8 L_a + 0.2 L_b. The specification
# halves F, so its duals and its bound are half of those here.
EXAMPLES = {"c": [0.0, 0.0, 0.0, 0.0, 1.0], "group": [0, 0, 0, 0, 1]}


@pytest.fixture(scope="session")
def solve(point_task, play):
    """Run the strategy on the examples with one full-batch step a round."""

    def run(rounds, lr=0.1, start=0.2, clients=(EXAMPLES,), **options):
        app = client_app(point_task(clients, scale=1.0), BoundedGroupLossClient)
        strategy = BoundedGroupLoss(
            groups=["a", "b"], fraction_evaluate=0.0, **ANY, **options
        )
        initial = {"w": np.float32(start)}
        config = {**STEP, "lr": lr}
        played = play(strategy, app, len(clients), initial, rounds, config)
        return strategy, played

    return run


def last(played):
    return float(played.models[-1]["w"])


@pytest.mark.parametrize(
    ("bound", "w", "dual"),
    [
        (10.0, 0.4, 1 / 3),
        (1.0, 0.4, 1 / 3),
        (0.2, 1 / 3, 0.2),
        (0.3, 0.5 / 1.3, 0.3),
    ],
)
def test_run_reaches_the_closed_form(solve, bound, w, dual):
    rate = 1.0 if bound >= 1 else 5.0
    strategy, played = solve(
        120, upper_bound=0.36, dual_bound=bound, dual_learning_rate=rate
    )
    assert last(played) == pytest.approx(w, abs=2e-4)
    assert strategy.dual == pytest.approx([0, dual], abs=1e-3)
    metrics = played.train(120)
    assert metrics["group-loss/a"] == pytest.approx(w**2, abs=5e-4)
    assert metrics["group-loss/b"] == pytest.approx((1 - w) ** 2, abs=5e-4)
    assert metrics["worst-group-loss"] == metrics["group-loss/b"]


def test_infeasible_bounds_hold_the_duals_at_their_bound(solve):
    # No w has both losses below 1/4. At w = 1/2 the duals differ by 0.6.
    strategy, played = solve(
        120, upper_bound=0.2, dual_bound=1.0, dual_learning_rate=2.0
    )
    assert strategy.dual.sum() == pytest.approx(1.0, abs=1e-4)
    assert strategy.dual == pytest.approx([0.2, 0.8], abs=1e-3)
    assert last(played) == pytest.approx(0.5, abs=1e-3)
    assert played.train(120)["feasible"] == 0


def test_bound_of_zero_minimises_the_worst_group(solve):
    _, played = solve(
        80, lr=0.02, upper_bound=0.0, dual_bound=20.0, dual_learning_rate=0.5
    )
    assert last(played) == pytest.approx(0.5, abs=1e-3)
    assert played.train(80)["worst-group-loss"] == pytest.approx(0.25, abs=1e-3)


def test_generous_bounds_let_the_duals_die_out(solve):
    strategy, played = solve(
        40, upper_bound=2.0, dual_bound=1.0, dual_learning_rate=0.5, start=0.9
    )
    duals = [played.train(r)["dual/a"] for r in range(1, 41)]
    assert all(later < before for before, later in zip(duals, duals[1:], strict=False))
    # Geometrically: theta falls by 0.5 * (2 - w**2) a round, and w is near 0.2.
    assert duals[-1] / duals[-2] == pytest.approx(np.exp(-0.5 * (2 - 0.2**2)), rel=1e-3)
    assert np.all(strategy.dual < 1e-10)
    assert last(played) == pytest.approx(0.2, abs=1e-3)  # the minimiser of F
    assert played.train(40)["feasible"] == 1


def test_bound_of_each_group(solve):
    # Only a is bounded: w = 0.1, where 0 = (w - 0.2) + lambda_a * w.
    strategy, played = solve(
        150, upper_bound=[0.01, 5.0], dual_bound=4.0, dual_learning_rate=4.0
    )
    assert last(played) == pytest.approx(0.1, abs=1e-3)
    assert strategy.dual == pytest.approx([1.0, 0.0], abs=0.02)


def test_one_group_of_all_examples_changes_the_step_not_the_solution(point_task, play):
    data = [{**EXAMPLES, "group": [0] * 5}]
    app = client_app(point_task(data, scale=1.0), BoundedGroupLossClient)
    strategy = BoundedGroupLoss(
        groups=["all"],
        upper_bound=0.0,
        dual_bound=3.0,
        group_counts=[5],
        fraction_evaluate=0.0,
        **ANY,
    )
    played = play(strategy, app, 1, {"w": np.float32(1.0)}, 30, STEP)
    # The first step is (1 + 3/2) times that of FedAvg from 1: 2 * 0.8 * 0.1.
    assert float(played.models[1]["w"]) == pytest.approx(1 - 2.5 * 0.16)
    assert last(played) == pytest.approx(0.2, abs=1e-3)


# Losses below zero ----------------------------------------------------------------


@pytest.mark.parametrize("shift", [-3.0, 3.0, -0.4])
def test_a_constant_in_loss_and_bound_changes_nothing(point_task, play, shift):
    plain = point_task([part(EXAMPLES, [0, 4]), part(EXAMPLES, [1, 2, 3])], scale=1.0)
    shifted = replace(plain, loss=lambda model, batch: plain.loss(model, batch) + shift)
    runs = []
    for task, bound in ((plain, 0.36), (shifted, 0.36 + shift)):
        strategy = BoundedGroupLoss(
            groups=["a", "b"], upper_bound=bound, certificate_radius=1.0
        )
        app = client_app(task, BoundedGroupLossClient)
        runs.append(play(strategy, app, 2, {"w": np.float32(0.9)}, 12, STEP))
    for server_round in range(1, 13):
        first, second = (float(run.models[server_round]["w"]) for run in runs)
        assert second == pytest.approx(first, rel=1e-5)
        first, second = (run.train(server_round) for run in runs)
        for name in ("feasible", "dual/a", "dual/b", "num-replies", "duality-gap"):
            assert second[name] == pytest.approx(first[name], rel=1e-4, abs=1e-6)
        for name in ("group-loss/b", "worst-group-loss", "primal-value", "dual-value"):
            expected = first[name] + shift
            assert second[name] == pytest.approx(expected, rel=1e-4, abs=1e-5)


# The certificate ------------------------------------------------------------------

# Losses of a convex problem of one number: L_a = w**2, L_b = (w - 1)**2.
GRID = np.linspace(-2, 2, 400_001)


def objective(w):
    return 0.8 * w**2 + 0.2 * (w - 1) ** 2


def excess(w, zeta):
    return np.maximum(w**2, (w - 1) ** 2) - zeta


ONE_CLIENT, THREE_CLIENTS = [[0, 1, 2, 3, 4]], [[0, 4], [1], [2, 3]]


@pytest.mark.parametrize(
    ("zeta", "bound", "rate", "start", "clients", "known"),
    [
        (0.36, 2.0, 1.0, 0.2, ONE_CLIENT, True),
        (0.36, 0.1, 2.0, -1.0, ONE_CLIENT, True),
        (0.3, 5.0, 0.5, 1.9, ONE_CLIENT, True),
        (0.36, 2.0, 1.0, 0.2, THREE_CLIENTS, True),
        (0.3, 5.0, 0.5, 1.9, THREE_CLIENTS, False),
    ],
)
def test_duality_gap_bounds_the_distance_from_the_optimum(
    solve, zeta, bound, rate, start, known, clients
):
    options = {"upper_bound": zeta, "dual_bound": bound, "dual_learning_rate": rate}
    _, played = solve(
        100,
        start=start,
        clients=[part(EXAMPLES, chosen) for chosen in clients],
        group_counts=[4, 1] if known else None,
        certificate_radius=2.0,
        **options,
    )
    # By brute force: the optimum under the bounds, and that of the bounded dual.
    allowed = GRID[excess(GRID, zeta) <= 1e-9]
    best = objective(allowed).min()
    saddle = (objective(GRID) + bound * np.maximum(0, excess(GRID, zeta))).min()
    gaps = []
    for server_round in range(1, 101):
        found = played.train(server_round)
        mean = np.mean([float(m["w"]) for m in played.models[:server_round]])
        value = objective(mean) + bound * max(0.0, excess(mean, zeta))
        assert found["primal-value"] >= value - 1e-6
        assert found["dual-value"] <= min(best, saddle) + 1e-6
        assert found["duality-gap"] >= max(objective(mean) - best, value - saddle, 0)
        gaps.append(found["duality-gap"])
    # What the first rounds were off is averaged away: the gap falls as 1 / rounds.
    assert gaps[-1] < 0.6 * gaps[49] < 0.36 * gaps[24]


def test_values_of_the_certificate_by_hand():
    # F = w**2, one bound: L = w**2 <= 1; at w = 2 with a dual of 0.5 the gradient of
    # F + 0.5 (L - 1) is 6, and the tangent 6 - 0.5 + ... falls to -11.5 at w = -1.
    gap = DualityGap(radius=1.0)
    model = {"w": np.array([2.0])}
    slope = {"w": np.array([6.0])}
    gap = gap.after(4.0, np.array([3.0]), np.array([0.5]), slope, model)
    assert gap.values(2.0) == (4 + 2 * 3, 4 + 0.5 * 3 - 6 * 2 - 6)
    model = {"w": np.array([0.0])}
    flat = {"w": np.array([0.0])}
    gap = gap.after(0.0, np.array([-1.0]), np.array([0.0]), flat, model)
    assert gap.values(2.0) == ((4 + 2 * 2) / 2, (5.5 - 12 - 6) / 2)


def test_gradient_is_that_of_the_lagrangian(linear_task, play):
    data = regression()
    clients = [part(data, chosen) for chosen in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9])]
    app = client_app(linear_task(clients, 2), BoundedGroupLossClient)
    strategy = BoundedGroupLoss(
        groups=["a", "b", "c"],
        upper_bound=0.1,
        group_counts=[6, 2, 2],
        certificate_radius=3.0,
    )
    # Whatever the local training is, the gradient is that of the received model.
    config = {"lr": 0.3, "batch-size": 2, "local-epochs": 3}
    dual, weight = strategy.dual, np.array([0.5, 0.5])
    run = play(strategy, app, 2, {"weight": np.float32([weight])}, config=config)
    slope = lagrangian_slope(data, weight, dual, data["group"])
    losses = group_losses(data, weight, data["group"], 3)
    overall = 0.5 * np.mean((data["x"] @ weight - data["y"]) ** 2)
    value = overall + dual @ (losses - 0.1) - slope @ weight
    value -= 3 * np.linalg.norm(slope)
    assert run.train()["dual-value"] == pytest.approx(value, rel=1e-5)
    worst = np.max(losses - 0.1)
    assert run.train()["primal-value"] == pytest.approx(overall + 5 * worst, rel=1e-5)


def test_certificate_of_a_network_leaves_the_training_alone(play):
    app = client_app(NET, BoundedGroupLossClient)
    runs = [
        play(BoundedGroupLoss(**TWO, **more), app, 3, net_initial(), 2, NET_CONFIG)
        for more in ({}, {"certificate_radius": 5.0})
    ]
    for name, array in runs[0].models[2].items():
        assert np.array_equal(runs[1].models[2][name], array)
    assert runs[1].train(2)["duality-gap"] > 0
    assert "duality-gap" not in runs[0].train(2)


# Against FedAvg -------------------------------------------------------------------


def make_net(config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.2), nn.Linear(4, 2)
        )


def net_data(context):
    client = context.node_config["partition-id"]
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(10 + 4 * client, 3, generator=generator)
    columns = {"x": x, "y": (x[:, 0] > 0).long(), "group": (x[:, 1] > 0.5).long()}
    return columns, {name: column[:7] for name, column in columns.items()}


def cross_entropy(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


NET = Task(make_net, net_data, cross_entropy)
NET_CONFIG = {"lr": 0.2, "batch-size": 4, "local-epochs": 2}


def net_initial():
    return {name: x.numpy() for name, x in make_net({}).state_dict().items()}


@pytest.mark.parametrize("optimizer", [SGD(1.0), SGD(0.7)])
def test_no_dual_is_fedavg_bit_for_bit(play, optimizer):
    app = client_app(NET, BoundedGroupLossClient)
    bounded = {"groups": ["a", "b"], "upper_bound": 0.1, "server_optimizer": optimizer}
    runs = [
        play(strategy, app, 3, net_initial(), 3, NET_CONFIG)
        for strategy in (
            BoundedGroupLoss(dual_bound=0.0, **bounded),
            BoundedGroupLoss(dual_bound=2.0, **bounded),
            AdditiveStrategy(server_optimizer=optimizer),
        )
    ]
    assert all(run.train(3)["num-errors"] == 0 for run in runs)
    without, with_dual, average = (run.models[3] for run in runs)
    assert all(np.array_equal(without[name], average[name]) for name in average)
    assert any(not np.allclose(with_dual[name], average[name]) for name in average)
    # The first round knows no counts and is one of FedAvg whatever the bound.
    first, fedavg = runs[1].models[1], runs[2].models[1]
    assert all(np.array_equal(first[name], fedavg[name]) for name in fedavg)


# Groups cut across clients --------------------------------------------------------


def regression(examples=10):
    rng = np.random.default_rng(7)
    x = rng.normal(size=(examples, 2))
    return {
        "x": x,
        "y": x @ [1.0, -2.0] + rng.normal(size=examples),
        "group": np.array([0, 0, 0, 1, 0, 2, 2, 0, 1, 0])[:examples],
    }


def part(columns, chosen):
    return {name: np.asarray(column)[chosen] for name, column in columns.items()}


@pytest.mark.parametrize("known", [False, True])
def test_split_over_clients_does_not_matter(linear_task, play, known):
    data = regression()
    splits = [
        [list(range(10))],
        [[0, 3, 4, 5, 6, 7, 9], [1, 2, 8]],
        # Clients without a group, of one group only, and of one example.
        [[0, 1, 2], [3, 8], [5, 6, 4], [7], [9]],
    ]
    runs = []
    for split in splits:
        clients = [part(data, chosen) for chosen in split]
        app = client_app(linear_task(clients, 2), BoundedGroupLossClient)
        strategy = BoundedGroupLoss(
            groups=["a", "b", "c"],
            upper_bound=[0.2, 0.1, 0.3],
            dual_bound=3.0,
            dual_learning_rate=0.7,
            group_counts=[6, 2, 2] if known else None,
            **ANY,
        )
        initial = {"weight": np.float32([[0.5, 0.5]])}
        run = play(strategy, app, len(split), initial, 6, STEP)
        runs.append((run, strategy.dual))
    for run, dual in runs[1:]:
        assert dual == pytest.approx(runs[0][1], rel=1e-5)
        for server_round in range(1, 7):
            model = runs[0][0].models[server_round]["weight"]
            assert run.models[server_round]["weight"] == pytest.approx(model, rel=1e-4)
            for kind in ("train", "evaluate"):
                expected = getattr(runs[0][0], kind)(server_round)
                found = getattr(run, kind)(server_round)
                for name in expected:
                    if name not in ("num-replies", "train-loss"):
                        assert found[name] == pytest.approx(expected[name], rel=1e-4)


def lagrangian_slope(data, weight, dual, constraint):
    """Gradient of F + sum_a lambda_a L_a for least squares, group by group."""
    residuals = data["x"] @ weight - data["y"]
    gradients = residuals[:, None] * data["x"]
    slope = gradients.mean(0)
    for a, value in enumerate(dual):
        if np.any(constraint == a):
            slope = slope + value * gradients[constraint == a].mean(0)
    return slope


def group_losses(data, weight, constraint, size):
    losses = 0.5 * (data["x"] @ weight - data["y"]) ** 2
    return np.array(
        [
            losses[constraint == a].mean() if np.any(constraint == a) else nan
            for a in range(size)
        ]
    )


def next_theta(theta, losses, bound, rate):
    return theta + rate * np.where(np.isnan(losses), 0, losses - bound)


def test_constraints_on_group_and_label(linear_task, play):
    # The label is a column of its own here; the pair (b, 2) has no example.
    data = regression()
    data["kind"] = np.array([0, 1, 2, 0, 0, 1, 2, 1, 1, 2])
    data["group"] = np.array([0, 0, 0, 1, 0, 1, 0, 0, 1, 0])
    constraint = data["group"] * 3 + data["kind"]
    assert 5 not in constraint and len(set(constraint)) == 5
    clients = [part(data, chosen) for chosen in ([0, 3, 4, 5], [1, 2, 6, 7, 8, 9])]
    app = client_app(
        linear_task(clients, 2),
        partial(BoundedGroupLossClient, label="kind"),
    )
    strategy = BoundedGroupLoss(
        groups=["a", "b"],
        labels=["0", "1", "2"],
        upper_bound=0.1,
        dual_bound=2.0,
        dual_learning_rate=0.5,
        group_counts=np.bincount(constraint, minlength=6).tolist(),
    )
    names = ["a/0", "a/1", "a/2", "b/0", "b/1", "b/2"]
    assert strategy.constraints == names
    weight = np.array([0.5, 0.5])
    run = play(strategy, app, 2, {"weight": np.float32([weight])}, 4, STEP)
    theta = np.zeros(6)
    for server_round in range(1, 5):
        dual = dual_weights(theta, 2.0)
        losses = group_losses(data, weight, constraint, 6)
        metrics = run.train(server_round)
        for name, value, loss in zip(names, dual, losses, strict=True):
            assert metrics[f"dual/{name}"] == pytest.approx(value, rel=1e-4)
            if np.isnan(loss):
                assert f"group-loss/{name}" not in metrics
            else:
                assert metrics[f"group-loss/{name}"] == pytest.approx(loss, rel=1e-4)
        weight = weight - 0.1 * lagrangian_slope(data, weight, dual, constraint)
        theta = next_theta(theta, losses, 0.1, 0.5)
        assert run.models[server_round]["weight"][0] == pytest.approx(weight, rel=1e-4)
    assert strategy.dual == pytest.approx(dual_weights(theta, 2.0), rel=1e-4)


def test_columns_may_have_other_names(linear_task, play):
    data = regression()
    data["sex"] = data.pop("group")
    app = client_app(
        linear_task([data], 2), partial(BoundedGroupLossClient, group="sex")
    )
    strategy = BoundedGroupLoss(groups=["a", "b", "c"], upper_bound=0.1, **ANY)
    initial = {"weight": np.zeros((1, 2), np.float32)}
    assert play(strategy, app, 1, initial, config=STEP).train()["num-errors"] == 0


def test_minibatches_weigh_examples_as_full_batches(linear_task, play):
    # With a rate so small that the model stands still, an epoch of minibatches of
    # one example adds up to as many times the full gradient.
    data, lr = regression(), 1e-4
    app = client_app(linear_task([data], 2), BoundedGroupLossClient)
    weight = np.array([0.5, 0.5])
    strategy = BoundedGroupLoss(
        groups=["a", "b", "c"], upper_bound=0.1, group_counts=[6, 2, 2], **ANY
    )
    dual = strategy.dual
    config = {"lr": lr, "batch-size": 1, "local-epochs": 1}
    run = play(strategy, app, 1, {"weight": np.array([weight])}, config=config)
    slope = lagrangian_slope(data, weight, dual, data["group"])
    moved = run.models[1]["weight"][0] - weight
    assert moved == pytest.approx(-lr * 10 * slope, rel=2e-2)


# What is told and counted ---------------------------------------------------------


def told(strategy):
    return np.array(strategy.tell(Round(1, SENT))["group-multipliers"])


def sums_reply(reply, sums, counts, w=1.0, n=None):
    n = sum(counts) if n is None else n
    metrics = {SUMS: sums, COUNTS: counts}
    present = {name: value for name, value in metrics.items() if value is not None}
    return reply({"w": np.float32([w])}, n, **present)


SENT = {"w": np.float32([0.0])}
TWO = {"groups": ["a", "b"], "upper_bound": 1.0, "dual_learning_rate": 0.5}


def test_counts_that_are_given_and_that_are_found(reply, aggregate):
    given = BoundedGroupLoss(group_counts=[3, 1], **TWO)
    counted = BoundedGroupLoss(**TWO)
    assert told(given) == pytest.approx([5 / 3 * 4 / 3, 5 / 3 * 4])
    assert told(counted).tolist() == [0, 0]
    cohort = [
        sums_reply(reply, [2.0, 0.0], [2.0, 0.0]),
        sums_reply(reply, [1.0, 4.0], [1.0, 1.0]),
    ]
    for server_round in (1, 2, 3):
        for strategy in (given, counted):
            aggregate(strategy, SENT, cohort, server_round)
        assert told(given) == pytest.approx(told(counted))
    # What was given stays, whatever the cohorts hold.
    assert told(given) == pytest.approx(given.dual * 4 / np.array([3, 1]))
    aggregate(given, SENT, [sums_reply(reply, [1.0, 1.0], [1.0, 9.0])] * 2, 4)
    assert told(given) == pytest.approx(given.dual * 4 / np.array([3, 1]))
    # Counts of the cohorts so far, even if the last one lacked a group.
    aggregate(counted, SENT, [sums_reply(reply, [1.0, 0.0], [4.0, 0.0])] * 2, 4)
    assert told(counted) == pytest.approx(counted.dual * 20 / np.array([17, 3]))


def test_a_round_without_counted_examples_leaves_the_certificate_as_it_is(
    reply, aggregate
):
    def content(sums, counts):
        made = sums_reply(reply, sums, counts, n=2)
        made["lagrangian-gradient"] = to_record({"w": np.float32([1.0])})
        return made

    nobody, all_groups = content([0.0, 0.0], [0.0, 0.0]), content([2.0, 3.0], [1, 1])
    found = []
    for first in ([nobody], []):
        strategy = BoundedGroupLoss(certificate_radius=1.0, **TWO)
        for server_round, one in enumerate([*first, all_groups], 1):
            _, metrics = aggregate(strategy, SENT, [one] * 2, server_round)
            assert ("duality-gap" in metrics) == (one is all_groups)
        found.append(metrics["duality-gap"])
    assert found[0] == found[1] and np.isfinite(found[0])


def test_group_loss_is_the_sum_over_the_sum_and_not_a_mean_of_means(reply, aggregate):
    strategy = BoundedGroupLoss(**TWO)
    cohort = [
        sums_reply(reply, [2.0, 9.0], [1.0, 3.0]),
        sums_reply(reply, [2.0, 1.0], [7.0, 1.0]),
        sums_reply(reply, [1.0, 0.0], [2.0, 0.0]),  # no example of b
    ]
    _, metrics = aggregate(strategy, SENT, cohort)
    assert metrics["group-loss/a"] == pytest.approx(5 / 10)
    assert metrics["group-loss/b"] == pytest.approx(10 / 4)
    assert metrics["worst-group-loss"] == pytest.approx(10 / 4)
    assert metrics["feasible"] == 0
    assert SUMS not in metrics and COUNTS not in metrics
    # The dual step is up where the loss is above the bound of 1, else down.
    theta = 0.5 * np.array([0.5 - 1, 2.5 - 1])
    assert strategy.dual == pytest.approx(dual_weights(theta, 5.0))
    assert metrics["dual/a"] == metrics["dual/b"] == pytest.approx(5 / 3)


def test_group_that_the_cohort_lacks_keeps_its_theta(reply, aggregate):
    strategy = BoundedGroupLoss(**TWO)
    _, metrics = aggregate(
        strategy, SENT, [sums_reply(reply, [8.0, 0.0], [4.0, 0.0])] * 2
    )
    assert "group-loss/b" not in metrics
    assert strategy.dual == pytest.approx(dual_weights(np.array([0.5, 0.0]), 5.0))
    assert metrics["feasible"] == 0


def test_feasible_needs_all_groups(reply, aggregate):
    def play_round(strategy, sums, counts, server_round=1):
        cohort = [sums_reply(reply, sums, counts)] * 2
        return aggregate(strategy, SENT, cohort, server_round)[1]

    only_a, both, bad = ([4.0, 0.0], [4.0, 0.0]), ([4.0, 1.0], [4.0, 1.0]), [4.0, 1.1]
    strategy = BoundedGroupLoss(**TWO)
    found = play_round(strategy, *only_a)
    assert (found["feasible"], found["groups-unseen"]) == (0, 1)
    found = play_round(strategy, *both, 2)
    assert (found["feasible"], found["groups-unseen"]) == (1, 0)
    assert play_round(strategy, bad, [4.0, 1.0], 3)["feasible"] == 0
    # The last known loss of b holds until another is measured.
    found = play_round(strategy, *only_a, 4)
    assert found["worst-group-loss"] == pytest.approx(1.1)
    assert "group-loss/b" not in found
    assert (found["feasible"], found["groups-unseen"]) == (0, 0)
    # A group that is known to have no examples is not waited for.
    strategy = BoundedGroupLoss(group_counts=[4, 0], **TWO)
    found = play_round(strategy, *only_a)
    assert (found["feasible"], found["groups-unseen"]) == (1, 0)


def test_best_feasible_is_a_model_at_which_all_groups_were_measured(
    reply, aggregate, caplog
):
    caplog.set_level(logging.WARNING, logger="flwr")
    strategy = BoundedGroupLoss(**TWO)
    rounds = [  # sums of a and b, of as many examples where they are not 0
        ([1.0, 0.0], [9.0, 0.0]),  # b unseen, less loss than any later model
        ([9.0, 2.0], [9.0, 1.0]),  # b above its bound
        ([1.0, 0.0], [9.0, 0.0]),  # b above its bound when last seen
        ([9.0, 0.9], [9.0, 1.0]),  # feasible
        ([1.0, 0.0], [9.0, 0.0]),  # b feasible when last seen
        ([9.0, 1.0], [9.0, 1.0]),  # feasible, of larger loss
    ]
    best = {1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4}
    for server_round, (sums, counts) in enumerate(rounds, start=1):
        sent = {"w": np.float32([server_round])}
        cohort = [sums_reply(reply, sums, counts, w=server_round)] * 2
        aggregate(strategy, sent, cohort, server_round)
        found = strategy.iterates()["best-feasible"]["w"].numpy()
        assert found == [best[server_round]]
        told = "1 were missing at the least" in caplog.text
        assert told == (server_round == 1)
        assert ("never seen: ['b']" in caplog.text) == (server_round == 1)
        caplog.clear()


def test_overall_loss_of_a_model_does_not_depend_on_who_is_in_the_cohort(
    reply, aggregate
):
    # By the cohort's own examples the second model, of b alone, would be better.
    strategy = BoundedGroupLoss(groups=["a", "b"], upper_bound=5.0, group_counts=[9, 1])
    for k, (sums, counts) in enumerate(
        [([9.0, 4.0], [9.0, 1.0]), ([4.0, 8.0], [1.0, 8.0])], start=1
    ):
        cohort = [sums_reply(reply, sums, counts)] * 2
        aggregate(strategy, {"w": np.float32([k])}, cohort, k)
    assert strategy.iterates()["best-feasible"]["w"].numpy() == [1]


@pytest.mark.parametrize("lie", [1e300, 1e30, 150.0, -1e300, -1e30])
def test_one_absurd_loss_does_not_decide_the_duals(reply, aggregate, lie):
    honest, liar = ([2.0, 6.0], [4.0, 4.0]), ([2.0, lie], [4.0, 4.0])
    strategy = BoundedGroupLoss(**TWO)
    told_truth = BoundedGroupLoss(**TWO)
    for server_round in range(1, 81):
        cohorts = [[sums_reply(reply, *honest)] * 2 for _ in range(2)]
        if server_round == 1:
            cohorts[0][1] = sums_reply(reply, *liar)
        if server_round > 20:  # the honest bring b below its bound
            cohorts = [[sums_reply(reply, [2.0, 2.0], [4.0, 4.0])] * 2] * 2
        _, metrics = aggregate(strategy, SENT, cohorts[0], server_round)
        aggregate(told_truth, SENT, cohorts[1], server_round)
        assert np.all(np.isfinite(list(metrics.values())))
        assert abs(metrics["group-loss/b"]) <= (100 + 1.5) / 2
    assert strategy.dual == pytest.approx(told_truth.dual, abs=0.2)


def test_loss_of_a_client_is_bounded(reply, aggregate):
    cohort = [sums_reply(reply, [s, 1.0], [4.0, 1.0]) for s in (4.0, 40.0, -40.0)]
    for bound, loss in ((3.0, (4 + 12 - 12) / 12), (100.0, 4 / 12), (9.0, 4 / 12)):
        strategy = BoundedGroupLoss(loss_bound=bound, **TWO)
        _, metrics = aggregate(strategy, SENT, cohort)
        assert metrics["group-loss/a"] == pytest.approx(loss)
    _, metrics = aggregate(BoundedGroupLoss(loss_bound=3.0, **TWO), SENT, cohort[:2])
    assert metrics["group-loss/a"] == pytest.approx((4 + 12) / 8)
    for bound, default in ((0.4, 100), (30.0, 300), ([-50.0, 2.0], 500)):
        strategy = BoundedGroupLoss(groups=["a", "b"], upper_bound=bound)
        assert strategy.loss_bound == default


def test_weight_of_an_example_is_bounded(reply, aggregate):
    strategy = BoundedGroupLoss(group_counts=[999, 1], multiplier_bound=7.0, **TWO)
    assert told(strategy) == pytest.approx([5 / 3 * 1000 / 999, 7.0])


@pytest.mark.parametrize(
    ("sums", "counts", "reason"),
    [
        ([1.0, 1.0, 1.0], [1.0, 1.0], "metric 'group-loss-sums'="),
        ([1.0, 1.0], [2.0], "metric 'group-counts'="),
        ([1.0, -inf], [1.0, 1.0], "metric 'group-loss-sums'="),
        ([1.0, -1.0], [2.0, 0.0], "'group-loss-sums' of a group without examples"),
        ([1.0, 1.0], [2.0, 1.0], "'group-counts' adds up to 3, more than 'num-exam"),
        ([1.0, 1.0], [1e30, 1.0], r"adds up to 1e\+30, more than 'num-examples'=2"),
        ([1.0, nan], [1.0, 1.0], "metric 'group-loss-sums'="),
        ([1.0, inf], [1.0, 1.0], "metric 'group-loss-sums'="),
        ([1.0, 1.0], [3.0, -1.0], "metric 'group-counts'="),
        ([1.0, 1.0], [2.0, 0.0], "'group-loss-sums' of a group without examples"),
        (None, [1.0, 1.0], "no metric 'group-loss-sums'"),
        ([1.0, 1.0], None, "no metric 'group-counts'"),
    ],
)
def test_reply_without_usable_sums_is_dropped(
    reply, aggregate, caplog, sums, counts, reason
):
    caplog.set_level(logging.WARNING, logger="flwr")
    strategy = BoundedGroupLoss(**TWO)
    good = sums_reply(reply, [1.0, 3.0], [2.0, 2.0], w=2.0)
    bad = sums_reply(reply, sums, counts, w=100.0, n=2)
    new, metrics = aggregate(strategy, SENT, [good, bad, good])
    assert new["w"] == pytest.approx([2.0])
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert metrics["group-loss/b"] == pytest.approx(1.5)
    assert re.search(reason, caplog.text)


def test_round_that_keeps_the_model_keeps_the_duals(reply, aggregate):
    strategy = BoundedGroupLoss(min_replies=3, **TWO)
    cohort = [sums_reply(reply, [9.0, 9.0], [1.0, 1.0])] * 2
    new, metrics = aggregate(strategy, SENT, cohort)
    assert new is None
    assert metrics["num-replies"] == 2
    assert strategy.dual == pytest.approx([5 / 3, 5 / 3])
    assert strategy.iterates() == {}
    assert told(strategy).tolist() == [0, 0]


# Evaluation -----------------------------------------------------------------------


def test_evaluation_adds_up_over_clients(point_task, play):
    # Other groups in the test data than in the training data, and unequal ones.
    test = [
        {"c": [0.0, 2.0, 2.0], "group": [0, 1, 1]},
        {"c": [1.0] * 5, "group": [0, 0, 0, 0, 1]},
    ]
    train = {"c": [0.0, 0.0], "group": [0, 1]}
    task = point_task([(train, t) for t in test], scale=1.0)
    app = client_app(task, BoundedGroupLossClient)
    strategy = BoundedGroupLoss(groups=["a", "b"], upper_bound=0.1)
    run = play(strategy, app, 2, {"w": np.float32(0.5)}, config=STEP)
    w = float(run.models[1]["w"])
    found = run.evaluate()
    a, b = (w**2 + 4 * (1 - w) ** 2) / 5, (2 * (2 - w) ** 2 + (1 - w) ** 2) / 3
    assert found["group-loss/a"] == pytest.approx(a, rel=1e-5)
    assert found["group-loss/b"] == pytest.approx(b, rel=1e-5)
    assert found["worst-group-loss"] == pytest.approx(max(a, b), rel=1e-5)
    assert found["loss"] == pytest.approx((5 * a + 3 * b) / 8, rel=1e-5)
    assert SUMS not in found and COUNTS not in found
    # Evaluation is no step of the dual.
    assert run.train()["dual/a"] == pytest.approx(5 / 3)
    theta = 0.5 * (0.25 - 0.1) * np.ones(2)
    assert strategy.dual == pytest.approx(dual_weights(theta, 5.0))


def test_no_test_data_no_group_losses(point_task, play):
    train = {"c": [0.0, 0.0], "group": [0, 1]}
    nothing = {"c": [], "group": np.array([], np.int64)}
    app = client_app(point_task([(train, nothing)] * 2), BoundedGroupLossClient)
    strategy = BoundedGroupLoss(groups=["a", "b"], upper_bound=0.1)
    run = play(strategy, app, 2, {"w": np.float32(0.5)}, config=STEP)
    assert not any("group" in name for name in run.evaluate())
    assert "group-loss/a" in run.train()


def test_losses_of_the_dual_are_in_evaluation_mode():
    # Dropout of 0.2 would make the sums differ from those of the evaluation.
    app = client_app(NET, BoundedGroupLossClient)
    strategy, grid = BoundedGroupLoss(**TWO), LocalGrid(app, 2, NET_CONFIG)
    sent = to_record(net_initial())
    messages = strategy.configure_train(1, sent, ConfigRecord(), grid)
    model = make_net({}).eval()
    for client, answer in enumerate(grid.send_and_receive(messages)):
        context = type("Context", (), {"node_config": {"partition-id": client}})
        columns = net_data(context)[0]
        losses = cross_entropy(model, columns).detach().double()
        for a in (0, 1):
            mine = columns["group"] == a
            metrics = answer.content["metrics"]
            assert metrics[SUMS][a] == pytest.approx(float(losses[mine].sum()), 1e-6)
            assert metrics[COUNTS][a] == int(mine.sum())


# Errors on the client -------------------------------------------------------------


def first_error(task, half=BoundedGroupLossClient, **options):
    """Return what the first client says that cannot take part."""
    strategy = BoundedGroupLoss(**{**TWO, **options})
    grid = LocalGrid(client_app(task, half), 2, STEP)
    sent = to_record({"w": np.float32(0)})
    messages = strategy.configure_train(1, sent, ConfigRecord(), grid)
    answer = list(grid.send_and_receive(messages))[0]
    assert answer.has_error()
    return answer.error.reason


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0, 1, 2], r"column 'group'=\[0, 2\] must be indices from 0 to 1: a group"),
        ([0, -1, 1], r"column 'group'=\[-1, 1\] must be indices from 0 to 1"),
        ([0.0, 1.0, 0.0], r"column 'group'='torch.float32\[3\]' must be int64"),
        ([[0], [1], [0]], r"column 'group'='torch.int64\[3, 1\]' must be int64"),
        (None, r"column='group' must be one of the data's columns \['c'\]"),
    ],
)
def test_group_column_that_does_not_fit(point_task, column, message):
    data = {"c": [0.0, 1.0, 2.0]} | ({} if column is None else {"group": column})
    assert re.search(message, first_error(point_task([data] * 2)))


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ([0, 1, 3], r"column 'y'=\[0, 3\] must be indices from 0 to 2"),
        ([0, -1, 1], r"column 'y'=\[-1, 1\] must be indices from 0 to 2"),
        ([0.0, 1.0, 0.0], r"column 'y'='torch.float32\[3\]' must be int64"),
        (None, r"column='y' must be one of the data's columns \['c', 'group'\]"),
    ],
)
def test_label_column_that_does_not_fit(point_task, column, message):
    # Label 3 of group 0 would be label 0 of group 1.
    data = {"c": [0.0, 1.0, 2.0], "group": [0, 0, 1]}
    data |= {} if column is None else {"y": column}
    labels = {"labels": ["x", "y", "z"]}
    assert re.search(message, first_error(point_task([data] * 2), **labels))


def test_broken_test_data_do_not_stop_the_run(point_task, play):
    train = {"c": [0.0, 1.0], "group": [0, 1]}
    task = point_task([(train, train), (train, {"c": [0.0], "group": [7]})])
    app = client_app(task, BoundedGroupLossClient)
    run = play(BoundedGroupLoss(**TWO), app, 2, {"w": np.float32(0)}, config=STEP)
    assert run.evaluate()["group-loss/b"] == pytest.approx(0.5 * 0.95**2)


def test_half_needs_its_strategy(point_task):
    strategy = BoundedGroupLoss(**TWO)
    strategy.tell = lambda round: {}
    task = point_task([{"c": [0.0], "group": [0]}] * 2)
    grid = LocalGrid(client_app(task, BoundedGroupLossClient), 2, STEP)
    sent = to_record({"w": np.float32(0)})
    messages = strategy.configure_train(1, sent, ConfigRecord(), grid)
    answer = list(grid.send_and_receive(messages))[0]
    assert "the server must run the strategy BoundedGroupLoss" in answer.error.reason


def test_group_sums_by_hand():
    found = group_sums(
        torch.tensor([1.0, 2.0, 4.0]).requires_grad_(), torch.tensor([2, 0, 2]), 4
    )
    assert found == {SUMS: [2.0, 0.0, 5.0, 0.0], COUNTS: [1.0, 0.0, 2.0, 0.0]}
    with pytest.raises(ValueError, match=r"groups=\[0, 2\] must be indices from 0 to"):
        group_sums(torch.ones(2), torch.tensor([0, 2]), 2)
    with pytest.raises(ValueError, match="groups='torch.int32.* must be int64"):
        group_sums(torch.ones(1), torch.tensor([0], dtype=torch.int32), 2)


def test_group_sums_are_added_in_double_precision():
    losses = torch.full((40_000,), 0.1)
    found = group_sums(losses, torch.zeros(40_000, dtype=torch.int64), 1)
    assert found[SUMS][0] == pytest.approx(float(losses[0]) * 40_000, rel=1e-12)


# A loop of one's own --------------------------------------------------------------


def app_with_a_loop(clients, reports_groups):
    """A ClientApp that minimises the weighted (w - c)**2 with a loop of its own."""
    app = ClientApp()

    def open_(message, context):
        data = clients[context.node_config["partition-id"]]
        w = float(message.content["arrays"]["w"].numpy())
        c, groups = np.array(data["c"]), torch.tensor(data["group"])
        losses = torch.tensor((w - c) ** 2)
        return w, c, groups, losses, message.content["config"]["group-multipliers"]

    def answer(message, metrics, arrays=None):
        records = {
            "metrics": MetricRecord({"num-examples": metrics.pop("n"), **metrics})
        }
        if arrays is not None:
            records["arrays"] = to_record(arrays)
        return Message(RecordDict(records), reply_to=message)

    @app.train()
    def train(message, context):
        w, c, groups, losses, multipliers = open_(message, context)
        weights = 1 + np.array(multipliers)[groups]
        w = w - 0.1 * np.mean(weights * 2 * (w - c))
        metrics = {"n": len(c), **group_sums(losses, groups, len(multipliers))}
        return answer(message, metrics, {"w": np.asarray(w, np.float32)})

    @app.evaluate()
    def evaluate(message, context):
        _, c, groups, losses, multipliers = open_(message, context)
        metrics = {"n": len(c), "loss": float(losses.mean())}
        if reports_groups:
            metrics |= group_sums(losses, groups, len(multipliers))
        return answer(message, metrics)

    return app


@pytest.mark.parametrize("reports_groups", [True, False])
def test_a_loop_of_ones_own_gives_the_same(point_task, play, reports_groups):
    clients = [part(EXAMPLES, [0, 4]), part(EXAMPLES, [1, 2, 3])]
    ours = client_app(point_task(clients, scale=1.0), BoundedGroupLossClient)
    theirs = app_with_a_loop(clients, reports_groups)
    runs = []
    for app in (ours, theirs):
        strategy = BoundedGroupLoss(groups=["a", "b"], upper_bound=0.36)
        runs.append(play(strategy, app, 2, {"w": np.float32(0.9)}, 5, STEP))
    for server_round in range(1, 6):
        first, second = (float(run.models[server_round]["w"]) for run in runs)
        assert first == pytest.approx(second, rel=1e-5)
    assert ("group-loss/a" in runs[1].evaluate(5)) == reports_groups
    assert runs[1].evaluate(5)["loss"] == pytest.approx(runs[0].evaluate(5)["loss"])


# Iterates, state, settings --------------------------------------------------------


def hand_history(rounds, start, zeta, bound, rate, lr=0.1):
    """Return the models that were sent, with their losses, by the plain equations."""
    w, theta, sent = start, np.zeros(2), []
    for _ in range(rounds):
        losses = np.array([w**2, (w - 1) ** 2])
        sent.append((w, losses))
        dual = dual_weights(theta, bound)
        slope = 2 * (w - 0.2) + 2 * dual[0] * w + 2 * dual[1] * (w - 1)
        w, theta = w - lr * slope, theta + rate * (losses - zeta)
    return sent


@pytest.mark.parametrize(
    ("zeta", "rounds"),
    [(0.36, 24), (0.36, 2), (0.2, 12)],  # the last two are never feasible
)
def test_average_and_best_iterate_are_those_of_a_history(solve, zeta, rounds):
    options = {"dual_bound": 2.0, "dual_learning_rate": 4.0}
    strategy, played = solve(
        rounds, upper_bound=zeta, group_counts=[4, 1], start=0.1, **options
    )
    history = hand_history(rounds, 0.1, zeta, 2.0, 4.0)
    for (w, _), model in zip(history, played.models, strict=False):
        assert float(model["w"]) == pytest.approx(w, abs=1e-5)
    feasible = [bool(np.all(losses <= zeta)) for _, losses in history]
    assert any(feasible) == (rounds == 24)
    found = [played.train(r)["feasible"] == 1 for r in range(1, rounds + 1)]
    assert found == feasible

    def rank(entry):
        w, losses = entry
        return max(0.0, *(losses - zeta)), 0.8 * losses[0] + 0.2 * losses[1]

    best = min(history, key=rank)[0]
    iterates = {name: float(r["w"].numpy()) for name, r in strategy.iterates().items()}
    assert iterates["best-feasible"] == pytest.approx(best, abs=1e-5)
    assert iterates["average"] == pytest.approx(
        np.mean([w for w, _ in history]), abs=1e-5
    )
    assert iterates["best-feasible"] != pytest.approx(last(played), abs=1e-3)


def test_average_is_optional(solve):
    strategy, _ = solve(2, upper_bound=0.36, average_iterates=False)
    assert list(strategy.iterates()) == ["best-feasible"]


def test_iterates_are_laid_out_as_the_model(play):
    app = client_app(NET, BoundedGroupLossClient)
    strategy = BoundedGroupLoss(**TWO)
    run = play(strategy, app, 2, net_initial(), 3, NET_CONFIG)
    for record in strategy.iterates().values():
        found = from_record(record)
        for name, array in run.models[0].items():
            assert found[name].shape == array.shape
            assert found[name].dtype == array.dtype
    batches = "1.num_batches_tracked"
    counts = [model[batches] for model in run.models[:3]]
    average = from_record(strategy.iterates()["average"])
    assert average[batches] == round(float(np.mean(counts)))
    mean = np.mean([model["0.weight"] for model in run.models[:3]], axis=0)
    assert average["0.weight"] == pytest.approx(mean, rel=1e-6)


def test_state_round_trip(solve):
    options = {"upper_bound": 0.36, "dual_bound": 1.0}
    strategy, _ = solve(6, **options)
    saved = pickle.loads(pickle.dumps(strategy.state_dict()))
    other = BoundedGroupLoss(groups=["a", "b"], **options)
    assert other.dual != pytest.approx(strategy.dual)
    other.load_state_dict(saved)
    assert other.dual.tolist() == strategy.dual.tolist()
    assert told(other).tolist() == told(strategy).tolist()
    assert set(other.iterates()) == {"average", "best-feasible"}
    for name, record in strategy.iterates().items():
        assert other.iterates()[name]["w"].numpy() == record["w"].numpy()


def test_interrupted_run_continues(linear_task, play, tmp_path):
    data = regression()
    clients = [part(data, chosen) for chosen in ([0, 1, 2], [3, 8], [4, 5, 6], [7, 9])]

    def run(rounds, folder):
        app = client_app(linear_task(clients, 2), BoundedGroupLossClient)
        strategy = BoundedGroupLoss(
            groups=["a", "b", "c"],
            upper_bound=0.1,
            fraction_train=0.5,
            sampler=UniformSampler(seed=1),
            server_optimizer=SGD(1.0, momentum=0.5),
            certificate_radius=2.0,
        )
        initial = {"weight": np.float32([[0.5, 0.5]])}
        played = play(strategy, app, 4, initial, rounds, STEP, checkpoint=folder)
        return strategy, played

    whole, played = run(4, tmp_path / "whole")
    run(2, tmp_path / "halves")
    halves, resumed = run(4, tmp_path / "halves")
    assert np.array_equal(resumed.models[-1]["weight"], played.models[-1]["weight"])
    assert halves.dual.tolist() == whole.dual.tolist()
    for server_round in range(1, 5):
        assert resumed.train(server_round) == played.train(server_round)
        assert resumed.evaluate(server_round) == played.evaluate(server_round)
    # A run that is finished already still knows its iterates.
    finished, _ = run(4, tmp_path / "halves")
    for strategy in (halves, finished):
        assert set(strategy.iterates()) == {"average", "best-feasible"}
        for name, record in whole.iterates().items():
            found = strategy.iterates()[name]["weight"].numpy()
            assert np.array_equal(found, record["weight"].numpy())


def test_state_of_other_groups_is_refused(solve):
    strategy, _ = solve(1, upper_bound=0.36)
    other = BoundedGroupLoss(groups=["a", "b", "c"], upper_bound=0.36)
    with pytest.raises(ValueError, match=r"groups=\['a', 'b', 'c'\] must be 2 as in"):
        other.load_state_dict(strategy.state_dict())


def test_summary_logs_the_settings(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    BoundedGroupLoss(
        groups=["f", "m"], upper_bound=[0.4, 0.5], dual_bound=3, dual_learning_rate=0.2
    ).summary()
    for line in (
        "BoundedGroupLoss settings",
        "Upper bounds: f 0.4, m 0.5",
        "Dual: bound 3, rate 0.2",
        "Bound of multipliers: inf",
        "Bound of losses: 100",
        "Minimum replies: 1",
    ):
        assert line in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": []}, r"groups=\[\] must be a sequence of different names"),
        ({"groups": ["a", "a"]}, r"groups=\['a', 'a'\] must be a sequence of diff"),
        ({"groups": "ab"}, "groups='ab' must be a sequence of different names"),
        ({"groups": 2}, "groups=2 must be a sequence of different names"),
        ({"labels": []}, r"labels=\[\] must be a sequence of different names"),
        ({"labels": ["x", "x"]}, r"labels=\['x', 'x'\] must be a sequence of diff"),
        ({"labels": "xy"}, "labels='xy' must be a sequence of different names"),
        ({"upper_bound": nan}, "upper_bound=nan must be finite"),
        ({"upper_bound": [1.0, inf]}, r"upper_bound=\[1.0, inf\] must be finite"),
        ({"multiplier_bound": 0}, "multiplier_bound=0 must be a number > 0"),
        ({"multiplier_bound": nan}, "multiplier_bound=nan must be a number > 0"),
        ({"loss_bound": 0}, "loss_bound=0 must be a finite number > 0"),
        ({"loss_bound": inf}, "loss_bound=inf must be a finite number > 0"),
        ({"certificate_radius": 0}, "certificate_radius=0 must be a finite number > 0"),
        ({"upper_bound": [1.0]}, r"upper_bound=\[1.0\] must be one number or 2, for"),
        ({"upper_bound": [[1, 2], 3]}, "upper_bound=.* must be one number or 2, for"),
        ({"upper_bound": "x"}, "upper_bound='x' must be one number or 2, for"),
        ({"upper_bound": "1"}, "upper_bound='1' must be one number or 2, for"),
        ({"upper_bound": None}, "upper_bound=None must be"),
        ({"upper_bound": True}, "upper_bound=True must be one number or 2, for"),
        (
            {"labels": ["x", "y"], "upper_bound": [1.0, 1.0]},
            r"upper_bound=\[1.0, 1.0\] must be one number or 4, for \['a/x', 'a/y', 'b",
        ),
        ({"dual_bound": -1}, "dual_bound=-1 must be a finite number >= 0"),
        ({"dual_bound": inf}, "dual_bound=inf must be a finite number >= 0"),
        ({"dual_bound": nan}, "dual_bound=nan must be a finite number >= 0"),
        ({"dual_bound": "5"}, "dual_bound='5' must be a finite number >= 0"),
        ({"dual_learning_rate": 0}, "dual_learning_rate=0 must be a finite number > 0"),
        ({"dual_learning_rate": nan}, "dual_learning_rate=nan must be a finite number"),
        ({"group_counts": [1, -1]}, r"group_counts=\[1, -1\] must be finite and >= 0"),
        ({"group_counts": [1]}, r"group_counts=\[1\] must be one number or 2"),
        ({"group_counts": [0, 0]}, r"group_counts=\[0, 0\] must be > 0 for some group"),
        ({"average_iterates": "no"}, "average_iterates='no' must be True or False"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BoundedGroupLoss(**{"groups": ["a", "b"], "upper_bound": 0.3, **options})
