"""Local training: every client by itself, the server's model as it was."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy, client_app
from flower_ext.client.personal import Personal
from flower_ext.core.arrays import from_record
from flower_ext.core.sampling import UniformSampler
from flower_ext.privacy import Mechanism
from flower_ext.server.optimizers import TorchOptimizer
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import LocalOnly, LocalOnlyClient
from flower_ext.strategies.local_only import alone

CONFIG = {"batch-size": 4, "lr": 0.1}


def test_each_client_descends_by_itself(play, point_task):
    app = client_app(point_task([{"c": [1.0]}, {"c": [5.0]}]), LocalOnlyClient)
    played = play(LocalOnly(), app, 2, {"w": np.float32(0)}, 4, CONFIG)
    for number in range(1, 5):
        gaps = [0.9**number * (0 - c) for c in (1, 5)]
        expected = np.mean(np.square(gaps)) / 2
        assert played.evaluate(number)["loss"] == pytest.approx(expected, rel=1e-5)
        assert played.models[number]["w"] == 0


def test_who_is_there_and_who_trains_changes_no_model(task, initial, spied):
    """A client's model depends on its own rounds only, and it sends none."""
    kept = []
    for clients in (3, 5):
        app, calls = spied(client_app(task, LocalOnlyClient))
        grid = LocalGrid(app, clients, CONFIG)
        LocalOnly().start(grid, initial, num_rounds=3)
        kept.append({c.client: c.state for c in calls if c.kind == "train"})
        assert not any(call.reply.get("arrays") for call in calls)
    for client in range(3):
        assert kept[0][client] == kept[1][client] != kept[1][4]


def test_the_unseen_use_the_initial_model(task, initial, spied):
    app, calls = spied(client_app(task, LocalOnlyClient))
    grid = LocalGrid(app, 4, CONFIG)
    strategy = LocalOnly(fraction_train=0.5, sampler=UniformSampler(seed=1))
    result = strategy.start(grid, initial, num_rounds=2)
    for name, x in from_record(initial).items():
        np.testing.assert_array_equal(from_record(result.arrays)[name], x)
    seen = {call.client for call in calls if call.kind == "train"}
    assert 1 < len(seen) < 4
    like = initial.to_torch_state_dict()
    model = task.model({})
    for call in calls:
        if call.kind == "train" or call.server_round < 2:
            continue
        own = Personal(call.state).arrays("model", like=like, first=like)
        model.load_state_dict(own)
        _, test = task.data(_context(call.client))
        with torch.no_grad():
            loss = float(task.loss(model.eval(), test).mean())
        assert call.reply["metrics"]["loss"] == pytest.approx(loss, rel=1e-6)
        assert bool(call.state) == (call.client in seen)


def _context(client):
    return type("Context", (), {"node_config": {"partition-id": client}})


def test_no_optimizer_moves_the_model_of_the_server(play, point_task):
    app = client_app(point_task([{"c": [1.0]}, {"c": [5.0]}]), LocalOnlyClient)
    decaying = TorchOptimizer(partial(torch.optim.SGD, lr=0.1, weight_decay=0.5))
    strategy = LocalOnly(server_optimizer=decaying)
    played = play(strategy, app, 2, {"w": np.float32(3)}, 2, CONFIG)
    assert [model["w"] for model in played.models] == [3, 3, 3]


def test_there_is_nothing_to_protect():
    plan = {"num_rounds": 1, "num_sampled_clients": 1, "population_size": 1}
    mechanism = Mechanism(**plan, noise_multiplier=1.0, target_delta=0.1)
    with pytest.raises(ValueError, match="must be None: nothing is sent that it could"):
        LocalOnly(mechanism=mechanism)


def test_the_mod_makes_of_any_loop_what_the_half_does(play, reply):
    """Of one without torch, too: each client adds its number to what it is given."""
    app = ClientApp(mods=[alone()])

    def answer(message, context):
        own = from_record(message.content["arrays"])["w"]
        own = own + 1 + context.node_config["partition-id"]
        content = reply({"w": own}, loss=float(own))
        return Message(content, reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    played = play(LocalOnly(), app, 2, {"w": np.float32(0)}, 4)
    assert all(model["w"] == 0 for model in played.models)
    for number in range(1, 5):
        # This loop adds in an evaluation as well, once more than it has trained.
        expected = (number + 1) * np.mean([1, 2])
        assert played.evaluate(number)["loss"] == expected
        assert played.train(number)["loss"] == number * np.mean([1, 2])
    unseen = play(LocalOnly(fraction_train=0.0), app, 2, {"w": np.float32(0)})
    assert unseen.evaluate()["loss-unseen"] == np.mean([1, 2])
    plain = play(AdditiveStrategy(), app, 2, {"w": np.float32(0)}, 3)
    assert plain.models[3]["w"] == 4.5  # other strategies are served as before
