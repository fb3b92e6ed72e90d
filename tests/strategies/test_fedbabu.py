"""FedBABU: a run by hand, and a head that is the same for all until it is used."""

import numpy as np
import pytest

from flower_ext import client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.parts import PERSONAL_START
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FedBABU, FedBABUClient
from flower_ext.wire import BFloat16, TopK

CONFIG = {"batch-size": 4, "lr": 0.1, "momentum": 0.9}


@pytest.mark.parametrize("tunes", ["all", "head"])
def test_a_run_by_hand(linear_task, tunes):
    """Full-batch steps on ``(y - x w - b)^2 / 2``; b is trained in evaluations only."""
    rng = np.random.default_rng(0)
    data = [
        {"x": rng.standard_normal((n, 2)), "y": rng.standard_normal(n) + n}
        for n in (4, 6)
    ]
    app = client_app(linear_task(data, 2, bias=True), FedBABUClient)
    initial = to_record(
        {"weight": np.float32([[0.5, -1.0]]), "bias": np.float32([0.25])}
    )
    strategy = FedBABU(personal="bias", tuning_epochs=3, tunes=tunes)
    grid = LocalGrid(app, 2, {"lr": 0.1, "batch-size": 10, "local-epochs": 2})
    result = strategy.start(grid, initial, num_rounds=2)
    w = np.array([0.5, -1.0])
    for _ in range(2):
        bodies = []
        for columns in data:
            x, y, body = columns["x"], columns["y"], w
            for _ in range(2):
                body = body - 0.1 * (x @ body + 0.25 - y) @ x / len(x)
            bodies.append(body)
        w = (4 * bodies[0] + 6 * bodies[1]) / 10
    received, tuned = [], []
    for columns in data:
        x, y, body, b = columns["x"], columns["y"], w, 0.25
        received.append(np.sum((x @ body + b - y) ** 2) / 2)
        for _ in range(3):
            gap = x @ body + b - y
            b -= 0.1 * gap.mean()
            if tunes == "all":
                body = body - 0.1 * gap @ x / len(x)
        tuned.append(np.sum((x @ body + b - y) ** 2) / 2)
    np.testing.assert_allclose(result.arrays["weight"].numpy()[0], w, rtol=1e-5)
    assert result.arrays["bias"].data == initial["bias"].data
    metrics = result.evaluate_metrics_clientapp[2]
    assert metrics["received-loss"] == pytest.approx(sum(received) / 10, rel=1e-5)
    assert metrics["loss"] == pytest.approx(sum(tuned) / 10, rel=1e-5)
    assert metrics["loss-seen-hurt"] == 0


@pytest.mark.parametrize("codecs", [{}, {"download": BFloat16(), "upload": TopK(0.5)}])
def test_the_head_is_the_initial_one_until_an_evaluation(task, initial, spied, codecs):
    trained = []

    class Watched(FedBABUClient):
        def after_training(self, local):
            super().after_training(local)
            for name in self.personal(local):
                if "norm" not in name:  # BatchNorm's statistics are no weights
                    trained.append((name, local.end[name].numpy().copy()))

    app, calls = spied(client_app(task, Watched))
    strategy = FedBABU(personal="out.*", tuning_epochs=1, **codecs)
    grid = LocalGrid(app, 3, CONFIG)
    messages = []
    send = grid.send_and_receive

    def watch(asked, *, timeout=None):
        asked = list(asked)
        messages.extend(asked)
        return send(asked, timeout=timeout)

    grid.send_and_receive = watch
    result = strategy.start(grid, initial, num_rounds=3)
    for message in messages:
        head = from_record(message.content[PERSONAL_START])
        assert head.keys() == {"out.weight", "out.bias"}
        for name, x in head.items():
            assert x.tobytes() in initial[name].data
    assert len(trained) == 3 * 3 * 2
    for name, x in trained:
        assert np.array_equal(x, initial[name].numpy())
    for name in ("out.weight", "out.bias", "hidden.weight"):
        same = result.arrays[name].data == initial[name].data
        assert same == name.startswith("out.")
    for call in calls:
        assert not any(key.startswith("personal/part") for key in call.state)
        if call.kind == "train":
            assert not any(name.startswith("out.") for name in call.reply["arrays"])
    losses = result.evaluate_metrics_clientapp[3]
    assert losses["loss"] != losses["received-loss"]


def test_what_is_no_way_to_fine_tune_is_refused():
    with pytest.raises(ValueError, match="tunes='body' must be one of"):
        FedBABU(tunes="body")
    with pytest.raises(ValueError, match="tuning_epochs=-1 must be an integer >= 0"):
        FedBABU(tuning_epochs=-1)
