"""MR-MTL: closed forms of mean estimation, its limits, DP-SGD, a loop of one's own."""

import math

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.core.sampling import UniformSampler
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.optimizers import SGD
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import MRMTL, LocalOnly, LocalOnlyClient, MRMTLClient
from flower_ext.strategies.mrmtl import mean_regularized, pull_to_mean

WANTED = [-1.0, 0.5, 4.0]
NUMBERS = [1, 1, 3]


def points(wanted=WANTED, numbers=NUMBERS):
    return [{"c": np.full(n, c)} for c, n in zip(wanted, numbers, strict=True)]


def own_models(calls):
    """Return what every client has kept last."""
    return {
        call.client: {
            name: array.numpy()
            for name, array in call.state.array_records["personal/model"].items()
        }
        for call in calls
    }


def exact_step(strength):
    """Return settings of one step to the minimiser of (w - c)^2/2 and the pull."""
    return {"lr": 1 / (1 + strength), "batch-size": 10}


@pytest.mark.parametrize(
    ("weights", "shares"), [("equal", [1, 1, 1]), ("examples", NUMBERS)]
)
def test_mean_estimation_has_its_closed_form(point_task, play, spied, weights, shares):
    strength = 1.0
    app, calls = spied(client_app(point_task(points()), MRMTLClient))
    strategy = MRMTL(strength=strength, weights=weights)
    config = exact_step(strength)
    played = play(strategy, app, 3, {"w": 0.25}, rounds=22, config=config)
    mean = np.average(WANTED, weights=shares)
    assert played.models[-1]["w"] == pytest.approx(mean, abs=1e-6)
    for client, model in own_models(calls).items():
        expected = (WANTED[client] + strength * mean) / (1 + strength)
        assert model["w"] == pytest.approx(expected, abs=1e-6)
    # Every silo wants its own number; what it received is further from it than its own.
    found = played.evaluate(22)
    distances = (np.array(WANTED) - mean) ** 2 / 2
    assert found["received-loss-seen"] == pytest.approx(distances.mean(), rel=1e-4)
    assert found["loss-seen"] == pytest.approx(distances.mean() / 4, rel=1e-4)
    assert found["loss-seen-hurt"] == 0


class Vector(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(size))


def squares(model, batch):
    return (model.w - batch["c"]).square().sum(1) / 2


def test_the_best_strength_is_noise_over_spread(play, spied):
    """Silos estimate means that differ by tau, of one noisy measurement each."""
    silos, tau, sigma, problems = 20, 0.7, 1.3, 4000
    best = sigma**2 / tau**2
    rng = np.random.default_rng(0)
    true = tau * rng.standard_normal((silos, problems))
    measured = true + sigma * rng.standard_normal(true.shape)

    def error(strength, rounds):
        def data(context):
            c = torch.tensor(measured[context.node_config["partition-id"]])
            return ({"c": c.float()[None]},) * 2

        task = Task(lambda config: Vector(problems), data, squares)
        app, calls = spied(client_app(task, MRMTLClient))
        config = exact_step(strength if strength < math.inf else 0)
        strategy = MRMTL(strength=strength, fraction_evaluate=0.0)
        start = {"w": np.zeros(problems, np.float32)}
        played = play(strategy, app, silos, start, rounds, config)
        mean = played.models[-1]["w"]
        own = own_models(calls) if strength < math.inf else {}
        models = [own[i]["w"] if own else mean for i in range(silos)]
        return np.mean((np.array(models) - true) ** 2)

    # By hand: with s = 1 / (1 + strength), an estimate deviates from its mean by s of
    # its noise and 1 - s of the spread, in all directions but that of the common mean.
    def by_hand(s):
        apart = (1 - 1 / silos) * (s**2 * sigma**2 + (1 - s) ** 2 * tau**2)
        return apart + sigma**2 / silos

    assert [round(by_hand(s), 2) for s in (1, 1 / (1 + best), 0)] == [1.69, 0.45, 0.55]
    others = [best / 3, best * 0.9, best * 1.1, best * 3]
    assert by_hand(1 / (1 + best)) < min(by_hand(1 / (1 + x)) for x in others)
    near = {"rel": 0.02}
    assert error(0.0, 1) == pytest.approx(by_hand(1), **near)
    assert error(math.inf, 1) == pytest.approx(by_hand(0), **near)
    assert error(best, 14) == pytest.approx(by_hand(1 / (1 + best)), **near)


def kept_by(strategy, half, task, play, spied, initial, **options):
    app, calls = spied(client_app(task, half))
    config = {"batch-size": 4, "lr": 0.1, "local-epochs": 2}
    play(strategy, app, 4, initial, rounds=3, config=config, **options)
    return own_models(calls)


def test_without_a_pull_it_is_local_training(task, play, spied, initial):
    arrays = {name: array.numpy() for name, array in initial.items()}
    found = kept_by(MRMTL(strength=0.0), MRMTLClient, task, play, spied, arrays)
    alone = kept_by(LocalOnly(), LocalOnlyClient, task, play, spied, arrays)
    assert found.keys() == alone.keys()
    for client, model in alone.items():
        for name, x in model.items():
            assert np.array_equal(found[client][name], x)


def test_where_all_share_one_model_nothing_is_kept(point_task, play, spied):
    app, calls = spied(client_app(point_task(points()), MRMTLClient))
    played = play(MRMTL(strength=math.inf), app, 3, {"w": 0.0}, 2, {"lr": 0.5})
    assert not any("personal/model" in call.state for call in calls)
    assert played.evaluate(2)["loss"] == played.evaluate(2)["received-loss"]


def test_of_few_clients_the_mean_is_right_on_average(point_task, play):
    """The server's step decides over how many rounds it is taken."""
    wanted = [-1.0, -0.5, 0.0, 3.0]
    app = client_app(point_task(points(wanted, [1] * 4)), MRMTLClient)
    spreads = []
    for rate in (1.0, 0.25):
        strategy = MRMTL(
            strength=1.0,
            fraction_train=0.5,
            sampler=UniformSampler(seed=2),
            server_optimizer=SGD(rate),
            fraction_evaluate=0.0,
        )
        played = play(strategy, app, 4, {"w": 0.5}, 160, exact_step(1.0))
        means = [float(model["w"]) for model in played.models[20:]]
        assert np.mean(means) == pytest.approx(np.mean(wanted), abs=0.2)
        spreads.append(np.std(means))
    assert spreads[1] < 0.5 * spreads[0]


# Private silos ----------------------------------------------------------------------


def linear_app(linear_task, privacy, **data):
    rng = np.random.default_rng(0)
    clients = [
        {"x": rng.standard_normal((20, 2)), "y": rng.standard_normal(20) + i, **data}
        for i in range(3)
    ]
    return client_app(linear_task(clients, 2), MRMTLClient, trainer=DPSGD(privacy))


def test_the_pull_is_not_clipped(linear_task, play, spied):
    """Where hardly anything is learned, models go to the mean as the pull says."""
    privacy = SiloPrivacy(noise_multiplier=0.0, clipping_norm=1e-9, delta=1e-3)
    app, calls = spied(linear_app(linear_task, privacy))
    start, later = {"weight": np.zeros((1, 2), np.float32)}, np.float32([[3.0, -1.0]])
    config = {"lr": 0.1, "batch-size": 20, "local-steps": 3}
    grid = LocalGrid(app, 3, config)
    options = {"strength": 2.0, "fraction_evaluate": 0.0}
    play(MRMTL(**options), grid, 3, start)
    assert np.abs(own_models(calls)[0]["weight"]).max() < 1e-8
    play(MRMTL(**options), grid, 3, {"weight": later})
    left = (1 - 0.1 * 2.0) ** 3
    for model in own_models(calls).values():
        np.testing.assert_allclose(model["weight"], (1 - left) * later, rtol=1e-5)


def test_every_silo_has_an_epsilon_of_its_own(linear_task, play, spied):
    promised = [0.5, 2.0, 8.0]

    def privacy(context):
        epsilon = promised[context.node_config["partition-id"]]
        return SiloPrivacy(epsilon=epsilon, delta=1e-3, num_rounds=2, clipping_norm=1.0)

    app, calls = spied(linear_app(linear_task, privacy))
    start = {"weight": np.zeros((1, 2), np.float32)}
    config = {"lr": 0.1, "batch-size": 20, "local-steps": 2}
    strategy = MRMTL(strength=1.0, fraction_evaluate=0.0)
    play(strategy, app, 3, start, rounds=2, config=config)
    spent = {c.client: c.reply["metrics"]["example-epsilon"] for c in calls}
    for client, epsilon in enumerate(promised):
        assert 0.97 * epsilon < spent[client] <= epsilon


# A loop of one's own ----------------------------------------------------------------


def own_app(mods, loss=pull_to_mean):
    """Make an app that trains one number by gradient steps of its own."""
    app = ClientApp(mods=mods)

    @app.train()
    def train(message, context):
        model = nn.Module()
        [(_, w)] = message.content["arrays"].to_torch_state_dict().items()
        model.w = nn.Parameter(w)
        wanted = WANTED[context.node_config["partition-id"]]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.25)
        for _ in range(2):
            optimizer.zero_grad()
            added = (model.w - wanted) ** 2 / 2 + loss(message)(model)
            added.backward()
            optimizer.step()
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        [(_, w)] = message.content["arrays"].to_torch_state_dict().items()
        loss = (float(w) - WANTED[context.node_config["partition-id"]]) ** 2 / 2
        metrics = MetricRecord({"num-examples": 1, "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@pytest.mark.parametrize("strength", [0.0, 1.5, math.inf])
def test_a_loop_of_ones_own_is_the_half(point_task, play, strength):
    task = point_task(points(numbers=[1, 1, 1]))
    config = {"lr": 0.25, "local-epochs": 2}
    runs = []
    for app in (client_app(task, MRMTLClient), own_app([mean_regularized()])):
        played = play(MRMTL(strength=strength), app, 3, {"w": 0.5}, 3, config)
        models = [float(model["w"]) for model in played.models]
        runs.append([*models, played.evaluate(3)["loss"]])
    np.testing.assert_allclose(runs[1], runs[0], rtol=1e-6)


def test_the_mod_leaves_other_strategies_alone(play):
    runs = []
    for mods in ([], [mean_regularized()]):
        app = own_app(mods, lambda message: lambda model: 0.0)
        runs.append(play(AdditiveStrategy(), app, 3, {"w": 0.5}, 2).models[-1]["w"])
    assert runs[0] == runs[1]


def test_a_loop_without_the_mod_is_told(play):
    with pytest.raises(EveryClientFailed, match="needs the mod mean_regularized"):
        play(MRMTL(), own_app([]), 3, {"w": 0.5})


# Bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("strength", [-1.0, math.nan, "1"])
def test_a_strength_out_of_range_is_refused(strength):
    with pytest.raises(ValueError, match=r"strength=.* must be a number >= 0"):
        MRMTL(strength=strength)


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="weights='sizes'"):
        MRMTL(weights="sizes")


@pytest.mark.parametrize(("momentum", "most"), [(0.0, "4"), (0.5, "6")])
def test_a_pull_beyond_the_mean_is_refused(point_task, play, momentum, most):
    app = client_app(point_task(points()), MRMTLClient)
    config = {"lr": 0.5, "momentum": momentum}
    with pytest.raises(EveryClientFailed, match=f"strength=6.0 must be < {most}"):
        play(MRMTL(strength=6.0), app, 3, {"w": 0.5}, config=config)
    play(MRMTL(strength=3.9), app, 3, {"w": 0.5}, config=config)
