"""FedExP: its step in closed form, and sums of squares in every kind of round."""

from math import inf, nan

import numpy as np
import pytest
from adding_grid import AddingGrid
from flwr.app import ConfigRecord

from flower_ext.client.app import client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.several import stack
from flower_ext.core.spread import Spread
from flower_ext.privacy import Mechanism
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.asynchronous import Asynchronous, VirtualClock
from flower_ext.server.optimizers import SGD, FedExP, Muon
from flower_ext.server.strategy import RoundStrategy
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import FLASC, FedFish, FedPer, HypCluster, MaxFL, Scaffold
from flower_ext.strategies.fedfish import FedFishClient
from flower_ext.strategies.fedper import FedPerClient
from flower_ext.strategies.flasc import FLASCClient
from flower_ext.strategies.hypcluster import HypClusterClient
from flower_ext.strategies.maxfl import MaxFLClient
from flower_ext.strategies.scaffold import ScaffoldClient
from flower_ext.wire import NF4, Chain, Exact, TopK

TINY = 1e-300


class Uniform(AdditiveStrategy):
    equal_weights = True


def contents(reply, sent, changes, weights=None):
    weights = [1.0] * len(changes) if weights is None else weights
    return [
        reply({n: x + change[n] for n, x in sent.items()}, weight)
        for change, weight in zip(changes, weights, strict=True)
    ]


@pytest.fixture
def moved(aggregate, reply):
    """Return the factor by which FedExP goes further than the average."""

    def run(changes, weights=None, epsilon=TINY, make=AdditiveStrategy):
        sent = {"w": np.zeros(len(changes[0]))}
        named = [{"w": np.float64(change)} for change in changes]
        replies = contents(reply, sent, named, weights)
        plain, _ = aggregate(make(), sent, replies)
        strategy = make(server_optimizer=FedExP(epsilon))
        ours, _ = aggregate(strategy, sent, replies)
        factors = ours["w"][plain["w"] != 0] / plain["w"][plain["w"] != 0]
        assert factors == pytest.approx(factors[0])
        return factors[0]

    return run


def test_clients_that_agree_are_averaged(moved):
    assert moved([[1.0, 2.0]] * 5) == 1
    assert moved([[1.0, 2.0]] * 2) == 1


@pytest.mark.parametrize("count", [3, 4, 8])
def test_right_angles_give_half_the_number_of_clients(count, moved):
    assert moved(0.3 * np.eye(count)) == pytest.approx(count / 2, rel=1e-12)


def test_two_at_a_right_angle_are_averaged_and_three_are_not(moved):
    assert moved(np.eye(2)) == 1
    assert moved(np.eye(3)) == 1.5


def test_epsilon_shortens_the_step(moved):
    # 3 / (2 * 3 * (1/3 + 1/6)) = 1.
    assert moved(np.eye(3), epsilon=1 / 6) == pytest.approx(1)
    assert moved(np.eye(3), epsilon=1 / 12) == pytest.approx(1.2)
    assert moved(np.eye(9), epsilon=1e9) == 1


def test_weights_are_those_of_the_average(moved):
    # Squares 1, 1, 4 with weights 1, 2, 5 of 8; the mean is (1/8, 2/8, 10/8).
    changes = [[1.0, 0, 0], [0, 1.0, 0], [0, 0, 2.0]]
    expected = ((1 + 2 + 20) / 8) / (2 * (1 + 4 + 100) / 64)
    assert expected < 1 and moved(changes, [1.0, 2.0, 5.0]) == 1
    changes = [[3.0, 0, 0], [0, 2.0, 0], [0, 0, 1.0]]
    expected = ((9 + 8 + 5) / 8) / (2 * (9 + 16 + 25) / 64)
    assert moved(changes, [1.0, 2.0, 5.0]) == pytest.approx(expected)
    uniform = ((9 + 4 + 1) / 3) / (2 * (9 + 4 + 1) / 9)
    assert moved(changes, [1.0, 2.0, 5.0], make=Uniform) == pytest.approx(uniform)


def test_a_client_without_weight_does_not_count(moved):
    assert moved([*np.eye(3).tolist(), [1e200, 0, 0]], [1.0, 1.0, 1.0, 0.0]) == 1.5


def test_statistics_and_counters_are_averaged_and_have_no_norm(aggregate, reply):
    sent = {
        "w": np.zeros(3),
        "bn.running_mean": np.zeros(2),
        "steps": np.array(4),
    }
    changes = [
        {"w": row, "bn.running_mean": np.full(2, 100.0), "steps": 6}
        for row in np.eye(3)
    ]
    strategy = AdditiveStrategy(server_optimizer=FedExP(TINY))
    new, _ = aggregate(strategy, sent, contents(reply, sent, changes))
    assert new["w"].tolist() == pytest.approx([0.5] * 3)
    assert new["bn.running_mean"].tolist() == [100.0] * 2
    assert new["steps"] == 10


def test_a_reply_that_is_not_finite_is_left_out_of_both_sums(aggregate, reply):
    sent = {"w": np.zeros(3)}
    changes = [{"w": row} for row in np.eye(3)]
    for bad in (nan, inf):
        replies = contents(reply, sent, [*changes, {"w": np.full(3, bad)}])
        strategy = AdditiveStrategy(server_optimizer=FedExP(TINY))
        new, metrics = aggregate(strategy, sent, replies)
        assert metrics["num-dropped"] == 1
        assert new["w"].tolist() == pytest.approx([0.5] * 3)


# Rounds of clients that train -----------------------------------------------------

HALVES = [FedFishClient, FLASCClient, MaxFLClient, ScaffoldClient, HypClusterClient]
CONFIG = {"batch-size": 4, "lr": 0.1}


@pytest.fixture
def app(task):
    return client_app(task, *HALVES, FedPerClient)


def models(record):
    """Return the model and a moved one, as HypCluster takes them."""
    model = from_record(record)
    moved = {n: (x + 0.1).astype(x.dtype) for n, x in model.items()}
    return to_record(stack([model, moved]))


STRATEGIES = {
    "FedAvg": AdditiveStrategy,
    "encoded": lambda **o: AdditiveStrategy(upload=Chain(TopK(0.5), NF4()), **o),
    "exact": lambda **o: AdditiveStrategy(download=Exact(), upload=Exact(), **o),
    "FedFish": FedFish,
    "MaxFL": MaxFL,
    "Scaffold": Scaffold,
    "FLASC": lambda **o: FLASC(upload_density=0.5, **o),
    "senders": lambda **o: FLASC(upload_density=0.5, aggregation="senders", **o),
    "FedPer": lambda **o: FedPer(personal="out.*", **o),
    "HypCluster": lambda **o: HypCluster(num_clusters=2, **o),
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_partial_sums_give_the_same(name, app, initial):
    found = []
    for kind in (LocalGrid, AddingGrid):
        optimizer = FedExP(1e-6)
        strategy = STRATEGIES[name](server_optimizer=optimizer, fraction_evaluate=0.0)
        start = models(initial) if name == "HypCluster" else initial
        grid = kind(app, 6, CONFIG)
        arrays = strategy.start(grid, start, num_rounds=3).arrays
        found.append((from_record(arrays), optimizer.spread))
    (plain, its), (summed, own) = found
    assert own == pytest.approx(its, rel=1e-5)
    assert its.mean_square > its.square_of_mean > 0
    for key, array in plain.items():
        np.testing.assert_allclose(summed[key], array, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["FedAvg", "exact", "Scaffold", "FedPer"])
def test_one_client_is_averaging_bit_for_bit(name, app, initial):
    found = []
    for optimizer in (SGD(), FedExP()):
        strategy = STRATEGIES[name](
            server_optimizer=optimizer, fraction_evaluate=0.0, min_train_nodes=1,
            min_available_nodes=1,
        )  # fmt: skip
        arrays = strategy.start(LocalGrid(app, 1, CONFIG), initial, num_rounds=3).arrays
        found.append(from_record(arrays))
    for key, array in found[0].items():
        assert array.tobytes() == found[1][key].tobytes()


def test_the_squares_are_those_of_the_models_that_clients_return(app, initial):
    optimizer = FedExP()
    strategy = AdditiveStrategy(server_optimizer=optimizer, fraction_evaluate=0.0)
    grid = LocalGrid(app, 6, CONFIG)
    messages = strategy.configure_train(1, initial, ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    strategy.aggregate_train(1, replies)
    sent = from_record(initial)
    trained = [n for n in sent if "running" not in n and "num_batches" not in n]

    def vector(arrays):
        return np.concatenate([np.float64(arrays[n]).reshape(-1) for n in trained])

    changes = np.stack(
        [vector(from_record(r.content["arrays"])) - vector(sent) for r in replies]
    )
    weights = np.float64([r.content["metrics"]["num-examples"] for r in replies])
    mean = np.average(changes, axis=0, weights=weights)
    squares = np.average(np.sum(changes**2, axis=1), weights=weights)
    assert optimizer.spread == pytest.approx((squares, mean @ mean), rel=1e-5)


def test_stale_changes_count_less_in_both_sums(app, initial):
    optimizer = FedExP()
    strategy = AdditiveStrategy(server_optimizer=optimizer, fraction_evaluate=0.0)
    how = Asynchronous(2, 4, clock=VirtualClock(lambda client, task: 1.0 + client))
    grid = LocalGrid(app, 6, CONFIG)
    result = strategy.start(grid, initial, num_rounds=4, asynchronous=how)
    assert result.train_metrics_clientapp[4]["staleness-max"] > 0
    assert optimizer.spread.mean_square >= optimizer.spread.square_of_mean > 0


def test_a_resumed_run_is_the_same(app, initial, tmp_path):
    def run(rounds, **options):
        strategy = AdditiveStrategy(server_optimizer=FedExP(1e-6))
        grid = LocalGrid(app, 6, CONFIG)
        return strategy.start(grid, initial, num_rounds=rounds, **options).arrays

    expected = run(4)
    run(2, checkpoint=tmp_path)
    assert run(4, checkpoint=tmp_path) == expected


# What is refused ------------------------------------------------------------------

PLAN = {
    "num_rounds": 1,
    "num_sampled_clients": 2,
    "population_size": 4,
}


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("optimizer", [FedExP(), Muon(otherwise=FedExP())])
def test_a_mechanism_is_refused(noise, optimizer):
    plan = Mechanism(noise_multiplier=noise, clipping=1.0, **PLAN)
    with pytest.raises(ValueError, match=r"norms of the clients' changes are neither"):
        AdditiveStrategy(server_optimizer=optimizer, mechanism=plan)


def test_a_strategy_that_is_no_sum_is_refused():
    class Median(RoundStrategy):
        def aggregate(self, round, replies):
            return {}

    with pytest.raises(ValueError, match="Median: it is no sum of the clients'"):
        Median(server_optimizer=FedExP())


def test_a_step_without_the_sums_is_refused():
    with pytest.raises(ValueError, match="needs see"):
        FedExP().step({"w": np.zeros(2)}, {"w": np.ones(2)})


@pytest.mark.parametrize("bad", [0, -1.0, nan, inf, True, "1"])
def test_a_bad_epsilon_is_refused(bad):
    with pytest.raises(ValueError, match=rf"^epsilon={bad!r} must be .* > 0: changes"):
        FedExP(bad)


def test_an_optimizer_inside_is_told(aggregate, reply):
    sent = {"b": np.zeros(3)}
    replies = contents(reply, sent, [{"b": row} for row in np.eye(3)])
    strategy = AdditiveStrategy(server_optimizer=Muon(otherwise=FedExP(TINY)))
    new, _ = aggregate(strategy, sent, replies)
    assert new["b"].tolist() == pytest.approx([0.5] * 3)


def test_other_optimizers_cost_nothing(aggregate, reply):
    sent = {"w": np.zeros(3)}
    optimizer = SGD()
    strategy = AdditiveStrategy(server_optimizer=optimizer)
    aggregate(strategy, sent, contents(reply, sent, [{"w": x} for x in np.eye(3)]))
    assert optimizer.spread is None
    assert strategy.summand().measure is None


def test_the_rate_by_hand():
    assert FedExP(1.0).rate(Spread(12.0, 2.0)) == 2.0
