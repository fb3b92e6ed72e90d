"""Scaffold: the minimum that FedAvg misses, its controls, and loops of one's own."""

import logging
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Context,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import AdditiveStrategy, Mechanism, client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.half import ClientHalf
from flower_ext.client.personal import Personal
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy.silo_budget import SiloPrivacy
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import Scaffold, ScaffoldClient
from flower_ext.strategies.scaffold import CHANGE, OWN, Controls

ETA, STEPS = 0.2, 5
CONFIG = {"lr": ETA, "local-steps": STEPS}
ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}


def controls_of(calls):
    """Return the last control of every client that was asked."""
    return {
        call.client: Personal(call.state).arrays(OWN, like={"w": torch.zeros(2)})["w"]
        for call in calls
        if call.kind == "train"
    }


# The minimum that FedAvg misses ---------------------------------------------------


def test_fedavg_is_biased_and_scaffold_is_not(quadratics, play):
    app = client_app(quadratics.task(), ScaffoldClient)
    biased = quadratics.fixed_point(ETA, STEPS)
    assert np.abs(biased - quadratics.minimizer).max() > 0.1
    run = partial(play, initial=quadratics.start, clients=3, config=CONFIG)
    average = run(AdditiveStrategy(**ALL), app, rounds=16)
    assert average.models[-1]["w"] == pytest.approx(biased, abs=1e-6)
    for option in ("I", "II"):
        found = run(Scaffold(option=option, **ALL), app, rounds=18)
        assert found.models[-1]["w"] == pytest.approx(quadratics.minimizer, abs=1e-6)


def test_with_momentum_the_minimum_is_the_same(quadratics, play):
    def optimizer(parameters, settings):
        return torch.optim.SGD(parameters, 0.1, momentum=0.6, nesterov=True)

    app = client_app(quadratics.task(optimizer=optimizer), ScaffoldClient)
    run = partial(play, app=app, clients=3, initial=quadratics.start, config=CONFIG)
    found = run(Scaffold(**ALL), rounds=20).models[-1]["w"]
    assert found == pytest.approx(quadratics.minimizer, abs=1e-6)


# The algorithm ----------------------------------------------------------------------


def simulate(quadratics, cohorts, steps=(STEPS,) * 3, option="II"):
    """Compute Algorithm 1 of the paper, in its own words, with NumPy."""
    hessians, centers = quadratics.hessians, quadratics.centers
    x, c = np.zeros(2), np.zeros(2)
    own = np.zeros((3, 2))
    for cohort in cohorts:
        moves, changes = [], []
        for k in cohort:
            y = x.copy()
            for _ in range(steps[k]):
                y -= ETA * (hessians[k] @ (y - centers[k]) - own[k] + c)
            new = own[k] - c + (x - y) / (steps[k] * ETA)
            if option == "I":
                new = hessians[k] @ (x - centers[k])
            moves.append(y - x)
            changes.append(new - own[k])
            own[k] = new
        x = x + np.mean(moves, 0)
        c = c + len(cohort) / 3 * np.mean(changes, 0)
    return x, c, own


@pytest.mark.parametrize("option", ["I", "II"])
def test_rounds_are_those_of_the_algorithm(quadratics, play, spied, option):
    app, calls = spied(client_app(quadratics.task(), ScaffoldClient))
    strategy = Scaffold(option=option, **{**ALL, "fraction_train": 0.67})
    found = play(strategy, app, 3, quadratics.start, rounds=6, config=CONFIG)
    cohorts = [
        sorted(c.client for c in calls if c.server_round == n) for n in range(1, 7)
    ]
    assert len({tuple(c) for c in cohorts}) > 1
    assert {len(c) for c in cohorts} == {2}
    x, c, own = simulate(quadratics, cohorts, option=option)
    assert found.models[-1]["w"] == pytest.approx(x, abs=1e-12)
    assert strategy.state_dict()["control"]["w"] == pytest.approx(c, abs=1e-12)
    for client, kept in controls_of(calls).items():
        assert kept.numpy() == pytest.approx(own[client], abs=1e-12)
    # Cohorts change nothing of where it goes.
    x, _, _ = simulate(quadratics, cohorts * 100, option=option)
    assert x == pytest.approx(quadratics.minimizer, abs=1e-6)


def test_steps_and_examples_may_differ_and_be_none(quadratics, play, spied):
    # Three clients, the last without examples: it counts among all, and stands still.
    task = quadratics.task(copies=[1, 3, 0])
    app, calls = spied(client_app(task, ScaffoldClient))
    strategy, config = Scaffold(**ALL), {"lr": ETA, "local-epochs": 2, "batch-size": 1}
    found = play(strategy, app, 3, quadratics.start, rounds=4, config=config)
    x, c, own = simulate(quadratics, [(0, 1)] * 4, steps=(2, 6, 0))
    assert found.models[-1]["w"] == pytest.approx(x, abs=1e-12)
    assert strategy.state_dict()["control"]["w"] == pytest.approx(c, abs=1e-12)
    for client, kept in controls_of(calls).items():
        assert kept.numpy() == pytest.approx(own[client], abs=1e-12)


def test_after_all_have_taken_part_the_control_is_the_mean(quadratics, play, spied):
    app, calls = spied(client_app(quadratics.task(), ScaffoldClient))
    strategy = Scaffold(**ALL)
    play(strategy, app, 3, quadratics.start, rounds=3, config=CONFIG)
    kept = torch.stack([*controls_of(calls).values()])
    assert len(kept) == 3
    assert kept.abs().max() > 0.1
    mean = kept.mean(0).numpy()
    assert strategy.state_dict()["control"]["w"] == pytest.approx(mean, abs=1e-12)


def test_the_first_round_is_fedavg_with_equal_weights(task, initial):
    class One(ClientHalf):
        def records(self, local):
            return {}, {"one": 1.0}

    models = []
    for strategy in (Scaffold(**ALL), AdditiveStrategy(weighted_by_key="one", **ALL)):
        app = client_app(task, ScaffoldClient, One)
        grid = LocalGrid(app, 3, {"lr": 0.1, "batch-size": 4})
        models.append(from_record(strategy.start(grid, initial, num_rounds=1).arrays))
    for name, x in models[1].items():
        assert np.array_equal(models[0][name], x), name


def test_only_parameters_have_a_control(task, initial, spied):
    app, calls = spied(client_app(task, ScaffoldClient))
    strategy = Scaffold(**ALL)
    strategy.start(LocalGrid(app, 2, {"lr": 0.1}), initial, num_rounds=2)
    names = {name for name, _ in task.model({}).named_parameters()}
    assert set(strategy.state_dict()["control"]) == names
    for call in calls:
        assert set(call.reply.array_records[CHANGE]) == names


def test_a_control_never_travels(quadratics, spied, play):
    app, calls = spied(client_app(quadratics.task(), ScaffoldClient))
    play(Scaffold(**ALL), app, 3, quadratics.start, rounds=2, config=CONFIG)
    second = [c for c in calls if c.server_round == 2]
    for call in second:
        assert set(call.reply.array_records) == {"arrays", CHANGE}
        kept = Personal(call.state).arrays(OWN, like={"w": torch.zeros(2)})["w"]
        sent = call.reply.array_records[CHANGE]["w"].numpy()
        assert np.abs(sent - kept.numpy()).min() > 1e-3


# What goes wrong --------------------------------------------------------------------


def test_a_control_that_diverges_is_dropped(quadratics, caplog):
    app = client_app(quadratics.task(), ScaffoldClient)
    grid = LocalGrid(app, 3, {"lr": 0.1, "local-steps": 4})
    before = Scaffold(**ALL)
    model = before.start(grid, to_record(quadratics.start), num_rounds=1).arrays
    good = before.state_dict()["control"]["w"].copy()
    # A learning rate over which the gradient overflows: the control is not finite.
    with caplog.at_level(logging.WARNING):
        before.start(
            grid,
            model,
            num_rounds=1,
            train_config=ConfigRecord({"lr": 1e200, "local-steps": 4}),
        )
    assert "the control is not finite" in caplog.text
    assert np.array_equal(before.state_dict()["control"]["w"], good)


def test_a_control_beyond_its_type_is_not_taken(caplog, reply, exchange):
    strategy, sent = Scaffold(**ALL), {"w": np.float32([0.0])}
    with caplog.at_level(logging.WARNING):
        for number in (1, 2):
            content = reply(sent)
            content[CHANGE] = to_record({"w": np.float32([3e38])})
            replies = exchange(strategy, sent, [content], server_round=number)
            strategy.aggregate_train(number, replies)
    assert "the control would not be finite" in caplog.text
    assert strategy.state_dict()["control"]["w"] == pytest.approx([3e38], rel=1e-6)


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match=r"option='III' must be one of"):
        Scaffold(option="III")


def test_a_half_without_the_strategy_says_what_is_missing(quadratics):
    app = client_app(quadratics.task(), ScaffoldClient)

    class Other(AdditiveStrategy):
        client_half = ScaffoldClient

    with pytest.raises(Exception, match="with 'control'"):
        Other(**ALL).start(
            LocalGrid(app, 2, CONFIG), to_record(quadratics.start), num_rounds=1
        )


def test_a_new_run_on_a_used_grid_begins_at_0(quadratics, play):
    grid = LocalGrid(client_app(quadratics.task(), ScaffoldClient), 3, CONFIG)
    run = partial(play, app=grid, clients=3, initial=quadratics.start)
    run(Scaffold(**ALL), rounds=2)
    strategy = Scaffold(**ALL)
    found = run(strategy, rounds=9).models[-1]["w"]
    # The same strategy goes on, also as one that was saved and loaded.
    loaded = Scaffold(**ALL)
    loaded.load_state_dict(strategy.state_dict())
    found = play(loaded, grid, 3, {"w": found}, rounds=9).models[-1]["w"]
    assert found == pytest.approx(quadratics.minimizer, abs=1e-6)


# Privacy ----------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["I", "II"])
def test_dpsgd_takes_the_control_of_the_steps_only(linear_task, option):
    rng = np.random.default_rng(0)
    clients = [
        {"x": rng.standard_normal((20, 2)), "y": rng.standard_normal(20)}
        for _ in range(2)
    ]
    privacy = SiloPrivacy(epsilon=3.0, delta=1e-2, num_rounds=2, clipping_norm=1.0)
    app = client_app(linear_task(clients, 2), ScaffoldClient, trainer=DPSGD(privacy))
    grid = LocalGrid(app, 2, {"lr": 0.1, "batch-size": 10})
    initial = to_record({"weight": np.zeros((1, 2), np.float32)})
    strategy = Scaffold(option=option, **ALL)
    if option == "I":
        with pytest.raises(Exception, match="the gradient of all examples"):
            strategy.start(grid, initial, num_rounds=2)
        return
    result = strategy.start(grid, initial, num_rounds=2)
    assert result.train_metrics_clientapp[2]["num-errors"] == 0
    assert np.all(strategy.state_dict()["control"]["weight"] != 0)


def test_the_control_is_clipped_with_the_model(quadratics):
    mechanism = Mechanism(
        num_rounds=1,
        num_sampled_clients=3,
        population_size=3,
        noise_multiplier=0.0,
        clipping=0.1,
        scales={CHANGE: STEPS * ETA},
    )
    app = client_app(quadratics.task(), ScaffoldClient)
    strategy = Scaffold(fraction_evaluate=0.0, mechanism=mechanism)
    grid = LocalGrid(app, 3, CONFIG)
    result = strategy.start(grid, to_record(quadratics.start), num_rounds=1)
    moved = from_record(result.arrays)["w"]
    control = strategy.state_dict()["control"]["w"]
    # In the first round the two changes are the same, up to sign and scale.
    assert moved == pytest.approx(-control * STEPS * ETA, rel=1e-6)
    assert 0 < np.linalg.norm(moved) <= 0.1 / np.sqrt(2) * (1 + 1e-6)


# Loops of one's own -----------------------------------------------------------------


def own_loop(task, late=False, by_hand=False):
    """Make an app with a loop of its own, and Scaffold's two lines."""
    app = ClientApp()

    @app.train()
    def train(msg: Message, context: Context) -> Message:
        model = task.model({})
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        data, _ = task.data(context)
        controls = None if late else Controls.of(model, msg, context)
        stepper = torch.optim.SGD(model.parameters(), lr=ETA)
        for _ in range(STEPS):
            stepper.zero_grad()
            for half in (0.25, 0.75):  # accumulated over two backward passes
                (half * task.loss(model, data).mean()).backward()
            if by_hand:
                model.w.data -= ETA * model.w.grad
            else:
                stepper.step()
        controls = controls or Controls.of(model, msg, context)
        content = {
            "arrays": ArrayRecord(model.state_dict()),
            "control-change": controls.change(),
            "metrics": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=msg)

    return app


def test_a_loop_of_ones_own_is_the_half(quadratics, play):
    task = quadratics.task()
    run = partial(play, initial=quadratics.start, clients=3, config=CONFIG, rounds=3)
    half = run(Scaffold(**ALL), client_app(task, ScaffoldClient)).models
    own = run(Scaffold(**ALL), own_loop(task)).models
    for left, right in zip(half, own, strict=True):
        assert left["w"] == pytest.approx(right["w"], abs=1e-12)


def test_loops_of_ones_own_refuse_what_they_cannot_do(quadratics):
    grid = LocalGrid(own_loop(quadratics.task()), 2)
    for strategy, words in (
        (Scaffold(option="I", **ALL), "option='I' must be 'II'"),
        (AdditiveStrategy(**ALL), "with 'control'"),
    ):
        with pytest.raises(Exception, match=words):
            strategy.start(grid, to_record(quadratics.start), num_rounds=1)


def test_loops_that_are_not_corrected_are_refused(quadratics):
    for how, words in (
        ({"late": True}, "between load_state_dict and the training"),
        ({"by_hand": True}, "without a step of a torch optimizer"),
    ):
        grid = LocalGrid(own_loop(quadratics.task(), **how), 2)
        with pytest.raises(Exception, match=words):
            Scaffold(**ALL).start(grid, to_record(quadratics.start), num_rounds=1)


def test_a_parameter_that_no_step_reaches_keeps_its_control():
    model = nn.ModuleDict({"used": nn.Linear(1, 1), "idle": nn.Linear(1, 1)})
    like = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    controls = Controls(like, Personal(RecordDict()))
    model["used"](torch.ones(1, 1)).sum().backward()
    controls.correct(dict(model.named_parameters()))
    assert model["idle"].weight.grad is None
    assert {name: float(x) for name, x in controls.new().items()} == {
        "used.weight": 1.0,
        "used.bias": 1.0,
        "idle.weight": 0.0,
        "idle.bias": 0.0,
    }
