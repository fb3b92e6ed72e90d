"""FedProx: the half serves Flower's server and ours; the term by its closed form."""

from functools import partial

import numpy as np
import pytest
from flwr.app import ConfigRecord
from flwr.serverapp.strategy import FedProx as FlowersFedProx
from plain_loop import plain_loop

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.simulation import LocalGrid
from flower_ext.strategies import FedProx, FedProxClient
from flower_ext.strategies.fedprox import MU_KEY, proximal

ETA, STEPS = 0.1, 4
own_loop = partial(plain_loop, rate=ETA, steps=STEPS)
CONFIG = {"lr": ETA, "local-steps": STEPS}
ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}


def expected(quadratics, mu, rounds):
    """Return the mean of where gradient descent on the quadratics leads."""
    x = np.zeros(2)
    for _ in range(rounds):
        ends = []
        for h, a in zip(quadratics.hessians, quadratics.centers, strict=True):
            # (H + mu I)(y - y*) = 0 at y* = (H + mu I)^-1 (H a + mu x).
            curved = h + mu * np.eye(2)
            least = np.linalg.solve(curved, h @ a + mu * x)
            step = np.linalg.matrix_power(np.eye(2) - ETA * curved, STEPS)
            ends.append(least + step @ (x - least))
        x = np.mean(ends, 0)
    return x


def run_of(strategy, app, start, rounds=2, told=None):
    grid = LocalGrid(app, 3, CONFIG)
    train_config = ConfigRecord(told or {})
    result = strategy.start(
        grid, to_record(start), num_rounds=rounds, train_config=train_config
    )
    return from_record(result.arrays)["w"]


@pytest.mark.parametrize("mu", [0.0, 0.5, 15.0])
def test_every_server_and_every_client_gives_the_same(quadratics, mu):
    task, start = quadratics.task(), quadratics.start
    found = expected(quadratics, mu, rounds=2)
    servers = [
        (FedProx(proximal_mu=mu, **ALL), {}),
        (FlowersFedProx(proximal_mu=mu, fraction_evaluate=0.0), {}),
        (AdditiveStrategy(**ALL), {MU_KEY: mu}),
    ]
    for strategy, told in servers:
        for app in (client_app(task, FedProxClient), own_loop(task, proximal())):
            w = run_of(strategy, app, start, told=told)
            assert w == pytest.approx(found, abs=1e-12), (strategy, app)


def test_without_a_term_it_is_fedavg_bit_for_bit(task, initial):
    app = client_app(task, FedProxClient)
    models = []
    for strategy in (FedProx(proximal_mu=0.0, **ALL), AdditiveStrategy(**ALL)):
        grid = LocalGrid(app, 3, {"lr": 0.1, "batch-size": 4})
        models.append(strategy.start(grid, initial, num_rounds=2).arrays)
    for name, array in models[1].items():
        assert models[0][name].data == array.data


def test_a_large_mu_holds_clients_back(quadratics):
    app = client_app(quadratics.task(), FedProxClient)
    moved = [
        np.linalg.norm(run_of(FedProx(proximal_mu=mu, **ALL), app, quadratics.start, 1))
        for mu in (0.0, 3.0, 9.0)
    ]
    assert moved[0] > 1.5 * moved[1] > 1.5 * moved[2] > 0


def test_the_half_is_asked_for_by_its_key_only_where_none_is_named(quadratics):
    app = client_app(quadratics.task(), FedProxClient)
    plain = partial(run_of, app=app, start=quadratics.start)
    assert plain(AdditiveStrategy(**ALL)) == pytest.approx(
        expected(quadratics, 0.0, 2), abs=1e-12
    )
    # An app without the half trains without the term, as Flower's would, unless the
    # server is ours.
    bare = client_app(quadratics.task())
    told = {MU_KEY: 5.0}
    w = run_of(AdditiveStrategy(**ALL), bare, quadratics.start, told=told)
    assert w == pytest.approx(expected(quadratics, 0.0, 2), abs=1e-12)
    with pytest.raises(Exception, match="needs the client half 'fedprox'"):
        run_of(FedProx(**ALL), bare, quadratics.start)
    with pytest.raises(Exception, match="'proximal-mu'"):
        run_of(FedProx(**ALL), own_loop(quadratics.task()), quadratics.start)


def test_a_key_in_another_spelling_is_refused(quadratics):
    app, told = client_app(quadratics.task(), FedProxClient), {"proximal_mu": 0.1}
    with pytest.raises(
        Exception, match=r"'proximal_mu'=0\.1 must be spelt 'proximal-mu'"
    ):
        run_of(AdditiveStrategy(**ALL), app, quadratics.start, told=told)


def test_bad_strengths_are_refused(quadratics):
    with pytest.raises(ValueError, match=r"proximal_mu=-1 must be a finite"):
        FedProx(proximal_mu=-1)
    app = client_app(quadratics.task(), FedProxClient)
    with pytest.raises(
        Exception, match=r"proximal-mu=20\.0 must be < 20 at a learning"
    ):
        run_of(FedProx(proximal_mu=20.0, **ALL), app, quadratics.start)
    own = own_loop(quadratics.task(), proximal())
    with pytest.raises(
        Exception, match=r"proximal-mu=20\.0 must be < 20 at a learning"
    ):
        run_of(FedProx(proximal_mu=20.0, **ALL), own, quadratics.start)
    with pytest.raises(Exception, match=r"proximal-mu='abc' must be a finite"):
        run_of(AdditiveStrategy(**ALL), own, quadratics.start, told={MU_KEY: "abc"})


def test_a_loop_that_the_term_cannot_reach_is_refused(quadratics):
    app = own_loop(quadratics.task(), proximal(), by_hand=True)
    with pytest.raises(Exception, match="without a step of a torch optimizer"):
        run_of(FedProx(**ALL), app, quadratics.start)


def test_the_mod_finds_records_under_keys_of_ones_own(quadratics):
    app = own_loop(quadratics.task(), proximal(), model_key="model")
    found = expected(quadratics, 0.5, rounds=2)
    keys = {"arrayrecord_key": "model", "configrecord_key": "settings"}
    for strategy in (
        FedProx(proximal_mu=0.5, **keys, **ALL),
        FlowersFedProx(proximal_mu=0.5, fraction_evaluate=0.0, **keys),
    ):
        w = run_of(strategy, app, quadratics.start)
        assert w == pytest.approx(found, abs=1e-12)
