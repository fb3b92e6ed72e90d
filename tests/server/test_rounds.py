"""The loop of a run: Flower's own, in the same order, and what it measures."""

import functools
import gc
import logging
from itertools import count
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, FedAvgM, FedMedian, QFedAvg, Strategy

from flower_ext._flower import recorddict_to_proto
from flower_ext.core.arrays import from_record, to_record
from flower_ext.server import rounds
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import Tracker, read_metrics
from flower_ext.simulation.local import LocalGrid

INITIAL = to_record({"w": np.float32([1, 2, 3])})


class Spy(Strategy):
    """Writes down how it is called; trains in odd rounds only."""

    def __init__(self):
        self.calls = []

    def note(self, name, *values):
        self.calls.append((name, *values))

    def messages(self, grid, record, kind):
        content = RecordDict({"arrays": record})
        return (Message(content, node, kind) for node in grid.get_node_ids())

    def configure_train(self, server_round, arrays, config, grid):
        self.note("configure_train", server_round, arrays["w"].data, dict(config))
        return self.messages(grid, arrays, "train")

    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        self.note("aggregate_train", server_round, len(replies))
        if server_round % 2 == 0:
            return None, None
        w = replies[0].content["arrays"]["w"].numpy()
        return to_record({"w": w + 1}), MetricRecord({"t": server_round})

    def configure_evaluate(self, server_round, arrays, config, grid):
        self.note("configure_evaluate", server_round, arrays["w"].data, dict(config))
        return self.messages(grid, arrays, "evaluate")

    def aggregate_evaluate(self, server_round, replies):
        self.note("aggregate_evaluate", server_round, len(list(replies)))
        return None if server_round == 2 else MetricRecord({"e": server_round})

    def summary(self):
        self.note("summary")

    def evaluate_fn(self, server_round, arrays):
        self.note("evaluate_fn", server_round, arrays["w"].data)
        return None if server_round == 1 else MetricRecord({"c": server_round})


@pytest.fixture
def echo():
    """Three clients that send back what they get."""
    app = ClientApp()

    def answer(message, context):
        return Message(message.content, reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    return LocalGrid(app, 3)


@pytest.mark.parametrize(
    "options",
    [
        {"num_rounds": 3},
        {
            "num_rounds": 2,
            "train_config": ConfigRecord({"lr": 0.1}),
            "evaluate_config": ConfigRecord({"k": [1, 2]}),
        },
        {"num_rounds": 0},
    ],
)
@pytest.mark.parametrize("central", [False, True])
def test_a_strategy_is_called_as_by_flowers_loop(echo, options, central):
    theirs, ours = Spy(), Spy()
    expected = theirs.start(
        echo, INITIAL, evaluate_fn=theirs.evaluate_fn if central else None, **options
    )
    found = run_rounds(
        ours,
        echo,
        INITIAL,
        evaluate_fn=ours.evaluate_fn if central else None,
        **options,
    )
    assert ours.calls == theirs.calls
    for field in (
        "train_metrics_clientapp",
        "evaluate_metrics_clientapp",
        "evaluate_metrics_serverapp",
    ):
        assert getattr(found, field) == getattr(expected, field)
    assert found.arrays == (expected.arrays or INITIAL)


def test_a_run_of_no_rounds_returns_the_initial_model(echo):
    assert run_rounds(Spy(), echo, INITIAL, num_rounds=0).arrays == INITIAL


@pytest.fixture
def learners():
    """Four clients with a loss to minimise: the distance to their own point."""
    app = ClientApp()

    def point(context):
        return np.float32([1, -1, 2]) * (1 + context.node_config["partition-id"])

    @app.train()
    def train(message, context):
        w = message.content["arrays"]["w"].numpy()
        loss = float(np.sum((w - point(context)) ** 2))
        new = w + np.float32(0.2) * (point(context) - w)
        metrics = {"num-examples": 10, "train_loss": loss}
        content = {"arrays": to_record({"w": new}), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        w = message.content["arrays"]["w"].numpy()
        loss = float(np.sum((w - point(context)) ** 2))
        metrics = MetricRecord({"num-examples": 10, "loss": loss})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return LocalGrid(app, 4)


@pytest.fixture
def little_garbage():
    """Let QFedAvg, which collects garbage for every reply, look at what is new only."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.mark.usefixtures("little_garbage")
@pytest.mark.parametrize(
    "make",
    [
        FedAvg,
        lambda: FedAvgM(server_learning_rate=0.5, server_momentum=0.9),
        FedMedian,
        lambda: QFedAvg(client_learning_rate=0.2, q=1.0),
    ],
    ids=["FedAvg", "FedAvgM", "FedMedian", "QFedAvg"],
)
def test_flowers_own_strategies_give_what_they_give(learners, tmp_path, make):
    expected = make().start(learners, INITIAL, num_rounds=2)
    found = run_rounds(
        make(), learners, INITIAL, num_rounds=2, tracker=Tracker(tmp_path, False)
    )
    np.testing.assert_allclose(
        found.arrays["w"].numpy(), expected.arrays["w"].numpy(), rtol=1e-5
    )
    for field in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        for server_round, metrics in getattr(expected, field).items():
            left = dict(getattr(found, field)[server_round])
            assert left == pytest.approx(dict(metrics), rel=1e-5)
    losses = [row["evaluate/loss"] for row in read_metrics(tmp_path)]
    assert losses == [found.evaluate_metrics_clientapp[r]["loss"] for r in (1, 2)]


def test_configurations_are_not_changed(learners):
    train, evaluate = ConfigRecord({"lr": 0.1}), ConfigRecord()
    for strategy in (FedAvg(), AdditiveStrategy()):
        run_rounds(
            strategy,
            learners,
            INITIAL,
            num_rounds=2,
            train_config=train,
            evaluate_config=evaluate,
        )
    assert dict(train) == {"lr": 0.1}
    assert dict(evaluate) == {}


@pytest.mark.parametrize("base", [FedAvg, FedAvgM, AdditiveStrategy])
def test_what_a_strategy_changes_in_a_configuration_stays_changed(base):
    """Strategy and clients see what they see in Flower's own loop."""
    app = ClientApp()

    def answer(message, context):
        if context.node_config["partition-id"] == 0:
            seen.append(dict(message.content["config"]))
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": message.content["arrays"], "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)

    class Halving(base):
        def configure_train(self, server_round, arrays, config, grid):
            seen.append(("before", dict(config)))
            if server_round in (2, 4):
                config["lr"] *= 0.5
            return super().configure_train(server_round, arrays, config, grid)

        def configure_evaluate(self, server_round, arrays, config, grid):
            config["bins"] = [*config.get("bins", []), server_round]
            return super().configure_evaluate(server_round, arrays, config, grid)

    def told(run):
        seen.clear()
        config = ConfigRecord({"lr": 0.1})
        run(LocalGrid(app, 2), to_record({"w": np.zeros(1)}), train_config=config)
        return list(seen)

    seen = []
    flowers = told(functools.partial(Strategy.start, Halving(), num_rounds=5))
    assert told(functools.partial(run_rounds, Halving(), num_rounds=5)) == flowers
    assert [c["lr"] for c in flowers if "lr" in c] == [0.1, 0.05, 0.05, 0.025, 0.025]


def test_a_strategy_may_keep_the_replies_that_it_was_given(learners):
    class Keeping(FedAvg):
        def aggregate_train(self, server_round, replies):
            self.kept = replies
            return super().aggregate_train(server_round, replies)

    strategy = Keeping()
    run_rounds(strategy, learners, INITIAL, num_rounds=1)
    assert len(strategy.kept) == 4


# What is measured -----------------------------------------------------------------


@pytest.fixture
def rows(echo, tmp_path):
    """Run a spy and read what the tracker wrote."""

    def run(num_rounds=2, **options):
        tracker = Tracker(tmp_path, tensorboard=False)
        run_rounds(
            Spy(), echo, INITIAL, num_rounds=num_rounds, tracker=tracker, **options
        )
        return read_metrics(tmp_path)

    return run


def test_every_round_has_a_row_with_the_metrics_of_its_phases(rows):
    def central(server_round, arrays):
        return MetricRecord({"acc": 10.0 * server_round})

    found = rows(3, evaluate_fn=central)
    shown = [
        {
            k: v
            for k, v in row.items()
            if k.startswith(("round", "train", "eval", "cent"))
        }
        for row in found
    ]
    assert shown == [
        {"round": 1, "train/t": 1, "evaluate/e": 1, "central/acc": 10.0},
        {"round": 2, "central/acc": 20.0},
        {"round": 3, "train/t": 3, "evaluate/e": 3, "central/acc": 30.0},
    ]


def test_bytes_are_those_of_the_records_of_all_messages_of_both_phases(rows):
    # Three clients, two phases; every reply echoes its message.
    size = recorddict_to_proto(RecordDict({"arrays": INITIAL})).ByteSize()
    assert size > INITIAL.count_bytes() > 3 * 4
    for row in rows():
        assert row["bytes/down"] == row["bytes/up"] == 3 * 2 * size
        assert row["encoded-bytes/down"] == row["encoded-bytes/up"] == 3 * 2 * 12
        assert row["parameters/down"] == row["parameters/up"] == 3 * 2 * 3
        assert row["messages/down"] == row["messages/up"] == 3 * 2


def test_bytes_of_errors_and_of_different_replies_are_right(tmp_path):
    app = ClientApp()

    @app.train()
    def train(message, context):
        client = context.node_config["partition-id"]
        if client == 0:
            raise RuntimeError("no")
        content = {
            "arrays": to_record({"w": np.zeros(100 * client, np.float64)}),
            "m": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    strategy = Spy()
    strategy.aggregate_train = lambda server_round, replies: (None, None)
    strategy.configure_evaluate = lambda *args: []
    tracker = Tracker(tmp_path, tensorboard=False)
    run_rounds(strategy, LocalGrid(app, 3), INITIAL, num_rounds=1, tracker=tracker)
    expected = sum(
        recorddict_to_proto(
            RecordDict(
                {
                    "arrays": to_record({"w": np.zeros(n, np.float64)}),
                    "m": MetricRecord({"num-examples": 1}),
                }
            )
        ).ByteSize()
        for n in (100, 200)
    )
    [row] = read_metrics(tmp_path)
    assert row["bytes/up"] == expected
    assert (row["parameters/up"], row["encoded-bytes/up"]) == (300, 2400)
    assert (row["messages/up"], row["messages/down"]) == (2, 3)


def test_seconds_are_those_from_sending_to_the_last_reply(rows, monkeypatch, echo):
    clock = count()
    send = type(echo).send_and_receive

    def slow(self, messages, *, timeout):
        for _ in range(4):
            next(clock)
        return send(self, messages, timeout=timeout)

    monkeypatch.setattr(type(echo), "send_and_receive", slow)
    monkeypatch.setattr(
        rounds, "time", SimpleNamespace(monotonic=lambda: float(next(clock)))
    )
    for row in rows():
        assert (row["seconds/train"], row["seconds/evaluate"]) == (5.0, 5.0)


def test_the_timeout_is_that_of_each_phase(echo, monkeypatch):
    seen = []
    send = type(echo).send_and_receive

    def look(self, messages, *, timeout):
        seen.append(timeout)
        return send(self, messages, timeout=timeout)

    monkeypatch.setattr(type(echo), "send_and_receive", look)
    run_rounds(Spy(), echo, INITIAL, num_rounds=2, timeout=7.5)
    assert seen == [7.5] * 4


def test_a_resumed_run_tracks_only_the_rounds_that_are_new(learners, tmp_path):
    for num_rounds in (2, 4):
        tracker = Tracker(tmp_path / "results", tensorboard=False)
        AdditiveStrategy().start(
            learners,
            INITIAL,
            num_rounds=num_rounds,
            checkpoint=tmp_path / "saved",
            tracker=tracker,
        )
    found = read_metrics(tmp_path / "results")
    assert [row["round"] for row in found] == [1, 2, 3, 4]
    whole = AdditiveStrategy().start(learners, INITIAL, num_rounds=4)
    assert [row["train/train_loss"] for row in found] == [
        metrics["train_loss"] for metrics in whole.train_metrics_clientapp.values()
    ]


def test_the_log_names_every_round_and_the_result(learners, caplog):
    caplog.set_level(logging.INFO, "flwr")
    run_rounds(AdditiveStrategy(), learners, INITIAL, num_rounds=2)
    for text in (
        "Starting AdditiveStrategy strategy",
        "AdditiveStrategy settings",
        "[ROUND 1/2]",
        "[ROUND 2/2]",
        "Final results",
    ):
        assert text in caplog.text


# Bad arguments --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_rounds": -1}, "num_rounds=-1 must be an integer >= 0"),
        ({"num_rounds": 1.5}, "num_rounds=1.5 must be an integer >= 0"),
        ({"num_rounds": True}, "num_rounds=True must be an integer >= 0"),
        ({"timeout": 0}, "timeout=0 must be a finite number > 0"),
        ({"timeout": float("nan")}, "timeout=nan must be a finite number > 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_runs(echo, options, text):
    strategy = Spy()
    with pytest.raises(ValueError, match=text):
        run_rounds(strategy, echo, INITIAL, **options)
    assert strategy.calls == []


def test_the_result_is_made_of_flowers_records(learners):
    result = run_rounds(AdditiveStrategy(), learners, INITIAL, num_rounds=1)
    assert isinstance(result.arrays, ArrayRecord)
    assert list(from_record(result.arrays)) == ["w"]
