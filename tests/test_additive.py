"""The round: equal to Flower's FedAvg where that works, and sound where it does not."""

import copy
import functools
import inspect
import logging
import pickle
import re
from math import inf, nan

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext import options
from flower_ext.additive import AdditiveStrategy
from flower_ext.arrays import from_record, layout, to_record
from flower_ext.client import ClientHalf, client_app
from flower_ext.contribution import Contribution
from flower_ext.sampling import AllClients, PoissonSampler, UniformSampler
from flower_ext.server_optimizer import SGD, Adam, TorchOptimizer
from flower_ext.simulation.local import LocalGrid

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
SENT = {"w": np.float32([1.0, -2.0]), "n": np.array(5)}
COUNTS = ("num-replies", "num-errors", "num-dropped")


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


# Rounds without enough replies ----------------------------------------------------


@pytest.mark.parametrize(
    ("contents", "expected"),
    [
        ([RuntimeError("a"), RuntimeError("b")], (0, 2, 0)),
        ([RuntimeError("a"), "reply"], (1, 1, 0)),
    ],
)
def test_fewer_replies_than_required_keep_the_model_and_say_so(
    aggregate, reply, caplog, contents, expected
):
    contents = [reply(model(9, 9)) if c == "reply" else c for c in contents]
    new, metrics = aggregate(AdditiveStrategy(min_replies=2), SENT, contents)
    assert new is None
    assert counts(metrics) == expected
    [warning] = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert re.search(r"round 1: \d usable.*at least 2.*model is kept", warning.message)


def test_as_many_replies_as_required_move_the_model(aggregate, reply):
    contents = [reply(model(9, 9)), reply(model(9, 9)), RuntimeError("c")]
    new, _ = aggregate(AdditiveStrategy(min_replies=2), SENT, contents)
    assert new["w"].tolist() == [9, 9]


def test_a_round_of_nobody_keeps_the_model(exchange, reply, caplog):
    strategy = AdditiveStrategy()
    exchange(strategy, SENT, [reply(model(0, 0))] * 2)
    record, metrics = strategy.aggregate_train(1, [])
    assert record is None
    assert counts(metrics) == (0, 0, 0)
    assert "the model is kept" in caplog.text


def test_replies_that_all_weigh_nothing_keep_the_model(aggregate, reply, caplog):
    contents = [reply(model(9, 9), 0), reply(model(8, 8), 0.0)]
    new, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    assert new is None
    assert counts(metrics) == (2, 0, 0)
    assert "total weight 0" in caplog.text


def test_a_reply_that_weighs_nothing_changes_nothing(aggregate, reply):
    contents = [reply(model(3, 4), 2, loss=1.0), reply(model(9, 9), 0, loss=nan)]
    new, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    assert new["w"].tolist() == [3, 4]
    assert metrics["loss"] == 1


def test_a_run_in_which_nothing_changed_returns_the_initial_model(scripted):
    grid = scripted([RuntimeError("down")] * 3)
    initial = to_record(SENT)
    result = AdditiveStrategy().start(grid, initial, num_rounds=2)
    assert result.arrays == initial
    assert [counts(m) for m in result.train_metrics_clientapp.values()] == [
        (0, 3, 0),
        (0, 3, 0),
    ]


def test_a_kept_model_is_sent_again_in_the_next_round(reply):
    app, seen = ClientApp(), []

    @app.train()
    def train(message, context):
        seen.append(message.content["arrays"]["w"].numpy().tolist())
        if message.content["config"]["server-round"] == 2:
            raise RuntimeError("down in round 2")
        return Message(reply(model(7, 7)), reply_to=message)

    strategy = AdditiveStrategy(fraction_evaluate=0.0)
    strategy.start(LocalGrid(app, 2), to_record(SENT), num_rounds=3)
    assert seen == [[1, -2]] * 2 + [[7, 7]] * 4


# Replies that are not usable ------------------------------------------------------


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_a_reply_that_is_not_finite_is_dropped_and_the_rest_is_averaged(
    aggregate, reply, caplog, bad
):
    good = [reply(model(3, 4), 2, loss=1.0), reply(model(6, 1), 1, loss=4.0)]
    spoilt = reply(model(0, bad), 5, loss=99.0)
    new, metrics = aggregate(AdditiveStrategy(), SENT, [good[0], spoilt, good[1]])
    expected, expected_metrics = aggregate(AdditiveStrategy(), SENT, good)
    assert new["w"].tobytes() == expected["w"].tobytes()
    assert metrics["loss"] == expected_metrics["loss"]
    assert counts(metrics) == (2, 0, 1)
    assert "1 reply(s) dropped: the contribution is not finite" in caplog.text


def test_a_weight_so_large_that_the_sum_overflows_keeps_the_model(
    aggregate, reply, caplog
):
    contents = [reply(model(50, 50), 1e308), reply(model(6, 1), 1)]
    new, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    assert new is None
    assert counts(metrics) == (2, 0, 0)
    assert "the sum of the replies is not finite: the model is kept" in caplog.text


def test_an_overflowing_round_leaves_no_trace_in_the_server_optimizer(aggregate, reply):
    contents = [reply(model(50, 50), 1e308), reply(model(6, 1), 1)]
    strategy = AdditiveStrategy(server_optimizer=Adam())
    aggregate(strategy, SENT, contents)
    assert strategy.server_optimizer.state == {}


MALFORMED = {
    "no arrays": (None, 1),
    "array missing": ({"w": np.ones(2, np.float32)}, 1),
    "unknown array": ({**model(1, 1), "x": np.ones(1)}, 1),
    "wrong shape": (model(1, 1, 1), 1),
    "wrong kind": ({"w": np.ones(2, np.complex64), "n": np.array(1)}, 1),
    "negative weight": (model(1, 1), -1),
    "weight of nan": (model(1, 1), nan),
    "infinite weight": (model(1, 1), inf),
    "list for a weight": (model(1, 1), [1.0, 2.0]),
    "list of one for a weight": (model(1, 1), [1.0]),
}


@pytest.mark.parametrize("case", MALFORMED.values(), ids=MALFORMED.keys())
def test_a_malformed_reply_is_dropped_and_the_rest_is_averaged(aggregate, reply, case):
    good = [reply(model(3, 4), 2, loss=1.0), reply(model(6, 1), 1, loss=4.0)]
    new, metrics = aggregate(AdditiveStrategy(), SENT, [reply(*case), *good])
    assert new["w"].tolist() == [4, 3]
    assert metrics["loss"] == 2
    assert counts(metrics) == (2, 0, 1)


def test_replies_may_carry_more_records_than_needed(aggregate, reply):
    content = reply(model(3, 4))
    content["note"] = ConfigRecord({"a": 1})
    content["more"] = to_record({"other": np.ones(3)})
    content["metrics2"] = MetricRecord({"x": 1.0})
    new, _ = aggregate(AdditiveStrategy(), SENT, [content, reply(model(5, 6))])
    assert new["w"].tolist() == [4, 5]


@pytest.mark.parametrize("count", [16, 17, 40])
def test_many_replies_are_summed_as_one_at_a_time(aggregate, reply, count):
    random = np.random.default_rng(0)
    sent = {"w": np.float32(random.normal(size=50))}
    arrays = [np.float32(random.normal(size=50)) for _ in range(count)]
    weights = random.integers(1, 99, count).tolist()
    contents = [reply({"w": w}, n) for w, n in zip(arrays, weights, strict=True)]
    new, metrics = aggregate(AdditiveStrategy(), sent, contents)
    total = np.zeros(50)
    for w, n in zip(arrays, weights, strict=True):
        total += n * (w - sent["w"]).astype(np.float64)
    expected = (sent["w"] + total / sum(weights)).astype(np.float32)
    assert new["w"].tobytes() == expected.tobytes()
    assert counts(metrics) == (count, 0, 0)


@pytest.mark.parametrize("bad", [nan, inf])
def test_only_the_replies_that_are_not_finite_are_dropped_of_many(
    aggregate, reply, bad
):
    contents = [reply(model(i, i + 1), i + 1, loss=float(i)) for i in range(40)]
    for i in (0, 15, 16, 39):
        contents[i] = reply(model(0, bad), i + 1, loss=bad)
    rest = [c for i, c in enumerate(contents) if i not in (0, 15, 16, 39)]
    new, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    expected, expected_metrics = aggregate(AdditiveStrategy(), SENT, rest)
    assert new["w"].tobytes() == expected["w"].tobytes()
    assert metrics["loss"] == expected_metrics["loss"]
    assert counts(metrics) == (36, 0, 4)


def test_infinities_that_would_cancel_are_dropped(aggregate, reply):
    contents = [reply(model(inf, 0)), reply(model(-inf, 0)), reply(model(3, 4))]
    new, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    assert new["w"].tolist() == [3, 4]
    assert counts(metrics) == (1, 0, 2)


def test_a_reply_that_is_not_finite_is_dropped_although_it_weighs_nothing(
    aggregate, reply
):
    contents = [reply(model(inf, nan), 0), reply(model(3, 4), 2)]
    new, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    assert new["w"].tolist() == [3, 4]
    assert counts(metrics) == (1, 0, 1)


def test_a_first_round_that_is_not_finite_keeps_the_model(aggregate, reply):
    new, metrics = aggregate(AdditiveStrategy(), SENT, [reply(model(nan, nan))] * 2)
    assert new is None
    assert counts(metrics) == (0, 0, 2)


def test_a_sum_that_is_not_finite_does_not_hide_a_reply_that_is_not(aggregate, reply):
    contents = [reply(model(50, 50), 1e308), reply(model(6, 1)), reply(model(nan, 1))]
    new, metrics = aggregate(AdditiveStrategy(), SENT, contents)
    assert new is None
    assert counts(metrics) == (2, 0, 1)


class Half(ClientHalf):
    name = "half-of-the-test"


class NeedsHalf(AdditiveStrategy):
    client_half = Half


def test_clients_without_the_half_end_the_run_with_what_to_do(task, initial):
    grid = LocalGrid(client_app(task), 3)
    with pytest.raises(
        InconsistentMessageReplies,
        match=r"half 'half-of-the-test', this ClientApp has \['plain'\]: add its class",
    ):
        NeedsHalf().start(grid, initial)


def test_clients_with_the_half_train(task, initial):
    grid = LocalGrid(client_app(task, Half), 3)
    result = NeedsHalf().start(grid, initial, num_rounds=1)
    assert counts(result.train_metrics_clientapp[1]) == (3, 0, 0)


def test_a_single_client_without_the_half_does_not_end_the_run(aggregate, reply):
    error = ValueError("the strategy needs the client half 'half-of-the-test'")
    new, metrics = aggregate(NeedsHalf(), SENT, [error, reply(model(3, 4))])
    assert new["w"].tolist() == [3, 4]
    assert counts(metrics) == (1, 1, 0)


def test_a_later_round_of_clients_without_the_half_keeps_the_model(aggregate, reply):
    strategy = NeedsHalf()
    aggregate(strategy, SENT, [reply(model(1, 1))] * 2)
    error = ValueError("the strategy needs the client half 'half-of-the-test'")
    new, metrics = aggregate(strategy, SENT, [error] * 2, server_round=2)
    assert new is None
    assert counts(metrics) == (0, 2, 0)


@pytest.mark.parametrize("strategy", [AdditiveStrategy, NeedsHalf])
def test_a_first_round_of_malformed_replies_only_ends_the_run_with_the_reason(
    aggregate, reply, strategy
):
    contents = [reply(None), RuntimeError("no"), reply(None)]
    with pytest.raises(InconsistentMessageReplies) as caught:
        aggregate(strategy(), SENT, contents)
    text = str(caught.value)
    assert strategy.__name__ in text
    assert "no ArrayRecord 'arrays'" in text
    assert ("client half Half" in text) == (strategy is NeedsHalf)


def test_a_later_round_of_malformed_replies_keeps_the_model(aggregate, reply):
    strategy = AdditiveStrategy()
    aggregate(strategy, SENT, [reply(model(1, 1))] * 2)
    new, metrics = aggregate(strategy, SENT, [reply(None)] * 2, server_round=2)
    assert new is None
    assert counts(metrics) == (0, 0, 2)


def test_a_first_round_of_errors_then_malformed_replies_ends_the_run(aggregate, reply):
    strategy = AdditiveStrategy()
    aggregate(strategy, SENT, [RuntimeError("no")] * 2)
    with pytest.raises(InconsistentMessageReplies, match="no ArrayRecord"):
        aggregate(strategy, SENT, [reply(None)] * 2, server_round=2)


def test_a_first_round_with_one_usable_reply_goes_on(aggregate, reply):
    new, metrics = aggregate(
        AdditiveStrategy(), SENT, [reply(None), reply(model(2, 3))]
    )
    assert new["w"].tolist() == [2, 3]
    assert counts(metrics) == (1, 0, 1)


def test_a_client_that_replied_twice_is_left_out(exchange, reply):
    strategy = AdditiveStrategy()
    contents = [reply(model(9, 9)), reply(model(3, 4)), reply(model(5, 6))]
    replies = exchange(strategy, SENT, contents)
    record, metrics = strategy.aggregate_train(1, [*replies, replies[0]])
    assert from_record(record)["w"].tolist() == [4, 5]
    assert counts(metrics) == (2, 0, 2)


def stranger(content, node=77):
    return Message(content, reply_to=Message(content, node, "train"))


def test_a_client_that_was_not_asked_is_left_out(exchange, reply):
    strategy = AdditiveStrategy()
    replies = exchange(strategy, SENT, [reply(model(3, 4)), reply(model(5, 6))])
    record, metrics = strategy.aggregate_train(
        1, [stranger(reply(model(99, 99))), *replies]
    )
    assert from_record(record)["w"].tolist() == [4, 5]
    assert counts(metrics) == (2, 0, 1)


def test_a_client_of_an_earlier_cohort_is_a_stranger(exchange, reply):
    strategy = AdditiveStrategy(fraction_train=0.5, min_train_nodes=1)
    contents = [reply(model(i, i)) for i in range(6)]
    rounds = [exchange(strategy, SENT, contents, r) for r in (1, 2)]
    asked = [{m.metadata.src_node_id for m in replies} for replies in rounds]
    late = [m for m in rounds[0] if m.metadata.src_node_id not in asked[1]]
    assert late
    _, metrics = strategy.aggregate_train(2, rounds[1] + late)
    assert counts(metrics) == (3, 0, len(late))


def evaluation(strategy, scripted, contents):
    grid = scripted(contents)
    messages = strategy.configure_evaluate(1, to_record(SENT), ConfigRecord(), grid)
    return list(grid.send_and_receive(messages))


def test_evaluations_of_strangers_and_duplicates_are_left_out(scripted, reply):
    strategy = AdditiveStrategy()
    contents = [reply(None, 1, acc=a) for a in (0.1, 0.4, 0.6)]
    replies = evaluation(strategy, scripted, contents)
    twice = [*replies, replies[0], stranger(reply(None, 9, acc=1.0))]
    assert strategy.aggregate_evaluate(1, twice) == {"acc": pytest.approx(0.5)}


def test_an_evaluation_of_a_client_that_only_trained_is_left_out(exchange, reply):
    strategy = AdditiveStrategy(fraction_evaluate=0.5)
    contents = [reply(model(i, i), 1, acc=float(i)) for i in range(4)]
    everyone = exchange(strategy, SENT, contents)
    trained = {m.metadata.src_node_id: m.content["metrics"]["acc"] for m in everyone}
    grid = LocalGrid(ClientApp(), 4)
    asked = [
        m.metadata.dst_node_id
        for m in strategy.configure_evaluate(1, to_record(SENT), ConfigRecord(), grid)
    ]
    assert len(asked) == 2
    expected = sum(trained[node] for node in asked) / 2
    assert strategy.aggregate_evaluate(1, everyone) == {"acc": expected}


def test_an_evaluation_without_weight_is_left_out_with_a_warning(
    scripted, reply, caplog
):
    strategy = AdditiveStrategy()
    contents = [reply(None, 1, acc=0.5), reply(None, nan, acc=0.9)]
    replies = evaluation(strategy, scripted, contents)
    assert strategy.aggregate_evaluate(1, replies) == {"acc": 0.5}
    assert "dropped: metric 'num-examples'=nan" in caplog.text


def test_an_evaluation_of_errors_only_has_no_metrics(scripted):
    strategy = AdditiveStrategy()
    replies = evaluation(strategy, scripted, [RuntimeError("no")] * 2)
    assert strategy.aggregate_evaluate(1, replies) is None


def test_a_client_without_test_data_does_not_spoil_the_evaluation(scripted, reply):
    strategy = AdditiveStrategy()
    contents = [reply(None, 4, loss=0.5, acc=0.9), reply(None, 0, loss=nan)]
    replies = evaluation(strategy, scripted, contents)
    assert strategy.aggregate_evaluate(1, replies) == {"loss": 0.5, "acc": 0.9}


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


def test_the_order_of_evaluations_changes_no_bit(scripted, reply):
    contents = [reply(None, w, acc=1 / w) for w in (3, 7, 11, 13, 17)]
    strategy = AdditiveStrategy()
    replies = evaluation(strategy, scripted, contents)
    results = set()
    for seed in range(8):
        order = np.random.default_rng(seed).permutation(len(replies))
        metrics = strategy.aggregate_evaluate(1, [replies[i] for i in order])
        results.add(metrics["acc"])
    assert len(results) == 1


class ShuffledGrid(LocalGrid):
    """The same clients under other node ids, as in another run."""

    def __init__(self, app, count, ids):
        super().__init__(app, count)
        self._contexts = dict(zip(ids, self._contexts.values(), strict=True))


def test_node_ids_change_no_bit(task, initial):
    results = []
    for ids in ([5, 900, 3, 77, 12, 40], [1, 2, 3, 4, 5, 6]):
        strategy = AdditiveStrategy(fraction_train=0.5, fraction_evaluate=0.5)
        result = strategy.start(ShuffledGrid(client_app(task), 6, ids), initial)
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


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_the_users_configuration_is_not_changed(scripted, phase):
    config = ConfigRecord({"lr": 0.5})
    strategy = NeedsHalf()
    configure = getattr(strategy, f"configure_{phase}")
    configure(3, to_record(SENT), config, scripted([None, None]))
    assert dict(config) == {"lr": 0.5}


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_clients_get_model_configuration_round_and_half(scripted, phase):
    strategy = NeedsHalf(arrayrecord_key="model", configrecord_key="settings")
    configure = getattr(strategy, f"configure_{phase}")
    arrays = to_record(SENT)
    messages = configure(3, arrays, ConfigRecord({"lr": 0.5}), scripted([None] * 3))
    assert [m.metadata.message_type for m in messages] == [phase] * 3
    for message in messages:
        assert message.content["model"] == arrays
        assert dict(message.content["settings"]) == {
            "lr": 0.5,
            "server-round": 3,
            "client-half": "half-of-the-test",
        }


def test_replies_are_read_under_the_chosen_array_key(aggregate, reply):
    content = reply(None, 1)
    content["model"] = to_record(model(3, 4))
    strategy = AdditiveStrategy(arrayrecord_key="model")
    new, _ = aggregate(strategy, SENT, [content, content])
    assert new["w"].tolist() == [3, 4]


# Options --------------------------------------------------------------------------


def flowers_options():
    signature = inspect.signature(FedAvg.__init__)
    return {n: p for n, p in signature.parameters.items() if n != "self"}


def test_options_are_exactly_those_of_flowers_fedavg():
    assert list(options.FedAvgOptions.__annotations__) == list(flowers_options())


def test_every_option_of_fedavg_is_passed_on():
    def own(contents, key):
        return MetricRecord()

    chosen = {
        "fraction_train": 0.25,
        "fraction_evaluate": 0.75,
        "min_train_nodes": 3,
        "min_evaluate_nodes": 4,
        "min_available_nodes": 5,
        "weighted_by_key": "w",
        "arrayrecord_key": "a",
        "configrecord_key": "c",
        "train_metrics_aggr_fn": own,
        "evaluate_metrics_aggr_fn": own,
    }
    assert chosen.keys() == flowers_options().keys()
    strategy = AdditiveStrategy(**chosen)
    assert {name: getattr(strategy, name) for name in chosen} == chosen


def test_documented_defaults_are_flowers():
    documented = dict(
        re.findall(r"(\w+) : .*\(default: (.*)\)", options.FedAvgOptions.__doc__)
    )
    expected = {
        name: str(parameter.default).replace("'", '"')
        for name, parameter in flowers_options().items()
        if parameter.default is not None
    }
    assert {k: v.strip('"') for k, v in documented.items()} == expected


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="fraction_fit"):
        AdditiveStrategy(fraction_fit=0.5)


def test_no_training_is_asked_for_with_fraction_train_0(initial, grid):
    strategy = AdditiveStrategy(fraction_train=0.0)
    result = strategy.start(grid, initial, num_rounds=2)
    assert result.arrays == initial
    assert result.train_metrics_clientapp == {}
    assert list(result.evaluate_metrics_clientapp) == [1, 2]


def test_no_evaluation_is_asked_for_with_fraction_evaluate_0(initial, grid):
    result = AdditiveStrategy(fraction_evaluate=0.0).start(grid, initial, num_rounds=2)
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert result.evaluate_metrics_clientapp == {}


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, 7),
        ({"fraction_train": 0.5}, 3),
        ({"fraction_train": 0.5, "min_train_nodes": 5}, 5),
        ({"fraction_train": 0.01}, 2),
        ({"fraction_train": 0.01, "min_train_nodes": 1}, 1),
    ],
)
def test_as_many_clients_are_asked_as_by_fedavg(scripted, chosen, expected):
    for strategy in (AdditiveStrategy(**chosen), FedAvg(**chosen)):
        messages = strategy.configure_train(
            1, to_record(SENT), ConfigRecord(), scripted([None] * 7)
        )
        assert len(list(messages)) == expected


@pytest.mark.parametrize(
    ("chosen", "text"),
    [
        ({"min_replies": 0}, r"min_replies=0 must be an integer >= 1"),
        ({"min_replies": 1.5}, r"min_replies=1.5 must be an integer >= 1"),
        ({"min_replies": True}, r"min_replies=True must be an integer >= 1"),
        ({"fraction_train": 1.5}, r"fraction_train=1.5 must be between 0 and 1"),
        ({"fraction_train": nan}, r"fraction_train=nan must be between 0 and 1"),
        ({"fraction_evaluate": -0.1}, r"fraction_evaluate=-0.1 must be between"),
        ({"min_train_nodes": -1}, r"min_train_nodes=-1 must be an integer >= 0"),
        ({"min_evaluate_nodes": -1}, r"min_evaluate_nodes=-1 must be an integer"),
        ({"min_available_nodes": 2.0}, r"min_available_nodes=2.0 must be an int"),
        ({"sampler": UniformSampler}, r"sampler=.* must be a Sampler: an instance"),
        ({"server_optimizer": "adam"}, r"server_optimizer='adam' must be a Server"),
    ],
)
def test_bad_arguments_are_refused_with_name_value_and_bound(chosen, text):
    with pytest.raises(ValueError, match=text):
        AdditiveStrategy(**chosen)


def test_a_model_of_complex_numbers_is_refused(scripted):
    arrays = to_record({"z": np.ones(1, np.complex64)})
    with pytest.raises(ValueError, match=r"array 'z'=dtype\('complex64'\) must be of"):
        AdditiveStrategy().configure_train(1, arrays, ConfigRecord(), scripted([0, 0]))


def test_aggregating_before_configuring_is_refused(reply):
    strategy = AdditiveStrategy()
    replies = [stranger(reply(model(1, 1)))]
    with pytest.raises(AggregationError, match="configure_train"):
        strategy.aggregate_train(1, replies)


# What a strategy may say ----------------------------------------------------------


class Maximum(AdditiveStrategy):
    """Overrides everything a strategy may override."""

    consumed_metrics = ("own",)

    def contribution(self, reply, sent):
        return Contribution(
            {"delta": self.delta(reply, sent)}, 2.0, {"own": reply["metrics"]["own"]}
        )

    def update(self, total):
        return {name: 10 * x for name, x in total.mean().items()}

    def report(self, total):
        return {"sum-of-own": float(total.scalars["own"]), "terms": total.count}

    def report_evaluate(self, replies):
        return {"evaluators": len(replies)}

    def client_config(self):
        return {"lr": 9.0, "more": "yes"}


def test_update_gets_the_sum_of_the_contributions(aggregate, reply):
    contents = [reply(model(2, -2), own=3.0), reply(model(4, -2), own=4.0)]
    new, metrics = aggregate(Maximum(), SENT, contents)
    assert new["w"].tolist() == [1 + 10 * (1 + 3) / 2, -2]
    assert metrics["sum-of-own"] == 7
    assert metrics["terms"] == 2


def test_consumed_metrics_are_not_averaged(aggregate, reply):
    contents = [reply(model(2, -2), own=3.0, loss=1.0)] * 2
    _, metrics = aggregate(Maximum(), SENT, contents)
    assert "own" not in metrics
    assert metrics["loss"] == 1


def test_report_evaluate_adds_metrics(scripted, reply):
    strategy = Maximum()
    replies = evaluation(strategy, scripted, [reply(None, 1), reply(None, nan)])
    assert strategy.aggregate_evaluate(1, replies)["evaluators"] == 1


def test_client_config_goes_before_the_users(scripted):
    strategy = Maximum()
    config = ConfigRecord({"lr": 0.5, "seed": 3})
    messages = strategy.configure_train(1, to_record(SENT), config, scripted([0, 0]))
    told = dict(messages[0].content["config"])
    assert told == {"lr": 9.0, "more": "yes", "seed": 3, "server-round": 1}


def test_the_sampler_decides_who_trains_and_who_evaluates(scripted):
    strategy = AdditiveStrategy(
        fraction_train=0.5,
        fraction_evaluate=0.5,
        sampler=UniformSampler(7, same_for_evaluation=True),
    )
    grid = scripted([None] * 8)
    arrays = to_record(SENT)
    nodes = list(grid.get_node_ids())
    for server_round in (1, 2):
        expected = UniformSampler(7).sample(nodes, 4, server_round, "train")
        for configure in (strategy.configure_train, strategy.configure_evaluate):
            messages = configure(server_round, arrays, ConfigRecord(), grid)
            assert [m.metadata.dst_node_id for m in messages] == expected


def test_an_empty_poisson_cohort_keeps_the_model(reply, scripted):
    options_ = {"fraction_train": 0.01, "fraction_evaluate": 0.0, **ANY}
    strategy = AdditiveStrategy(sampler=PoissonSampler(0), **options_)
    grid = scripted([reply(model(9, 9))] * 3)
    result = strategy.start(grid, to_record(SENT), num_rounds=2)
    assert result.arrays == to_record(SENT)
    assert [counts(m) for m in result.train_metrics_clientapp.values()] == [
        (0, 0, 0)
    ] * 2


def test_all_clients_take_part_with_that_sampler(scripted):
    strategy = AdditiveStrategy(fraction_train=0.1, sampler=AllClients())
    grid = scripted([None] * 9)
    messages = strategy.configure_train(1, to_record(SENT), ConfigRecord(), grid)
    assert len(messages) == 9


def test_state_continues_in_another_object(aggregate, reply):
    first = AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.9))
    contents = [reply(model(3, 4), 2), reply(model(6, 1), 1)]
    aggregate(first, SENT, contents)
    state = copy.deepcopy(first.state_dict())
    second = AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.9))
    second.load_state_dict(state)
    expected, _ = aggregate(first, SENT, contents, server_round=2)
    found, _ = aggregate(second, SENT, contents, server_round=2)
    assert found["w"].tobytes() == expected["w"].tobytes()
    fresh, _ = aggregate(
        AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.9)), SENT, contents
    )
    assert fresh["w"].tolist() != expected["w"].tolist()


def torch_optimizer(kind):
    return TorchOptimizer(functools.partial(kind, lr=0.1))


@pytest.mark.parametrize(
    ("saved", "other", "text"),
    [
        (SGD(), Adam(), "SGD, this one Adam"),
        (SGD(), torch_optimizer(torch.optim.SGD), r"SGD, .* TorchOptimizer\(SGD\)"),
        (
            torch_optimizer(torch.optim.SGD),
            torch_optimizer(torch.optim.AdamW),
            r"TorchOptimizer\(SGD\), this one TorchOptimizer\(AdamW\)",
        ),
    ],
)
def test_state_of_another_server_optimizer_is_refused(saved, other, text):
    state = AdditiveStrategy(server_optimizer=saved).state_dict()
    with pytest.raises(ValueError, match=text):
        AdditiveStrategy(server_optimizer=other).load_state_dict(state)


def test_state_of_other_settings_of_the_server_optimizer_is_accepted():
    state = AdditiveStrategy(server_optimizer=Adam(0.1)).state_dict()
    strategy = AdditiveStrategy(server_optimizer=Adam(0.01))
    strategy.load_state_dict(state)
    assert strategy.server_optimizer.learning_rate == 0.01


def test_state_of_another_sampler_is_refused():
    saved = AdditiveStrategy(sampler=UniformSampler(1)).state_dict()
    with pytest.raises(ValueError, match="same sampler"):
        AdditiveStrategy(sampler=UniformSampler(2)).load_state_dict(saved)


def test_a_pickled_strategy_continues(exchange, reply):
    strategy = AdditiveStrategy(server_optimizer=Adam())
    replies = exchange(strategy, SENT, [reply(model(3, 4)), reply(model(5, 6))])
    twin = pickle.loads(pickle.dumps(strategy))
    expected, _ = strategy.aggregate_train(1, replies)
    found, _ = twin.aggregate_train(1, replies)
    assert found == expected


def test_summary_logs_the_settings_and_flowers(caplog):
    caplog.set_level(logging.INFO, "flwr")
    strategy = AdditiveStrategy(
        server_optimizer=SGD(0.5), sampler=PoissonSampler(3), min_replies=4
    )
    strategy.summary()
    for text in (
        "AdditiveStrategy settings",
        "Server optimizer: SGD(learning_rate=0.5",
        "Sampler: PoissonSampler(seed=3)",
        "Minimum replies: 4",
        "Weighted by: 'num-examples'",
    ):
        assert text in caplog.text


def test_arrays_keep_names_order_shapes_and_dtypes(aggregate, reply):
    sent = {
        "z": np.float16([[1, 2, 3]]),
        "a": np.array(1.0),
        "k": np.array([True]),
        "b": np.empty((0, 2), np.float32),
        "i": np.int8([1]),
    }
    new, _ = aggregate(AdditiveStrategy(), sent, [reply(sent)] * 2)
    assert list(new) == list(sent)
    assert layout(new) == layout(sent)


def test_a_fortran_ordered_reply_is_read_in_its_own_order(aggregate, reply):
    sent = {"w": np.zeros((2, 3), np.float32)}
    w = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    new, _ = aggregate(AdditiveStrategy(), sent, [reply({"w": w})] * 2)
    assert new["w"].tolist() == w.tolist()


def test_unreadable_bytes_are_dropped(aggregate, reply):
    content = reply(model(1, 1))
    content["arrays"]["w"] = Array("float32", (2,), "numpy.ndarray", b"junk")
    new, metrics = aggregate(AdditiveStrategy(), SENT, [content, reply(model(3, 4))])
    assert new["w"].tolist() == [3, 4]
    assert counts(metrics) == (1, 0, 1)


def test_result_arrays_are_an_arrayrecord(initial, grid):
    result = AdditiveStrategy().start(grid, initial, num_rounds=1)
    assert isinstance(result.arrays, ArrayRecord)
