"""Clients that are trained together, against the same clients one after the other."""

import logging
import random
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn
from torch.nn import functional as F

from flower_ext import AdditiveStrategy, PackedGrid, Plain, Stacked, Task, client_app
from flower_ext.client import stacked
from flower_ext.client.batching_rules import BatchingRules
from flower_ext.client.half import ClientHalf
from flower_ext.simulation import LocalGrid, packed

SIZES = (12, 7, 12, 5, 1, 16)  # of batches of 4: some end with a smaller one
CONFIG = {"server-round": 1, "batch-size": 4, "lr": 0.1, "local-epochs": 2}


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def steps(monkeypatch):
    """How many clients took part in each stacked step, and 1 for those taken alone."""
    found = []

    def counted(owner, name, size):
        take = getattr(owner, name)

        def step(self, **options):
            take(self, **options)  # not counted where it fails
            found.append(size(self))

        monkeypatch.setattr(owner, name, step)

    counted(stacked._Stack, "step", lambda stack: len(stack.members))
    counted(stacked._Member, "step_alone", lambda member: 1)
    return found


def images(context, sizes=SIZES):
    client = int(context.node_config["partition-id"])
    draw = torch.Generator().manual_seed(client)
    x = torch.randn(sizes[client], 2, 6, 6, generator=draw)
    y = torch.randint(0, 3, (sizes[client],), generator=draw)
    return {"x": x, "y": y}, {"x": x, "y": y}


def cross_entropy(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def dense(*layers):
    return nn.Sequential(nn.Flatten(), nn.Linear(72, 5), *layers, nn.Linear(5, 3))


def plain_net():
    return dense(nn.Tanh())


def make_task(model=plain_net, data=images, loss=cross_entropy, **more):
    return Task(lambda run_config: model(), data, loss, **more)


def replies(task, trainer, *halves, mods=(), arrays=None, rounds=1, **config):
    """Return what all clients answer, in the last of some rounds."""
    app = client_app(task, *halves, trainer=trainer, mods=mods)
    grid = LocalGrid(app, len(SIZES))
    if arrays is None:
        torch.manual_seed(0)
        arrays = task.model({}).state_dict()
    half = {"client-half": halves[0].name} if halves else {}
    for number in range(1, rounds + 1):
        told = ConfigRecord({**CONFIG, **half, **config, "server-round": number})
        content = RecordDict({"arrays": ArrayRecord(arrays), "config": told})
        found = grid.send_and_receive(
            Message(content, node, "train") for node in grid.get_node_ids()
        )
    return found


def require_equal(found, expected, **tolerance):
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.has_error() == theirs.has_error()
        if theirs.has_error():
            last = [x.error.reason.splitlines()[0] for x in (ours, theirs)]
            assert last[0] == last[1]
            continue
        assert ours.content.keys() == theirs.content.keys()
        for key, metrics in theirs.content.metric_records.items():
            close = pytest.approx(dict(metrics), rel=1e-4, nan_ok=True)
            assert dict(ours.content[key]) == close
        for key, record in theirs.content.array_records.items():
            for name, x in record.items():
                np.testing.assert_allclose(
                    ours.content[key][name].numpy(),
                    x.numpy(),
                    **{"rtol": 1e-4, "atol": 1e-6, **tolerance},
                )


def require_as_alone(task, *halves, at_once=6, tolerance=None, **config):
    require_equal(
        replies(task, Stacked(at_once), *halves, **config),
        replies(task, Plain(), *halves, **config),
        **(tolerance or {}),
    )


# What is equal ----------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [2, 4, 6])
def test_unequal_clients_end_where_each_would_alone(at_once, steps):
    require_as_alone(make_task(), at_once=at_once)
    assert max(steps) > at_once / 2
    # Every step was taken: 2 epochs of batches of 4.
    assert sum(steps) == sum(2 * -(-size // 4) for size in SIZES)


OPTIMIZERS = {
    "momentum": lambda p, s: torch.optim.SGD(
        p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01
    ),
    "groups": lambda p, s: torch.optim.SGD(
        [{"params": [x], "lr": 0.02 * (i + 1)} for i, x in enumerate(p)]
    ),
    "adam": lambda p, s: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p, s: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "adamax": lambda p, s: torch.optim.Adamax(p, lr=0.01),
    "nadam": lambda p, s: torch.optim.NAdam(p, lr=0.01),
    "radam": lambda p, s: torch.optim.RAdam(p, lr=0.01),
    "rmsprop": lambda p, s: torch.optim.RMSprop(
        p, lr=0.01, momentum=0.5, centered=True
    ),
    "adagrad": lambda p, s: torch.optim.Adagrad(p, lr=0.05),
    "adadelta": lambda p, s: torch.optim.Adadelta(p),
    # These step each client alone: what one row does depends on all of it.
    "adafactor": lambda p, s: torch.optim.Adafactor(p, lr=0.05),
    "rprop": lambda p, s: torch.optim.Rprop(p, lr=0.01),
}


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_optimizers_with_states_of_their_own(make, steps):
    # Sharp: Adam divides by square roots of what has been rounded.
    require_as_alone(make_task(optimizer=make), tolerance={"rtol": 1e-3, "atol": 1e-5})
    assert max(steps) > 2


def test_gradients_are_scaled_for_each_client(steps):
    config = {"max-gradient-norm": 0.05, "momentum": 0.5, "lr": 1.0}
    require_as_alone(make_task(), **config)
    free, scaled = (
        replies(make_task(), Stacked(), **{**config, "max-gradient-norm": limit})
        for limit in (1e9, 0.05)
    )
    with pytest.raises(AssertionError):
        require_equal(free, scaled)


class Attends(nn.Module):
    """A small transformer over rows of an image, with dropout."""

    def __init__(self):
        super().__init__()
        self.into = nn.Linear(12, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, 0.3, batch_first=True)
        self.block.self_attn.dropout = 0.0
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.block(self.into(x.flatten(1).view(-1, 6, 12))).mean(1))


class DropsWeights(nn.Module):
    """Attention as that of transformers' models, whose weights are dropped."""

    def __init__(self, **options):
        super().__init__()
        self.into, self.out = nn.Linear(12, 24), nn.Linear(8, 3)
        self.options = options

    def forward(self, x):
        parts = self.into(x.flatten(1).view(-1, 6, 12)).view(-1, 6, 3, 2, 4)
        query, key, value = parts.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            query, key, value, dropout_p=0.4 * self.training, **self.options
        )
        return self.out(attended.transpose(1, 2).flatten(2).mean(1))


class Words(nn.Module):
    """Embeddings with an output layer tied to them."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(7, 4, padding_idx=0)
        self.out = nn.Linear(4, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x):
        tokens = (x.flatten(1) * 3).long().clamp(0, 6)
        return self.out(self.embed(tokens).mean(1))[:, :3]


MODELS = {
    "convolution": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(16, 3)
    ),
    "batch norm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3)
    ),
    "batch norm of features": lambda: dense(nn.BatchNorm1d(5), nn.Tanh()),
    "group and layer norm": lambda: nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Flatten(), nn.LayerNorm(64),
        nn.Linear(64, 3),
    ),
    "dropout": lambda: dense(nn.ReLU(), nn.Dropout(0.4)),
    "dropout of channels": lambda: nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Dropout2d(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)
    ),
    "attention": Attends,
    "dropped weights": DropsWeights,
    "causal": lambda: DropsWeights(is_causal=True, scale=0.3),
    "bias": lambda: DropsWeights(attn_mask=torch.arange(6.0)),
    "mask": lambda: DropsWeights(attn_mask=torch.eye(6).roll(1).bool()),
    "embeddings": Words,
}  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_layers(model, steps):
    require_as_alone(make_task(model))
    assert max(steps) > 2


def test_dropout_draws_from_each_clients_own_generator():
    task = make_task(lambda: dense(nn.ReLU(), nn.Dropout(0.5)))
    together, in_twos = (replies(task, Stacked(n)) for n in (6, 2))
    require_equal(together, in_twos)


def test_a_loss_that_compares_examples_is_not_filled_up(steps):
    def contrast(model, batch):
        found = model(batch["x"])
        return cross_entropy(model, batch) + (found - found.mean(0)).square().sum(1)

    require_as_alone(make_task(loss=contrast))
    assert max(steps) > 2


def test_filled_up_examples_do_not_count(steps):
    """Batches of 4, 3 and, in the last client, one of 4: all but the one of 1."""
    sizes = (4, 3, 4, 3, 1, 4)
    data = partial(images, sizes=sizes)
    require_as_alone(make_task(data=data), **{"local-epochs": 1})
    assert sorted(steps) == [1, 5]


def test_what_is_not_trained_and_equal_is_shared(monkeypatch, steps):
    class Adapted(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = nn.Linear(72, 8).requires_grad_(False)
            self.down = nn.Linear(72, 2, bias=False)
            self.up = nn.Linear(2, 8, bias=False)
            self.head = nn.Linear(8, 3)

        def forward(self, x):
            x = x.flatten(1)
            return self.head(self.base(x) + self.up(self.down(x)))

    shared = []
    init = stacked._Stack.__init__

    def watched(self, members):
        init(self, members)
        shared.append(set(self._shared))

    monkeypatch.setattr(stacked._Stack, "__init__", watched)
    require_as_alone(make_task(Adapted))
    assert all(x == {"base.weight", "base.bias"} for x in shared)
    assert shared


class Noisy(ClientHalf):
    """Overrides every hook of a step, and draws from all global generators."""

    name = "noisy"

    def begin(self, local):
        self.drawn = []
        self.weight = 1 + local.client

    def batches(self, local):
        for batch in super().batches(local):
            yield {**batch, "x": batch["x"] + 0.1 * torch.randn(1)}

    def objective(self, losses, batch):
        self.drawn.append(random.random())
        return losses * self.weight * (0.5 + np.random.rand())  # noqa: NPY002

    def regularizer(self, model):
        return 0.01 * sum(p.square().sum() for p in model.parameters()) * self.weight

    def after_backward(self, model):
        first, *_, last = model.parameters()
        first.grad *= 0.5
        last.grad = torch.ones_like(last) * self.weight

    def after_step(self, local):
        with torch.no_grad():
            for p in local.model.parameters():
                p.clamp_(-0.5, 0.5)
        self.drawn.append(float(torch.rand(())))

    def records(self, local):
        own = float(np.random.rand() + random.random() + torch.rand(()))  # noqa: NPY002
        return {}, {"drawn": sum(self.drawn), "later": own}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_every_hook_sees_its_own_client(momentum, steps):
    def model():
        return dense(nn.ReLU(), nn.Dropout(0.3))

    require_as_alone(make_task(model), Noisy, momentum=momentum)
    assert max(steps) > 2


class Schedules(ClientHalf):
    """Halves the learning rate, freezes a layer, fixes the norm: clients in turns."""

    name = "schedules"

    def begin(self, local):
        self.steps = 0

    def optimizer(self, local):
        self.found = super().optimizer(local)
        return self.found

    def after_step(self, local):
        self.steps += 1
        if self.steps == 1:
            for group in self.found.param_groups:
                group["lr"] *= 0.5 if local.client % 2 else 2.0
        if self.steps == 2:
            first = next(iter(local.model.parameters()))
            first.requires_grad_(False)
        if self.steps == 3:
            local.model.eval()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_what_hooks_change_between_steps_is_followed(momentum, steps):
    config = {"momentum": momentum, "local-epochs": 4}
    require_as_alone(make_task(lambda: dense(nn.BatchNorm1d(5))), Schedules, **config)
    assert max(steps) > 1


class Twice(ClientHalf):
    """Trains a second model of its own, and keeps it."""

    name = "twice"

    def after_training(self, local):
        own = local.personal.arrays("own", like=local.start, first=local.start)
        second = local.with_model(own)
        second.fit(
            lambda model: 0.1 * sum(p.square().sum() for p in model.parameters())
        )
        local.personal.save(own=second.end)

    def records(self, local):
        return {"own": local.personal.arrays("own", like=local.start)}, {}


def test_further_trainings_meet_too(steps):
    require_as_alone(make_task(), Twice, rounds=2)
    together = [size for size in steps if size > 1]
    assert sum(together) > 0.8 * sum(steps)


# What is not stacked ----------------------------------------------------------------


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(12, 5, batch_first=True)
        self.out = nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.lstm(x.flatten(1).view(-1, 6, 12))[0][:, -1])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(72, 3)

    def forward(self, x):
        x = self.out(x.flatten(1))
        return 2 * x if x.sum() > 0 else x


class Draws(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(72, 3)

    def forward(self, x):
        return self.out(x.flatten(1) + 0.1 * torch.randn(x.shape[0], 72))


class Attention(nn.Module):
    """Attention of torch's own module draws in the midst of what cannot be replaced."""

    def __init__(self):
        super().__init__()
        self.attend = nn.MultiheadAttention(12, 2, dropout=0.3, batch_first=True)
        self.out = nn.Linear(12, 3)

    def forward(self, x):
        x = x.flatten(1).view(-1, 6, 12)
        return self.out(self.attend(x, x, x)[0].mean(1))


@pytest.mark.parametrize("model", [Recurrent, Branches, Draws, Attention])
def test_models_without_a_batching_rule_are_trained_alone(model, steps, caplog):
    with caplog.at_level(logging.WARNING, logger="flwr"):
        require_as_alone(make_task(model), rounds=2, tolerance={"rtol": 0, "atol": 0})
    assert set(steps) == {1}
    said = [x for x in caplog.messages if "one after the other" in x]
    assert len(said) == 1  # once, whatever the number of rounds


def test_a_hook_of_a_module_is_its_clients_own(steps):
    class Hooked(nn.Linear):
        def __init__(self):
            super().__init__(72, 3)
            self.seen = 0
            self.register_forward_hook(self.look)

        def look(self, *_):
            self.seen += 1

        def forward(self, x):
            return super().forward(x.flatten(1)) * (1 + self.seen)

    require_as_alone(make_task(Hooked), tolerance={"rtol": 0, "atol": 0})
    assert set(steps) == {1}


def test_one_client_that_fails_does_so_alone(steps):
    def spoiled(context):
        train, test = images(context)
        if context.node_config["partition-id"] == 2:
            train = {**train, "y": train["y"] + 5}  # there are 3 classes
        return train, test

    require_as_alone(make_task(data=spoiled), rounds=3)
    assert max(steps) > 2  # in later rounds, too


class Fails(ClientHalf):
    name = "fails"

    def begin(self, local):
        self.left, self.client = 2, local.client

    def objective(self, losses, batch):
        self.left -= 1
        if self.client == 0 and self.left < 0:
            raise ValueError("client 0 has had enough")
        if self.client == 3 and self.left < 1:
            raise SystemExit(3)
        return losses


def test_a_hook_that_fails_ends_its_own_client(steps):
    require_as_alone(make_task(), Fails)
    assert max(steps) > 2


def test_clients_with_no_example_or_one_that_batch_norm_cannot_take():
    data = partial(images, sizes=(8, 0, 8, 1, 9, 0))
    require_as_alone(make_task(lambda: dense(nn.BatchNorm1d(5)), data=data))


def test_one_model_for_all_clients_is_refused():
    model = dense(nn.Tanh())
    found = replies(make_task(lambda: model), Stacked())
    assert all("Task.model" in reply.error.reason for reply in found)
    assert all("a new one for each call" in reply.error.reason for reply in found)


@pytest.mark.parametrize("wrong", [0, -1, 2.5, "4"])
def test_at_once_is_a_positive_number(wrong):
    with pytest.raises((ValueError, TypeError), match="at_once"):
        Stacked(wrong)


# What is around ----------------------------------------------------------------------


def states():
    return (
        torch.get_rng_state().tolist(),
        np.random.get_state()[1].tolist(),  # noqa: NPY002
        random.getstate(),
        torch.get_num_threads(),
    )


@pytest.mark.parametrize("trainer", [Plain(), Stacked(4)], ids=["plain", "stacked"])
def test_random_states_and_threads_outside_stay_as_they_were(trainer):
    torch.set_num_threads(2)
    torch.manual_seed(1)
    arrays = make_task().model({}).state_dict()
    before = states()
    replies(make_task(), trainer, Noisy, arrays=arrays)
    assert states() == before


@pytest.mark.parametrize("trainer", [Plain(), Stacked(4)], ids=["plain", "stacked"])
def test_noise_of_a_mod_goes_on_from_client_to_client(trainer):
    drawn = []

    def noise(message, context, call_next):
        reply = call_next(message, context)
        drawn.append((np.random.rand(), random.random(), float(torch.rand(()))))  # noqa: NPY002
        return reply

    replies(make_task(), trainer, mods=[noise], rounds=2)
    assert all(len(set(column)) == 12 for column in zip(*drawn, strict=True))


def test_clients_of_a_node_are_stacked(steps):
    """Over Flower's messages, where a mod runs the clients of a pack."""

    def run(trainer):
        app = client_app(make_task(), trainer=trainer, mods=[packed])
        torch.manual_seed(0)
        initial = ArrayRecord(make_task().model({}).state_dict())
        inner = LocalGrid(app, 1)
        with PackedGrid(inner, num_clients=6, transport="messages") as grid:
            strategy = AdditiveStrategy(fraction_evaluate=0.0)
            return strategy.start(grid, initial, num_rounds=1).arrays

    found, expected = run(Stacked()), run(Plain())
    assert max(steps) > 2
    for name, x in expected.items():
        np.testing.assert_allclose(found[name].numpy(), x.numpy(), rtol=1e-5, atol=1e-7)


def test_what_vmap_gets_wrong_is_found_out(monkeypatch, steps):
    """It forgets that the row of the padding has no gradient."""
    monkeypatch.delitem(BatchingRules._replaced, F.embedding)
    require_as_alone(make_task(Words))
    assert set(steps) == {1}


def test_a_client_with_a_limit_of_time_is_alone(steps):
    grid = PackedGrid(
        LocalGrid(client_app(make_task(), trainer=Stacked()), 1),
        num_clients=6,
        client_app=client_app(make_task(), trainer=Stacked()),
        client_timeout=60,
        run_config={"batch-size": 4},
    )
    initial = ArrayRecord(make_task().model({}).state_dict())
    with grid:
        AdditiveStrategy(fraction_evaluate=0.0).start(grid, initial, num_rounds=1)
    assert steps == []
