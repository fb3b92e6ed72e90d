"""Bounded group loss of groups that overlap, and with a schedule of its dual's rate."""

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord

from flower_ext.client.app import client_app
from flower_ext.client.groups import group_sums
from flower_ext.core.arrays import to_record
from flower_ext.core.schedules import Piecewise
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.server.saddle import dual_weights
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies.bounded_group_loss import (
    BoundedGroupLoss,
    BoundedGroupLossClient,
)

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
SUMS, COUNTS = "group-loss-sums", "group-counts"
STEP = {"lr": 0.1, "batch-size": 100, "local-steps": 1}
NAMES = ["women", "old", "north"]
INITIAL = {"weight": np.float32([[0.5, 0.5]])}


def people(examples=12, seed=3):
    """Examples of several groups, of one, and of none."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(examples, 2))
    flags = rng.random((examples, 3)) < [0.5, 0.4, 0.3]
    flags[0], flags[1] = True, False
    return {"x": x, "y": x @ [1.0, -2.0] + rng.normal(size=examples), "group": flags}


def part(columns, chosen):
    return {name: column[chosen] for name, column in columns.items()}


def lagrangian(data, weight, dual):
    """The losses of the groups, that of all, and the slope: group by group."""
    residuals = data["x"] @ weight - data["y"]
    gradients = residuals[:, None] * data["x"]
    members = data["group"].T
    losses = np.array([(0.5 * residuals[own] ** 2).mean() for own in members])
    slope = gradients.mean(0)
    for value, own in zip(dual, members, strict=True):
        slope = slope + value * gradients[own].mean(0)
    return losses, (0.5 * residuals**2).mean(), slope


SPLITS = {
    "one client": [list(range(12))],
    "two clients": [[0, 3, 4, 5, 6, 7, 9, 11], [1, 2, 8, 10]],
    "clients without a group": [[0, 2, 3, 4, 5, 6, 7], [1], [8, 9], [10, 11]],
}


@pytest.mark.parametrize("split", SPLITS.values(), ids=SPLITS)
def test_the_run_is_that_of_the_equations(linear_task, play, split):
    data = people()
    assert len(np.unique(data["group"].sum(1))) > 2
    app = client_app(
        linear_task([part(data, chosen) for chosen in split], 2), BoundedGroupLossClient
    )
    strategy = BoundedGroupLoss(
        groups=NAMES,
        upper_bound=[0.3, 0.2, 0.4],
        overlapping=True,
        dual_bound=3.0,
        dual_learning_rate=0.2,
        certificate_radius=5.0,
        **ANY,
    )
    run = play(strategy, app, len(split), INITIAL, 6, STEP)
    weight, theta, overall, excesses = INITIAL["weight"][0], np.zeros(3), [], []
    for server_round in range(1, 7):
        dual = dual_weights(theta, 3.0)
        # The first round knows no counts.
        used = dual if server_round > 1 else np.zeros(3)
        losses, mean, slope = lagrangian(data, weight, used)
        metrics = run.train(server_round)
        for name, value, loss in zip(NAMES, dual, losses, strict=True):
            assert metrics[f"dual/{name}"] == pytest.approx(value, rel=1e-4)
            assert metrics[f"group-loss/{name}"] == pytest.approx(loss, rel=1e-4)
        overall.append(mean)
        excesses.append(losses - [0.3, 0.2, 0.4])
        value = np.mean(overall) + 3.0 * max(0, np.mean(excesses, 0).max())
        assert metrics["primal-value"] == pytest.approx(value, rel=1e-4)
        weight = weight - 0.1 * slope
        assert run.models[server_round]["weight"][0] == pytest.approx(weight, rel=1e-4)
        theta = theta + 0.2 * excesses[-1]
        losses, _, _ = lagrangian(data, weight, theta)
        tested = run.evaluate(server_round)
        assert tested["group-loss/old"] == pytest.approx(losses[1], rel=1e-4)


def test_flags_of_groups_that_part_the_examples_are_their_indices(linear_task, play):
    index = np.arange(12) % 3
    flags = {**people(), "group": np.eye(3, dtype=bool)[index]}
    runs = []
    for data, overlapping in ((flags, True), ({**flags, "group": index}, False)):
        app = client_app(linear_task([data], 2), BoundedGroupLossClient)
        strategy = BoundedGroupLoss(
            groups=NAMES,
            upper_bound=0.2,
            overlapping=overlapping,
            certificate_radius=5.0,
            **ANY,
        )
        run = play(strategy, app, 1, INITIAL, 4, STEP)
        best = strategy.iterates()["best-feasible"]["weight"].numpy()
        runs.append((run, strategy.dual, best))
    (one, dual, best), (other, expected, expected_best) = runs
    assert dual == pytest.approx(expected, rel=1e-6)
    assert best == pytest.approx(expected_best, rel=1e-6)
    for server_round in range(1, 5):
        for kind in ("train", "evaluate"):
            found = dict(getattr(one, kind)(server_round))
            wanted = dict(getattr(other, kind)(server_round))
            assert found.keys() == wanted.keys()
            for name, value in wanted.items():
                assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_sums_by_hand():
    flags = torch.tensor([[True, True], [False, True], [False, False]])
    found = group_sums(torch.tensor([1.0, 2.0, 4.0]), flags, 2)
    assert found == {SUMS: [1.0, 3.0, 7.0], COUNTS: [1.0, 2.0, 3.0]}
    with pytest.raises(ValueError, match=r"torch.bool\[3, 2\]' must be torch.bool\[ex"):
        group_sums(torch.ones(3), flags, 3)


@pytest.mark.parametrize(
    ("sums", "counts", "reason"),
    [
        ([1.0, 1.0], [1.0, 1.0], "metric 'group-loss-sums'="),
        ([1.0, 1.0, 2.0], [2.0, 1.0, 1.0], "has a group of more than all examples"),
        ([1.0, 1.0, 2.0], [1.0, 1.0, 3.0], "adds up to 3, more than 'num-examples'=2"),
        ([1.0, 1.0, 2.0], [0.0, 1.0, 2.0], "of a group without examples"),
    ],
)
def test_malformed_sums_are_dropped(reply, aggregate, caplog, sums, counts, reason):
    strategy = BoundedGroupLoss(groups=["a", "b"], upper_bound=1.0, overlapping=True)
    sent = {"w": np.zeros(1, np.float32)}

    def answer(w, n, sums, counts):
        return reply({"w": np.float32([w])}, n, **{SUMS: sums, COUNTS: counts})

    good = answer(2.0, 4, [1.0, 3.0, 4.0], [2.0, 2.0, 4.0])
    new, metrics = aggregate(strategy, sent, [good, answer(9.0, 2, sums, counts), good])
    assert new["w"] == pytest.approx([2.0])
    assert (metrics["num-dropped"], metrics["group-loss/b"]) == (1, 1.5)
    assert reason in caplog.text


def test_a_client_that_gives_indices_is_told(linear_task):
    data = {**people(), "group": np.arange(12) % 3}
    app = client_app(linear_task([data] * 2, 2), BoundedGroupLossClient)
    strategy = BoundedGroupLoss(groups=NAMES, upper_bound=0.2, overlapping=True)
    grid = LocalGrid(app, 2, STEP)
    messages = strategy.configure_train(1, to_record(INITIAL), ConfigRecord(), grid)
    [answer, _] = grid.send_and_receive(messages)
    assert "must be torch.bool[examples, 3], a flag for each" in answer.error.reason


def test_under_a_mechanism_all_examples_are_noised_with_the_groups(linear_task, play):
    app = client_app(linear_task([people()] * 4, 2), BoundedGroupLossClient)
    mechanism = Mechanism(
        num_rounds=2,
        num_sampled_clients=4,
        population_size=4,
        clipping=100.0,
        noise_multiplier=1e-6,
    )
    strategy = BoundedGroupLoss(
        groups=NAMES, upper_bound=0.2, overlapping=True, mechanism=mechanism
    )
    metrics = play(strategy, app, 4, INITIAL, 2, STEP).train(2)
    assert (metrics["num-replies"], metrics["num-dropped"]) == (4, 0)
    weight = play_once(linear_task, play)
    losses, _, _ = lagrangian(people(), weight, np.zeros(3))
    assert metrics["group-loss/old"] == pytest.approx(losses[1], rel=1e-2)


def play_once(linear_task, play):
    """Return the model after a round of FedAvg."""
    app = client_app(linear_task([people()], 2), BoundedGroupLossClient)
    strategy = BoundedGroupLoss(
        groups=NAMES, upper_bound=0.2, overlapping=True, **ANY
    )  # of which the first round knows no counts
    return play(strategy, app, 1, INITIAL, 1, STEP).models[1]["weight"][0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"overlapping": 1}, "overlapping=1 must be True or False"),
        ({"labels": ["x"]}, r"labels=\['x'\] must be left out where groups overlap"),
        ({"group_counts": 3}, "group_counts=3 must be left out where groups overlap"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BoundedGroupLoss(
            **{"groups": ["a"], "upper_bound": 1.0, "overlapping": True, **options}
        )


# A schedule -----------------------------------------------------------------------


def run_with(rate, linear_task, play, rounds=4):
    app = client_app(linear_task([people()], 2), BoundedGroupLossClient)
    strategy = BoundedGroupLoss(
        groups=NAMES,
        upper_bound=0.2,
        overlapping=True,
        dual_learning_rate=rate,
        **ANY,
    )
    run = play(strategy, app, 1, INITIAL, rounds, STEP)
    return [run.train(r)["dual/old"] for r in range(1, rounds + 1)], strategy


def test_the_rate_of_the_dual_is_that_of_its_round(linear_task, play):
    constant, _ = run_with(0.5, linear_task, play)
    assert run_with(lambda server_round: 0.5, linear_task, play)[0] == constant
    held, strategy = run_with(Piecewise({1: 0.5, 3: 0.0}), linear_task, play)
    assert held[:3] == constant[:3]
    assert held[3] == held[2] != constant[3]
    assert "rate Piecewise(values={1: 0.5, 3: 0.0})" in str(strategy.settings())
    with pytest.raises(ValueError, match=r"dual_learning_rate\(1\)=-1 must be a fin"):
        run_with(lambda server_round: -1, linear_task, play)
