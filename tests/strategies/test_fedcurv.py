"""FedCurv: its penalty, whose terms are in it, and runs by the paper's equations."""

import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import (
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import Mechanism
from flower_ext.client.app import client_app
from flower_ext.client.half import trainable
from flower_ext.client.personal import Personal
from flower_ext.core.contribution import Total
from flower_ext.core.protocol import Payload, Round
from flower_ext.core.sampling import UniformSampler
from flower_ext.simulation import LocalGrid
from flower_ext.strategies.fedcurv import (
    OWN_ROUND,
    SUM,
    SUM_OF_MODELS,
    Curvature,
    FedCurv,
    FedCurvClient,
    Held,
    keep,
)

# The penalty ------------------------------------------------------------------------


@pytest.fixture
def cohort():
    """Return the Fishers and models of three clients; one knows nothing of one row."""
    generator = torch.Generator().manual_seed(0)
    fishers = torch.rand(3, 2, 4, generator=generator)
    fishers[:, 0, 0] = torch.tensor([0.5, 0.0, 0.0])
    return fishers, torch.randn(3, 2, 4, generator=generator)


def penalty_of(cohort, client=None, strength=0.7, kept_in=1):
    """Return the penalty that a client makes of the sums over the cohort."""
    fishers, models = cohort
    personal = Personal(RecordDict())
    if client is not None:
        mine, model = {"weight": fishers[client]}, {"weight": models[client]}
        keep(personal, mine, model, ConfigRecord({"fedcurv-number": float(kept_in)}))
    received = {
        SUM: {"weight": fishers.sum(0)},
        SUM_OF_MODELS: {"weight": (fishers * models).sum(0)},
    }
    config = ConfigRecord({"fedcurv-summed": 1.0, "fedcurv-strength": strength})
    return Curvature.of_others(received, personal, config, ["weight"])


def gradient_by_definition(cohort, others, weight, strength=0.7):
    weight = weight.detach().clone().requires_grad_()
    fishers, models = cohort
    total = sum((fishers[j] * (weight - models[j]) ** 2).sum() for j in others)
    (strength * total).backward()
    return weight.grad


@pytest.mark.parametrize(
    ("client", "kept_in", "others"),
    [
        (None, 1, (0, 1, 2)),  # it was never asked
        (0, 1, (1, 2)),
        (2, 1, (0, 1)),
        (2, 0, (0, 1, 2)),  # what it has kept is of a round before: it is not in it
    ],
)
def test_the_pull_is_that_of_the_other_clients(cohort, client, kept_in, others):
    model = nn.Linear(4, 2, bias=False)
    model.weight.grad = torch.zeros(2, 4)
    penalty_of(cohort, client, kept_in=kept_in).pull(trainable(model))
    expected = gradient_by_definition(cohort, others, model.weight)
    assert torch.all(expected[0, 1:] != 0)
    torch.testing.assert_close(model.weight.grad, expected, rtol=1e-4, atol=1e-6)
    # Client 0 alone knows this coordinate.
    assert (model.weight.grad[0, 0] == 0) == (0 not in others)


def test_what_is_left_out_and_was_not_in_the_sum_pulls_nowhere(cohort):
    fishers, models = cohort
    model = nn.Linear(4, 2, bias=False)
    lost = 100 * fishers, models  # of a reply that did not arrive
    personal = Personal(RecordDict())
    number = ConfigRecord({"fedcurv-number": 1.0})
    keep(personal, {"weight": lost[0][1]}, {"weight": models[1]}, number)
    received = {SUM: {"weight": fishers[0]}, SUM_OF_MODELS: {"weight": fishers[0]}}
    config = ConfigRecord({"fedcurv-summed": 1.0, "fedcurv-strength": 1.0})
    model.weight.grad = torch.zeros(2, 4)
    Curvature.of_others(received, personal, config, ["weight"]).pull(trainable(model))
    hidden = lost[0][1] >= fishers[0]
    assert hidden.sum() >= 6
    assert torch.all(model.weight.grad[hidden] == 0)


def test_a_first_round_has_no_penalty():
    config = ConfigRecord({"fedcurv-summed": 0.0, "fedcurv-strength": 1.0})
    assert Curvature.of_others({}, Personal(RecordDict()), config, ["w"]) is None


# Runs against the paper's equations ---------------------------------------------------

STRENGTH = 0.05
SOLVE = {"lr": 0.7, "batch-size": 100, "local-steps": 30}
ZERO = {"weight": np.zeros((1, 2), np.float32)}


def quadratics():
    """Return four clients: their losses have other curvatures and other minima."""
    rng = np.random.default_rng(0)
    turn = np.array([[0.8, -0.6], [0.6, 0.8]])
    for curvatures in ((1.4, 0.6), (0.5, 1.0), (1.0, 1.2), (0.7, 0.5)):
        orthogonal = np.linalg.qr(rng.normal(size=(12, 2)))[0] * 12**0.5
        x = orthogonal * np.sqrt(curvatures) @ turn
        yield {"x": x, "y": x @ rng.normal(size=2) + rng.normal(size=12)}


def by_equations(clients, cohorts, strength=STRENGTH, own=0.0):
    """Return the models of a run in which every client solves its problem exactly.

    ``own`` counts the own terms of a client, which the paper leaves out.
    """
    model, last, models = np.zeros(2), {}, []
    for cohort in cohorts:
        found = {}
        for k in cohort:
            x, y = clients[k]["x"], clients[k]["y"]
            left, right = x.T @ x / len(x), x.T @ y / len(x)
            for j, (fisher, theirs) in last.items():
                factor = 2 * strength * (own if j == k else 1.0)
                left = left + factor * np.diag(fisher)
                right = right + factor * fisher * theirs
            solved = np.linalg.solve(left, right)
            errors = x @ solved - y
            found[k] = (np.mean((x * errors[:, None]) ** 2, 0), solved)
        last = found
        model = np.mean([solved for _, solved in found.values()], 0)
        models.append(model)
    return models


def test_runs_are_those_of_the_equations(linear_task, play):
    clients = list(quadratics())
    app = client_app(linear_task(clients, 2), FedCurvClient)
    strategy = FedCurv(strength=STRENGTH, estimator="per-example", fraction_evaluate=0)
    run = play(strategy, app, 4, ZERO, rounds=7, config=SOLVE)
    found = [model["weight"][0] for model in run.models[1:]]
    cohorts = [range(4)] * 40
    expected = by_equations(clients, cohorts)
    assert np.array(found) == pytest.approx(np.array(expected[:7]), abs=2e-4)
    # It has arrived at the fixed point, which is not FedAvg's.
    assert found[-1] == pytest.approx(expected[-1], abs=2e-3)
    average = by_equations(clients, cohorts, strength=0.0)[-1]
    assert np.abs(found[-1] - average).max() > 0.05
    # Clients that are pulled to their own last models as well take another way.
    with_own = by_equations(clients, cohorts, own=1.0)
    assert np.abs(found[2] - with_own[2]).max() > 0.005


def test_a_client_that_was_not_in_the_last_cohort_leaves_nothing_out(
    linear_task, play, spied
):
    clients = list(quadratics())
    app, calls = spied(client_app(linear_task(clients, 2), FedCurvClient))
    strategy = FedCurv(
        strength=STRENGTH,
        estimator="per-example",
        fraction_train=0.5,
        fraction_evaluate=0,
        sampler=UniformSampler(seed=2),
    )
    run = play(strategy, app, 4, ZERO, rounds=6, config=SOLVE)
    cohorts = [[c.client for c in calls if c.server_round == r] for r in range(1, 7)]
    pairs = list(zip(cohorts, cohorts[1:], strict=False))
    # Some were in it, some were not, and some have kept terms of an earlier round.
    assert any(set(a) & set(b) for a, b in pairs)
    assert any(set(b) - set(a) for a, b in pairs)
    for found, model in zip(
        run.models[1:], by_equations(clients, cohorts), strict=True
    ):
        assert found["weight"][0] == pytest.approx(model, abs=2e-4)


def test_free_estimates_are_of_the_clients_own_loss(linear_task, play):
    # One batch of n: n times the squared gradient of F_k, which the penalty's balances.
    clients = list(quadratics())
    app = client_app(linear_task(clients, 2), FedCurvClient)
    strategy = FedCurv(strength=0.01, estimator="last-epoch")
    sums = []
    advance = strategy.advance

    def spy(total, round):
        sums.append(total.arrays["fisher"]["weight"][0].copy())
        advance(total, round)

    strategy.advance = spy
    fisher = np.array([3.0, 5.0])
    held = {  # at (2, -1), whatever clients have found
        SUM: {"weight": np.float32([fisher])},
        SUM_OF_MODELS: {"weight": np.float32([fisher * [2.0, -1.0]])},
    }
    strategy.payload = lambda variant, round: Payload(round.sent, beside=held)
    play(strategy, app, 4, ZERO, config=SOLVE)
    expected = np.zeros(2)
    for data in clients:
        x, y = data["x"], data["y"]
        hold = 2 * 0.01 * np.diag(fisher)
        solved = np.linalg.solve(x.T @ x / 12 + hold, x.T @ y / 12 + hold @ [2.0, -1.0])
        expected += 12 * (x.T @ (x @ solved - y) / 12) ** 2
    assert expected.min() > 0.01
    assert sums[0] == pytest.approx(expected, rel=1e-3)


def test_a_loop_of_ones_own_takes_the_same_steps(linear_task, play):
    """Two clients with hands on their own loops are as those of the half."""
    clients = list(quadratics())
    task = linear_task(clients, 2)
    app = ClientApp()

    @app.train()
    def train(message, context):
        model = task.model({})
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        data, _ = task.data(context)
        optimizer = torch.optim.SGD(model.parameters(), lr=SOLVE["lr"])
        held = Held(model, message, context, batches_per_epoch=1)
        for _ in range(5):
            optimizer.zero_grad()
            task.loss(model, data).mean().backward()
            optimizer.step()
        content = RecordDict(
            {
                "arrays": ArrayRecord(model.state_dict()),
                "fisher": held.record(),
                "metrics": MetricRecord({"num-examples": 12}),
            }
        )
        return Message(content, reply_to=message)

    options = {"strength": 0.01, "estimator": "last-epoch", "fraction_evaluate": 0}
    half = client_app(task, FedCurvClient)
    config = {**SOLVE, "local-steps": 5}
    runs = [play(FedCurv(**options), x, 4, ZERO, 4, config) for x in (app, half)]
    for ours, theirs in zip(*(run.models for run in runs), strict=True):
        assert ours["weight"] == pytest.approx(theirs["weight"], rel=1e-5)
    plain = play(FedCurv(**{**options, "strength": 0}), half, 4, ZERO, 4, config)
    gap = np.abs(plain.models[-1]["weight"] - runs[0].models[-1]["weight"])
    assert gap.max() > 0.01


class Partly(nn.Module):
    """A model with statistics, and layers that are frozen or tied."""

    def __init__(self):
        super().__init__()
        self.norm, self.frozen = nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.frozen.requires_grad_(False)
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(self.frozen(self.norm(x)))).sum(1, keepdim=True)


def test_noisy_sums_of_what_nobody_trains_are_no_matter(linear_task, play):
    task = replace(linear_task(list(quadratics()), 2), model=lambda config: Partly())
    mechanism = Mechanism(
        num_rounds=3,
        num_sampled_clients=4,
        population_size=4,
        noise_multiplier=0.01,
        clipping=1.0,
    )
    strategy = FedCurv(strength=0.01, fraction_evaluate=0.0, mechanism=mechanism)
    initial = {n: x.numpy() for n, x in Partly().state_dict().items()}
    config = {"lr": 0.01, "batch-size": 4}
    found = play(strategy, client_app(task, FedCurvClient), 4, initial, 3, config)
    assert [found.train(n)["num-errors"] for n in (1, 2, 3)] == [0, 0, 0]


def test_rounds_of_two_starts_are_told_apart(linear_task, play, spied):
    """What a client has kept of round 1 of one start is not in that of another."""
    app, calls = spied(client_app(linear_task(list(quadratics()), 2), FedCurvClient))
    grid, strategy = (
        LocalGrid(app, 4, SOLVE),
        FedCurv(strength=STRENGTH, fraction_evaluate=0),
    )
    for _ in range(2):
        play(strategy, grid, 4, ZERO, rounds=1)
    numbers = {c.state["personal/" + OWN_ROUND][OWN_ROUND] for c in calls}
    assert len(numbers) == 2


# The server ---------------------------------------------------------------------------


def test_sums_that_noise_hides_pull_nowhere():
    sent = {"w": np.float32([1.0, 1.0, 1.0])}
    total = Total(
        arrays={
            "fisher": {"w": np.array([3.0, 0.4, -2.0])},
            "fisher-delta": {"w": np.array([6.0, 5.0, 5.0])},
        },
        noise={"fisher": 0.5},
    )
    strategy = FedCurv()
    strategy.advance(total, Round(1, sent))
    payload = strategy.payload(None, Round(2, sent))
    assert payload.beside[SUM]["w"].tolist() == [3.0, 0.0, 0.0]
    assert payload.beside[SUM_OF_MODELS]["w"].tolist() == [9.0, 0.0, 0.0]
    assert not strategy.payload(None, Round(2, sent, phase="evaluate")).beside


def test_sums_that_are_not_finite_are_not_taken_over(caplog):
    strategy, sent, told = FedCurv(), {"w": np.float32([1e20])}, []
    for number, fisher in ((1, 2.0), (2, 1e38)):
        told.append(strategy.tell(Round(number, sent))["fedcurv-number"])
        arrays = {
            "fisher": {"w": np.array([fisher])},
            "fisher-delta": {"w": np.array([0.0])},
        }
        strategy.advance(Total(arrays=arrays), Round(number, sent))
    assert "round 2: sums of Fishers are not finite" in caplog.text
    assert strategy.payload(None, Round(3, sent)).beside[SUM]["w"].tolist() == [2.0]
    assert strategy.tell(Round(3, sent))["fedcurv-summed"] == told[0] != told[1]


def test_a_client_that_diverges_says_so_and_keeps_what_it_had(linear_task, play):
    app = client_app(linear_task(list(quadratics()), 2), FedCurvClient)
    strategy = FedCurv(estimator="per-example")
    with pytest.raises(Exception, match="training diverged: strength times"):
        play(strategy, app, 4, ZERO, config={**SOLVE, "lr": 1e5})


def test_summary_logs_the_settings(caplog):
    caplog.set_level(logging.INFO, logger="flwr")
    FedCurv(strength=0.25, estimator="sampled").summary()
    assert "Strength: 0.25" in caplog.text
    assert "Fisher: sampled" in caplog.text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"strength": -0.1},
            r"strength=-0\.1 must be a finite number >= 0: 0 is FedAvg",
        ),
        ({"strength": float("inf")}, "strength=inf must be a"),
        ({"strength": "1"}, "strength='1' must be a finite number >= 0"),
        ({"estimator": "exact"}, "estimator='exact' must be one of"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FedCurv(**options)
