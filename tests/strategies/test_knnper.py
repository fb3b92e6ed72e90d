"""KNNPer: against neighbours found by NumPy, and its limits."""

import math
from dataclasses import replace
from functools import partial

import numpy as np
import peft
import pytest
import torch
from torch import nn

from flower_ext import AdditiveStrategy
from flower_ext.client.app import client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.task import Task
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.strategies.knnper import KNNPer, KNNPerClient, knn_probabilities, mixed

CLASSES = 3


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(2, 4)
        self.out = nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.out(torch.tanh(self.body(x)))


def columns(size, seed):
    rng = np.random.default_rng(seed)
    x = torch.tensor(rng.standard_normal((size, 2)), dtype=torch.float32)
    return {"x": x, "y": torch.tensor(rng.integers(0, CLASSES, size))}


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def accuracy(model, batch):
    return {"accuracy": (model(batch["x"]).argmax(1) == batch["y"]).float()}


def task_of(*clients, make=Net):
    """Make a task of clients given as (train, test)."""
    place = "partition-id"
    return Task(
        lambda config: make(), lambda c: clients[c.node_config[place]], loss, accuracy
    )


CLIENTS = [(columns(12 + i, i), columns(9, 10 + i)) for i in range(3)]
STILL = {"lr": 0.0}


@pytest.fixture(scope="module")
def start():
    torch.manual_seed(0)
    return {name: x.numpy() for name, x in Net().state_dict().items()}


@pytest.fixture
def evaluated(play, start):
    """Run a round without learning; return the metrics of the evaluation."""

    def run(strategy, task, half=KNNPerClient, clients=3, **app):
        app = client_app(task, half, **app)
        return play(strategy, app, clients, start, config=STILL).evaluate()

    return run


def by_hand(start, client, weight, k, scale=1.0, remember=slice(None), ask=None):
    """Return log probabilities and labels of a client's test data, in NumPy."""
    train, test = CLIENTS[client]
    represent = lambda x: np.tanh(x @ start["body.weight"].T + start["body.bias"])  # noqa: E731
    x, y = (c.numpy()[remember] for c in train.values())
    asked, labels = (c.numpy() for c in (test if ask is None else ask).values())
    logits = represent(asked) @ start["out.weight"].T + start["out.bias"]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    stored = represent(x)
    for row, one in enumerate(represent(asked)):
        distances = np.sqrt(((stored - one) ** 2).sum(1))
        votes = np.zeros(CLASSES)
        for i in np.argsort(distances)[:k]:
            votes[y[i]] += math.exp(-distances[i] / scale)
        votes /= votes.sum()
        chances[row] = weight * votes + (1 - weight) * chances[row]
    return np.log(np.maximum(chances, np.finfo(np.float32).tiny)), labels


def scores(logs, labels):
    taken = -logs[np.arange(len(labels)), labels]
    return taken.mean(), (logs.argmax(1) == labels).mean()


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize(("k", "scale"), [(1, 1.0), (4, 0.2), (100, 1.0)])
def test_loss_and_accuracy_are_those_of_neighbours_by_hand(
    evaluated, start, weight, k, scale
):
    strategy = KNNPer(num_neighbours=k, weight=weight, scale=scale)
    metrics = evaluated(strategy, task_of(*CLIENTS))
    found = [scores(*by_hand(start, c, weight, k, scale)) for c in range(3)]
    losses, hits = zip(*found, strict=True)
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert metrics["accuracy"] == pytest.approx(np.mean(hits))
    assert metrics["knn-weight"] == weight


def test_without_weight_it_is_the_shared_model_exactly(evaluated):
    found = evaluated(KNNPer(weight=0.0), task_of(*CLIENTS))
    expected = evaluated(AdditiveStrategy(), task_of(*CLIENTS))
    for name, value in expected.items():
        assert found[name] == value
    assert found["received-loss"] == found["loss"]
    assert found["loss-seen-hurt"] == 0


def steps(batch):
    """Return points and labels of sequences."""
    return batch["steps"][..., :2], batch["steps"][..., 2].long()


def sequences(clients, make=Net, axes=(1, 2)):
    """Make a task of clients whose examples are two of others' each."""

    def long(data):
        return {"steps": torch.cat([data["x"], data["y"][:, None]], 1).view(-1, 2, 3)}

    def losses(model, batch):
        x, y = steps(batch)
        logs = model(x).transpose(*axes)
        return nn.functional.cross_entropy(logs, y, reduction="none").mean(1)

    task = task_of(*[tuple(map(long, client)) for client in clients], make=make)
    return replace(task, loss=losses, metrics=None)


class ClassesFirst(Net):
    def forward(self, x):
        return super().forward(x).transpose(1, 2)


def test_each_answer_of_a_sequence_has_neighbours_of_its_own(evaluated, caplog):
    """As if every step of a sequence were an example."""
    clients = [tuple(columns(size, size + i) for size in (12, 8)) for i in range(3)]
    half = partial(KNNPerClient, label=lambda batch: steps(batch)[1])
    strategy = KNNPer(num_neighbours=4, weight=0.3)
    found = evaluated(strategy, sequences(clients), half)
    expected = evaluated(strategy, task_of(*clients))
    for name in ("loss", "received-loss"):
        assert found[name] == pytest.approx(expected[name], rel=1e-6)
    assert found["loss"] != found["received-loss"]
    # Logits as cross entropy takes them have no axis of answers to go by.
    with pytest.raises(KeyError):  # nobody has metrics
        evaluated(strategy, sequences(clients, ClassesFirst, axes=(1, 1)), half)
    assert "layer's input=(6, 2, 4) must be of shape (6, 3) and features" in caplog.text


def test_who_is_hurt_is_seen(evaluated):
    metrics = evaluated(KNNPer(weight=1.0, num_neighbours=1), task_of(*CLIENTS))
    # A wrong single neighbour costs the logarithm of the smallest float.
    assert metrics["loss"] > 10 > metrics["received-loss"]
    assert metrics["loss-seen-hurt"] == 1


def test_an_example_that_is_in_store_has_its_label(evaluated):
    train = {name: torch.cat([c] * 3) for name, c in columns(9, 5).items()}
    task = task_of(*[(train, columns(9, 5))] * 3)
    metrics = evaluated(KNNPer(weight=1.0, num_neighbours=3), task)
    assert metrics["loss"] == pytest.approx(0, abs=1e-6)
    assert metrics["accuracy"] == 1


def test_each_client_takes_the_weight_that_loses_least_on_what_it_holds_out(
    evaluated, start, monkeypatch
):
    orders = []
    real = torch.randperm

    def spy(size, **options):
        orders.append(real(size, **options))
        return orders[-1]

    monkeypatch.setattr("flower_ext.strategies.knnper.torch.randperm", spy)
    half = partial(KNNPerClient, holdout=0.3)
    metrics = evaluated(KNNPer(num_neighbours=3), task_of(*CLIENTS), half)
    monkeypatch.undo()
    weights, losses = [], []
    for client, order in enumerate(orders[-3:]):  # after those of the batches
        size = len(order)
        out = round(0.3 * size)
        held = {k: c[order[:out]] for k, c in CLIENTS[client][0].items()}
        rest = order[out:].numpy()
        tried = [
            scores(*by_hand(start, client, a, 3, remember=rest, ask=held))[0]
            for a in np.arange(11) / 10
        ]
        weights.append(np.argmin(tried) / 10)
        losses.append(scores(*by_hand(start, client, weights[-1], 3))[0])
    assert metrics["knn-weight"] == pytest.approx(np.mean(weights))
    assert metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    assert len(set(weights)) > 1


def test_what_is_held_out_is_the_same_in_every_round(play, start):
    app = client_app(task_of(*CLIENTS), KNNPerClient)
    played = play(KNNPer(), app, 3, start, rounds=2, config=STILL)
    assert played.evaluate(1) == played.evaluate(2)


@pytest.mark.parametrize("size", [0, 1])
def test_who_has_nothing_to_tune_on_takes_the_shared_model(evaluated, size):
    few = {name: c[:size] for name, c in columns(3, 0).items()}
    metrics = evaluated(KNNPer(), task_of(*[(few, columns(9, 1))] * 3))
    assert metrics["knn-weight"] == 0
    assert metrics["loss"] == metrics["received-loss"]


def test_the_model_travels_as_with_federated_averaging(play, start):
    models = []
    for strategy in (KNNPer(), AdditiveStrategy()):
        app = client_app(task_of(*CLIENTS), KNNPerClient)
        models.append(play(strategy, app, 3, start, rounds=2).models[-1])
    for name, x in models[1].items():
        np.testing.assert_array_equal(models[0][name], x)


def test_another_layer_represents(evaluated, start):
    # The input of the first layer is the example itself.
    half = partial(KNNPerClient, layer="body")
    found = evaluated(KNNPer(weight=1.0, num_neighbours=1), task_of(*CLIENTS), half)
    hits = []
    for train, test in CLIENTS:
        gaps = np.linalg.norm(test["x"].numpy()[:, None] - train["x"].numpy(), axis=2)
        hits.append((train["y"].numpy()[gaps.argmin(1)] == test["y"].numpy()).mean())
    assert found["accuracy"] == pytest.approx(np.mean(hits))


def test_the_last_layer_may_have_an_adapter():
    lora = peft.LoraConfig(r=2, target_modules=["body", "out"])
    model = peft.inject_adapter_in_model(lora, Net())
    assert KNNPerClient()._represents(model) is model.out
    only = peft.LoraConfig(r=2, target_modules=["body"])
    model = peft.inject_adapter_in_model(only, Net())
    assert KNNPerClient()._represents(model) is model.out


def test_a_model_keeps_no_hook(play, start):
    model = Net()
    task = task_of(*CLIENTS, make=lambda: model)
    play(KNNPer(), client_app(task, KNNPerClient), 3, start, config=STILL)
    assert not model._forward_hooks
    assert not model.out._forward_pre_hooks


def test_under_dpsgd_the_neighbours_stay_at_home(play, start):
    privacy = SiloPrivacy(noise_multiplier=1.0, clipping_norm=1.0, delta=1e-3)
    app = client_app(task_of(*CLIENTS), KNNPerClient, trainer=DPSGD(privacy))
    metrics = play(KNNPer(), app, 3, start).evaluate()
    assert set(metrics) <= {"num-examples"}


@pytest.mark.parametrize("weight", [0.0, 0.5, None])
def test_predictions_that_quote_training_data_are_not_released(play, start, weight):
    """Under DPSGD these are protected, whatever is done with the test data."""
    privacy = SiloPrivacy(noise_multiplier=1.0, clipping_norm=1.0, delta=1e-3)
    trainer = DPSGD(privacy, release_evaluation=True)
    app = client_app(task_of(*CLIENTS), KNNPerClient, trainer=trainer)
    strategy = KNNPer(weight=weight, fraction_train=0.0)
    if weight == 0:  # the shared model's own
        assert play(strategy, app, 3, start).evaluate()["loss"] > 0
        return
    with pytest.raises(EveryClientFailed, match="release_evaluation=True must be"):
        play(strategy, app, 3, start)


# The functions ------------------------------------------------------------------------


def test_more_rows_than_fit_at_a_time():
    rng = np.random.default_rng(0)
    queries, stored = (torch.tensor(rng.standard_normal((n, 3))) for n in (600, 40))
    labels = torch.tensor(rng.integers(0, 4, 40))
    found = knn_probabilities(queries, stored, labels, 4, k=5)
    assert found.shape == (600, 4)
    for row in (0, 255, 256, 599):
        one = knn_probabilities(queries[row : row + 1], stored, labels, 4, k=5)
        torch.testing.assert_close(found[row], one[0])
    torch.testing.assert_close(found.sum(1), torch.ones(600, dtype=torch.float64))


def test_a_large_scale_counts_votes():
    stored, labels = torch.tensor([[0.0], [5.0], [9.0]]), torch.tensor([0, 1, 1])
    found = knn_probabilities(torch.zeros(1, 1), stored, labels, 2, scale=1e9)
    torch.testing.assert_close(found, torch.tensor([[1 / 3, 2 / 3]]), check_dtype=False)


def test_mixing_is_of_probabilities():
    one, other = torch.tensor([[0.9, 0.1]]), torch.tensor([[0.0, 1.0]])
    assert mixed(one, other, 0.25).exp()[0].tolist() == pytest.approx([0.675, 0.325])
    assert mixed(one, other, 1.0).isfinite().all()


# Who is refused -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_neighbours": 0}, "num_neighbours=0 must be an integer >= 1"),
        ({"weight": 1.1}, "weight=1.1 must be between 0 and 1"),
        ({"scale": 0.0}, "scale=0.0 must be"),
    ],
)
def test_options(options, says):
    with pytest.raises(ValueError, match=says):
        KNNPer(**options)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2, CLASSES))

    def forward(self, x):
        return x @ self.w


@pytest.mark.parametrize(
    ("half", "make", "says"),
    [
        (partial(KNNPerClient, layer="head"), Net, "layer='head' must be one of"),
        (partial(KNNPerClient, label="z"), Net, "label='z' must be one of"),
        (
            partial(KNNPerClient, label=lambda batch: batch["y"][:1]),
            Net,
            "one for each answer of the model",
        ),
        (KNNPerClient, Flat, "the model has no torch.nn.Linear"),
    ],
)
def test_clients_that_have_no_neighbours(play, half, make, says, caplog):
    app = client_app(task_of(*CLIENTS, make=make), half)
    initial = {n: x.numpy() for n, x in make().state_dict().items()}
    play(KNNPer(weight=0.5), app, 3, initial, config=STILL)
    assert says in caplog.text


@pytest.mark.parametrize("holdout", [0, 1, -0.1, "0.2"])
def test_holdout_is_a_share(holdout):
    with pytest.raises(ValueError, match="holdout="):
        KNNPerClient(holdout=holdout)
