"""Asynchronous runs, against a simulation of the events that is written down here."""

import math
from functools import partial

import numpy as np
import pytest
from adding_grid import AddingGrid
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext import (
    AdditiveStrategy,
    LocalGrid,
    Mechanism,
    RoundStrategy,
    Schedule,
    client_app,
)
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import (
    AllClients,
    HeldOutSampler,
    MinSeparationSampler,
    PoissonSampler,
    UniformSampler,
)
from flower_ext.server import cohorts
from flower_ext.server.checkpoint import CheckpointError
from flower_ext.server.optimizers import SGD
from flower_ext.server.rounds import EveryClientFailed, run_rounds
from flower_ext.server.tracking import Tracker, read_clients, read_metrics
from flower_ext.simulation import (
    Asynchronous,
    LogNormal,
    Stragglers,
    VirtualClock,
    inverse_root,
)
from flower_ext.wire import NF4, BFloat16, Chain, ErrorFeedback, TopK

RATE = 0.3
SIZE = 4
START = {"w": np.linspace(-1, 1, SIZE)}


def center(client):
    """Where a client pulls the model."""
    return np.cos(np.arange(SIZE) + client)


def weight(client):
    return 1.0 + client % 3


def clients(dead=(), seen=None):
    """A ClientApp that goes a part of the way to its center, and counts its trainings.

    Parameters
    ----------
    dead : collection of int
        Clients whose trainings fail.
    seen : list, optional
        Gets ``(client, round)`` of every training.
    """
    app = ClientApp()

    @app.train()
    def train(message, context):
        client = context.node_config["partition-id"]
        sent = from_record(message.content["arrays"])["w"]
        server_round = message.content["config"]["server-round"]
        if seen is not None:
            seen.append((client, server_round))
        if client in dead:
            raise RuntimeError(f"client {client} is dead")
        told = MetricRecord({"num-examples": weight(client), "loss": 1.0})
        arrays = to_record({"w": sent + RATE * (center(client) - sent)})
        content = RecordDict({"arrays": arrays, "metrics": told})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        sent = from_record(message.content["arrays"])["w"]
        found = MetricRecord({"num-examples": 1, "loss": float(sent.sum())})
        return Message(RecordDict({"metrics": found}), reply_to=message)

    return app


def start(how, num_clients, rounds, app=None, kind=LocalGrid, strategy=None, **options):
    strategy = strategy or AdditiveStrategy(fraction_evaluate=0.0)
    grid = kind(app or clients(), num_clients)
    begin = to_record(START)
    return strategy.start(grid, begin, rounds, asynchronous=how, **options)


def simulated(how, num_clients, rounds, dead=(), rate=1.0):
    """Return the models and metrics of FedBuff, moment after moment.

    Every client at work has the version of the model that it was sent, and its term is
    computed when it is done. Who begins is drawn as the sampler draws.
    """
    sampler, draws = UniformSampler(), 0
    model, version, now = START["w"], 0, 0.0
    at_work, tasks, buffer = {}, dict.fromkeys(range(num_clients), 0), {}
    models, found = [], []
    errors = 0
    while version < rounds:
        due = sorted((end, client) for client, (end, _, _) in at_work.items())
        if not due or due[0][0] > now:
            free = how.concurrency - len(at_work)
            others = [c for c in range(num_clients) if c not in {*at_work, *buffer}]
            if free:
                draws += 1
                for client in sampler.sample(others, free, draws, "train"):
                    tasks[client] += 1
                    end = now + how.clock.of(client, tasks[client])
                    at_work[client] = end, version, model
            due = sorted((end, client) for client, (end, _, _) in at_work.items())
        now, client = due[0]
        _, sent_at, sent = at_work.pop(client)
        if client in dead:
            errors += 1
            continue
        buffer[client] = sent_at, RATE * (center(client) - sent)
        if len(buffer) == how.buffer:
            stale = [version - sent_at for sent_at, _ in buffer.values()]
            weights = np.array([weight(c) for c in buffer])
            factors = np.array([how.staleness(tau) for tau in stale])
            deltas = np.array([delta for _, delta in buffer.values()])
            mean = (weights * factors) @ deltas / (weights @ factors)
            model = model + rate * factors.mean() * mean
            version += 1
            buffer.clear()
            models.append(model)
            found.append((np.mean(stale), max(stale), now, errors))
            errors = 0
    return models, found


@st.composite
def plans(draw):
    """Settings, and how long clients take: few different times, so that some tie."""
    num_clients = draw(st.integers(2, 7))
    concurrency = draw(st.integers(1, num_clients))
    buffer = draw(st.integers(1, num_clients))
    times = draw(
        st.lists(
            st.sampled_from([0.5, 1.0, 1.5, 4.0]),
            min_size=num_clients,
            max_size=num_clients,
        )
    )
    staleness = draw(st.sampled_from([inverse_root, lambda tau: 1.0 / (1 + tau)]))
    clock = VirtualClock(lambda client, task: times[client] * (1 + task % 2))
    return Asynchronous(buffer, concurrency, staleness, clock), num_clients


@given(plans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_a_run_is_the_simulation_of_its_events(plan):
    how, num_clients = plan
    seen = []
    models, found = simulated(how, num_clients, rounds=6)
    result = start(
        how,
        num_clients,
        6,
        evaluate_fn=lambda number, arrays: seen.append(from_record(arrays)["w"].copy()),
    )
    np.testing.assert_allclose(seen[1:], models, rtol=1e-12)
    for (mean, largest, now, _), metrics in zip(
        found, result.train_metrics_clientapp.values(), strict=True
    ):
        assert metrics["staleness-mean"] == pytest.approx(mean)
        assert metrics["staleness-max"] == largest
        assert metrics["virtual-seconds"] == now
        assert metrics["num-replies"] == how.buffer and metrics["num-errors"] == 0


def test_stale_contributions_are_damped_as_in_the_paper():
    """Two clients, the second three times as slow, and a buffer of one.

    The slow one comes in at 3 s, after the fast one's updates at 1 and 2 s, and before
    its third: it is stale by two.
    """
    times = {0: 1.0, 1: 3.0}
    how = Asynchronous(1, 2, clock=VirtualClock(lambda client, task: times[client]))
    seen = []
    start(
        how,
        2,
        4,
        evaluate_fn=lambda n, arrays: seen.append(from_record(arrays)["w"].copy()),
    )
    w0, w1, w2, w3, w4 = seen
    np.testing.assert_allclose(w1, w0 + RATE * (center(0) - w0))
    np.testing.assert_allclose(w2, w1 + RATE * (center(0) - w1))
    # At 3 s both come in: in client order.
    np.testing.assert_allclose(w3, w2 + RATE * (center(0) - w2))
    np.testing.assert_allclose(w4, w3 + RATE * (center(1) - w0) / math.sqrt(1 + 3))


# The synchronous run ----------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "momentum": {"server_optimizer": partial(SGD, 0.7, momentum=0.9)},
    "codecs": {
        "download": BFloat16(),
        "upload": ErrorFeedback(Chain(TopK(0.5), NF4())),
    },
    "held-out": {"sampler": partial(HeldOutSampler, num_training_clients=5)},
    "seed": {"sampler": partial(UniformSampler, 7, same_for_evaluation=True)},
}


def made(options):
    """Return options with objects of their own, since they have states."""
    return {k: x() if isinstance(x, partial) else x for k, x in options.items()}


@pytest.mark.parametrize("name", OPTIONS)
def test_equal_times_are_the_synchronous_run_bit_for_bit(name, initial, task):
    results = []
    for how in (None, Asynchronous(3, 3, clock=VirtualClock(2.5))):
        cohort = {} if how else {"fraction_train": 0.5, "min_train_nodes": 3}
        strategy = AdditiveStrategy(
            fraction_evaluate=0.5, **made(OPTIONS[name]), **cohort
        )
        one = LocalGrid(client_app(task), 6, {"batch-size": 4, "lr": 0.1})
        results.append(strategy.start(one, initial, num_rounds=3, asynchronous=how))
    synchronous, other = results
    assert synchronous.arrays != initial
    assert other.arrays == synchronous.arrays
    assert other.evaluate_metrics_clientapp == synchronous.evaluate_metrics_clientapp
    for number, metrics in synchronous.train_metrics_clientapp.items():
        own = {"staleness-mean": 0.0, "staleness-max": 0}
        own["virtual-seconds"] = 2.5 * number
        assert dict(other.train_metrics_clientapp[number]) == {**metrics, **own}


def test_a_strategy_can_run_in_rounds_again():
    strategy = AdditiveStrategy(fraction_evaluate=0.0)
    how = Asynchronous(2, 4, clock=VirtualClock(LogNormal()))
    first = start(how, 4, 2, strategy=strategy)
    in_rounds = start(None, 6, 2, strategy=strategy)
    assert in_rounds.arrays == start(None, 6, 2).arrays
    assert start(how, 4, 2, strategy=strategy).arrays == first.arrays


def test_in_flowers_simulation_clients_are_known_by_their_places(monkeypatch):
    how = Asynchronous(2, 3, clock=VirtualClock(LogNormal()))
    expected = start(how, 6, 6)
    monkeypatch.setattr(cohorts, "in_simulation", lambda grid: True)
    assert start(how, 6, 6).arrays == expected.arrays


# Partial sums -----------------------------------------------------------------------


def test_partial_sums_give_the_same():
    how = Asynchronous(4, 6, clock=VirtualClock(LogNormal()))
    plain, summed = (start(how, 8, 6, kind=kind) for kind in (LocalGrid, AddingGrid))
    np.testing.assert_allclose(
        from_record(summed.arrays)["w"], from_record(plain.arrays)["w"], rtol=1e-12
    )
    assert summed.train_metrics_clientapp == plain.train_metrics_clientapp
    assert any(m["staleness-max"] for m in plain.train_metrics_clientapp.values())


# Failures ---------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LocalGrid, AddingGrid])
def test_a_client_that_fails_frees_its_place(kind):
    """Of five clients that are all at work the third always fails."""
    times = [1.0, 1.5, 0.75, 4.0, 2.0]
    how = Asynchronous(2, 5, clock=VirtualClock(lambda client, task: times[client]))
    result = start(how, 5, 6, clients(dead={2}), kind)
    models, _ = simulated(how, 5, 6, dead={2})
    np.testing.assert_allclose(from_record(result.arrays)["w"], models[-1], rtol=1e-12)
    rounds = result.train_metrics_clientapp.values()
    assert all(metrics["num-replies"] == 2 for metrics in rounds)
    assert sum(metrics["num-errors"] for metrics in rounds) > 0


def test_a_run_of_which_all_clients_fail_ends():
    how = Asynchronous(2, 3, clock=VirtualClock())
    with pytest.raises(EveryClientFailed, match="is dead"):
        start(how, 4, 2, clients(dead=range(4)))


def test_a_round_in_which_all_fail_keeps_the_model():
    dead = set()
    how = Asynchronous(2, 3, clock=VirtualClock())

    def die(number, arrays):
        if number == 1:
            dead.update(range(4))
        if number == 2:
            dead.clear()

    result = start(how, 4, 3, clients(dead=dead), evaluate_fn=die)
    found = result.train_metrics_clientapp
    assert (found[2]["num-replies"], found[2]["num-errors"]) == (0, 6)
    assert found[3]["num-replies"] == 2 and "staleness-max" not in found[2]


# Who is asked -----------------------------------------------------------------------


def test_who_begins_is_neither_at_work_nor_in_the_buffer():
    how = Asynchronous(3, 4, clock=VirtualClock(LogNormal(seed=2)))
    seen = []
    start(how, 6, 40, clients(seen=seen))
    rounds = {}
    for client, asked_in in seen:
        rounds.setdefault(client, []).append(asked_in)
    # A client is asked again in a later round than that in which it came in.
    assert all(len(set(own)) == len(own) for own in rounds.values())
    assert set(rounds) == set(range(6))


def test_all_clients_are_drawn_alike_where_they_take_as_long():
    seen = []
    how = Asynchronous(3, 5, clock=VirtualClock())
    start(how, 10, 500, clients(seen=seen))
    times = np.bincount([client for client, _ in seen], minlength=10)
    # Of 1,500 draws each client has 150, with a standard deviation below 12.
    assert np.all(np.abs(times - 150) < 48)


def test_clients_that_are_held_out_stay_out():
    seen = []
    sampler = HeldOutSampler(num_training_clients=4)
    strategy = AdditiveStrategy(sampler=sampler, fraction_evaluate=0.0)
    how = Asynchronous(2, 3, clock=VirtualClock(LogNormal()))
    start(how, 7, 10, clients(seen=seen), strategy=strategy)
    assert {client for client, _ in seen} == set(range(4))


# Checkpoints ------------------------------------------------------------------------

SAVED = {
    "plain": {},
    "codecs": {
        "download": BFloat16(),
        "upload": ErrorFeedback(Chain(TopK(0.5), NF4())),
    },
    "momentum": {"server_optimizer": partial(SGD, 0.7, momentum=0.9)},
}


@pytest.mark.parametrize("name", SAVED)
def test_a_resumed_run_is_the_same_bit_for_bit(name, task, initial, tmp_path):
    app = client_app(task)
    how = Asynchronous(2, 5, clock=VirtualClock(LogNormal()))

    def run(rounds, **options):
        strategy = AdditiveStrategy(fraction_evaluate=0.5, **made(SAVED[name]))
        grid = LocalGrid(app, 6, {"batch-size": 4, "lr": 0.1})
        return strategy.start(grid, initial, rounds, asynchronous=how, **options)

    whole = run(5)
    for rounds in range(1, 6):
        resumed = run(rounds, checkpoint=tmp_path)
    assert resumed.arrays == whole.arrays
    assert resumed.train_metrics_clientapp == whole.train_metrics_clientapp
    assert resumed.evaluate_metrics_clientapp == whole.evaluate_metrics_clientapp
    # Some were at work over a saved round, with a model before it.
    assert max(m["staleness-max"] for m in whole.train_metrics_clientapp.values()) > 1


def test_who_begins_after_an_interruption_is_who_would_have(tmp_path):
    """Of twelve clients three are at work, and each takes longer every time."""
    clock = VirtualClock(lambda client, task: task + client / 10)
    how = Asynchronous(2, 3, clock=clock)
    whole = start(how, 12, 12)
    for rounds in (1, 4, 12):
        resumed = start(how, 12, rounds, checkpoint=tmp_path)
    assert resumed.arrays == whole.arrays
    assert resumed.train_metrics_clientapp == whole.train_metrics_clientapp


def test_a_schedule_of_the_clients_settings_is_that_of_their_round(tmp_path):
    """What stale clients were told when they were asked is saved with them."""
    told = []
    app = ClientApp()

    @app.train()
    def train(message, context):
        config = message.content["config"]
        told.append((config["server-round"], config["lr"]))
        assert message.content["run"]["name"]
        return Message(
            RecordDict(
                {
                    "arrays": message.content["arrays"],
                    "metrics": MetricRecord({"num-examples": 1.0}),
                }
            ),
            reply_to=message,
        )

    how = Asynchronous(2, 5, clock=VirtualClock(LogNormal()))
    for rounds in range(1, 8):
        start(
            how,
            6,
            rounds,
            app,
            train_config=ConfigRecord({"lr": 1.0}),
            callbacks=[Schedule("lr", lambda number: 1.0 / number)],
            checkpoint=tmp_path,
        )
    assert len(told) == 14
    assert all(rate == 1.0 / number for number, rate in told)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (None, "asynchronous.buffer was 2, is now absent"),
        (Asynchronous(3, 4, clock=VirtualClock()), "asynchronous.buffer was 2"),
        (Asynchronous(2, 5, clock=VirtualClock()), "asynchronous.concurrency was 4"),
        (Asynchronous(2, 4, clock=VirtualClock(2.0)), "asynchronous.clock was 1.0"),
        (Asynchronous(2, 4), "asynchronous.clock was 1.0, is now real time"),
        (
            Asynchronous(2, 4, staleness=float, clock=VirtualClock()),
            "asynchronous.staleness was inverse_root, is now <class 'float'>",
        ),
    ],
)
def test_a_saved_run_goes_on_as_it_began(other, words, tmp_path):
    start(Asynchronous(2, 4, clock=VirtualClock()), 6, 1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match=words):
        start(other, 6, 2, checkpoint=tmp_path)


def test_a_run_in_rounds_does_not_go_on_at_any_time(tmp_path):
    start(None, 6, 1, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="asynchronous.buffer was absent"):
        start(Asynchronous(2, 4), 6, 2, checkpoint=tmp_path)


# What is written --------------------------------------------------------------------


def test_a_tracker_writes_the_virtual_seconds_and_each_client(tmp_path):
    how = Asynchronous(2, 4, clock=VirtualClock(Stragglers()))
    tracker = Tracker(tmp_path, tensorboard=False, per_client=True)
    result = start(how, 6, 3, tracker=tracker)
    rows = read_metrics(tmp_path)
    assert [row["train/virtual-seconds"] for row in rows] == [
        metrics["virtual-seconds"]
        for metrics in result.train_metrics_clientapp.values()
    ]
    assert all(row["messages/up"] == row["messages/down"] == 2 for row in rows)
    assert [row["round"] for row in read_clients(tmp_path)] == [1, 1, 2, 2, 3, 3]


# Real time --------------------------------------------------------------------------


class LateGrid(LocalGrid):
    """Hands over one reply at a time, in an order that the test gives."""

    order: list
    withdrawn: list

    def pull_messages(self, message_ids):
        self._collect(0)
        names = {}
        for name in message_ids:
            reply = self._replies.get(name)
            if reply is not None:
                names[reply.metadata.src_node_id - 1000] = name
        for i, client in enumerate(self.order):
            if client in names:
                del self.order[: i + 1]
                return super().pull_messages([names[client]])
        return []

    def withdraw(self, message_ids):
        names = list(message_ids)
        self.withdrawn.append(len(names))
        super().withdraw(names)


def late(order):
    """Return the kind of a grid on which clients are done in this order."""

    def make(app, num_clients):
        grid = LateGrid(app, num_clients)
        grid.order, grid.withdrawn = list(order), []
        made.append(grid)
        return grid

    made = []
    return make, made


def test_in_real_time_clients_take_part_as_they_are_done():
    """All three are at work; client 2 is last, after two updates of one each."""
    make, made = late([0, 1, 2, 0])
    seen = []
    result = start(
        Asynchronous(1, 3),
        3,
        4,
        kind=make,
        evaluate_fn=lambda n, arrays: seen.append(from_record(arrays)["w"].copy()),
    )
    w0, w1, w2, w3, w4 = seen
    np.testing.assert_allclose(w1, w0 + RATE * (center(0) - w0))
    np.testing.assert_allclose(w2, w1 + RATE * (center(1) - w0) / math.sqrt(2))
    np.testing.assert_allclose(w3, w2 + RATE * (center(2) - w0) / math.sqrt(3))
    np.testing.assert_allclose(w4, w3 + RATE * (center(0) - w1) / math.sqrt(3))
    metrics = result.train_metrics_clientapp
    assert [metrics[n]["staleness-max"] for n in range(1, 5)] == [0, 1, 2, 2]
    assert "virtual-seconds" not in metrics[1]
    # The two that are at work in the end are stopped, and nothing of them is kept.
    [grid] = made
    assert grid.withdrawn == [2]
    assert not grid._asked and not grid._replies


def test_in_real_time_who_has_come_in_waits_for_the_next_update():
    """All three come in at once, and one of them is taken at a time."""
    seen = []
    result = start(Asynchronous(1, 3), 3, 5, clients(seen=seen))
    assert seen == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 3), (2, 4), (0, 5)]
    found = result.train_metrics_clientapp.values()
    assert [metrics["staleness-max"] for metrics in found] == [0, 1, 2, 2, 2]


def test_in_real_time_who_was_in_an_update_may_begin_again():
    """Three come in at once, and nobody after them: at each update one begins."""
    seen = []

    class Once(LocalGrid):
        left = 3

        def pull_messages(self, message_ids):
            found = list(super().pull_messages(message_ids)) if self.left else []
            self.left -= len(found)
            return found

    start(Asynchronous(1, 3), 3, 3, clients(seen=seen), Once)
    assert seen == [(0, 1), (1, 1), (2, 1), (0, 2), (1, 3)]


def test_in_real_time_nobody_waits_for_the_slowest():
    make, _ = late([0, 1] * 4)
    result = start(Asynchronous(2, 3), 3, 4, kind=make, timeout=3600)
    found = result.train_metrics_clientapp.values()
    assert [metrics["num-errors"] for metrics in found] == [0, 0, 0, 0]


def test_in_real_time_who_is_late_is_given_up():
    """After the first update nobody comes in any more."""
    make, made = late([0])
    result = start(Asynchronous(1, 2), 2, 2, kind=make, timeout=0.05)
    found = result.train_metrics_clientapp[2]
    # As many as there are places and contributions, or one more with the last of them.
    assert found["num-replies"] == 0 and found["num-errors"] in (3, 4)
    assert not made[0]._replies


def test_in_real_time_who_is_at_work_is_not_asked_to_evaluate():
    asked = []

    class Watched(LateGrid):
        def send_and_receive(self, messages, *, timeout=None):
            messages = list(messages)
            asked.append([m.metadata.dst_node_id - 1000 for m in messages])
            return super().send_and_receive(messages, timeout=timeout)

    grid = Watched(clients(), 4)
    grid.order, grid.withdrawn = [3, 1, 2, 0], []
    strategy = AdditiveStrategy(min_evaluate_nodes=1)
    strategy.start(grid, to_record(START), 2, asynchronous=Asynchronous(1, 3))
    # Three of four are at work, and one of them has come in.
    assert all(2 >= len(names) >= 1 for names in asked) and len(asked) == 2


# What is refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Asynchronous(0, 3), "buffer=0 must be an integer >= 1"),
        (lambda: Asynchronous(1, 0), "concurrency=0 must be an integer >= 1"),
        (lambda: Asynchronous(1.5, 3), "buffer=1.5"),
        (lambda: Asynchronous(1, 1, staleness=0.5), "staleness=0.5 must be a function"),
        (lambda: Asynchronous(1, 1, staleness=lambda t: -1), r"staleness\(0\)=-1"),
        (
            lambda: Asynchronous(1, 1, staleness=lambda t: math.nan),
            r"staleness\(0\)=nan must be a finite number",
        ),
        (lambda: Asynchronous(1, 1, clock=2.0), "clock=2.0 must be a VirtualClock"),
        (lambda: VirtualClock(0.0), "seconds=0.0 must be a finite number > 0"),
        (lambda: VirtualClock(math.inf), "seconds=inf"),
        (lambda: LogNormal(median=0), "median=0"),
        (lambda: LogNormal(spread=-1), "spread=-1"),
        (lambda: LogNormal(seed=-1), "seed=-1"),
        (lambda: Stragglers(seconds=-1), "seconds=-1"),
        (lambda: Stragglers(share=0), "share=0"),
        (lambda: Stragglers(factor=0), "factor=0"),
        (lambda: Stragglers(seed=0.5), "seed=0.5"),
    ],
)
def test_bad_settings_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


class Replies(RoundStrategy):
    def aggregate(self, round, replies):
        return {}


class OwnMessages(AdditiveStrategy):
    def configure_train(self, *args):
        return super().configure_train(*args)


PLAN = {
    "num_rounds": 3,
    "num_sampled_clients": 2,
    "population_size": 6,
    "noise_multiplier": 1.0,
    "target_delta": 1e-2,
}


@pytest.mark.parametrize(
    ("how", "strategy", "words"),
    [
        ((2, 7), AdditiveStrategy, "concurrency=7 must be <= 6, the nodes"),
        ((7, 2), AdditiveStrategy, "buffer=7 must be <= 6, the nodes"),
        ((2, 3), lambda: AdditiveStrategy(fraction_train=0.5), "fraction_train=0.5"),
        ((2, 3), lambda: AdditiveStrategy(min_replies=3), "min_replies=3 must be <= b"),
        ((2, 3), Replies, "left out with Replies: it is no sum over clients"),
        ((2, 3), FedAvg, "left out with FedAvg: it is no sum over clients"),
        ((2, 3), OwnMessages, "its own configure_train is written for whole rounds"),
        (
            (2, 3),
            lambda: AdditiveStrategy(mechanism=Mechanism(**PLAN)),
            "a mechanism accounts for cohorts",
        ),
        *(
            (
                (2, 3),
                lambda sampler=sampler: AdditiveStrategy(sampler=sampler),
                f"its {type(sampler).__name__} draws whole rounds",
            )
            for sampler in (AllClients(), PoissonSampler(), MinSeparationSampler(2))
        ),
    ],
)
def test_what_cannot_be_asynchronous_is_refused(how, strategy, words):
    seen = []
    grid = LocalGrid(clients(seen=seen), 6)
    with pytest.raises(ValueError, match=words):
        run_rounds(
            strategy(),
            grid,
            to_record(START),
            num_rounds=2,
            asynchronous=Asynchronous(*how, clock=VirtualClock()),
        )
    assert not seen


def test_no_settings_are_refused():
    with pytest.raises(ValueError, match="asynchronous=3 must be an Asynchronous"):
        start(3, 6, 2)


@pytest.mark.parametrize("found", [0.0, -1.0, math.inf, math.nan, "1", None])
def test_times_that_are_none_are_refused(found):
    how = Asynchronous(2, 3, clock=VirtualClock(lambda client, task: found))
    with pytest.raises(ValueError, match=r"seconds\(client=\d, task=1\)=.* > 0"):
        start(how, 6, 2)


def test_a_weight_of_staleness_that_is_none_is_refused_when_it_is_met():
    how = Asynchronous(
        1, 3, staleness=lambda tau: 1.0 - tau, clock=VirtualClock(LogNormal())
    )
    with pytest.raises(ValueError, match=r"staleness\(3\)=-2.0 must be"):
        start(how, 3, 10)


def test_more_contributions_than_there_are_to_be_drawn_are_refused():
    sampler = HeldOutSampler(num_training_clients=3)
    strategy = AdditiveStrategy(sampler=sampler, fraction_evaluate=0.0)
    with pytest.raises(ValueError, match="buffer=4 must be <= 3, the clients that may"):
        start(Asynchronous(4, 2, clock=VirtualClock()), 6, 2, strategy=strategy)


def test_a_sampler_that_draws_too_many_is_refused():
    class TooMany(UniformSampler):
        def sample(self, clients, size, server_round, purpose):
            return list(clients)

    strategy = AdditiveStrategy(sampler=TooMany(), fraction_evaluate=0.0)
    with pytest.raises(ValueError, match="draws at most as many clients as asked"):
        start(Asynchronous(2, 3, clock=VirtualClock()), 6, 2, strategy=strategy)


# Times ------------------------------------------------------------------------------


def test_times_are_of_the_distribution_that_they_say():
    times = np.log([LogNormal(3.0, 0.5, seed=1)(c, 1) for c in range(4000)])
    # Standard errors of 4,000 draws: 0.008 and 0.006.
    assert np.mean(times) == pytest.approx(math.log(3.0), abs=0.03)
    assert np.std(times) == pytest.approx(0.5, abs=0.025)
    slow = np.mean([Stragglers(2.0, 0.1, 10.0, seed=4)(c, 1) for c in range(4000)])
    assert slow == pytest.approx(2.0 * 0.9 + 20.0 * 0.1, abs=0.3)


def test_times_are_a_clients_own():
    for seconds in (LogNormal(), Stragglers()):
        assert [seconds(c, 1) for c in range(9)] == [seconds(c, 5) for c in range(9)]
    first, second = (
        [LogNormal(seed=seed)(c, 1) for c in range(9)] for seed in range(2)
    )
    assert len({*first, *second}) == 18
