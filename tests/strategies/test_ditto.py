"""Ditto: both limits of its strength, its closed form, and two models apart."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import DPSGD, AdditiveStrategy, ClientHalf, client_app
from flower_ext.client.half import LocalSettings, Proximal
from flower_ext.client.personal import Personal
from flower_ext.core.sampling import UniformSampler
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.optimizers import SGD, Adam
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import Ditto, DittoClient, LocalOnly, LocalOnlyClient
from flower_ext.strategies.ditto import paired

START = {"w": np.float32(0.0)}
LINE = {"weight": np.zeros((1, 1), np.float32)}
# Two clients, whose losses are (w - 1)^2 / 2 and (w - 5)^2 / 2.
CENTRES = [{"c": [1.0]}, {"c": [5.0]}]
RATE = {"lr": 0.1, "batch-size": 8}


def own(state, name="w"):
    """Return what a client keeps, as a number."""
    return float(Personal(state).arrays("model", like={name: torch.zeros(())})[name])


def models(calls, kind="train"):
    """Return the personal models after each message of a kind, by round and client."""
    return {(c.server_round, c.client): own(c.state) for c in calls if c.kind == kind}


def playing(play, point_task, spied, strategy, rounds, config=RATE, **task):
    app, calls = spied(client_app(point_task(CENTRES, **task), DittoClient))
    return play(strategy, app, 2, START, rounds, config), models(calls)


# By hand ----------------------------------------------------------------------------


def test_two_rounds_by_hand(play, point_task, spied):
    """Each model from where it was, both towards what the round began with."""
    played, found = playing(play, point_task, spied, Ditto(strength=2.0), 2)
    w, v = 0.0, [0.0, 0.0]
    for number in (1, 2):
        v = [x - 0.1 * ((x - c) + 2 * (x - w)) for x, c in zip(v, (1, 5), strict=True)]
        for client in (0, 1):
            assert found[number, client] == pytest.approx(v[client], rel=1e-6)
        w = np.mean([w - 0.1 * (w - c) for c in (1, 5)])
        assert played.models[number]["w"] == pytest.approx(w, rel=1e-6)


@pytest.mark.parametrize("strength", [0.0, 0.5, 3.0])
def test_closed_form_of_quadratics(play, point_task, spied, strength):
    """After many steps v = (a c + strength w) / (a + strength), with curvature a."""
    config = {"lr": 0.2, "batch-size": 8, "local-steps": 60}
    strategy = Ditto(strength=strength, server_optimizer=SGD(0.5))
    played, found = playing(play, point_task, spied, strategy, 2, config, scale=1.0)
    w = played.models[1]["w"]  # with which the second round began
    assert w == pytest.approx(1.5, rel=1e-5)
    for client, c in enumerate((1, 5)):
        expected = (2 * c + strength * w) / (2 + strength)
        assert found[2, client] == pytest.approx(expected, rel=1e-5)


def test_a_strength_beyond_bounds_is_the_shared_model(play, point_task, spied):
    config = {"lr": 1e-6, "batch-size": 8, "local-steps": 3}
    strategy = Ditto(strength=1e6, server_optimizer=SGD(1e5))  # the shared one moves
    played, found = playing(play, point_task, spied, strategy, 3, config)
    for number in (1, 2, 3):
        received = played.models[number - 1]["w"]
        for client in (0, 1):
            assert found[number, client] == pytest.approx(received, abs=1e-5)
    assert played.models[2]["w"] > 1


def test_without_strength_the_personal_model_is_that_of_local_training(
    play, point_task, spied
):
    _, found = playing(play, point_task, spied, Ditto(strength=0.0), 3)
    app, calls = spied(client_app(point_task(CENTRES), LocalOnlyClient))
    play(LocalOnly(), app, 2, START, 3, RATE)
    assert found == pytest.approx(models(calls), rel=1e-6)
    assert found[3, 1] == pytest.approx(5 * (1 - 0.9**3), rel=1e-5)


def test_epochs_of_the_personal_model_are_its_own(play, point_task, spied):
    twice = Ditto(strength=0.0, personal_epochs=2)
    config = {**RATE, "local-steps": 1}
    played, found = playing(play, point_task, spied, twice, 1, config)
    assert found[1, 1] == pytest.approx(5 * (1 - 0.9**2), rel=1e-6)
    assert played.models[1]["w"] == pytest.approx(0.3, rel=1e-6)  # one step


# With a real model ------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"strength": 5.0, "personal_epochs": 2}])
def test_the_shared_model_is_that_of_fedavg_bit_for_bit(task, initial, options):
    """Dropout, BatchNorm and shuffled batches: the second training disturbs nothing."""
    models = []
    for make, half in ((Ditto, DittoClient), (AdditiveStrategy, ClientHalf)):
        grid = LocalGrid(client_app(task, half), 4, {"batch-size": 4, "lr": 0.1})
        strategy = make(
            fraction_train=0.5,
            sampler=UniformSampler(seed=2),
            server_optimizer=Adam(0.01),
            **(options if make is Ditto else {}),
        )
        models.append(strategy.start(grid, initial, num_rounds=3).arrays)
    for name, array in models[1].items():
        assert models[0][name].data == array.data, name


def test_clients_use_their_own_model_and_others_the_shared_one(task, initial, spied):
    app, calls = spied(client_app(task, DittoClient))
    grid = LocalGrid(app, 4, {"batch-size": 4, "lr": 0.3})
    strategy = Ditto(fraction_train=0.5, sampler=UniformSampler(seed=1), strength=0.1)
    strategy.start(grid, initial, num_rounds=1)
    trained = {c.client: c for c in calls if c.kind == "train"}
    assert len(trained) == 2
    for call in calls:
        if call.kind == "train":
            continue
        metrics = call.reply["metrics"]
        same = metrics["loss"] == metrics["received-loss"]
        assert same == (call.client not in trained)
        # An evaluation changes nothing.
        kept = trained[call.client].state if call.client in trained else {}
        assert dict(call.state) == dict(kept)


def test_a_client_that_lost_its_model_begins_anew(play, point_task, spied):
    app, calls = spied(client_app(point_task(CENTRES), DittoClient), forget=True)
    played = play(Ditto(strength=1.0), app, 2, START, 2, RATE)
    w = played.models[1]["w"]
    assert models(calls)[2, 1] == pytest.approx(w - 0.1 * (w - 5), rel=1e-6)


@pytest.mark.parametrize(("personal", "in_all"), [(None, 2), (3, 4)])
def test_a_silo_pays_for_both_models(play, linear_task, personal, in_all):
    """It has spent as much as one that trains FedAvg's model for as many epochs."""
    clients = [{"x": np.ones((20, 1)) * i, "y": np.ones(20)} for i in (1, 2)]
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-3, clipping_norm=1.0, seed=3)
    app = client_app(linear_task(clients, 1), DittoClient, trainer=DPSGD(privacy))
    spent = []
    for strategy, epochs in (
        (Ditto(personal_epochs=personal), 1),
        (AdditiveStrategy(), in_all),
    ):
        config = {"lr": 0.1, "batch-size": 10, "local-epochs": epochs}
        found = play(strategy, app, 2, LINE, 2, config)
        assert found.train(2)["num-errors"] == 0
        spent.append([found.train(i)["example-epsilon"] for i in (1, 2)])
    assert spent[0] == spent[1]


# A loop of one's own ----------------------------------------------------------------


class ClosureSGD(torch.optim.SGD):
    """Steps with a closure, as Lightning does, through the step of its base class."""

    def step(self, closure=None):
        return super().step(closure)


def looped(task, closure=False, between=lambda model: None, steps=True):
    """Make the ClientApp of a loop that knows nothing of Ditto."""
    app = ClientApp(mods=[paired()])

    def opened(message, context):
        model = task.model({})
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        return model, task.data(context)

    @app.train()
    def train(message, context):
        model, (data, _) = opened(message, context)
        between(model)
        optimizer = ClosureSGD(model.parameters(), lr=message.content["config"]["lr"])

        def evaluate():
            optimizer.zero_grad()
            task.loss(model, data).mean().backward()

        if not steps:
            model.w.data += 1.0
        elif closure:
            optimizer.step(evaluate)
        else:
            evaluate()
            optimizer.step()
        metrics = MetricRecord({"num-examples": 1, "noise": float(torch.rand(()))})
        arrays = ArrayRecord(model.state_dict())
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        model, (_, data) = opened(message, context)
        metrics = {"num-examples": 1, "loss": task.loss(model, data).mean().item()}
        content = RecordDict({"metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return app


TOLD = {"train_config": ConfigRecord({"lr": 0.1})}


@pytest.mark.parametrize("closure", [False, True])
def test_the_mod_makes_of_a_loop_what_the_half_does(play, point_task, spied, closure):
    task = point_task(CENTRES)
    found = []
    for app in (client_app(task, DittoClient), looped(task, closure=closure)):
        app, calls = spied(app)
        strategy = Ditto(strength=2.0, fraction_train=0.5, min_train_nodes=1)
        played = play(strategy, app, 2, START, 6, RATE, **TOLD)
        evaluated = [dict(c.reply["metrics"]) for c in calls if c.kind == "evaluate"]
        found.append((models(calls), evaluated, played.models))
    half, mod = found
    assert mod[0] == pytest.approx(half[0], rel=1e-6) and len(half[0]) == 6
    for ours, theirs in zip(mod[1], half[1], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)
    for ours, theirs in zip(mod[2], half[2], strict=True):
        assert ours["w"] == pytest.approx(theirs["w"], rel=1e-6)


def test_the_mod_lets_the_loop_draw_what_it_would_have_drawn(play, point_task):
    task = point_task(CENTRES)
    drawn = []
    for strategy in (Ditto(), AdditiveStrategy()):
        torch.manual_seed(0)
        played = play(strategy, looped(task), 2, START, 3, {}, **TOLD)
        drawn.append([played.train(i)["noise"] for i in (1, 2, 3)])
    assert drawn[0] == drawn[1]


@pytest.mark.parametrize(
    ("options", "strategy", "text"),
    [
        ({}, Ditto(personal_epochs=2), "personal_epochs=2 must be None with the mod"),
        ({"steps": False}, Ditto(), "without a step of a torch optimizer"),
        (
            {"between": lambda model: model.w.data.add_(1.0)},
            Ditto(),
            r"a parameter of shape \(\) was trained and is none of the arrays \['w'\]",
        ),
    ],
)
def test_a_loop_that_the_mod_cannot_serve_is_told_why(
    play, point_task, options, strategy, text
):
    app = looped(point_task(CENTRES), **options)
    with pytest.raises(EveryClientFailed, match=text):
        play(strategy, app, 2, START, 1, {}, **TOLD)


def test_the_mod_leaves_other_strategies_alone(play, point_task, spied):
    app, calls = spied(looped(point_task(CENTRES)))
    play(AdditiveStrategy(), app, 2, START, 1, {}, **TOLD)
    assert not any(call.state for call in calls)
    assert "received-loss" not in calls[-1].reply["metrics"]


# What is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strength": -0.1}, "strength=-0.1 must be a finite number >= 0: 0 is local"),
        ({"strength": np.inf}, "strength=inf must be a finite number"),
        ({"personal_epochs": 0}, "personal_epochs=0 must be an integer >= 1"),
    ],
)
def test_bad_options_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        Ditto(**options)


def test_a_strength_that_would_diverge_ends_the_run_before_it_trains(play, point_task):
    app = client_app(point_task(CENTRES), DittoClient)
    text = r"strength=20.0 must be < 20 at a learning rate of 0.1: every step"
    with pytest.raises(EveryClientFailed, match=text):
        play(Ditto(strength=20.0), app, 2, START, 1, RATE)
    found = play(Ditto(strength=19.9), app, 2, START, 30, RATE)
    assert found.evaluate(30)["loss"] < found.evaluate(1)["loss"]


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_the_bound_of_a_strength_is_where_steps_diverge(momentum):
    rate = 0.5
    settings = LocalSettings(learning_rate=rate, momentum=momentum)
    local = SimpleNamespace(settings=settings, task=SimpleNamespace(optimizer=None))
    for factor, converges in ((0.99, True), (1.01, False)):
        term = Proximal(START, factor * 2 * (1 + momentum) / rate)
        w, step = 1.0, 0.0
        for _ in range(2000):
            step = momentum * step + term.strength * w
            w -= rate * step
        assert (abs(w) < 1) == converges
        if converges:
            term.require_stable(local)
        else:
            with pytest.raises(ValueError, match="learning rate of 0.5"):
                term.require_stable(local)
    local.task.optimizer = object()  # of which nothing is known
    Proximal(START, 1e9).require_stable(local)
