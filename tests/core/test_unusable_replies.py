"""Rounds with too few replies, and with replies that must not spoil the model."""

import itertools
import logging
import re
from math import inf, nan

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import FedAvg

from flower_ext.client.app import client_app
from flower_ext.client.half import ClientHalf
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import PoissonSampler, UniformSampler
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD, Adam
from flower_ext.server.rounds import EveryClientFailed, run_rounds
from flower_ext.simulation.local import LocalGrid

SENT = {"w": np.float32([1.0, -2.0]), "n": np.array(5)}
COUNTS = ("num-replies", "num-errors", "num-dropped")


def model(*w, n=5):
    return {"w": np.float32(w), "n": np.array(n)}


def counts(metrics):
    return tuple(metrics[name] for name in COUNTS)


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


def test_a_run_in_which_nothing_changed_returns_the_initial_model(scripted, reply):
    contents = [RuntimeError("down")] * 2
    grid = scripted([reply(SENT, 0.0), *contents])
    initial = to_record(SENT)
    result = AdditiveStrategy().start(grid, initial, num_rounds=2)
    assert result.arrays == initial
    assert [counts(m) for m in result.train_metrics_clientapp.values()] == [
        (1, 2, 0),
        (1, 2, 0),
    ]


STRATEGIES = {
    "ours": AdditiveStrategy,
    "private": lambda: AdditiveStrategy(
        mechanism=Mechanism(
            num_rounds=3,
            num_sampled_clients=3,
            population_size=3,
            noise_multiplier=1.0,
            factorization="identity",
        )
    ),
    "Flower's": FedAvg,
}


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
def test_a_first_round_of_failures_ends_the_run_with_the_reason(scripted, make):
    aggregated = []

    class Strategy(type(make())):
        def aggregate_train(self, server_round, replies):
            aggregated.append(server_round)
            return super().aggregate_train(server_round, replies)

    strategy = make()
    strategy.__class__ = Strategy
    grid = scripted([RuntimeError("no data here")] * 3)
    text = r"asked to train in round 1 failed.* reason: RuntimeError: no data here"
    with pytest.raises(EveryClientFailed, match=text):
        run_rounds(strategy, grid, to_record(SENT), num_rounds=3)
    assert not aggregated


def test_failures_of_a_later_round_keep_the_model(scripted, reply):
    grid = scripted([reply({k: x + 1 for k, x in SENT.items()})] * 2)
    send, rounds = grid.send_and_receive, itertools.count(1)

    def failing_later(messages, *, timeout=None):
        down = scripted([RuntimeError("down")] * 2).send_and_receive
        return (send if next(rounds) == 1 else down)(messages)

    grid.send_and_receive = failing_later
    strategy = AdditiveStrategy(fraction_evaluate=0.0)
    result = strategy.start(grid, to_record(SENT), num_rounds=3)
    assert [counts(m) for m in result.train_metrics_clientapp.values()] == [
        (2, 0, 0),
        (0, 2, 0),
        (0, 2, 0),
    ]


def test_a_round_of_nobody_is_no_round_of_failures(scripted, reply):
    sampler = PoissonSampler(probability=1e-9)
    strategy = AdditiveStrategy(sampler=sampler, fraction_evaluate=0.0)
    result = strategy.start(scripted([reply(SENT)] * 3), to_record(SENT))
    assert result.arrays == to_record(SENT)


def test_clients_that_do_not_answer_in_time_are_failures(scripted, reply):
    grid = scripted([reply(SENT)] * 2)
    grid.send_and_receive = lambda messages, *, timeout=None: []
    with pytest.raises(EveryClientFailed, match="reason: no reply in time"):
        AdditiveStrategy().start(grid, to_record(SENT))


def test_clients_without_an_evaluation_are_named_once(reply, caplog):
    app = ClientApp()
    app.train()(lambda message, context: Message(reply(SENT), reply_to=message))
    grid = LocalGrid(app, 2)
    AdditiveStrategy().start(grid, to_record(SENT), num_rounds=3)
    assert caplog.text.count("asked to evaluate in round 1 failed") == 1
    assert "fraction_evaluate=0.0 asks nobody" in caplog.text
    with pytest.raises(EveryClientFailed, match="asked to evaluate in round 1"):
        AdditiveStrategy(fraction_train=0.0).start(grid, to_record(SENT))


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


SPOILING = {
    "a change of 3e38": (model(3e38, 0), 1),
    "a change of -1e19": (model(0, -1e19), 1e9),
    "numbers beyond float32": ({"w": np.array([1e300, 0]), "n": np.array(5)}, 1),
    "a weight of 1e308": (model(50, 50), 1e308),
    "a weight of 84 bits": (model(50, 50), 2**84),
    "a weight of a thousand digits": (model(50, 50), 10**1000),
    "a metric of 84 bits": (model(50, 50), 1, {"loss": 2**84}),
    "a list of 84 bits": (model(50, 50), 1, {"v": [1, -(2**84)]}),
}
OPTIMIZERS = {"average": SGD, "momentum": lambda: SGD(momentum=0.9), "adam": Adam}


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("case", SPOILING.values(), ids=SPOILING)
def test_a_reply_that_would_spoil_the_model_is_dropped(
    aggregate, reply, case, optimizer
):
    arrays, weight, *metrics = case
    bad = reply(arrays, weight, **(metrics[0] if metrics else {}))
    good = [reply(model(3, 4), 2), reply(model(6, 1), 1)]
    strategy, other = (AdditiveStrategy(server_optimizer=optimizer()) for _ in "ab")
    new, metrics = aggregate(strategy, SENT, [good[0], bad, good[1]])
    expected, _ = aggregate(other, SENT, good)
    assert new["w"].tobytes() == expected["w"].tobytes()
    assert counts(metrics) == (2, 0, 1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_model_that_would_overflow_is_kept_without_a_trace(
    aggregate, reply, caplog, optimizer
):
    """Two halves of float16's range are a change that no float16 can be moved by."""
    sent = {"w": np.float16([60000, 1])}
    strategy = AdditiveStrategy(server_optimizer=optimizer())
    strategy.server_optimizer.learning_rate = 1e30
    before = strategy.server_optimizer.state_dict()
    new, metrics = aggregate(strategy, sent, [reply({"w": np.float16([61000, 2])})] * 2)
    assert new is None
    assert counts(metrics) == (2, 0, 0)
    assert strategy.server_optimizer.state_dict() == before
    assert "would not be finite: the model is kept" in caplog.text


def test_integers_stay_in_their_range(aggregate, reply):
    sent = {"n": np.array(5, np.int32), "m": np.array(7, np.uint8)}
    far = {"n": np.array(-(2**40)), "m": np.array(2**50, np.uint64)}
    new, _ = aggregate(AdditiveStrategy(), sent, [reply(far)] * 2)
    assert new == {"n": -(2**31), "m": 255}


def test_a_strategy_that_stumbles_over_a_reply_drops_it(aggregate, reply):
    class Stumbles(AdditiveStrategy):
        def contribution(self, reply, round):
            assert 1 / reply.number("denominator") == 1
            return super().contribution(reply, round)

    contents = [reply(model(1, 1), denominator=d) for d in (1, 0, 1)]
    _, metrics = aggregate(Stumbles(), SENT, contents)
    assert counts(metrics) == (2, 0, 1)


def test_a_report_that_stumbles_over_a_reply_is_left_out(exchange, reply, caplog):
    class Stumbles(AdditiveStrategy):
        def report_evaluate(self, replies, round):
            return {"worst": max(x.content["metrics"]["worst"] for x in replies)}

    strategy = Stumbles()
    contents = [reply(None, worst=1.0, loss=2.0), reply(None, loss=4.0)]
    replies = exchange(strategy, SENT, contents, phase="evaluate")
    assert strategy.aggregate_evaluate(1, replies) == {"loss": 3.0}
    assert "no report: reading it raised KeyError" in caplog.text


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


def test_evaluations_of_strangers_and_duplicates_are_left_out(exchange, reply):
    strategy = AdditiveStrategy()
    contents = [reply(None, 1, acc=a) for a in (0.1, 0.4, 0.6)]
    replies = exchange(strategy, SENT, contents, phase="evaluate")
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
    exchange, reply, caplog
):
    strategy = AdditiveStrategy()
    contents = [reply(None, 1, acc=0.5), reply(None, nan, acc=0.9)]
    replies = exchange(strategy, SENT, contents, phase="evaluate")
    assert strategy.aggregate_evaluate(1, replies) == {"acc": 0.5}
    assert "dropped: metric 'num-examples'=nan" in caplog.text


def test_an_evaluation_of_errors_only_has_no_metrics(exchange):
    strategy = AdditiveStrategy()
    replies = exchange(strategy, SENT, [RuntimeError("no")] * 2, phase="evaluate")
    assert strategy.aggregate_evaluate(1, replies) is None


def test_a_client_without_test_data_does_not_spoil_the_evaluation(exchange, reply):
    strategy = AdditiveStrategy()
    contents = [reply(None, 4, loss=0.5, acc=0.9), reply(None, 0, loss=nan)]
    replies = exchange(strategy, SENT, contents, phase="evaluate")
    assert strategy.aggregate_evaluate(1, replies) == {"loss": 0.5, "acc": 0.9}


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
