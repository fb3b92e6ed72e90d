"""FedRep: two phases by hand, what changes in which, and what they cost a silo."""

import numpy as np
import pytest

from flower_ext import DPSGD, AdditiveStrategy, client_app
from flower_ext.client.parts import PART
from flower_ext.client.personal import PERSONAL
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import SiloPrivacy
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FedRep, FedRepClient

CONFIG = {"batch-size": 4, "lr": 0.1, "momentum": 0.9}
LINE = to_record({"weight": np.float32([[0.5, -1.0]]), "bias": np.float32([0.25])})


def run(strategy, app, initial, clients=2, rounds=2, config=CONFIG):
    return strategy.start(LocalGrid(app, clients, config), initial, num_rounds=rounds)


def kept(calls, client):
    last = [call for call in calls if call.client == client][-1]
    return from_record(last.state[PERSONAL + PART])


def test_two_rounds_by_hand(linear_task, spied):
    """Full-batch steps on ``(y - x w - b)^2 / 2``: 3 on b, then 2 on w."""
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.standard_normal((n, 2)), "y": rng.standard_normal(n) + n}
        for n in (4, 6)
    ]
    app, calls = spied(client_app(linear_task(data, 2, bias=True), FedRepClient))
    config = {"lr": 0.1, "batch-size": 10, "local-epochs": 2}
    result = run(FedRep(personal="bias", head_epochs=3), app, LINE, config=config)
    w, own = np.array([0.5, -1.0]), [0.25, 0.25]
    for _ in range(2):
        bodies, losses = [], []
        for i, columns in enumerate(data):
            x, y, body = columns["x"], columns["y"], w
            for _ in range(3):
                own[i] -= 0.1 * np.mean(x @ w + own[i] - y)
            for _ in range(2):
                gap = x @ body + own[i] - y
                losses.append(np.mean(gap**2) / 2 * len(x))
                body = body - 0.1 * gap @ x / len(x)
            bodies.append(body)
        w = (4 * bodies[0] + 6 * bodies[1]) / 10
    np.testing.assert_allclose(result.arrays["weight"].numpy()[0], w, rtol=1e-5)
    for i in range(2):
        np.testing.assert_allclose(kept(calls, i)["bias"], own[i], rtol=1e-5)
    metrics = result.train_metrics_clientapp[2]
    assert metrics["train-loss"] == pytest.approx(sum(losses) / 10 / 2, rel=1e-5)


def test_either_part_changes_in_its_phase_only(task, initial, spied):
    """BatchNorm's statistics and counters as well, whichever part they are in."""
    own = ["norm.*", "out.*"]
    both, calls = spied(client_app(task, FedRepClient))
    run(FedRep(personal=own, head_epochs=2), both, initial, rounds=1)
    heads = [kept(calls, i) for i in range(2)]
    # Without steps for the body the heads are the same, and it stays.
    still = {**CONFIG, "local-epochs": 0}
    app, calls = spied(client_app(task, FedRepClient))
    strategy = FedRep(personal=own, head_epochs=2)
    result = run(strategy, app, initial, rounds=1, config=still)
    for i in range(2):
        for name, x in kept(calls, i).items():
            assert np.array_equal(x, heads[i][name])
            assert x.tobytes() not in initial[name].data or name == "norm.bias"
    for name, array in initial.items():
        assert result.arrays[name].data == array.data
    # The other way round, with BatchNorm in the body.
    app, calls = spied(client_app(task, FedRepClient))
    result = run(FedRep(personal="out.*", head_epochs=0), app, initial, rounds=1)
    for name, array in initial.items():
        own = name.startswith("out.")
        assert (result.arrays[name].data == array.data) == own
        if own:
            assert np.array_equal(kept(calls, 0)[name], array.numpy())


@pytest.mark.parametrize(("head", "body"), [(3, 1), (1, 3), (0, 2)])
def test_a_silo_is_charged_the_steps_of_both_phases(linear_task, head, body):
    data = [{"x": np.ones((20, 1)) * i, "y": np.ones(20)} for i in range(2)]
    task = linear_task(data, 1, bias=True)
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-3, clipping_norm=1.0, seed=3)
    app = client_app(task, FedRepClient, trainer=DPSGD(privacy))
    initial = to_record(
        {"weight": np.ones((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    )
    spent = []
    for strategy, epochs in (
        (FedRep(personal="bias", head_epochs=head), body),
        (AdditiveStrategy(), head + body),
    ):
        config = {"lr": 0.1, "batch-size": 10, "local-epochs": epochs}
        found = run(strategy, app, initial, config=config).train_metrics_clientapp
        assert found[2]["num-errors"] == 0
        spent.append([found[i]["example-epsilon"] for i in (1, 2)])
    assert spent[0] == spent[1]


def test_a_head_with_nothing_to_train_is_refused(task, initial):
    app = client_app(task, FedRepClient)
    with pytest.raises(EveryClientFailed, match="leave parameters to train"):
        run(FedRep(personal="*running*"), app, initial)
    with pytest.raises(ValueError, match="head_epochs=-1 must be an integer >= 0"):
        FedRep(head_epochs=-1)
