"""FedNova: clients that work differently get the say that they were meant to have."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy, client_app
from flower_ext.strategies import FedNova, FedNovaClient
from flower_ext.strategies.fednova import WORK, Work, local_work

ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("steps", [0, 1, 2, 7])
def test_work_is_how_far_a_constant_gradient_leads(steps, momentum):
    w = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))
    optimizer = torch.optim.SGD([w], lr=1.0, momentum=momentum)
    for _ in range(steps):
        w.grad = -torch.ones_like(w)
        optimizer.step()
    assert local_work(steps, momentum) == pytest.approx(float(w), rel=1e-12)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (partial(local_work, 3, 1.0), "momentum=1.0 must be < 1"),
        (partial(local_work, -1), "num_steps=-1 must be an integer >= 0"),
        (partial(FedNova, effective_work=0), "effective_work=0 must be"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()


# Two clients on a line: minima at -1 and 1, of 1 and 10 examples and steps ------------


@pytest.fixture
def pair(quadratics):
    """Two clients of curvature 1, whose minima are -1 and 1."""
    return type(quadratics)(np.array([[-1.0], [1.0]]), np.ones((2, 1, 1)))


def test_two_clients_with_1_and_10_steps(pair, play):
    # As many examples each: the mean of the two objectives has its minimum at 0. Steps
    # are told apart by epochs, since a client's number of them depends on the client.
    class Uneven(FedNovaClient):
        def begin(self, local):
            steps = (1, 10)[local.client]
            local.settings = type(local.settings)(learning_rate=1e-3, local_steps=steps)

    app = client_app(pair.task(), Uneven)
    nova = FedNova(effective_work=1000.0, **ALL)  # the step of the server: nearly 1
    found = play(nova, app, 2, pair.start, rounds=40).models[-1]["w"]
    # To first order in the learning rate; FedAvg's is pulled to the second client.
    assert found == pytest.approx([0.0], abs=5e-3)
    assert pair.fixed_point(1e-3, [1, 10]) == pytest.approx([9 / 11], abs=1e-2)
    exact = [[steps, 1 - (1 - 1e-3) ** steps] for steps in (1, 10)]
    pull = np.array([moved / steps for steps, moved in exact])
    assert found == pytest.approx([(pull[1] - pull[0]) / pull.sum()], abs=1e-6)


def direction(weights, works, moves):
    """Compute equation 10 with the clients' weights, works and moves."""
    p = np.array(weights) / np.sum(weights)
    return (p @ works) * np.einsum("k,ki->i", p / works, moves)


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_a_round_is_that_of_the_paper(quadratics, play, spied, momentum):
    # Weighted by examples, as the paper is: 1, 3 and 2 of them, as many steps an epoch.
    app, calls = spied(client_app(quadratics.task(copies=[1, 3, 2]), FedNovaClient))
    config = {"lr": 0.1, "local-epochs": 2, "batch-size": 1, "momentum": momentum}
    found = play(FedNova(**ALL), app, 3, quadratics.start, rounds=1, config=config)
    moves = np.array([c.reply["arrays"]["w"].numpy() for c in calls])
    works = np.array([local_work(2 * n, momentum) for n in (1, 3, 2)])
    expected = direction([1, 3, 2], works, moves)
    assert found.models[-1]["w"] == pytest.approx(expected, rel=1e-12)
    effective = float(np.array([1, 3, 2]) @ works / 6)
    assert found.train()["effective-work"] == pytest.approx(effective, rel=1e-12)
    assert WORK not in found.train()


def test_equal_work_is_fedavg(quadratics, play):
    config = {"lr": 0.1, "local-steps": 4, "momentum": 0.5}
    task = quadratics.task(copies=[1, 3, 2])
    run = partial(play, clients=3, initial=quadratics.start, rounds=2, config=config)
    nova = run(FedNova(**ALL), client_app(task, FedNovaClient)).models[-1]["w"]
    average = run(AdditiveStrategy(**ALL), client_app(task)).models[-1]["w"]
    assert nova == pytest.approx(average, rel=1e-12)


def test_who_does_not_work_says_nothing(quadratics, play):
    config = {"lr": 0.1, "local-epochs": 2, "batch-size": 1}
    models = []
    for copies, clients in (([2, 1, 0], 3), ([2, 1], 2)):
        app = client_app(quadratics.task(copies=copies), FedNovaClient)
        found = play(FedNova(**ALL), app, clients, quadratics.start, 2, config)
        models.append(found.models[-1]["w"])
    assert models[0] == pytest.approx(models[1], rel=1e-12)


@pytest.mark.parametrize(
    "optimizer",
    [
        lambda p, s: torch.optim.Adam(p, 0.1),
        lambda p, s: torch.optim.SGD(p, 0.1, momentum=0.9, nesterov=True),
        lambda p, s: torch.optim.SGD(p, 0.1, momentum=0.9, dampening=0.5),
    ],
)
def test_work_that_is_not_known_is_refused(quadratics, play, optimizer):
    app = client_app(quadratics.task(optimizer=optimizer), FedNovaClient)
    with pytest.raises(Exception, match=r"must be torch\.optim\.SGD with one momentum"):
        play(FedNova(**ALL), app, 2, quadratics.start)


def test_a_loop_of_ones_own_counts_its_steps(quadratics, play):
    found = play(FedNova(**ALL), own_loop(quadratics.task()), 3, quadratics.start)
    moves = np.array(
        [
            center - np.linalg.matrix_power(np.eye(2) - 0.1 * h, k + 1) @ center
            for k, (h, center) in enumerate(
                zip(quadratics.hessians, quadratics.centers, strict=True)
            )
        ]
    )
    expected = direction([1, 1, 1], np.array([1, 2, 3]), moves)
    assert found.models[-1]["w"] == pytest.approx(expected, rel=1e-9)
    assert found.train()["effective-work"] == 2.0


def test_the_momentum_is_that_of_the_loop(quadratics, play):
    app = own_loop(quadratics.task(), partial(torch.optim.SGD, momentum=0.5))
    found = play(FedNova(**ALL), app, 3, quadratics.start)
    works = [local_work(steps, momentum=0.5) for steps in (1, 2, 3)]
    assert found.train()["effective-work"] == pytest.approx(np.mean(works))


@pytest.mark.parametrize(
    ("make", "late", "words"),
    [
        (torch.optim.Adam, False, r"Adam'> must be torch\.optim\.SGD with one"),
        (torch.optim.SGD, True, r"'local-work'=0\.0 of a model that was trained"),
    ],
)
def test_loops_whose_work_is_not_known_are_refused(quadratics, play, make, late, words):
    app = own_loop(quadratics.task(), make, late=late)
    with pytest.raises(Exception, match=words):
        play(FedNova(**ALL), app, 3, quadratics.start)


def own_loop(task, make=torch.optim.SGD, late=False):
    """Make an app whose client k takes k + 1 steps."""
    app = ClientApp()

    @app.train()
    def train(msg, context):
        model = task.model({})
        model.load_state_dict(msg.content["arrays"].to_torch_state_dict())
        data, _ = task.data(context)
        work = None if late else Work(model)
        optimizer = make(model.parameters(), lr=0.1)
        for _ in range(context.node_config["partition-id"] + 1):
            optimizer.zero_grad()
            task.loss(model, data).mean().backward()
            optimizer.step()
        work = work or Work(model)
        metrics = MetricRecord({"num-examples": 1, "local-work": work.done()})
        arrays = ArrayRecord(model.state_dict())
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=msg)

    return app
