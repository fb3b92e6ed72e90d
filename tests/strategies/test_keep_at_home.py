"""A mod that keeps a part of the model with the client, and layers found by type."""

import re

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

from flower_ext import client_app
from flower_ext.client.encoding import encoded
from flower_ext.client.parts import (
    PART,
    freeze,
    keep_at_home,
    normalization_arrays,
)
from flower_ext.client.personal import PERSONAL
from flower_ext.core.arrays import from_record
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FedPer, FedPerClient
from flower_ext.wire import Described, TopK

CONFIG = {"batch-size": 4, "lr": 0.1, "momentum": 0.9}
OWN = ["out.*", "norm.*"]


class Loop(FedPer):
    """FedPer, of clients that have no half."""

    client_half = None


def kept(calls, client):
    last = [call for call in calls if call.client == client][-1]
    return from_record(last.state[PERSONAL + PART])


def played(strategy, app, initial, clients=3, rounds=3):
    result = strategy.start(LocalGrid(app, clients, CONFIG), initial, num_rounds=rounds)
    errors = [m.get("num-errors", 0) for m in result.train_metrics_clientapp.values()]
    assert errors == [0] * rounds
    return result


@pytest.mark.parametrize("named", [True, False])
def test_with_the_mod_a_loop_is_the_half_bit_for_bit(task, initial, spied, named):
    mod = keep_at_home(OWN if named else None)
    app, calls = spied(client_app(task, mods=[mod]))
    ours = played(Loop(personal=OWN), app, initial)
    half, its_calls = spied(client_app(task, FedPerClient))
    theirs = played(FedPer(personal=OWN), half, initial)
    for name, array in theirs.arrays.items():
        assert ours.arrays[name].data == array.data
    for i in range(3):
        found, expected = kept(calls, i), kept(its_calls, i)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[n], x) for n, x in expected.items())
    for number, metrics in theirs.evaluate_metrics_clientapp.items():
        assert ours.evaluate_metrics_clientapp[number] == metrics


def test_under_flowers_own_strategy_what_was_received_goes_back(task, initial, spied):
    app, calls = spied(client_app(task, mods=[keep_at_home(OWN)]))
    grid = LocalGrid(app, 3, CONFIG)
    result = FedAvg().start(grid, initial, num_rounds=3)
    half, its_calls = spied(client_app(task, FedPerClient))
    theirs = played(FedPer(personal=OWN), half, initial)
    for name, array in theirs.arrays.items():
        if array.dtype.startswith("float"):
            np.testing.assert_allclose(
                result.arrays[name].numpy(), array.numpy(), rtol=1e-5, atol=1e-6
            )
    for call in calls:
        if call.kind == "train":
            own = from_record(call.reply["arrays"])
            if call.server_round == 1:
                assert own["out.weight"].tobytes() in initial["out.weight"].data
            mine = from_record(call.state[PERSONAL + PART])
            assert not np.allclose(own["out.weight"], mine["out.weight"], atol=1e-4)
    for i in range(3):
        for name, x in kept(its_calls, i).items():
            np.testing.assert_allclose(kept(calls, i)[name], x, rtol=1e-4, atol=1e-5)


def test_the_default_is_the_last_layer(task, initial, spied):
    """Which is ``out``; the server may be Flower's."""
    app, calls = spied(client_app(task, mods=[keep_at_home()]))
    FedAvg().start(LocalGrid(app, 2, CONFIG), initial, num_rounds=1)
    assert list(kept(calls, 0)) == ["out.weight", "out.bias"]
    played(FedPer(), client_app(task, FedPerClient), initial, 2, 1)


def test_arrays_keep_their_order_and_places(initial):
    """As for apps that know arrays by their places."""
    orders = []

    def train(message, context):
        record = message.content["arrays"]
        orders.append([*record])
        metrics = MetricRecord({"num-examples": 1})
        content = RecordDict({"arrays": record, "metrics": metrics})
        return Message(content, reply_to=message)

    app = ClientApp(mods=[keep_at_home()])
    app.train()(train)
    strategy = Loop(personal=["hidden.bias", "*running*"], fraction_evaluate=0.0)
    played(strategy, app, initial, 2, 2)
    assert orders == [list(initial)] * 4


def own_loop(task, *mods):
    """Return an app that takes one step, in a loop of its own."""
    app = ClientApp(mods=[*mods])

    @app.train()
    def train(message, context):
        model = task.model({}).eval()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data, _ = task.data(context)
        task.loss(model, data).mean().backward()
        torch.optim.SGD(model.parameters(), lr=0.5).step()
        metrics = MetricRecord({"num-examples": len(data["y"])})
        arrays = ArrayRecord(model.state_dict())
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def test_together_with_the_mod_of_codecs(task, initial):
    options = {"personal": OWN, "fraction_evaluate": 0.0}
    coded = {"download": Described(TopK(1.0)), "upload": TopK(1.0)}
    mods = encoded(), keep_at_home(OWN)
    ours = played(Loop(**options, **coded), own_loop(task, *mods), initial)
    theirs = played(Loop(**options), own_loop(task, keep_at_home()), initial)
    assert theirs.arrays["hidden.weight"].data != initial["hidden.weight"].data
    for name, array in theirs.arrays.items():
        assert ours.arrays[name].data == array.data


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        ("out.*", "norm.*", "personal='norm.*' must be a filter of the server's"),
        (None, "head.*", "personal='head.*' must be a filter that matches arrays"),
        (None, "*", "a filter that leaves others"),
    ],
)
def test_what_the_two_sides_do_not_agree_on_is_refused(
    task, initial, theirs, ours, words
):
    app = client_app(task, mods=[keep_at_home(ours)])
    strategy = Loop(personal=theirs) if theirs else FedAvg()
    grid = LocalGrid(app, 2, CONFIG)
    messages = list(strategy.configure_train(1, initial, ConfigRecord(), grid))
    reasons = [reply.error.reason for reply in grid.send_and_receive(messages)]
    assert len(reasons) == 2
    assert all(re.search(re.escape(words), reason) for reason in reasons)


def test_a_client_that_lost_what_it_kept_says_so(task, initial):
    inner = client_app(task, mods=[keep_at_home()])

    def forgetful(message, context):
        if message.content["config"]["server-round"] == 2:
            context.state.clear()
        return inner(message, context)

    app = ClientApp()
    app.train()(forgetful)
    app.evaluate()(inner)
    grid = LocalGrid(app, 1, CONFIG)
    strategy = Loop(personal="out.*", min_train_nodes=1, min_available_nodes=1)
    for number in (1, 2):
        sent = list(strategy.configure_train(number, initial, ConfigRecord(), grid))
        replies = list(grid.send_and_receive(sent))
        if number == 1:
            strategy.aggregate_train(number, replies)
    assert "the client has lost what it kept" in replies[0].error.reason


# Layers -----------------------------------------------------------------------------


class RootMeanNorm(nn.Module):
    """A library's own."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


class PreNorm(nn.Module):
    """A container, whose layers are not all normalisations."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(3, bias=False)
        self.inner = nn.Linear(3, 3)


def test_normalization_layers_are_found_by_their_types():
    shared = nn.GroupNorm(1, 3)
    model = nn.ModuleDict(
        {
            "bn": nn.BatchNorm2d(3),
            "plain": nn.Linear(3, 3),
            "free": nn.InstanceNorm1d(3),  # it has no arrays
            "own": RootMeanNorm(),
            "pre": PreNorm(),
            "weighted": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
            "spectral": nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)),
            "a": shared,
            "b": shared,
        }
    )
    assert normalization_arrays(model) == [
        "bn.weight",
        "bn.bias",
        "bn.running_mean",
        "bn.running_var",
        "bn.num_batches_tracked",
        "own.gain",
        "pre.norm.weight",
        "a.weight",
        "a.bias",
        "b.weight",
        "b.bias",
    ]
    assert normalization_arrays(nn.LayerNorm(2)) == ["weight", "bias"]
    assert normalization_arrays(nn.Linear(2, 2)) == []


def test_frozen_parameters_take_no_step():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    before = [p.detach().clone() for p in model.parameters()]
    freeze(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1.0, weight_decay=0.5)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    moved = [
        not torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True)
    ]
    assert moved == [True, True, False, False]
    other = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    with freeze(other, "0.*"):
        flags = [p.requires_grad for p in other.parameters()]
        assert flags == [False, False, True, True]
    assert all(p.requires_grad for p in other.parameters())
    with pytest.raises(ValueError, match="must be arrays that leave parameters to tr"):
        freeze(nn.BatchNorm1d(2), ["weight", "bias"])
    with pytest.raises(ValueError, match="frozen='head' must be a filter that matches"):
        freeze(model, "head")


def test_other_messages_pass_through(initial):
    seen = []

    def look(message, context):
        seen.append(message.content)
        return Message(RecordDict(), reply_to=message)

    app = ClientApp(mods=[keep_at_home()])
    app.query()(look)
    grid = LocalGrid(app, 1, CONFIG)
    node = next(iter(grid.get_node_ids()))
    content = RecordDict({"arrays": ArrayRecord({"a": initial["scale"]})})
    list(grid.send_and_receive([Message(content, node, "query")]))
    assert list(seen[0]["arrays"]) == ["a"]
