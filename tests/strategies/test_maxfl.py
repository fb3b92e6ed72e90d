"""MaxFL: its weights and their limits, its objective, and a toy with two basins."""

import logging
import re
from functools import partial
from math import exp, inf, nan

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext.client.app import client_app
from flower_ext.client.personal import Personal
from flower_ext.core.arrays import to_record
from flower_ext.core.sampling import UniformSampler
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD, Adam
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies.maxfl import (
    OWN,
    REQUIREMENT,
    MaxFL,
    MaxFLClient,
    appeal,
    appeal_weight,
)

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
WEIGHT, APPEALED = "appeal-weight", "appealed"
STEP = {"lr": 1.0, "batch-size": 100, "local-steps": 1}


# The weight -----------------------------------------------------------------------


@given(st.floats(-1e3, 1e3))
def test_no_honest_weight_is_more_than_the_server_takes(gap):
    assert appeal_weight(gap) <= 0.25
    assert appeal_weight(gap * 1e-12) <= 0.25


def test_weights_of_the_specification():
    table = {0: 0.25, 1: 0.196612, 2: 0.104994, 4: 0.017663}
    for gap, q in table.items():
        assert appeal_weight(gap) == pytest.approx(q, abs=5e-7)
        assert appeal_weight(-gap) == appeal_weight(gap)
    assert appeal_weight(0) == 0.25


@settings(derandomize=True, deadline=None)
@given(st.floats(-30, 30), st.floats(0.1, 3))
def test_weight_is_s_times_one_minus_s(gap, temperature):
    s = 1 / (1 + exp(-temperature * gap))
    assert appeal_weight(gap, temperature) == pytest.approx(s * (1 - s), abs=1e-12)
    # The slope of the sigmoid, by differences, is the temperature times the weight.
    h = 1e-6
    slope = (
        1 / (1 + exp(-temperature * (gap + h)))
        - 1 / (1 + exp(-temperature * (gap - h)))
    ) / (2 * h)
    assert temperature * appeal_weight(gap, temperature) == pytest.approx(
        slope, abs=1e-8
    )


@pytest.mark.parametrize("gap", [1e4, -1e4, 1e300, -1e300, inf, -inf])
def test_weight_of_a_huge_gap_is_nothing(gap):
    assert appeal_weight(gap) == 0.0
    assert appeal_weight(gap, temperature=1e10) == 0.0


@pytest.mark.parametrize("sign", [1, -1])
def test_far_from_the_requirement_weights_are_exponentials(sign):
    # rho -> -inf: q ~ exp(rho - F), clients of small loss weigh most (softmin);
    # rho -> +inf: q ~ exp(F - rho), clients of large loss weigh most (softmax).
    losses, rho = np.array([0.5, 1.0, 3.0]), -sign * 40.0
    q = np.array([appeal_weight(loss - rho) for loss in losses])
    expected = np.exp(-sign * losses)
    assert q / q.sum() == pytest.approx(expected / expected.sum(), rel=1e-12)


def test_appeal_counts_whose_requirement_is_met():
    assert appeal(1.0, 1.0) == {WEIGHT: 0.25, APPEALED: 1.0}
    assert appeal(1.1, 1.0)[APPEALED] == 0.0
    assert appeal(3.0, 2.0, temperature=2.0)[WEIGHT] == pytest.approx(0.104994, 1e-5)


@pytest.mark.parametrize("loss", [nan, inf, -inf])
@pytest.mark.parametrize("requirement", [0.0, nan, inf])
def test_model_that_diverged_is_wanted_and_moved_by_nobody(loss, requirement):
    assert appeal(loss, requirement) == {WEIGHT: 0.0, APPEALED: 0.0}


@pytest.mark.parametrize("requirement", [nan, inf, -inf])
@pytest.mark.parametrize("loss", [-1.0, 0.0, 1e300])
def test_who_has_no_model_of_its_own_wants_any_finite_one(loss, requirement):
    assert appeal(loss, requirement, 5.0) == {WEIGHT: 0.0, APPEALED: 1.0}


# The strategy on given replies ----------------------------------------------------


@pytest.fixture(scope="session")
def asked(reply):
    """Make the reply of a client that trained to ``w`` and reports its appeal."""

    def make(w, q, n=1, appealed=0.0, **metrics):
        reported = {WEIGHT: q, APPEALED: appealed, **metrics}
        present = {k: v for k, v in reported.items() if v is not None}
        return reply({"w": np.float32(w)}, n, **present)

    return make


SENT = {"w": np.float32([1.0, -1.0])}

clients = st.lists(
    st.tuples(
        st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=2),
        st.floats(1e-6, 0.25),
        st.integers(1, 1000),
    ),
    min_size=1,
    max_size=5,
)


def test_direction_is_the_weighted_mean(asked, aggregate):
    @settings(derandomize=True, deadline=None, max_examples=60)
    @given(clients, st.sampled_from([0.0, 1e-5, 0.1, 1.0]))
    def check(cohort, epsilon):
        ws, qs, _ = (np.array(column) for column in zip(*cohort, strict=True))
        new, metrics = aggregate(
            MaxFL(epsilon=epsilon, **ANY), SENT, [asked(*client) for client in cohort]
        )
        sums = (qs[:, None] * (ws - SENT["w"])).sum(0)
        expected = SENT["w"] + sums / (qs.sum() + epsilon)
        assert new["w"] == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert metrics["appeal-weight-sum"] == pytest.approx(qs.sum())

    check()


@pytest.mark.parametrize("gap", [-20.0, -1.0, 0.0, 0.3, 20.0])
def test_equal_gaps_weigh_clients_not_examples(asked, aggregate, gap):
    q = appeal_weight(gap)
    cohort = [([3, 0], 1), ([5, 2], 999), ([1, 4], 10)]
    new, _ = aggregate(MaxFL(epsilon=0.0), SENT, [asked(w, q, n) for w, n in cohort])
    assert new["w"] == pytest.approx([3, 2], rel=1e-6)


def test_epsilon_holds_the_model_where_nobody_is_near(asked, aggregate):
    cohort = [asked([3, 1], 1e-9), asked([3, 1], 1e-9)]
    still, _ = aggregate(MaxFL(epsilon=1e-5), SENT, cohort)
    assert still["w"] == pytest.approx(SENT["w"], abs=1e-3)
    moved, _ = aggregate(MaxFL(epsilon=0.0), SENT, cohort)
    assert moved["w"] == pytest.approx([3, 1])


def test_weights_of_nothing_keep_the_model(asked, aggregate):
    new, metrics = aggregate(MaxFL(epsilon=0.0), SENT, [asked([3, 1], 0.0)] * 2)
    assert new is None
    assert metrics["num-replies"] == 2


def test_server_optimizer_is_applied(asked, aggregate):
    cohort = [asked([3, -1], 0.2), asked([3, -1], 0.1)]
    half = MaxFL(epsilon=0.0, server_optimizer=SGD(0.5))
    new, _ = aggregate(half, SENT, cohort)
    assert new["w"] == pytest.approx([2, -1])
    adam = MaxFL(epsilon=0.0, server_optimizer=Adam(0.1, 0.9, 0.99, 1e-3))
    new, _ = aggregate(adam, SENT, cohort)
    v = 0.99 * 1e-6 + 0.01 * 2.0**2
    assert new["w"] == pytest.approx([1 + 0.1 * 0.1 * 2 / (np.sqrt(v) + 1e-3), -1])


@pytest.mark.parametrize(
    ("q", "appealed", "reason"),
    [
        (0.2500001, 0.0, r"metric 'appeal-weight'=0\.2500001 must be <= 0\.25"),
        (-0.1, 0.0, r"metric 'appeal-weight'=-0\.1 must be .*>= 0"),
        (nan, 0.0, "metric 'appeal-weight'=nan must be"),
        (inf, 0.0, "metric 'appeal-weight'=inf must be"),
        ([0.1, 0.1], 0.0, "metric 'appeal-weight'="),
        (None, 0.0, "no metric 'appeal-weight'"),
        (0.1, None, "no metric 'appealed'"),
        (0.1, nan, "metric 'appealed'=nan must be"),
        (0.1, 1000.0, r"metric 'appealed'=1000\.0 must be <= 1"),
        (0.1, -1.0, r"metric 'appealed'=-1\.0 must be"),
    ],
)
def test_reply_without_a_usable_weight_is_dropped(
    asked, aggregate, caplog, q, appealed, reason
):
    caplog.set_level(logging.WARNING, logger="flwr")
    cohort = [asked([3, 1], 0.1), asked([99, 99], q, appealed=appealed)]
    new, metrics = aggregate(MaxFL(epsilon=0.0), SENT, [*cohort, asked([5, 3], 0.1)])
    assert new["w"] == pytest.approx([4, 2])
    assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 1)
    assert re.search(reason, caplog.text)


def test_share_of_clients_that_want_the_model(asked, aggregate):
    cohort = [asked([1, 1], 0.1, n, appealed) for n, appealed in ((1, 1), (99, 0))]
    _, metrics = aggregate(MaxFL(), SENT, cohort)
    assert metrics["gm-appeal"] == 0.5
    assert APPEALED not in metrics and WEIGHT not in metrics
    _, metrics = aggregate(MaxFL(), SENT, [*cohort, cohort[1], cohort[0]])
    assert metrics["gm-appeal"] == 0.5


def test_client_without_examples_has_no_say(asked, aggregate):
    wants = asked([3, 1], 0.1, 5, appealed=1.0)
    empty = [asked([99, 99], q, 0, appealed=a) for q, a in ((0.0, 0.0), (0.25, 1.0))]
    for cohort in ([wants, *empty], [*empty, wants]):
        new, metrics = aggregate(MaxFL(epsilon=0.0), SENT, cohort)
        assert new["w"] == pytest.approx([3, 1])
        assert metrics["gm-appeal"] == 1.0
        assert metrics["num-replies"] == 3
    new, metrics = aggregate(MaxFL(), SENT, empty)
    assert new is None  # nobody weighs anything: the model is kept
    assert "gm-appeal" not in metrics


# The objective --------------------------------------------------------------------


def sigmoid_objective(w, centres, rho, temperature):
    """The smooth share of clients whose requirement is not met."""
    gaps = 0.5 * (w - np.array(centres)) ** 2 - rho
    return float(np.mean(1 / (1 + np.exp(-temperature * gaps))))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("start", [-1.0, 0.7, 2.5])
def test_one_step_is_the_gradient_of_the_objective(
    point_task, play, start, temperature
):
    centres, rho, lr, h = [0.0, 1.0, 4.0], 0.4, 0.01, 1e-5
    # Sizes differ: the objective counts clients, not examples.
    data = [{"c": [c] * n} for c, n in zip(centres, (1, 50, 3), strict=True)]
    app = client_app(point_task(data), MaxFLClient)
    strategy = MaxFL(temperature=temperature, requirement=rho, epsilon=1e-3)
    run = play(strategy, app, 3, {"w": start}, config={**STEP, "lr": lr})
    moved = float(run.models[1]["w"]) - start
    q_sum = run.train()["appeal-weight-sum"]
    slope = (
        sigmoid_objective(start + h, centres, rho, temperature)
        - sigmoid_objective(start - h, centres, rho, temperature)
    ) / (2 * h)
    expected = -lr * len(centres) * slope / temperature / (q_sum + 1e-3)
    assert moved == pytest.approx(expected, rel=1e-3)


# Nine clients want 0 and one wants 10; each is content with a loss of 0.3.
CENTRES = [0.0] * 9 + [10.0]


def satisfied(w):
    return [0.5 * (w - c) ** 2 <= 0.3 for c in CENTRES]


@pytest.mark.parametrize(("start", "end", "content"), [(5.0, 0.0, 9), (9.0, 10.0, 1)])
def test_toy_has_two_basins(point_task, play, start, end, content):
    app = client_app(point_task([{"c": [c]} for c in CENTRES]), MaxFLClient)
    strategy = MaxFL(requirement=0.3, fraction_evaluate=0.0)
    run = play(strategy, app, 10, {"w": start}, 14, {**STEP, "lr": 0.5})
    w = float(run.models[-1]["w"])
    assert w == pytest.approx(end, abs=1e-3)
    assert sum(satisfied(w)) == content
    assert run.train(14)["gm-appeal"] == content / 10


def test_average_satisfies_nobody(point_task, play):
    app = client_app(point_task([{"c": [c]} for c in CENTRES]))
    strategy = AdditiveStrategy(fraction_evaluate=0.0)
    run = play(strategy, app, 10, {"w": 5.0}, 14, {**STEP, "lr": 0.5})
    w = float(run.models[-1]["w"])
    assert w == pytest.approx(1.0, abs=1e-3)
    assert sum(satisfied(w)) == 0


@pytest.mark.parametrize("requirement", [0.0, 1e5])
def test_gap_of_ten_thousand(point_task, play, requirement):
    # Losses of 20,000 and 31,250: nobody is near, the model stays as it is.
    app = client_app(point_task([{"c": [200.0]}, {"c": [-250.0]}]), MaxFLClient)
    run = play(MaxFL(requirement=requirement), app, 2, {"w": 0.0}, config=STEP)
    assert run.models[1] == run.models[0]
    assert run.train()["num-replies"] == 2
    assert run.train()["appeal-weight-sum"] == 0
    for metrics in (run.train(), run.evaluate()):  # all are won, or all are lost
        assert metrics["gm-appeal"] == (requirement > 0)


# The requirement ------------------------------------------------------------------


def requirements(calls, kind="train"):
    """Return what is kept of each client's requirement, by round and client."""
    return {
        (call.server_round, call.client): Personal(call.state).numbers(REQUIREMENT)[
            "loss"
        ]
        for call in calls
        if call.kind == kind
    }


def loss_of_own_model(start, c, steps, lr):
    """Gradient descent on 0.5 * (w - c)**2 shrinks w - c by 1 - lr a step."""
    return 0.5 * ((start - c) * (1 - lr) ** steps) ** 2


def test_requirement_is_the_loss_of_an_own_model(point_task, play, spied):
    task = point_task([{"c": [1.0]}, {"c": [-4.0, -4.0]}], start=2.0)
    app, calls = spied(client_app(task, MaxFLClient))
    config = {**STEP, "lr": 0.2}
    run = play(MaxFL(warmup_steps=3), app, 2, {"w": 7.0}, 3, config)
    assert run.models[0] != run.models[1] != run.models[2]
    for (_, client), found in requirements(calls).items():
        # From the fresh start 2, not from the global model; the same in all rounds.
        expected = loss_of_own_model(2.0, (1.0, -4.0)[client], 3, 0.2)
        assert found == pytest.approx(expected, rel=1e-5)


@pytest.fixture(scope="session")
def noisy_task(linear_task):
    """Two clients with the same data; model and order of batches are random."""
    rng = np.random.default_rng(0)
    data = {"x": rng.normal(size=(7, 2)), "y": rng.normal(size=7)}
    return linear_task([data, data], 2)


NOISY = {"lr": 0.1, "batch-size": 2}
PLANE = {"weight": np.ones((1, 2), np.float32)}


def test_requirement_survives_the_loss_of_the_state(noisy_task, play, spied):
    kept, found = (
        spied(client_app(noisy_task, MaxFLClient), forget) for forget in (False, True)
    )
    for app, _ in (kept, found):
        play(MaxFL(warmup_steps=5), app, 2, PLANE, 3, NOISY)
    assert len(requirements(kept[1])) == 6
    # Found again in every round, at training as at evaluation.
    for kind in ("train", "evaluate"):
        assert requirements(found[1], kind) == requirements(kept[1], kind)
    by_client = requirements(kept[1])
    assert all(by_client[r, k] == by_client[1, k] for r, k in by_client)
    assert by_client[1, 0] != by_client[1, 1]  # another order of the batches


def test_own_model_starts_from_the_seed_alone(noisy_task, play, spied):
    def run(seed):
        app, calls = spied(client_app(noisy_task, MaxFLClient))
        config = {"lr": 0.1, "batch-size": 100, "seed": seed}
        play(MaxFL(warmup_steps=1), app, 2, PLANE, config=config)
        return requirements(calls)

    first = run(0)
    # Full batches: same data, same start, same requirement; another seed, another.
    assert first[1, 0] == pytest.approx(first[1, 1], rel=1e-6)
    assert run(0) == first
    assert run(1)[1, 0] != pytest.approx(first[1, 0], rel=1e-3)


def test_warm_up_does_not_change_the_training(noisy_task, play, spied):
    trained = []
    for strategy in (MaxFL(warmup_steps=4), MaxFL(requirement=0.3), AdditiveStrategy()):
        app, calls = spied(client_app(noisy_task, MaxFLClient))
        play(strategy, app, 2, PLANE, config=NOISY)
        replies = [call.reply for call in calls if call.kind == "train"]
        trained.append([reply["arrays"]["weight"].numpy() for reply in replies])
    assert np.array_equal(trained[0], trained[1])
    assert np.array_equal(trained[0], trained[2])


def test_requirement_of_the_strategy(point_task, play, spied):
    task = point_task([{"c": [0.0]}, {"c": [3.0]}])
    inner = client_app(task, MaxFLClient)
    grid = LocalGrid(inner, 2, STEP)
    # At w = 1 the losses are 0.5 and 2; a second run on the grid has its own.
    for requirement, share in ((0.4, 0.0), (0.5, 0.5), (2.5, 1.0)):
        run = play(MaxFL(requirement=requirement), grid, 2, {"w": 1.0})
        assert run.train()["gm-appeal"] == share
        expected = sum(appeal_weight(loss - requirement) for loss in (0.5, 2.0))
        assert run.train()["appeal-weight-sum"] == pytest.approx(expected)
    app, calls = spied(inner)
    run = play(MaxFL(requirement=0.5), app, 2, {"w": 1.0}, config=STEP)
    assert calls and not any(call.state for call in calls)
    assert not any(name.startswith("preferred") for name in run.evaluate())


def test_requirement_of_the_client_goes_before_the_strategys(point_task, play):
    asked = []

    def own(local):
        asked.append(local.client)
        return 0.6 if local.client == 0 else 1.9

    task = point_task([{"c": [0.0]}, {"c": [3.0]}])
    app = client_app(task, partial(MaxFLClient, requirement=own))
    for strategy in (MaxFL(), MaxFL(requirement=100.0)):
        asked.clear()
        run = play(strategy, app, 2, {"w": 1.0}, 3, {**STEP, "lr": 0.01})
        assert run.train(1)["gm-appeal"] == 0.5
        assert asked == [0, 1]  # once each, for three rounds of both kinds


def test_requirement_that_is_none_wants_any_model_and_ends_nothing(
    point_task, play, caplog
):
    caplog.set_level(logging.WARNING, logger="flwr")

    def own(local):
        return (nan, inf, 0.0)[local.client]

    task = point_task([{"c": [0.0]}, {"c": [4.0]}, {"c": [2.0]}])
    app = client_app(task, partial(MaxFLClient, requirement=own))
    run = play(MaxFL(epsilon=0.0), app, 3, {"w": 1.0}, 3, STEP)
    for server_round in (1, 2, 3):
        assert run.train(server_round)["num-errors"] == 0
    assert run.train(1)["gm-appeal"] == pytest.approx(2 / 3)
    assert float(run.models[1]["w"]) == pytest.approx(2.0)  # the last client's alone
    assert caplog.text.count("any finite one appeals") == 2  # once each


# At a curvature of 1 both rates diverge: to about 1e30, and beyond float32.
@pytest.mark.parametrize(("lr", "steps"), [(3.0, 100), (1e30, 20)])
def test_own_model_that_diverged_is_dropped_for_its_fresh_start(
    point_task, play, spied, lr, steps
):
    def metrics(model, batch):
        return {"w": model.w.expand(len(batch["c"]))}

    task = point_task([{"c": [1.0]}, {"c": [-1.0]}], start=3.0, metrics=metrics)
    app, calls = spied(client_app(task, MaxFLClient))
    grid = LocalGrid(app, 2, {**STEP, "lr": lr})
    strategy = MaxFL(warmup_steps=steps, fraction_train=0.0)
    found = play(strategy, grid, 2, {"w": 0.5}).evaluate()
    assert requirements(calls, "evaluate") == {(1, 0): 2.0, (1, 1): 8.0}
    assert {Personal(call.state).numbers(OWN)["w"] for call in calls} == {3.0}
    assert found["gm-appeal"] == 1


def test_broken_data_are_no_error(point_task, play):
    task = point_task([{"c": [0.0]}, {"c": [nan]}])
    run = play(MaxFL(warmup_steps=2), client_app(task, MaxFLClient), 2, {"w": 1.0}, 2)
    for server_round in (1, 2):
        assert run.train(server_round)["num-errors"] == 0
        assert run.evaluate(server_round)["gm-appeal"] <= 0.5


def test_clients_without_examples_are_in_no_share(point_task, play):
    none = {"c": []}
    data = [
        {"c": [0.0]},
        {"c": [1.0]},
        (none, {"c": [1.0, 2.0]}),
        (none, none),
        ({"c": [0.5]}, none),
    ]
    app = client_app(point_task(data, start=9.0), MaxFLClient)
    run = play(MaxFL(warmup_steps=1), app, 5, {"w": 0.6}, 2, {**STEP, "lr": 0.1})
    for server_round in (1, 2):
        assert run.train(server_round)["gm-appeal"] == 1
        assert run.evaluate(server_round)["gm-appeal"] == 1
        # Whoever has no model of its own uses the global one.
        w = float(run.models[server_round]["w"])
        losses = [0.5 * (w - c) ** 2 for c in (0, 1, 1, 2)]
        found = run.evaluate(server_round)["preferred-loss"]
        assert found == pytest.approx(np.mean(losses), rel=1e-5)
    run = play(MaxFL(requirement=-1.0), app, 5, {"w": 0.6}, 1, STEP)
    assert run.train()["gm-appeal"] == run.evaluate()["gm-appeal"] == 0


# Rounds of equal weights, and clients that leave ----------------------------------


def test_rounds_of_equal_weights_are_fedavg_without_sizes(point_task, play):
    data = [{"c": [0.0]}, {"c": [2.0] * 9}, {"c": [7.0]}]
    app = client_app(point_task(data), MaxFLClient)
    strategy = MaxFL(requirement=0.5, warmup_rounds=2, epsilon=0.01)
    run = play(strategy, app, 3, {"w": 0.5}, 3, {**STEP, "lr": 0.5})
    w = 0.5
    for server_round in (1, 2):
        w = np.mean([w + 0.5 * (c - w) for c in (0, 2, 7)])
        assert float(run.models[server_round]["w"]) == pytest.approx(w, rel=1e-6)
        assert run.train(server_round)["appeal-weight-sum"] == pytest.approx(0.75)
    q = np.array([appeal_weight(0.5 * (w - c) ** 2 - 0.5) for c in (0, 2, 7)])
    moved = float(q @ (0.5 * (np.array([0, 2, 7]) - w))) / (q.sum() + 0.01)
    assert float(run.models[3]["w"]) == pytest.approx(w + moved, rel=1e-5)


def test_equal_weights_end_where_an_interrupted_run_says(point_task, play, tmp_path):
    data = [{"c": [0.0]}, {"c": [2.0]}, {"c": [7.0]}]

    def run(rounds, folder):
        app = client_app(point_task(data), MaxFLClient)
        strategy = MaxFL(requirement=0.5, warmup_rounds=3)
        config = {**STEP, "lr": 0.3}
        return play(strategy, app, 3, {"w": 0.5}, rounds, config, checkpoint=folder)

    whole = run(5, tmp_path / "whole")
    run(2, tmp_path / "halves")
    assert run(5, tmp_path / "halves").models[-1] == whole.models[-1]


@pytest.mark.parametrize("first", [0, 1, 3])
def test_clients_leave_when_they_may_and_the_model_does_not_appeal(
    point_task, play, spied, first
):
    # The last client pulls w up, the others, which hold w at 0.5, want no such model.
    data = [{"c": [0.0]}, {"c": [1.0]}, {"c": [9.0]}]
    app, calls = spied(client_app(point_task(data), MaxFLClient))
    strategy = MaxFL(requirement=0.6, opt_out_from=first, temperature=0.1)
    initial = {"w": np.float32(0.5)}
    run = play(strategy, app, 3, initial, 4, {**STEP, "lr": 0.05})
    for server_round in (1, 2, 3, 4):
        leaves = 0 < first <= server_round
        metrics = run.train(server_round)
        assert metrics["gm-appeal"] == pytest.approx(2 / 3)  # who leaves has a say
        assert metrics["num-errors"] == 0
        assert metrics.get("num-opted-out") == (leaves if first else None)
        assert np.isfinite(metrics["train-loss"])
        before, after = (float(m["w"]) for m in run.models[server_round - 1 :][:2])
        assert (after > before) != leaves
        reply = next(
            c.reply
            for c in calls
            if (c.kind, c.client, c.server_round) == ("train", 2, server_round)
        )
        stayed = float(reply["arrays"]["w"].numpy()) == before
        assert stayed == leaves


def test_clients_that_left_come_back_and_the_model_waits_for_them(
    point_task, play, spied
):
    app = client_app(point_task([{"c": [0.0]}] * 2), MaxFLClient)
    for first, end in ((2, 0.0), (1, 9.0)):
        strategy = MaxFL(requirement=0.1, opt_out_from=first, temperature=0.1)
        run = play(strategy, app, 2, {"w": 9.0}, 3, STEP)
        for model in run.models[1:]:
            assert float(model["w"]) == pytest.approx(end, abs=0.01)
        assert run.train(3)["num-opted-out"] == (0 if end == 0 else 2)


def test_client_that_diverged_neither_moves_nor_wants_the_model(point_task, play):
    # The third client's loss is infinite in float32, its gradient is not; the
    # fourth's data are broken.
    data = [{"c": [0.0]}, {"c": [2.0]}, {"c": [1e30]}, {"c": [nan]}]
    app = client_app(point_task(data), MaxFLClient)
    run = play(MaxFL(requirement=0.5, epsilon=0.0), app, 4, {"w": 1.0}, config=STEP)
    assert float(run.models[1]["w"]) == pytest.approx(1.0)  # the mean of 0 and 2
    counts = ("num-replies", "num-dropped", "num-errors")
    assert [run.train()[name] for name in counts] == [3, 1, 0]
    assert run.train()["gm-appeal"] == pytest.approx(2 / 3)
    assert run.evaluate()["gm-appeal"] == pytest.approx(2 / 4)


# Metrics --------------------------------------------------------------------------


def test_appeal_of_seen_and_unseen_clients_is_a_hand_count(point_task, play, spied):
    centres, rho = [0.0, 0.2, 0.5, 1.0, 1.5, 2.0, 3.0], 0.3
    app, calls = spied(
        client_app(point_task([{"c": [c]} for c in centres]), MaxFLClient)
    )
    strategy = MaxFL(
        requirement=rho,
        fraction_train=0.3,
        fraction_evaluate=0.6,
        sampler=UniformSampler(seed=3),
    )
    run = play(strategy, app, 7, {"w": 0.9}, 6, {**STEP, "lr": 0.3})
    seen, sizes = set(), set()
    for server_round in range(1, 7):
        by_kind = {
            kind: {
                call.client
                for call in calls
                if call.kind == kind and call.server_round == server_round
            }
            for kind in ("train", "evaluate")
        }
        before, after = (
            {k: 0.5 * (float(w["w"]) - c) ** 2 <= rho for k, c in enumerate(centres)}
            for w in run.models[server_round - 1 : server_round + 1]
        )
        trained, asked = by_kind["train"], by_kind["evaluate"]
        seen |= trained
        share = np.mean([before[k] for k in trained])
        assert run.train(server_round)["gm-appeal"] == pytest.approx(share)
        metrics = run.evaluate(server_round)
        for name, who in (
            ("gm-appeal", asked),
            ("gm-appeal-seen", asked & seen),
            ("gm-appeal-unseen", asked - seen),
        ):
            if who:
                assert metrics[name] == pytest.approx(np.mean([after[k] for k in who]))
            else:
                assert name not in metrics
            sizes.add((name, len(who)))
    assert len(sizes) > 6  # the cohorts were not all alike


def test_metrics_of_seen_and_unseen_clients_count_each_once(reply, scripted):
    values = [(1.0, 10, 0.2), (0.0, 1, 0.8), (1.0, 5, 0.5)]
    own = {"appeal-weight": 0.25}
    grid = scripted(
        [reply(SENT, n, appealed=a, accuracy=x, **own) for a, n, x in values]
    )
    strategy, sent = MaxFL(fraction_train=0.5, min_train_nodes=1), to_record(SENT)
    (trains,) = strategy.configure_train(1, sent, ConfigRecord(), grid)
    nodes = list(grid.get_node_ids())
    seen = nodes.index(trains.metadata.dst_node_id)
    strategy.aggregate_train(1, grid.send_and_receive([trains]))
    asked = strategy.configure_evaluate(1, sent, ConfigRecord(), grid)
    found = strategy.aggregate_evaluate(1, grid.send_and_receive(asked))
    others = [x for k, (_, _, x) in enumerate(values) if k != seen]
    assert found["accuracy-seen"] == values[seen][2]
    assert found["accuracy-unseen"] == pytest.approx(np.mean(others))
    assert found["gm-appeal"] == pytest.approx(2 / 3)
    assert "num-examples-seen" not in found


@pytest.mark.parametrize("lie", [1000.0, -1.0, 10**400, nan, inf])
def test_appeal_that_is_no_share_is_left_out(reply, scripted, caplog, lie):
    caplog.set_level(logging.WARNING, logger="flwr")
    grid = scripted([reply(None, 5, appealed=a) for a in (1.0, lie, 0.0)])
    strategy, sent = MaxFL(), to_record(SENT)
    asked = strategy.configure_evaluate(1, sent, ConfigRecord(), grid)
    found = strategy.aggregate_evaluate(1, grid.send_and_receive(asked))
    assert found["gm-appeal"] == found["gm-appeal-unseen"] == 0.5
    assert ("metric 'appealed'=" in caplog.text) == (lie in (1000.0, -1.0))


def test_preferred_model_is_the_one_of_less_training_loss(point_task, play):
    # Test data differ from training data, and in number.
    data = [
        ({"c": [0.0]}, {"c": [0.5]}),
        ({"c": [4.0]}, {"c": [3.0, 3.0, 3.0]}),
        ({"c": [1.0, 1.0]}, {"c": [2.0, 2.0]}),
    ]

    def metrics(model, batch):
        return {"distance": (model.w - batch["c"]).abs()}

    task = point_task(data, start=2.0, metrics=metrics)
    config = {**STEP, "lr": 0.2}
    run = play(
        MaxFL(warmup_steps=2, epsilon=0.0),
        client_app(task, MaxFLClient),
        3,
        {"w": 1.2},
        config=config,
    )
    weights = [
        appeal_weight(
            0.5 * (1.2 - train["c"][0]) ** 2
            - loss_of_own_model(2.0, train["c"][0], 2, 0.2)
        )
        for train, _ in data
    ]
    assert run.train()["appeal-weight-sum"] == pytest.approx(sum(weights), rel=1e-5)
    w = float(run.models[1]["w"])
    loss = distance = examples = wanted = 0.0
    for train, test in data:
        c, n, aim = train["c"][0], len(test["c"]), test["c"][0]
        own = c + (2.0 - c) * 0.8**2
        appealed = 0.5 * (w - c) ** 2 <= loss_of_own_model(2.0, c, 2, 0.2)
        wanted += appealed
        chosen = w if appealed else own
        loss += n * 0.5 * (chosen - aim) ** 2
        distance += n * abs(chosen - aim)
        examples += n
    assert 0 < wanted < 3
    found = run.evaluate()
    assert found["gm-appeal"] == pytest.approx(wanted / 3)
    assert found["preferred-loss"] == pytest.approx(loss / examples, rel=1e-5)
    assert found["preferred-distance"] == pytest.approx(distance / examples, rel=1e-5)
    assert found["loss"] != pytest.approx(found["preferred-loss"], rel=1e-2)


# A loop of one's own --------------------------------------------------------------


def app_with_a_loop(centres, requirement, reports_appeal):
    """A ClientApp that minimises 0.5 * (w - c)**2 with a loop of its own."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        w = message.content["arrays"]["w"].numpy()
        c = np.float32(centres[context.node_config["partition-id"]])
        temperature = message.content["config"]["maxfl-temperature"]
        found = appeal(float(0.5 * (w - c) ** 2), requirement, temperature)
        content = RecordDict(
            {
                "arrays": to_record({"w": np.asarray(w - np.float32(0.3) * (w - c))}),
                "metrics": MetricRecord({"num-examples": 1, **found}),
            }
        )
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        w = float(message.content["arrays"]["w"].numpy())
        loss = 0.5 * (w - centres[context.node_config["partition-id"]]) ** 2
        metrics = {"num-examples": 1, "loss": loss}
        if reports_appeal:
            metrics |= appeal(loss, requirement)
        content = RecordDict({"metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return app


@pytest.mark.parametrize("reports_appeal", [True, False])
def test_a_loop_of_ones_own_gives_the_same(point_task, play, reports_appeal):
    centres = [0.0, 0.5, 3.0]
    ours = client_app(point_task([{"c": [c]} for c in centres]), MaxFLClient)
    theirs = app_with_a_loop(centres, 0.4, reports_appeal)
    runs = [
        play(
            MaxFL(requirement=0.4, temperature=2.0),
            app,
            3,
            {"w": np.float32(1.0)},
            5,
            {**STEP, "lr": 0.3},
        )
        for app in (ours, theirs)
    ]
    for server_round in range(1, 6):
        first, second = (float(run.models[server_round]["w"]) for run in runs)
        assert first == pytest.approx(second, rel=1e-5)
    assert runs[0].evaluate(5)["loss"] == pytest.approx(runs[1].evaluate(5)["loss"])
    assert ("gm-appeal" in runs[1].evaluate(5)) == reports_appeal


# Settings and state ---------------------------------------------------------------


def test_clients_that_were_seen_are_saved(point_task, play, tmp_path):
    centres = [0.0, 0.2, 0.5, 1.0, 1.5, 2.0]

    def run(rounds, folder):
        app = client_app(point_task([{"c": [c]} for c in centres]), MaxFLClient)
        sampler = UniformSampler(seed=1)
        strategy = MaxFL(requirement=0.3, fraction_train=0.3, sampler=sampler)
        config = {**STEP, "lr": 0.3}
        initial = {"w": np.float32(0.9)}
        played = play(strategy, app, 6, initial, rounds, config, checkpoint=folder)
        return strategy.state_dict()["trained"], played

    seen, whole = run(4, tmp_path / "whole")
    first, _ = run(2, tmp_path / "halves")
    later, resumed = run(4, tmp_path / "halves")
    assert later == seen
    assert set(first) < set(seen) < set(range(6))
    assert resumed.models[-1] == whole.models[-1]
    for server_round in range(1, 5):
        assert resumed.evaluate(server_round) == whole.evaluate(server_round)
    assert "gm-appeal-unseen" in whole.evaluate(3)
    assert "gm-appeal-seen" in whole.evaluate(3)


def test_summary_logs_the_settings(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    MaxFL(temperature=2.0, epsilon=0.5, warmup_steps=7).summary()
    for line in (
        "MaxFL settings",
        "Temperature: 2.0",
        "Epsilon: 0.5",
        "Requirement: own model after 7 steps",
        "Rounds of equal weights: 0",
        "Clients may leave from round: never",
    ):
        assert line in caplog.text
    MaxFL(requirement=0.3).summary()
    assert "Requirement: 0.3" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0}, "temperature=0 must be a finite number > 0"),
        ({"temperature": -1.0}, "temperature=-1.0 must be a finite number > 0"),
        ({"temperature": nan}, "temperature=nan must be a finite number > 0"),
        ({"temperature": inf}, "temperature=inf must be a finite number > 0"),
        ({"temperature": "1"}, "temperature='1' must be a finite number > 0"),
        ({"epsilon": -1e-9}, "epsilon=-1e-09 must be a finite number >= 0"),
        ({"epsilon": nan}, "epsilon=nan must be a finite number >= 0"),
        ({"epsilon": inf}, "epsilon=inf must be a finite number >= 0"),
        ({"epsilon": None}, "epsilon=None must be a finite number >= 0"),
        ({"warmup_steps": 0}, "warmup_steps=0 must be an integer >= 1"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 must be an integer >= 1"),
        ({"requirement": nan}, "requirement=nan must be a finite number: None lets"),
        ({"requirement": inf}, "requirement=inf must be a finite number: None lets"),
        ({"requirement": "0"}, "requirement='0' must be a finite number: None lets"),
        ({"requirement": True}, "requirement=True must be a finite number: None lets"),
        ({"warmup_rounds": -1}, "warmup_rounds=-1 must be an integer >= 0"),
        ({"opt_out_from": 1.5}, "opt_out_from=1.5 must be an integer >= 0"),
        ({"min_train_nodes": -1}, "min_train_nodes=-1 must be an integer >= 0"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MaxFL(**options)
