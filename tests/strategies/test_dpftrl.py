"""DP-FTRL: its limits, its promise to clients, and a run that is resumed."""

import inspect
import logging
import time

import numpy as np
import pytest

from flower_ext.client.app import client_app
from flower_ext.core.sampling import MinSeparationSampler
from flower_ext.privacy import (
    BandedToeplitz,
    FlatClipping,
    Mechanism,
    gaussian_epsilon,
)
from flower_ext.privacy.mechanism import MechanismOptions
from flower_ext.server.optimizers import SGD
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import DPFTRL

USUAL = {
    "num_rounds": 8,
    "num_sampled_clients": 3,
    "population_size": 12,
    "min_separation": 4,
    "noise_multiplier": 1.0,
    "target_delta": 1e-2,
    "seed": 1,
    "fraction_evaluate": 0.0,
}


@pytest.fixture
def app(point_task):
    return client_app(point_task([{"c": [float(i)]} for i in range(12)]))


def test_momentum_makes_prefix_sums_of_prefix_sums(point_task, play):
    """Kairouz et al.: w_t = w_0 + v_t, v_t = beta v_(t-1) + the sum of changes."""
    clients = [{"c": [4.0]}] * 3
    strategy = DPFTRL(
        **{
            **USUAL,
            "population_size": 3,
            "min_separation": 1,
            "noise_multiplier": 0.0,
            "clipping": 1e9,
        },
        server_optimizer=SGD(1.0, momentum=0.9),
    )
    played = play(
        strategy, client_app(point_task(clients)), 3, {"w": np.float64(0.0)}, rounds=4
    )
    models = [float(m["w"]) for m in played.models]
    v = total = 0.0
    for before, after in zip(models, models[1:], strict=False):
        total += 0.1 * (4.0 - before)  # one local step of rate 0.1
        v = 0.9 * v + total
        assert after == pytest.approx(v, rel=1e-6)


def test_clients_are_not_drawn_too_often(app, spied, play):
    app, calls = spied(app)
    once = {**USUAL, "population_size": 24, "max_participations": 1}
    play(DPFTRL(**once), app, 12, {"w": np.float32(0)}, rounds=8)
    seen = [call.client for call in calls]
    assert len(seen) == len(set(seen)) == 12  # all that are there once, then nobody
    strategy = DPFTRL(**USUAL)
    calls.clear()
    played = play(strategy, app, 12, {"w": np.float32(0)}, rounds=8)
    for client in range(12):
        rounds = [call.server_round for call in calls if call.client == client]
        assert all(b - a >= 4 for a, b in zip(rounds, rounds[1:], strict=False))
    spent = [played.train(r)["epsilon"] for r in range(1, 9)]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(gaussian_epsilon(1.0, 1e-2))


def test_its_mechanism_is_chosen_from_participation():
    many = {**USUAL, "num_rounds": 64, "population_size": 96, "target_delta": 1e-3}
    free = DPFTRL(**{**many, "min_separation": 1})
    apart = DPFTRL(**{**many, "min_separation": 32})
    noise = [
        strategy.private_sum.noise_std
        * strategy.private_sum.factorization.rms_error(strategy.mechanism.workload)
        for strategy in (free, apart)
    ]
    assert noise[0] > 2 * noise[1]
    assert "identity" not in str(apart.settings()["Mechanism"])


def test_options_of_the_mechanism_are_known_by_name():
    with pytest.raises(TypeError, match="'target_dleta': did you mean target_delta"):
        DPFTRL(**USUAL, target_dleta=1e-3)
    parameters = inspect.signature(Mechanism).parameters.values()
    optional = {p.name for p in parameters if p.default is not p.empty}
    assert optional == set(MechanismOptions.__annotations__)
    strategy = DPFTRL(**USUAL, clipping=0.25, scales={"delta": 2.0})
    assert strategy.mechanism.clipping == FlatClipping(0.25)
    assert strategy.mechanism.scales == {"delta": 2.0}


def test_a_target_says_how_much_noise():
    strategy = DPFTRL(**{**USUAL, "noise_multiplier": None, "max_epsilon": 2.0})
    spent = strategy.private_sum.accountant.epsilon_after(8, 1e-2)
    assert spent == pytest.approx(2.0, rel=1e-9)
    assert spent <= 2.0


def short(when_short, app, play):
    strategy = DPFTRL(
        **{
            **USUAL,
            "min_separation": 1,
            "num_sampled_clients": 7,
            "population_size": 14,
        },
        sampler=MinSeparationSampler(2, when_short=when_short),
    )
    return play(strategy, app, 12, {"w": np.float32(0)}, rounds=3)


def test_a_run_short_of_clients_goes_on_smaller(app, play):
    played = short("smaller", app, play)
    assert [played.train(r)["num-replies"] for r in (1, 2, 3)] == [7, 5, 7]


def test_a_run_short_of_clients_stops(app, play, caplog):
    caplog.set_level(logging.WARNING, "flwr")
    played = short("stop", app, play)
    assert sorted(played.result.train_metrics_clientapp) == [1]
    assert "ends after round 1: round 2 needs 7 clients, 5 of the 12" in caplog.text


def test_a_run_short_of_clients_waits(app, monkeypatch, play):
    """Three more clients connect while round 2 waits."""

    class Growing(LocalGrid):
        is_fixed = False
        connected = 9

        def get_node_ids(self):
            return list(super().get_node_ids())  # a range is a simulation's

        def get_nodes(self):
            return list(super().get_nodes())[: self.connected]

    grid = Growing(app, 12)
    naps = []

    def nap(seconds):
        naps.append(seconds)
        grid.connected += 1

    monkeypatch.setattr(time, "sleep", nap)
    strategy = DPFTRL(
        **{**USUAL, "min_separation": 1, "num_sampled_clients": 6},
        sampler=MinSeparationSampler(2, when_short="wait"),
    )
    played = play(strategy, grid, 12, {"w": np.float32(0)}, rounds=2)
    assert len(naps) == 3
    assert played.train(2)["num-replies"] == 6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"restart_every": 2}, "restart_every=2 must be used with"),
        (
            {"sampler": MinSeparationSampler(4)},
            "sampler='MinSeparationSampler' must be left out",
        ),
        ({"min_separation": 0}, "min_separation=0"),
        (
            {"factorization": BandedToeplitz(8, [1.0, 0.5, 0.3, 0.2, 0.1])},
            "at most 4 bands",
        ),
        ({"noise_multiplier": None}, "noise_multiplier=None and max_epsilon=None"),
        ({"fraction_train": 0.1}, "fraction_train=0.1"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        DPFTRL(**{**USUAL, **changes})


def test_the_summary_says_what_is_promised(caplog):
    caplog.set_level(logging.INFO, "flwr")
    DPFTRL(**USUAL).summary()
    for line in ("8 rounds, 3 of 12 clients", "epsilon 2.318", "clipping_norm=1.0"):
        assert line in caplog.text
