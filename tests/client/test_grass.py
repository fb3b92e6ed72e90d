"""Grass: against Adam, a dense projection, and what a codec of rows sends."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
from torch import nn
from torch.nn import functional as F

from flower_ext import DPSGD, AdditiveStrategy, ClientHalf, Stacked, Task, client_app
from flower_ext.client import Grass
from flower_ext.client.grass import adam, in_rows
from flower_ext.core.arrays import from_record
from flower_ext.privacy import SiloPrivacy
from flower_ext.simulation import LocalGrid
from flower_ext.wire import NF4, Chain, ErrorFeedback, Rows, TopK
from flower_ext.wire.messages import UPLOAD_KEY, change_like
from flower_ext.wire.registry import describe

CONFIG = {"batch-size": 4, "lr": 0.01, "local-epochs": 2}
ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
LARGEST = Rows(0.25, "largest")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tied(nn.Module):
    """Words, a convolution with a norm, and a head that is the embedding."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(12, 8)
        self.mix = nn.Conv1d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 12)
        self.head.weight = self.words.weight

    def forward(self, x):
        x = self.norm(self.mix(self.words(x).transpose(1, 2)))
        return self.head(torch.tanh(x).mean(2))


def data(context, size=10):
    draw = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x = torch.randint(0, 12, (size, 5), generator=draw)
    return ({"x": x, "y": x[:, 0]},) * 2


def loss(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def start():
    torch.manual_seed(0)
    return ArrayRecord(Tied().state_dict())


def make_task(optimizer=None):
    return Task(lambda run_config: Tied(), data, loss, optimizer=optimizer)


def steps(model, optimizer, count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randint(0, 12, (6, 5), generator=draw)
        optimizer.zero_grad()
        loss(model, {"x": x, "y": x[:, 0]}).mean().backward()
        optimizer.step()


def trained(make, count=7):
    torch.manual_seed(0)
    model = Tied()
    optimizer = make(model)
    steps(model, optimizer, count)
    return model, optimizer


def grass(model, rows, make=torch.optim.Adam, **more):
    found = make(model.parameters())
    return in_rows(found, dict(model.named_parameters()), rows, **more)


def same(left, right):
    return all(torch.equal(x, right[name]) for name, x in left.items())


# The optimizer ------------------------------------------------------------------------


MAKE = {
    "adam": partial(torch.optim.Adam, lr=0.01, weight_decay=0.1),
    "adamw": partial(torch.optim.AdamW, lr=0.01, amsgrad=True),
    "sgd": partial(torch.optim.SGD, lr=0.1),
    "momentum": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
}


@pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
@pytest.mark.parametrize("choice", ["round", "client", "norm", "largest"])
def test_with_all_rows_it_is_the_optimizer_to_the_bit(make, choice):
    plain, _ = trained(lambda model: make(model.parameters()))
    rows = Rows(1, choice, rescaled=choice != "largest")
    ours, _ = trained(lambda model: grass(model, rows, make, every=3))
    assert same(plain.state_dict(), ours.state_dict())


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("choice", ["client", "norm", "largest"])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_it_is_adam_in_the_space_of_a_dense_projection(name, choice, rescaled):
    """W - lr alpha P adam(P^T G), with P as a matrix, and moments of P's columns."""
    rescaled = rescaled and choice != "largest"
    rows, every, alpha, rate = Rows(0.4, choice, rescaled=rescaled), 3, 0.7, 0.05
    make = {"adam": torch.optim.Adam, "sgd": torch.optim.SGD}[name]
    draw = torch.Generator().manual_seed(1)
    gradients = torch.randn(8, 10, 4, generator=draw, dtype=torch.float64)
    ours = nn.Parameter(torch.ones(10, 4, dtype=torch.float64))
    optimizer = make([ours], lr=rate)
    in_rows(optimizer, {"w": ours}, rows, every, alpha, seed=5)
    theirs = ours.detach().clone()
    for step, gradient in enumerate(gradients):
        if step % every == 0:
            seed = np.random.SeedSequence([5, step]).generate_state(1, np.uint64)
            norms = gradient.norm(dim=1).numpy
            picked = rows.pick("w", (10, 4), norms, int(seed[0]))
            assert len(picked.rows) == 4
            p = torch.zeros(10, 4, dtype=torch.float64)
            rho = picked.probabilities**-0.5 if rescaled else np.ones(4)
            p[picked.rows, torch.arange(4)] = torch.from_numpy(rho)
            small = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64))
            inner = make([small], lr=rate)
        small.grad = p.T @ gradient
        small.data.zero_()
        inner.step()
        theirs += alpha * p @ small.detach()
        ours.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(ours.grad, gradient)
        torch.testing.assert_close(ours.detach(), theirs, rtol=1e-12, atol=1e-14)


def test_the_rows_are_those_with_the_largest_gradients():
    model, optimizer = nn.Linear(3, 8), torch.optim.SGD
    before = model.weight.detach().clone()
    optimizer = in_rows(
        optimizer(model.parameters(), lr=1), dict(model.named_parameters()), LARGEST
    )
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    model.weight.grad[[2, 6]] = -5
    optimizer.step()
    moved = (model.weight != before).any(1)
    assert torch.equal(moved.nonzero().flatten(), torch.tensor([2, 6]))


def test_moments_are_those_of_the_rows():
    model, optimizer = trained(lambda model: grass(model, LARGEST))
    sizes = {"words.weight": 3 * 8, "mix.weight": 2 * 8 * 3}
    for name, p in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[p][key].numel() == sizes.get(name, p.numel())


def test_moments_begin_anew_with_new_rows():
    counts = []
    for every in (3, 5, 200):
        model, optimizer = trained(
            lambda model, n=every: grass(model, LARGEST, every=n)
        )
        state = optimizer.state
        counts.append(int(state[model.mix.weight]["step"]))
        assert int(state[model.mix.bias]["step"]) == 7
    assert counts == [1, 2, 7]


def test_rows_of_a_round_stay():
    rows = Rows(0.25).at(3)
    model, optimizer = trained(lambda model: grass(model, rows, every=2))
    assert int(optimizer.state[model.mix.weight]["step"]) == 7
    torch.manual_seed(0)
    begun = Tied().mix.weight
    picked = rows.pick("mix.weight", begun.shape, None, rows.round_seed)
    moved = (model.mix.weight != begun).flatten(1).any(1).nonzero().flatten()
    assert moved.tolist() == picked.rows.tolist()


def test_a_frozen_matrix_and_a_matrix_without_gradient_stay():
    model = Tied()
    model.mix.weight.requires_grad_(False)
    before = model.mix.weight.clone()
    optimizer = grass(model, LARGEST)
    optimizer.step()
    steps(model, optimizer, 2)
    assert torch.equal(model.mix.weight, before)
    assert model.mix.weight not in optimizer.state


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Grass(0.25), "rows=0.25 must be a codec Rows"),
        (lambda: Grass(LARGEST, every=0), "every=0"),
        (lambda: Grass(LARGEST, alpha=0), "alpha=0"),
        (lambda: Grass(LARGEST, optimizer=torch.optim), "optimizer="),
        (
            lambda: grass(Tied(), LARGEST, torch.optim.Adagrad),
            "optimizer='Adagrad' must be one without a state",
        ),
        (
            lambda: grass(Tied(), LARGEST).step(lambda: torch.zeros(())),
            "step='a closure' must be called without",
        ),
    ],
)
def test_what_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


# The client ---------------------------------------------------------------------------


def replies(task, upload=None, *halves, server_round=3, trainer=None, clients=2):
    app = client_app(task, *halves, **({"trainer": trainer} if trainer else {}))
    grid = LocalGrid(app, clients)
    told = ConfigRecord({**CONFIG, "server-round": server_round})
    if halves:
        told["client-half"] = halves[0].name
    if upload is not None:
        told[UPLOAD_KEY] = describe(upload.at(server_round))
    content = RecordDict({"arrays": start(), "config": told})
    nodes = grid.get_node_ids()
    return [*grid.send_and_receive(Message(content, n, "train") for n in nodes)]


def changes(task, upload, *halves, **more):
    """Return the changes of clients, as the server reads them."""
    like = change_like(from_record(start()))
    codec = upload.at(3)
    found = replies(task, upload, *halves, **more)
    return [codec.decode(x.content["arrays"], like) for x in found]


def rows_of(change):
    moved = change.reshape(len(change), -1).any(1)
    return np.flatnonzero(moved).tolist()


def round_rows(rows, name, shape, server_round=3):
    rows = rows.at(server_round)
    return rows.pick(name, shape, None, rows.round_seed).rows.tolist()


@pytest.mark.parametrize("trainer", [None, Stacked()], ids=["plain", "stacked"])
@pytest.mark.parametrize("optimizer", [adam, MAKE["momentum"]], ids=["adam", "sgd"])
def test_what_the_server_reads_is_what_the_client_did(optimizer, trainer):
    """Grass learns the rows of the upload; told the same rows, it needs no upload."""

    def make(parameters, settings):
        return optimizer(parameters, *([settings] if optimizer is adam else []))

    upload = Rows(0.25, seed=7)
    told = changes(make_task(Grass(LARGEST, optimizer=make)), upload, trainer=trainer)
    known = make_task(Grass(Rows(0.25, seed=7), optimizer=make))
    began = from_record(start())
    for found, reply in zip(told, replies(known, trainer=trainer), strict=True):
        ended = from_record(reply.content["arrays"])
        for name, x in found.items():
            if name != "head.weight":  # the same tensor, which travels once
                assert np.array_equal(x, ended[name] - began[name])
    for name in ("words.weight", "mix.weight"):
        rows = round_rows(upload, name, began[name].shape)
        assert [rows_of(found[name]) for found in told] == [rows, rows]
    assert told[0]["mix.bias"].any() and told[0]["norm.running_mean"].any()


def test_in_a_chain_the_rows_are_the_same():
    exact = changes(make_task(Grass()), Rows(0.25))
    for codec in (Chain(Rows(0.25), NF4()), ErrorFeedback(Chain(Rows(0.25), NF4()))):
        for one, two in zip(exact, changes(make_task(Grass()), codec), strict=True):
            assert rows_of(one["words.weight"]) == rows_of(two["words.weight"])
            assert two["words.weight"] == pytest.approx(one["words.weight"], abs=0.01)


def test_other_uploads_do_not_say_which_rows():
    task = make_task(Grass(LARGEST))
    for codec in (TopK(1.0), Rows(1, "largest")):
        [one, two] = changes(task, codec)
        # Of each client those of its own gradients.
        assert rows_of(one["mix.weight"]) != rows_of(two["mix.weight"])
        assert len(rows_of(one["mix.weight"])) == len(rows_of(two["mix.weight"])) == 2


class Personal(ClientHalf):
    """Trains a second model, and looks what it has trained."""

    name = "second"

    def after_training(self, local):
        own = local.with_model(local.start)
        own.fit()
        begun = local.start["mix.weight"]
        self.rows, self.received = (
            rows_of((x.end["mix.weight"] - begun).numpy()) for x in (own, local)
        )
        self.alone = local.alone(1).upload

    def records(self, local):
        assert self.alone is None
        round_ = round_rows(local.upload, "mix.weight", (8, 8, 3))
        return {}, {
            "own": float(self.rows != round_),
            "received": float(self.received == round_),
            "number": len(self.rows),
        }


def test_a_model_that_stays_has_rows_of_its_own():
    for reply in replies(make_task(Grass(Rows(0.25, "client"))), Rows(0.25), Personal):
        metrics = reply.content["metrics"]
        assert (metrics["own"], metrics["received"], metrics["number"]) == (1, 1, 2)


def test_an_upload_that_multiplies_is_refused():
    for reply in replies(make_task(Grass()), Rows(0.25, rescaled=True)):
        assert "must be rows with rescaled=False" in reply.error.reason


def test_under_dp_sgd_the_noise_moves_these_rows_only():
    linear = Task(
        lambda run_config: nn.Linear(6, 8),
        lambda context: ({"x": torch.ones(8, 6), "y": torch.zeros(8).long()},) * 2,
        lambda model, batch: F.cross_entropy(
            model(batch["x"]), batch["y"], reduction="none"
        ),
        optimizer=Grass(),
    )
    privacy = SiloPrivacy(clipping_norm=1.0, noise_multiplier=1.0, delta=1e-3)
    app = client_app(linear, trainer=DPSGD(privacy))
    told = ConfigRecord({**CONFIG, "server-round": 1})
    told[UPLOAD_KEY] = describe(Rows(0.25).at(1))
    arrays = ArrayRecord(nn.Linear(6, 8).state_dict())
    grid = LocalGrid(app, 1)
    message = RecordDict({"arrays": arrays, "config": told})
    [node] = grid.get_node_ids()
    [reply] = grid.send_and_receive([Message(message, node, "train")])
    like = change_like(from_record(arrays))
    found = Rows(0.25).decode(reply.content["arrays"], like)
    assert rows_of(found["weight"]) == round_rows(Rows(0.25), "weight", (8, 6), 1)


# A run --------------------------------------------------------------------------------


def run(task, rounds=3, **options):
    grid = LocalGrid(client_app(task), 3, CONFIG)
    strategy = AdditiveStrategy(**ANY, **options)
    return from_record(strategy.start(grid, start(), num_rounds=rounds).arrays)


def test_with_all_rows_a_run_is_that_of_adam_to_the_bit():
    plain = run(make_task(adam))
    for upload in (Rows(1.0), Rows(1.0, rescaled=False, seed=3)):
        ours = run(make_task(Grass()), upload=upload)
        assert all(x.tobytes() == ours[name].tobytes() for name, x in plain.items())


def test_a_round_moves_the_rows_of_the_round():
    began = from_record(start())
    ended = run(make_task(Grass()), rounds=2, upload=Rows(0.25))
    shape = began["mix.weight"].shape
    rows = {
        row for r in (1, 2) for row in round_rows(Rows(0.25), "mix.weight", shape, r)
    }
    assert set(rows_of(ended["mix.weight"] - began["mix.weight"])) == rows


def test_feedback_has_nothing_to_make_up_for():
    plain, feedback = (
        run(make_task(Grass()), upload=codec)
        for codec in (Rows(0.25), ErrorFeedback(Rows(0.25)))
    )
    assert all(x.tobytes() == feedback[name].tobytes() for name, x in plain.items())


def test_down_and_up_have_the_same_rows():
    codec = Rows(0.25, dense=("words", "head"))
    began = from_record(start())
    ended = run(make_task(Grass()), rounds=1, download=codec, upload=codec)
    rows = round_rows(codec, "mix.weight", began["mix.weight"].shape, 1)
    assert rows_of(ended["mix.weight"] - began["mix.weight"]) == rows
