"""Samplers that choose by what clients report: who stops, and messages saved."""

import math
from functools import partial

import numpy as np
import pytest
from adding_grid import AddingGrid
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import (
    AllClients,
    ConvergedClients,
    MinSeparationSampler,
    ParticipationGame,
    UniformSampler,
)
from flower_ext.privacy import Mechanism
from flower_ext.simulation import Asynchronous, LocalGrid, VirtualClock

SENT = {"w": np.float32([0.0])}


def answering(accuracy):
    """Return a ClientApp whose clients add 1 and report, and a list of who was asked.

    ``accuracy`` is a function of client and round.
    """
    app, asked = ClientApp(), []

    def answer(message, context):
        client = context.node_config["partition-id"]
        server_round = message.content["config"]["server-round"]
        kind = message.metadata.message_type.partition(".")[0]
        asked.append((server_round, kind, client))
        content = RecordDict()
        if kind == "train":
            arrays = from_record(message.content["arrays"])
            content["arrays"] = to_record({n: x + client for n, x in arrays.items()})
        metrics = {"num-examples": 1, "accuracy": accuracy(client, server_round)}
        content["metrics"] = MetricRecord(metrics)
        return Message(content, reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    return app, asked


def run(strategy, app, rounds, clients=3, grid=LocalGrid, **options):
    return strategy.start(grid(app, clients), to_record(SENT), rounds, **options)


# Converged clients --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "stops"),
    [
        ([0.5, 0.5], False),
        ([0.5, 0.5, 0.5], True),
        ([0.50, 0.51, 0.505], True),  # within 0.01, whose bound counts
        ([0.80, 0.81, 0.80], True),  # of which floats make a little more
        ([0.50, 0.52, 0.51], False),
        ([0.1, 0.50, 0.51, 0.50], True),  # the last three
        ([0.5, 0.5, 0.9, 0.5], False),
    ],
)
def test_a_client_has_converged_when_its_last_reports_are_close(values, stops):
    sampler = ConvergedClients(AllClients(), metric="accuracy", window=3)
    for value in values:
        sampler.hear({7: {"accuracy": value}, 8: {"loss": 1.0}}, "evaluate")
        sampler.hear({8: {"accuracy": 0.0}}, "train")  # not what was asked for
    expected = [8, 9] if stops else [7, 8, 9]
    assert sampler.sample([7, 8, 9], 3, 1, "train") == expected
    assert sampler.sample([7, 8, 9], 3, 1, "evaluate") == expected
    assert sampler.num_stopped == stops


def test_a_cohort_is_that_of_another_sampler_less_those_who_stopped():
    plain, own = UniformSampler(3), ConvergedClients(UniformSampler(3), window=2)
    for _ in range(2):
        own.hear({client: {"loss": 1.0} for client in range(0, 10, 2)}, "evaluate")
    for number in range(1, 9):
        expected = [c for c in plain.sample(range(10), 6, number, "train") if c % 2]
        assert own.sample(range(10), 6, number, "train") == expected


def test_messages_are_saved_and_the_run_ends_when_all_have_stopped(caplog):
    """Client k moves until round k, and is seen to rest two rounds later."""
    app, asked = answering(lambda client, number: 0.1 * min(client, number))
    sampler = ConvergedClients(AllClients(), metric="accuracy", window=3)
    found = run(AdditiveStrategy(sampler=sampler), app, 20)
    until = {0: 3, 1: 3, 2: 4}
    expected = [
        (number, kind, client)
        for number in range(1, 5)
        for kind in ("train", "evaluate")
        for client, last in until.items()
        if number <= last
    ]
    assert asked == expected
    assert "The run ends after round 4: all 3 clients have converged" in caplog.text
    assert list(found.train_metrics_clientapp) == [1, 2, 3, 4]
    # Mean steps of 1 by three clients, and of 2 by the last.
    assert found.arrays["w"].numpy().tolist() == [1 + 1 + 1 + 2]


@pytest.mark.parametrize("grid", [LocalGrid, AddingGrid])
def test_metrics_of_training_count_on_any_grid(grid):
    app, asked = answering(lambda client, number: 0.3 * number * (client == 2))
    sampler = ConvergedClients(
        AllClients(), metric="accuracy", window=2, purpose="train"
    )
    strategy = AdditiveStrategy(sampler=sampler, fraction_evaluate=0.0)
    run(strategy, app, 4, grid=grid)
    assert [a[2] for a in asked] == [0, 1, 2, 0, 1, 2, 2, 2]


def test_a_resumed_run_is_the_same(tmp_path):
    def play(rounds, **options):
        app, asked = answering(lambda client, number: 0.1 * min(client, number))
        of = MinSeparationSampler(2, seed=1)
        sampler = ConvergedClients(of, metric="accuracy", window=3)
        strategy = AdditiveStrategy(sampler=sampler, fraction_train=0.5)
        result = run(strategy, app, rounds, clients=6, **options)
        return result.arrays["w"].numpy().tolist(), asked

    model, asked = play(9)
    parts = []
    for rounds in range(1, 10):
        found, part = play(rounds, checkpoint=tmp_path)
        parts += part
    assert found == model
    assert parts == asked
    assert len({client for _, _, client in asked if client}) == 5
    assert len([1 for number, *_ in asked if number == 9]) < 6


def test_a_metric_that_nobody_reports_is_said(caplog):
    app, asked = answering(lambda client, number: 0.5)
    sampler = ConvergedClients(AllClients(), metric="acuracy", window=2)
    run(AdditiveStrategy(sampler=sampler), app, 3)
    assert caplog.text.count("no client reports ('acuracy',), but ['accuracy'") == 1
    assert len(asked) == 18


def test_numbers_that_are_not_finite_teach_nothing():
    app, asked = answering(lambda client, number: float("nan") if client else 0.5)
    sampler = ConvergedClients(AllClients(), metric="accuracy", window=2)
    run(AdditiveStrategy(sampler=sampler), app, 4)
    assert len(asked) == 3 * 4 + 2 * 4 and sampler.num_stopped == 1


# The game of taking part --------------------------------------------------------------


def test_clients_opt_in_and_out_by_what_they_gain():
    """Alone all have 0.5; with costs 0, 0.2 and 0.4 they need 0.5, 0.7 and 0.9."""
    common = [0.6, 0.75, 0.95, 0.4, 0.8]
    app, asked = answering(lambda client, number: common[number - 1])
    sampler = ParticipationGame(AllClients(), local=0.5, costs=[0.0, 0.2, 0.4])
    found = run(AdditiveStrategy(sampler=sampler), app, 5)
    trained = [
        [c for n, kind, c in asked if (n, kind) == (i, "train")] for i in range(1, 6)
    ]
    assert trained == [[0, 1, 2], [0], [0, 1], [0, 1, 2], []]
    evaluated = [c for _, kind, c in asked if kind == "evaluate"]
    assert evaluated == [0, 1, 2] * 5
    assert found.arrays["w"].numpy().tolist() == [1 + 0 + 0.5 + 1]


def test_a_payment_a_loss_and_a_metric_of_ones_own():
    """A loss of 0.4 against 0.5 alone is worth 0.1, which a payment of 0.1 doubles."""
    reports = {i: {"mine": 0.5, "ours": 0.4} for i in range(4)}
    options = {"local": "mine", "metric": "ours", "larger_is_better": False}
    costs = [0.05, 0.15, 0.15, math.inf]
    payments = [0.0, 0.0, 0.1, 9.0]
    sampler = ParticipationGame(AllClients(), costs=costs, payments=payments, **options)
    assert sampler.sample(range(4), 4, 1, "train") == [0, 1, 2]
    sampler.hear(reports, "evaluate")
    assert sampler.sample(range(4), 4, 2, "train") == [0, 2]
    assert sampler.num_outside == 2


def test_infinite_costs_leave_nobody_and_free_ones_everybody(caplog):
    for costs, messages in ((math.inf, 0), (0.0, 9)):
        app, asked = answering(lambda client, number: 0.5)
        sampler = ParticipationGame(AllClients(), local=0.5, costs=costs)
        found = run(AdditiveStrategy(sampler=sampler), app, 3)
        assert len([1 for _, kind, _ in asked if kind == "train"]) == messages
        assert (found.arrays["w"].numpy() == SENT["w"]).all() == (not messages)
    assert caplog.text.count("Nobody takes part") == 1


def test_a_resumed_game_is_the_same(tmp_path):
    def play(rounds, **options):
        app, asked = answering(
            lambda client, number: 0.5 + 0.1 * ((number + client) % 3)
        )
        costs = [0.01 * client for client in range(6)]
        sampler = ParticipationGame(UniformSampler(2), local=0.55, costs=costs)
        strategy = AdditiveStrategy(sampler=sampler, fraction_train=0.7)
        strategy.fraction_evaluate = 0.5
        result = run(strategy, app, rounds, clients=6, **options)
        return result.arrays["w"].numpy().tolist(), asked

    model, asked = play(7)
    parts = []
    for rounds in range(1, 8):
        found, part = play(rounds, checkpoint=tmp_path)
        parts += part
    assert (found, parts) == (model, asked)
    sizes = {
        len([1 for n, k, _ in asked if (n, k) == (i, "train")]) for i in range(1, 8)
    }
    assert len(sizes) > 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"local": []}, "a number, or one for each client"),
        ({"local": 0.5, "costs": -1}, "costs=-1 must be"),
        ({"local": 0.5, "payments": math.inf}, "payments=inf must be finite"),
        ({"local": math.nan}, "local=nan must be"),
        ({"local": 0.5, "larger_is_better": 1}, "larger_is_better=1 must be True"),
    ],
)
def test_options_of_the_game_are_looked_at(options, words):
    with pytest.raises((ValueError, TypeError), match=words):
        ParticipationGame(**options)


def test_more_clients_than_costs_are_refused_before_anybody_is_asked():
    app, asked = answering(lambda client, number: 0.5)
    sampler = ParticipationGame(AllClients(), local=0.5, costs=[0.0, 0.1])
    with pytest.raises(ValueError, match=r"len\(costs\)=2 must be > 2: one for each"):
        run(AdditiveStrategy(sampler=sampler), app, 1)
    assert not asked


# Refused ------------------------------------------------------------------------------

PLAN = {
    "num_rounds": 4,
    "num_sampled_clients": 3,
    "population_size": 3,
    "noise_multiplier": 0.5,
    "target_delta": 1e-2,
}


@pytest.mark.parametrize(
    "make", [ConvergedClients, partial(ParticipationGame, local=0)]
)
def test_a_mechanism_and_asynchronous_runs_are_refused(make):
    sampler = make()
    with pytest.raises(ValueError, match="depends on the clients' data, and no noise"):
        AdditiveStrategy(sampler=sampler, mechanism=Mechanism(**PLAN))
    app, _ = answering(lambda client, number: 0.5)
    how = Asynchronous(2, 2, clock=VirtualClock())
    with pytest.raises(
        ValueError, match="(ConvergedClients|ParticipationGame) draws whole rounds"
    ):
        run(AdditiveStrategy(sampler=sampler), app, 3, asynchronous=how)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: ConvergedClients(window=1), "window=1 must be an integer >= 2"),
        (lambda: ConvergedClients(tolerance=-1), "tolerance=-1 must be"),
        (lambda: ConvergedClients(purpose="test"), "purpose='test' must be one of"),
        (lambda: ConvergedClients(UniformSampler), "sampler=.* must be a Sampler"),
        (lambda: ConvergedClients(ConvergedClients()), "one that hears no reports"),
    ],
)
def test_options_are_looked_at(make, words):
    with pytest.raises((ValueError, TypeError), match=words):
        make()


def test_a_saved_run_with_other_settings_is_refused():
    state = ConvergedClients(UniformSampler(1), window=3).state_dict()
    for other in (
        ConvergedClients(UniformSampler(1), window=4),
        ConvergedClients(UniformSampler(2), window=3),
        ConvergedClients(AllClients(1), window=3),
    ):
        with pytest.raises(ValueError, match="needs the same sampler"):
            other.load_state_dict(state)


def test_a_strategy_of_plain_cohorts_hears_nothing():
    class Deaf(UniformSampler):
        def hear(self, reports, purpose):
            raise AssertionError

    app, _ = answering(lambda client, number: 0.5)
    run(AdditiveStrategy(sampler=Deaf()), app, 1)
