"""The round: equal to Flower's FedAvg, and the same in any order of the replies."""

import pickle

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext._flower import Run
from flower_ext.client.app import client_app
from flower_ext.core.arrays import from_record, layout, to_record
from flower_ext.core.contribution import Contribution
from flower_ext.core.protocol import Payload, Round
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD, Adam, TorchOptimizer
from flower_ext.simulation.base_grid import BaseGrid
from flower_ext.simulation.direct_transport import DirectTransport
from flower_ext.simulation.local import LocalGrid
from flower_ext.simulation.setting import Setting

SENT = {"w": np.float32([1.0, -2.0]), "n": np.array(5)}
COUNTS = ("num-replies", "num-errors", "num-dropped")
ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}


def model(*w, n=5):
    return {"w": np.float32(w), "n": np.array(n)}


def without_counts(metrics):
    return {k: v for k, v in metrics.items() if k not in COUNTS}


def counts(metrics):
    return tuple(metrics[name] for name in COUNTS)


def weighted_mean(arrays, weights):
    """The textbook formula, in float64."""
    pairs = zip(arrays, weights, strict=True)
    return sum(w * np.asarray(a, np.float64) for a, w in pairs) / sum(weights)


# The same as Flower's FedAvg ------------------------------------------------------

cases = st.tuples(
    st.lists(st.integers(1, 5000) | st.floats(0.01, 100), min_size=1, max_size=5),
    st.lists(
        st.tuples(
            st.sampled_from([np.float16, np.float32, np.float64]),
            st.sampled_from([(), (1,), (3,), (2, 3), (0,)]),
        ),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2**32 - 1),
)
TOLERANCE = {"float16": 2e-2, "float32": 2e-6, "float64": 1e-13}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases)
def test_defaults_equal_flowers_fedavg(aggregate, reply, case):
    weights, layers, seed = case
    random = np.random.default_rng(seed)

    def draw():
        return {
            f"layer{i}": np.asarray(random.normal(size=shape), dtype)
            for i, (dtype, shape) in enumerate(layers)
        }

    sent = draw()
    replies = [
        reply(draw(), weight, loss=random.normal(), v=random.normal(size=2).tolist())
        for weight in weights
    ]
    ours, our_metrics = aggregate(AdditiveStrategy(**ANY), sent, replies)
    theirs, their_metrics = aggregate(FedAvg(**ANY), sent, replies)
    assert layout(ours) == layout(theirs)
    for name, array in theirs.items():
        tolerance = TOLERANCE[str(array.dtype)]
        np.testing.assert_allclose(ours[name], array, rtol=tolerance, atol=tolerance)
    found = without_counts(our_metrics)
    assert found == {
        "loss": pytest.approx(their_metrics["loss"], rel=1e-12, abs=1e-12),
        "v": pytest.approx(their_metrics["v"], rel=1e-12, abs=1e-12),
    }


def test_weights_are_those_of_the_named_metric(aggregate, reply):
    strategy = AdditiveStrategy(weighted_by_key="trust", **ANY)
    contents = [
        reply(model(0, 0), 100, trust=1.0),
        reply(model(4, 8), 1, trust=3.0),
    ]
    new, _ = aggregate(strategy, SENT, contents)
    assert new["w"].tolist() == [3, 6]


def test_errors_are_left_out_as_in_fedavg(aggregate, reply):
    contents = [reply(model(3, 4), 2), RuntimeError("no"), reply(model(6, 1), 1)]
    ours, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    theirs, _ = aggregate(FedAvg(), SENT, contents)
    np.testing.assert_allclose(ours["w"], theirs["w"], rtol=1e-6)
    assert counts(metrics) == (2, 1, 0)


def test_a_client_that_never_replied_is_left_out(exchange, reply):
    contents = [reply(model(3, 4), 2), reply(model(9, 9), 5), reply(model(6, 1), 1)]
    strategy = AdditiveStrategy()
    first, _, third = exchange(strategy, SENT, contents)
    record, metrics = strategy.aggregate_train(1, [third, first])
    assert from_record(record)["w"].tolist() == [4, 3]
    assert counts(metrics) == (2, 0, 0)


def test_a_whole_run_equals_fedavgs(task, initial, grid):
    theirs = FedAvg().start(grid, initial, num_rounds=3)
    again = LocalGrid(client_app(task), 6, {"batch-size": 4, "lr": 0.1})
    ours = AdditiveStrategy().start(again, initial, num_rounds=3)
    for name, array in theirs.arrays.items():
        if name != "norm.num_batches_tracked":  # a float in FedAvg's result
            np.testing.assert_allclose(
                ours.arrays[name].numpy(), array.numpy(), rtol=2e-5, atol=1e-6
            )
    for field in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        for server_round, metrics in getattr(theirs, field).items():
            found = without_counts(getattr(ours, field)[server_round])
            assert found == pytest.approx(dict(metrics), rel=1e-5)


def test_evaluation_equals_fedavgs(exchange, scripted, reply):
    contents = [reply(None, 3, acc=0.5), ValueError("no"), reply(None, 1, acc=0.7)]
    grid = scripted(contents)
    results = []
    for strategy in (AdditiveStrategy(), FedAvg()):
        messages = strategy.configure_evaluate(1, to_record(SENT), ConfigRecord(), grid)
        replies = list(grid.send_and_receive(messages))
        results.append(dict(strategy.aggregate_evaluate(1, replies)))
    assert results[0] == pytest.approx(results[1]) == {"acc": pytest.approx(0.55)}


def test_own_aggregation_of_metrics_is_used(aggregate, scripted, reply):
    strategy = AdditiveStrategy(
        train_metrics_aggr_fn=lambda contents, key: MetricRecord({"n": len(contents)}),
        evaluate_metrics_aggr_fn=lambda contents, key: MetricRecord({"key": len(key)}),
    )
    contents = [reply(model(0, 0)), reply(model(0, 0))]
    _, metrics = aggregate(strategy, SENT, contents)
    assert without_counts(metrics) == {"n": 2}
    grid = scripted(contents)
    messages = strategy.configure_evaluate(1, to_record(SENT), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))
    assert strategy.aggregate_evaluate(1, replies) == {"key": len("num-examples")}


# Integers and flags ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["i8", "i4", "i1", "u1", "u4", "u8"])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.data())
def test_integers_are_the_rounded_weighted_mean(aggregate, reply, dtype, data):
    info = np.iinfo(dtype)
    value = st.integers(max(info.min, -(2**40)), min(info.max, 2**40))
    values = data.draw(st.lists(value, min_size=1, max_size=4))
    weights = [data.draw(st.integers(1, 100)) for _ in values]
    sent = {"n": np.array([data.draw(value)], dtype)}
    contents = [
        reply({"n": np.array([v], dtype)}, w)
        for v, w in zip(values, weights, strict=True)
    ]
    new, _ = aggregate(AdditiveStrategy(**ANY), sent, contents)
    assert new["n"].dtype == dtype
    mean = weighted_mean(values, weights)
    assert abs(int(new["n"][0]) - mean) <= 0.5 + 1e-3


@pytest.mark.parametrize(
    ("sent", "agreed", "dtype"),
    [
        (2**60, 2**60, np.int64),
        (2**60, 2**60 + 1, np.int64),
        (-(2**62) + 7, -(2**62) + 5, np.int64),
        (2**63 + 5, 2**63 + 9, np.uint64),
        # Exact as long as the change times the sum of weights (here 21) is < 2**53.
        (0, 2**53 // 21, np.int64),
        (0, -(2**53 // 21), np.int64),
        (255, 0, np.uint8),
        (-128, 127, np.int8),
    ],
)
def test_integers_on_which_all_clients_agree_are_taken_over(
    aggregate, reply, sent, agreed, dtype
):
    contents = [reply({"n": np.array(agreed, dtype)}, w) for w in (3, 7, 11)]
    new, _ = aggregate(AdditiveStrategy(), {"n": np.array(sent, dtype)}, contents)
    assert (int(new["n"]), new["n"].dtype, new["n"].shape) == (agreed, dtype, ())


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize(
    ("flags", "weights", "expected"),
    [
        ([True, True], [1, 1], True),
        ([False, False], [1, 1], False),
        ([True, False], [3, 1], True),
        ([True, False], [1, 3], False),
    ],
)
def test_flags_are_decided_by_weighted_majority(
    aggregate, reply, sent, flags, weights, expected
):
    contents = [
        reply({"f": np.array([flag])}, w)
        for flag, w in zip(flags, weights, strict=True)
    ]
    new, _ = aggregate(AdditiveStrategy(), {"f": np.array([sent])}, contents)
    assert new["f"].dtype == bool
    assert new["f"].tolist() == [expected]


def test_a_batchnorm_counter_stays_an_integer_over_rounds(initial, grid):
    result = AdditiveStrategy().start(grid, initial, num_rounds=2)
    counter = result.arrays["norm.num_batches_tracked"].numpy()
    # Clients of 12, 16, ... 32 examples take 3, 4, ... 8 steps of 4 in a round.
    sizes = np.arange(12, 36, 4)
    mean = np.average(sizes / 4, weights=sizes)
    assert counter.dtype == np.int64
    assert counter == 2 * round(mean)


# Order, and nothing changed behind the caller's back ------------------------------


def test_the_order_of_replies_changes_no_bit(exchange, reply):
    random = np.random.default_rng(0)
    sent = {"w": random.normal(size=200).astype(np.float32)}
    contents = [
        reply({"w": random.normal(size=200).astype(np.float32)}, w, loss=w / 7)
        for w in random.integers(1, 99, 12).tolist()
    ]
    strategy = AdditiveStrategy()
    replies = exchange(strategy, sent, contents)
    results = set()
    for seed in range(5):
        order = np.random.default_rng(seed).permutation(len(replies))
        record, metrics = strategy.aggregate_train(1, [replies[i] for i in order])
        results.add((record["w"].data, metrics["loss"]))
    assert len(results) == 1


def test_the_order_of_evaluations_changes_no_bit(exchange, reply):
    contents = [reply(None, w, acc=1 / w) for w in (3, 7, 11, 13, 17)]
    strategy = AdditiveStrategy()
    replies = exchange(strategy, SENT, contents, phase="evaluate")
    results = set()
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(len(replies))
        metrics = strategy.aggregate_evaluate(1, [replies[i] for i in order])
        results.add(metrics["acc"])
    assert len(results) == 1


def grid_of(app, ids):
    """Clients under node ids as a federation gives them, in no order."""
    setting = Setting(app, ids)
    return BaseGrid(Run.create_empty(1), setting, DirectTransport(setting))


def test_node_ids_change_no_bit(task, initial):
    results = []
    for ids in ([5, 900, 3, 77, 12, 40], [1, 2, 3, 4, 5, 6]):
        strategy = AdditiveStrategy(fraction_train=0.5, fraction_evaluate=0.5)
        result = strategy.start(grid_of(client_app(task), ids), initial)
        results.append(result)
    assert results[0] == results[1]


def test_replies_and_model_are_not_changed(exchange, reply):
    strategy = AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.9))
    contents = [reply(model(3, 4), 2, loss=1.0), reply(model(6, 1), 1, other=2.0)]
    replies = exchange(strategy, SENT, contents)
    sent = {name: array.copy() for name, array in SENT.items()}
    before = pickle.dumps([r.content for r in replies])
    strategy.aggregate_train(1, replies)
    assert pickle.dumps([r.content for r in replies]) == before
    assert all(np.array_equal(SENT[name], array) for name, array in sent.items())


def test_replies_are_read_under_the_chosen_array_key(aggregate, reply):
    content = reply(None, 1)
    content["model"] = to_record(model(3, 4))
    strategy = AdditiveStrategy(arrayrecord_key="model")
    new, _ = aggregate(strategy, SENT, [content, content])
    assert new["w"].tolist() == [3, 4]


class Counting(AdditiveStrategy):
    """Takes the counts of a reply as they come."""

    other_arrays = ("counts",)

    def contribution(self, reply, round):
        counts = from_record(reply.content["counts"])
        return Contribution({"delta": reply.delta(round)}, counts={"delta": counts})


@pytest.mark.parametrize(
    "counts",
    [{"w": np.ones(3)}, {"w": np.ones(1)}, {"w": np.ones((2, 1))}, {"v": np.ones(1)}],
)
def test_counts_of_another_shape_are_left_out(aggregate, reply, counts):
    bad, good = reply(model(5, 5)), reply(model(3, 4))
    bad["counts"] = to_record(counts)
    good["counts"] = to_record({"w": np.array([1.0, 2.0])})
    for contents in ([bad, good], [good, bad]):
        new, metrics = aggregate(Counting(**ANY), SENT, contents)
        expected, _ = aggregate(Counting(**ANY), SENT, [good])
        assert new["w"].tolist() == expected["w"].tolist()
        assert metrics["num-dropped"] == 1


@pytest.mark.parametrize(
    "count", [1e-300, 1e-30, np.array([-1.0 + 1e-15, 0.0]) * np.array([1.0, 1.0])]
)
def test_a_count_that_moves_the_model_too_far_is_left_out(aggregate, reply, count):
    """Nobody else has the first coordinate: its mean is what this reply makes of it."""
    bad, good = reply(model(5, 5)), reply(model(3, 4))
    bad["counts"] = to_record({"w": np.broadcast_to(count, 2)})
    first = 1.0 if np.ndim(count) else 0.0
    good["counts"] = to_record({"w": np.array([first, 2.0])})
    for contents in ([bad, good], [good, bad]):
        new, metrics = aggregate(Counting(**ANY), SENT, contents)
        expected, _ = aggregate(Counting(**ANY), SENT, [good])
        assert new["w"].tolist() == expected["w"].tolist()
        assert metrics["num-dropped"] == 1


class HalfOfIt(AdditiveStrategy):
    """Of two arrays one stays as it is: nobody is sent it, and nobody has a change."""

    def payload(self, variant, round):
        return Payload({"w": round.sent["w"]})

    def zero(self, sent):
        return super().zero({"w": sent["w"]})

    def contribution(self, reply, round):
        start = {"w": round.sent["w"]}
        return Contribution({"delta": reply.change(round, start).arrays})


@pytest.mark.parametrize(
    "make",
    [
        lambda: SGD(),
        lambda: SGD(0.5, momentum=0.9),
        lambda: Adam(0.1),
        lambda: TorchOptimizer(lambda p: torch.optim.Adam(p, lr=0.1)),
    ],
)
def test_an_array_of_which_nobody_has_a_change_stays(aggregate, reply, make):
    sent = {"n": np.array(5), "w": np.float32([1, 2]), "head": np.float32([3, 4])}
    contents = [reply({"w": np.float32([2, 2])}), reply({"w": np.float32([4, 2])})]
    new, metrics = aggregate(HalfOfIt(server_optimizer=make()), sent, contents)
    assert counts(metrics) == (2, 0, 0) and list(new) == list(sent)
    assert new["head"].tolist() == [3, 4] and new["n"] == 5
    assert new["w"][0] > 1 and new["w"][1] == 2


def test_running_statistics_are_no_parameters():
    names = ("norm.weight", "norm.running_mean", "norm.running_var", "moving_mean")
    sent = {name: np.ones(2) for name in names} | {"seen": np.array(1)}
    assert list(Round(1, sent).parameters) == ["norm.weight"]
