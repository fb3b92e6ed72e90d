"""DiLoCo: its limits, runs without rounds, fragments against a loop of one's own."""

import dataclasses
import re
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import DPSGD, AdditiveStrategy, ClientHalf, Stacked, Task, client_app
from flower_ext.client import MuonAdamW, OptimizerState
from flower_ext.client.personal import PERSONAL
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import UniformSampler
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.optimizers import SGD, Adam
from flower_ext.simulation import LocalGrid, PackedGrid
from flower_ext.strategies import DiLoCo, DiLoCoClient
from flower_ext.strategies.diloco import MODEL, ROUND, SENT, fragments_of
from flower_ext.wire import EDEN, NF4, ErrorFeedback, Exact, TopK

OPTIMIZERS = {
    "adamw": partial(torch.optim.AdamW, lr=0.05, weight_decay=0.1),
    "amsgrad": partial(torch.optim.AdamW, lr=0.05, amsgrad=True),
    "nadam": partial(torch.optim.NAdam, lr=0.05),
    "momentum": partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True),
    "rprop": partial(torch.optim.Rprop, lr=0.05),
    "rmsprop": partial(torch.optim.RMSprop, lr=0.05, momentum=0.5, centered=True),
    "adagrad": partial(torch.optim.Adagrad, lr=0.05, initial_accumulator_value=0.1),
    "adafactor": partial(torch.optim.Adafactor, lr=0.05),
    "asgd": partial(torch.optim.ASGD, lr=0.05, t0=2),
}
# Of a single client.
ALONE = dict.fromkeys(["min_train_nodes", "min_available_nodes"], 1) | {
    "min_evaluate_nodes": 1
}
STEPS = {"local-steps": 3, "batch-size": 8}


class Layers(nn.Module):
    """Four layers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.hidden = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.hidden:
            x = torch.tanh(layer(x))
        return self.last(x)


def net(dtype=torch.float64):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Layers().to(dtype)


def columns(client):
    generator = torch.Generator().manual_seed(client)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": x.sum(1) * (1 + client)}


def losses(model, batch):
    x, y = (batch[name].to(model.last.weight.dtype) for name in "xy")
    return (model(x)[:, 0] - y) ** 2


def net_task(make=None):
    """Make clients of six examples, which are in one batch, and an optimizer."""

    def data(context):
        return (columns(context.node_config["partition-id"]),) * 2

    optimizer = make and (lambda parameters, settings: make(parameters))
    return Task(lambda config: net(), data, losses, optimizer=optimizer)


START = {name: x.numpy().copy() for name, x in net().state_dict().items()}


def trained(strategy, task, clients, rounds, play, config=STEPS, start=START):
    app = client_app(task, DiLoCoClient, ClientHalf)
    return play(strategy, app, clients, start, rounds, config)


def require_equal(ours, theirs):
    for name, x in theirs.items():
        assert np.array_equal(ours[name], x), name


def require_close(ours, theirs):
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=1e-9, atol=1e-12, err_msg=name)


# Limits of DiLoCo -------------------------------------------------------------------


class Equal(AdditiveStrategy):
    """FedAvg of clients that all weigh the same."""

    equal_weights = True


@pytest.mark.parametrize("optimizer", [SGD(), SGD(0.7, 0.9, nesterov=True), Adam(0.01)])
def test_with_plain_sgd_it_is_fedavg_bit_for_bit(task, initial, optimizer):
    models = []
    for make in (DiLoCo, Equal):
        grid = LocalGrid(client_app(task, DiLoCoClient), 4, {"lr": 0.1})
        optimizer.load_state_dict({})
        strategy = make(
            fraction_train=0.5,
            sampler=UniformSampler(seed=2),
            server_optimizer=optimizer,
        )
        models.append(strategy.start(grid, initial, num_rounds=4).arrays)
    for name, array in models[1].items():
        assert models[0][name].data == array.data, name


def test_the_outer_optimizer_of_the_paper_is_the_default(play, quadratics):
    """One step of SGD is synchronous SGD, here with Nesterov's momentum, of torch."""
    app = client_app(quadratics.task(), DiLoCoClient)
    config = {"lr": 0.1, "local-steps": 1}
    played = play(DiLoCo(), app, 3, quadratics.start, 6, config)
    w = torch.zeros(2, dtype=torch.float64)
    outer = torch.optim.SGD([w], lr=0.7, momentum=0.9, nesterov=True)
    a, h = (torch.tensor(x) for x in (quadratics.centers, quadratics.hessians))
    for model in played.models[1:]:
        w.grad = 0.1 * torch.einsum("kij,kj->i", h, w - a) / 3
        outer.step()
        np.testing.assert_allclose(model["w"], w, rtol=1e-12)


def test_clients_weigh_the_same_whatever_they_have(play, point_task):
    app = client_app(point_task([{"c": [1.0]}, {"c": [4.0] * 9}]), DiLoCoClient)
    strategy = DiLoCo(server_optimizer=SGD())
    played = play(strategy, app, 2, {"w": np.float32(0)}, 1, {"lr": 1.0})
    assert played.models[1]["w"] == 2.5


def test_a_single_client_and_a_small_step_is_lookahead(play):
    make = OPTIMIZERS["adamw"]
    played = trained(
        DiLoCo(server_optimizer=SGD(0.5), **ALONE), net_task(make), 1, 5, play
    )
    model = net()
    slow, optimizer = (
        [p.detach().clone() for p in model.parameters()],
        make(model.parameters()),
    )
    for found in played.models[1:]:
        walk(model, optimizer, columns(0), 3)
        with torch.no_grad():
            for p, x in zip(model.parameters(), slow, strict=True):
                x += 0.5 * (p - x)
                p.copy_(x)
        require_close(found, as_arrays(model))


def walk(model, optimizer, batch, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        optimizer.step()


def as_arrays(model):
    return {name: x.numpy().copy() for name, x in model.state_dict().items()}


# Training that rounds do not interrupt ----------------------------------------------


SINGLE = {name: x.astype(np.float32) for name, x in START.items()}


def without_rounds(optimizer, steps, rounds, number=1):
    """Return what a server has of one run, on one example, after every few steps.

    That is all that is done for rounds: the run's values are written down as the change
    from those that the server had, which is rounded to float32.
    """
    model = net(torch.float32)
    one = {name: x[:1] for name, x in columns(0).items()}
    made = optimizer(model)
    server, models = dict(SINGLE), []
    for t in range(rounds):
        walk(model, made, one, steps)
        own = model.state_dict()
        for name in fragments_of(SINGLE, number)[t % number]:
            change = own[name].numpy() - server[name]
            server[name] = np.float32(server[name].astype(np.float64) + change)
            own[name].copy_(torch.from_numpy(server[name]))
        models.append(dict(server))
    return models


def alone(strategy, optimizer, rounds, play, config=STEPS):
    """Run a client with one example, whose batches are the same in any order."""

    def data(context):
        return ({name: x[:1] for name, x in columns(0).items()},) * 2

    task = Task(lambda config: net(torch.float32), data, losses, optimizer=optimizer)
    return trained(strategy, task, 1, rounds, play, config, SINGLE).models


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_single_client_is_one_run_of_its_optimizer_bit_for_bit(play, name):
    make = OPTIMIZERS[name]
    strategy = DiLoCo(server_optimizer=SGD(), **ALONE)
    models = alone(strategy, lambda p, settings: make(p), 4, play)
    expected = without_rounds(lambda model: make(model.parameters()), 3, 4)
    for found, model in zip(models[1:], expected, strict=True):
        require_equal(found, model)


def test_so_it_is_with_muon(play):
    strategy = DiLoCo(server_optimizer=SGD(), **ALONE)
    config = {**STEPS, "lr": 0.01, "weight-decay": 0.1}
    models = alone(strategy, MuonAdamW(), 4, play, config)

    def joined(model):
        from flower_ext.client.muon import Joined

        hidden = ["first.weight", "hidden.0.weight", "hidden.1.weight"]
        own = dict(model.named_parameters())
        return Joined(
            torch.optim.Muon(
                [own[name] for name in hidden],
                lr=0.01,
                weight_decay=0.1,
                adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW(
                [p for name, p in own.items() if name not in hidden],
                lr=0.01,
                weight_decay=0.1,
                betas=(0.9, 0.95),
            ),
        )

    expected = without_rounds(joined, 3, 4)
    for found, model in zip(models[1:], expected, strict=True):
        require_equal(found, model)


@pytest.mark.parametrize("number", [1, 2, 4])
def test_so_it_is_with_fragments(play, number):
    """Each is, on the server, that of the run at its last exchange."""
    make = OPTIMIZERS["adamw"]
    strategy = DiLoCo(server_optimizer=SGD(), fragments=number, **ALONE)
    models = alone(strategy, lambda p, settings: make(p), 9, play)
    expected = without_rounds(lambda model: make(model.parameters()), 3, 9, number)
    for found, model in zip(models[1:], expected, strict=True):
        require_equal(found, model)


def test_without_kept_state_it_is_another_run(play):
    """What the tests above see: FedAvg's clients begin anew."""
    make = OPTIMIZERS["adamw"]
    ours, theirs = (
        alone(kind(server_optimizer=SGD(), **ALONE), lambda p, s: make(p), 2, play)
        for kind in (DiLoCo, AdditiveStrategy)
    )
    require_equal(ours[1], theirs[1])
    assert np.abs(ours[2]["last.weight"] - theirs[2]["last.weight"]).max() > 1e-3


# Fragments --------------------------------------------------------------------------


def streaming(make, clients, number, rounds, steps=3, outer=(0.7, 0.9)):
    """Return the server's models of Algorithm 2, written as one loop of all workers."""
    workers = [net() for _ in range(clients)]
    inner = [make(model.parameters()) for model in workers]
    shared = {name: torch.tensor(x) for name, x in START.items()}
    names = fragments_of(START, number)
    optimizers = [
        torch.optim.SGD([shared[n] for n in own], *outer, nesterov=True)
        for own in names
    ]
    models = []
    for t in range(rounds):
        for client, model in enumerate(workers):
            walk(model, inner[client], columns(client), steps)
        own = [dict(model.named_parameters()) for model in workers]
        with torch.no_grad():
            for name in names[t % number]:
                mean = sum(worker[name] for worker in own) / clients
                shared[name].grad = shared[name] - mean
            optimizers[t % number].step()
            for name in names[t % number]:
                for worker in own:
                    worker[name].copy_(shared[name])
        models.append({name: x.numpy().copy() for name, x in shared.items()})
    return models


@pytest.mark.parametrize(
    ("number", "upload"),
    [(1, None), (2, None), (3, ErrorFeedback(Exact())), (4, Exact())],
)
def test_they_are_those_of_a_loop_of_all_workers(play, number, upload):
    make = OPTIMIZERS["adamw"]
    strategy = DiLoCo(fragments=number, upload=upload)
    played = trained(strategy, net_task(make), 3, 8, play)
    for found, model in zip(
        played.models[1:], streaming(make, 3, number, 8), strict=True
    ):
        require_close(found, model)


class Tapped(LocalGrid):
    """Keeps the names of the arrays of all messages of training."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.seen = getattr(self, "seen", [])
        if messages and messages[0].metadata.message_type == "train":
            down, up = (
                {
                    node(m): None if m.has_error() else set(m.content["arrays"])
                    for m in group
                }
                for group, node in (
                    (messages, lambda m: m.metadata.dst_node_id),
                    (replies, lambda m: m.metadata.src_node_id),
                )
            )
            self.seen.append((down, up))
        return replies


def tapped(strategy, app, clients, rounds, config=STEPS):
    grid = Tapped(app, clients, config)
    result = strategy.start(grid, to_record(START), num_rounds=rounds)
    return grid.seen, result


def test_who_did_not_answer_last_is_sent_the_whole_model():
    app = client_app(net_task(OPTIMIZERS["adamw"]), DiLoCoClient)
    strategy = DiLoCo(
        fragments=3,
        fraction_train=0.5,
        fraction_evaluate=0.0,
        sampler=UniformSampler(seed=3),
    )
    seen, result = tapped(strategy, app, 4, 12)
    names = [set(own) for own in fragments_of(START, 3)]
    before, kinds = set(), set()
    for t, (down, up) in enumerate(seen):
        for node, arrays in down.items():
            expected = names[(t - 1) % 3] if node in before else set(START)
            assert arrays == expected
            kinds.add(node in before)
            assert up[node] == names[t % 3]
        before = set(down)
    assert kinds == {True, False}
    errors = [m["num-errors"] for m in result.train_metrics_clientapp.values()]
    assert errors == [0] * 12


def test_a_client_that_lost_its_model_is_sent_it_again(spied):
    inner = client_app(net_task(OPTIMIZERS["adamw"]), DiLoCoClient)

    def answer(message, context):
        lost = message.content["config"]["server-round"] == 3
        if lost and context.node_config["partition-id"] == 1:
            context.state.clear()
        return inner(message, context)

    app = ClientApp()
    app.train()(answer)
    seen, result = tapped(DiLoCo(fragments=2, fraction_evaluate=0.0), app, 3, 5, STEPS)
    errors = [m["num-errors"] for m in result.train_metrics_clientapp.values()]
    assert errors == [0, 0, 1, 0, 0]
    sizes = [sorted(len(x) for x in down.values()) for down, _ in seen]
    assert sizes == [[8, 8, 8], [4] * 3, [4] * 3, [4, 4, 8], [4] * 3]


def test_a_client_that_diverged_goes_on_with_the_servers_model(play, spied):
    """Its optimizer keeps the moments that it had."""

    def optimizer(parameters, settings):
        return torch.optim.Adam(parameters, settings.learning_rate)

    task = dataclasses.replace(net_task(), optimizer=optimizer)
    inner = client_app(task, DiLoCoClient)

    def answer(message, context):
        config = message.content["config"]
        if context.node_config["partition-id"] == 0:
            config["lr"] = 1e300 if config["server-round"] == 2 else 0.01
        return inner(message, context)

    app = ClientApp()
    app.train()(answer)
    app, calls = spied(app)
    for number, errors, dropped in ((1, [0] * 4, 1), (2, [0, 0, 1, 0], 1)):
        calls.clear()
        strategy = DiLoCo(fragments=number, fraction_evaluate=0.0)
        played = play(strategy, app, 2, START, 4, {**STEPS, "lr": 0.01})
        told = [played.train(i) for i in range(1, 5)]
        assert [m["num-errors"] for m in told] == errors
        assert [m["num-dropped"] for m in told] == [0, dropped, 0, 0]
        states = {
            c.server_round: from_record(c.state[PERSONAL + "optimizer"])
            for c in calls
            if c.client == 0
        }
        key = "exp_avg/first.weight"
        assert np.array_equal(states[1][key], states[2][key])
        assert not np.array_equal(states[2][key], states[4][key])
        assert np.isfinite(states[4][key]).all()


def test_layers_are_dealt_out_in_turns():
    sent = {
        f"model.{name}": np.arange(2.0) + i
        for i, name in enumerate(
            [
                "embed.weight",
                *(f"layers.{i}.{x}" for i in range(12) for x in ("a.w", "b.w")),
                "norm.weight",
            ]
        )
    }
    found = fragments_of(sent, 3)
    assert sorted(n for names in found for n in names) == sorted(sent)
    numbers = [sorted({*re.findall(r"layers\.(\d+)", str(x))}, key=int) for x in found]
    assert numbers == [
        ["2", "5", "8", "11"],
        ["0", "3", "6", "9"],
        ["1", "4", "7", "10"],
    ]
    assert "model.embed.weight" in found[0] and "model.norm.weight" in found[1]


def test_one_tensor_stays_in_one_fragment(play):
    """Tied weights, of which each copy would be exchanged in another round."""

    class Tied(Layers):
        def __init__(self):
            super().__init__()
            self.hidden[1].weight = self.hidden[0].weight

    task = dataclasses.replace(
        net_task(OPTIMIZERS["adamw"]), model=lambda config: Tied()
    )
    model = Tied()
    start = as_arrays(model)
    for names in fragments_of(start, 3):
        assert ("hidden.0.weight" in names) == ("hidden.1.weight" in names)
    app = client_app(task, DiLoCoClient)
    played = play(DiLoCo(fragments=3), app, 2, start, 7, STEPS)
    for number, found in enumerate(played.models):
        assert np.array_equal(found["hidden.0.weight"], found["hidden.1.weight"])
        if number:
            assert played.train(number)["num-errors"] == 0
    moved = played.models[7]["hidden.0.weight"] - start["hidden.0.weight"]
    assert np.abs(moved).max() > 0.01


def test_a_fragment_costs_its_share_of_the_bytes(tmp_path, play):
    app = client_app(net_task(OPTIMIZERS["adamw"]), DiLoCoClient)
    grid = LocalGrid(app, 2, STEPS)
    names = fragments_of(START, 4)
    strategy = DiLoCo(fragments=4, fraction_evaluate=0.0)
    told = strategy.configure_train(1, to_record(START), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(told))
    record, _ = strategy.aggregate_train(1, replies)
    for content in [r.content for r in replies]:
        assert list(content["arrays"]) == names[0]
    [message, _] = strategy.configure_train(2, record, ConfigRecord(), grid)
    assert list(message.content["arrays"]) == names[0]
    assert message.content["config"]["diloco-fragment"] == names[1]


def test_what_is_left_out_is_kept_for_each_fragment(play, spied):
    """Error feedback: the sum of what was sent and what is left is all that changed."""
    app, calls = spied(client_app(net_task(OPTIMIZERS["adamw"]), DiLoCoClient))
    strategy = DiLoCo(fragments=2, upload=ErrorFeedback(TopK(0.3, dense=())))
    play(strategy, app, 2, START, 5, STEPS)
    last = [c for c in calls if c.client == 0 and c.kind == "train"][-1].state
    names = fragments_of(START, 2)
    for place, key in enumerate(["upload-residual", "upload-residual-1"]):
        assert set(last[PERSONAL + key]) == set(names[place])
        # Without the residual of two rounds ago it would be as large as one change.
        left = from_record(last[PERSONAL + key])
        assert any(np.abs(x).max() > 0 for x in left.values())


def test_the_change_is_from_what_the_server_has(play, spied):
    """Not from what the client's own model was at the begin of the round."""
    app, calls = spied(client_app(net_task(OPTIMIZERS["adamw"]), DiLoCoClient))
    strategy = DiLoCo(fragments=2, download=NF4())
    played = play(strategy, app, 2, START, 6, STEPS)
    state = [c for c in calls if c.client == 0 and c.kind == "train"][-1].state
    known = from_record(state[PERSONAL + SENT])
    own = from_record(state[PERSONAL + MODEL])
    assert state[PERSONAL + ROUND][ROUND] == 6
    # Of the fragment that is sent in round 6 what came down in round 5, coded.
    for name in fragments_of(START, 2)[1]:
        at = played.models[4][name]
        near = np.abs(known[name] - at).max()
        assert near <= 0.2 * np.abs(at).max()
        assert np.abs(own[name] - at).max() > 2 * near


# The kept state: resumed, on other workers, of another run --------------------------


def kept_run(rounds, task, grid, initial, checkpoint=None, **options):
    strategy = DiLoCo(
        fraction_train=0.67,
        sampler=UniformSampler(seed=4),
        min_train_nodes=2,
        **options,
    )
    # A run names itself; clients of another one begin anew.
    strategy._id = 7.0
    with grid() as made:
        return strategy.start(made, initial, rounds, checkpoint=checkpoint)


MULOCO = {
    "task": MuonAdamW(),
    "upload": ErrorFeedback(EDEN(2, unbiased=False)),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"fragments": 3}, MULOCO, {**MULOCO, "fragments": 2}]
)
def test_resumed_on_other_workers_it_is_the_same_bit_for_bit(tmp_path, options):
    options = dict(options)
    adamw = OPTIMIZERS["adamw"]
    optimizer = options.pop("task", lambda parameters, settings: adamw(parameters))
    task = dataclasses.replace(net_task(), optimizer=optimizer)
    app = client_app(task, DiLoCoClient)
    start = to_record(START)

    def local():
        return nullcontext(LocalGrid(app, 3, {**STEPS, "lr": 0.02}))

    def packed():
        return PackedGrid(
            num_clients=3,
            client_app=app,
            run_config={**STEPS, "lr": 0.02},
            num_workers=2,
            transport="processes",
        )

    expected = kept_run(6, task, local, start, **options)
    kept_run(3, task, packed, start, tmp_path, **options)
    found = kept_run(6, task, packed, start, tmp_path, **options)
    for name, array in expected.arrays.items():
        assert found.arrays[name].data == array.data, name
    assert found.train_metrics_clientapp[6] == expected.train_metrics_clientapp[6]


def test_a_new_strategy_begins_with_new_optimizers(play):
    app = client_app(net_task(OPTIMIZERS["adamw"]), DiLoCoClient)
    grid = LocalGrid(app, 2, STEPS)
    for options in ({}, {"fragments": 2}):
        first, second = (
            play(DiLoCo(**options), grid, 2, START, 3).models for _ in range(2)
        )
        require_equal(second[3], first[3])


def test_clients_of_unlike_numbers_of_steps_are_stacked(play, monkeypatch):
    """Adam counts its steps, and there each client has a count of its own."""
    models = []
    for options in ({}, {"trainer": Stacked()}):
        app = client_app(net_task(OPTIMIZERS["adamw"]), DiLoCoClient, **options)
        strategy = DiLoCo(
            fraction_train=0.5, sampler=UniformSampler(seed=1), min_train_nodes=2
        )
        models.append(play(strategy, app, 5, START, 6, STEPS).models[-1])
    require_close(models[1], models[0])


def test_a_silo_pays_what_fedavg_costs_it(play, linear_task):
    """The state of an optimizer is made of noisy gradients."""
    clients = [{"x": np.ones((20, 1)) * i, "y": np.ones(20)} for i in (1, 2)]
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-3, clipping_norm=1.0, seed=3)
    task = dataclasses.replace(
        linear_task(clients, 1),
        optimizer=lambda parameters, settings: torch.optim.Adam(parameters, 0.1),
    )
    app = client_app(task, DiLoCoClient, trainer=DPSGD(privacy))
    start = {"weight": np.zeros((1, 1), np.float32)}
    spent = []
    for strategy in (DiLoCo(), AdditiveStrategy()):
        found = play(strategy, app, 2, start, 2, {"batch-size": 10})
        assert found.train(2)["num-errors"] == 0
        spent.append([found.train(i)["example-epsilon"] for i in (1, 2)])
    assert spent[0] == spent[1]


# A loop of one's own ----------------------------------------------------------------


@pytest.mark.parametrize("forgets", [False, True])
def test_two_lines_make_of_a_loop_what_the_half_does(play, forgets):
    make = OPTIMIZERS["adamw"]
    app = ClientApp()

    @app.train()
    def train(message, context):
        model = net()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        optimizer = make(model.parameters())
        state = OptimizerState.of(optimizer, model, message, context)
        batch = columns(context.node_config["partition-id"])
        walk(model, optimizer, batch, 3)
        if not forgets:
            state.keep()
        arrays = ArrayRecord(model.state_dict())
        metrics = MetricRecord({"num-examples": 6})
        content = RecordDict({"arrays": arrays, "metrics": metrics})
        return Message(content, reply_to=message)

    options = {"fraction_evaluate": 0.0}
    ours = play(DiLoCo(**options), app, 2, START, 4, STEPS).models
    theirs = trained(DiLoCo(**options), net_task(make), 2, 4, play).models
    if forgets:
        assert np.abs(ours[4]["last.bias"] - theirs[4]["last.bias"]).max() > 1e-3
    else:
        require_close(ours[4], theirs[4])


# What is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"fragments": 0}, "fragments=0 must be an integer >= 1"),
        ({"fragments": 1.5}, "fragments=1.5 must be an integer >= 1"),
    ],
)
def test_options_are_refused(options, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        DiLoCo(**options)


def test_more_fragments_than_layers_are_refused_before_anything_ran(play, spied):
    app, calls = spied(client_app(net_task(), DiLoCoClient))
    text = "fragments=5 must be at most 4: the model has the layers"
    with pytest.raises(ValueError, match=re.escape(text)):
        play(DiLoCo(fragments=5), app, 2, START, 1, STEPS)
    assert not calls


def test_a_changed_optimizer_is_refused(play, spied):
    makes = [OPTIMIZERS["adamw"], OPTIMIZERS["momentum"]]
    inner = client_app(
        dataclasses.replace(
            net_task(),
            optimizer=lambda parameters, settings: makes[
                int(settings.learning_rate > 0.15)
            ](parameters),
        ),
        DiLoCoClient,
    )

    def schedule(message, context):
        message.content["config"]["lr"] = (
            0.1 * message.content["config"]["server-round"]
        )
        return inner(message, context)

    app = ClientApp()
    app.train()(schedule)
    strategy = DiLoCo(fraction_evaluate=0.0)
    grid = LocalGrid(app, 2, STEPS)
    messages = strategy.configure_train(1, to_record(START), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    record, _ = strategy.aggregate_train(1, replies)
    messages = strategy.configure_train(2, record, ConfigRecord(), grid)
    for reply in grid.send_and_receive(messages):
        reason = reply.error.reason
        assert "SGD' must be torch.optim.adamw.AdamW, whose state the" in reason
