"""Callbacks: what they see, keep and end, whatever the strategy, also when resumed."""

import json
import logging
import math
import multiprocessing
import os
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg
from safetensors.numpy import load_file, save_file

from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import PoissonSampler
from flower_ext.core.schedules import Cosine, Piecewise
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.server import callbacks as module
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.callbacks import (
    Callback,
    KeepBest,
    Schedule,
    StopAfter,
    StopWhen,
)
from flower_ext.server.checkpoint import CheckpointError
from flower_ext.server.finished import FinishedRound, RunInfo
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import Tracker, read_clients, read_metrics
from flower_ext.simulation.local import LocalGrid

MODEL = {"w": np.float32([0.0, 0.0])}
# Central losses by round: the best is round 4, and nothing is better for 3 rounds then.
LOSSES = [9.0, 5.0, math.nan, 2.0, 4.0, 2.0, 3.0, 1.0]


@pytest.fixture
def grid():
    """Three clients that move the model by what they are told."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        client = context.node_config["partition-id"]
        config = message.content["config"]
        w = message.content["arrays"]["w"].numpy()
        new = {"w": (w + config.get("lr", 1.0)).astype(np.float32)}
        metrics = {"num-examples": 2 + client, "loss": 1.0 * client}
        content = {"arrays": to_record(new), "metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        client = context.node_config["partition-id"]
        if client == 2:
            raise RuntimeError("no data")
        metrics = {"num-examples": 1, "accuracy": 0.25 * (client + 1)}
        content = {"metrics": MetricRecord(metrics)}
        return Message(RecordDict(content), reply_to=message)

    return LocalGrid(app, 3)


def central(server_round, arrays):
    """Return the hand-made losses, from round 1 on."""
    return MetricRecord({"loss": LOSSES[server_round - 1]}) if server_round else None


def start(grid, callbacks, rounds=8, strategy=None, **options):
    return run_rounds(
        strategy or AdditiveStrategy(),
        grid,
        to_record(MODEL),
        num_rounds=rounds,
        callbacks=callbacks,
        **{"evaluate_fn": central, **options},
    )


def finished(number, loss, **metrics):
    metrics = MetricRecord({"loss": loss, **metrics})
    return FinishedRound(number, to_record({"w": np.ones(number)}), central=metrics)


class Watching(Callback):
    """Keeps what it sees."""

    needs_clients = True

    def __init__(self):
        self.calls = []

    def begin(self, run):
        self.calls.append(("begin", run.num_rounds, run.done))

    def configure(self, server_round, config):
        self.calls.append(("configure", server_round))

    def round(self, this):
        self.calls.append(("round", this.number))
        self.last = this

    def end(self, error):
        self.calls.append(("end", error))


# What is seen ---------------------------------------------------------------------


def test_the_calls_of_a_run_are_in_order(grid):
    watching = Watching()
    start(grid, [watching], 2)
    assert watching.calls == [
        ("begin", 2, 0),
        ("configure", 1),
        ("round", 1),
        ("configure", 2),
        ("round", 2),
        ("end", None),
    ]


def test_a_round_has_model_metrics_and_costs(grid):
    watching = Watching()
    result = start(grid, [watching], 2)
    this = watching.last
    assert from_record(this.arrays)["w"].tolist() == [2, 2]
    assert this.train == result.train_metrics_clientapp[2]
    assert this.evaluate == result.evaluate_metrics_clientapp[2]
    assert dict(this.central) == {"loss": 5.0}
    assert this.down.messages == 6 and this.up.messages == 5
    assert this.seconds_train > 0
    with pytest.raises(AttributeError):
        this.number = 3


def test_the_end_is_called_however_the_run_ends(grid):
    def broken(server_round, arrays):
        raise KeyboardInterrupt

    watching, stranger = Watching(), Watching()
    stranger.begin = lambda run: 1 / 0
    with pytest.raises(KeyboardInterrupt):
        start(grid, [watching], evaluate_fn=broken)
    assert isinstance(watching.calls[-1][1], KeyboardInterrupt)
    with pytest.raises(ZeroDivisionError):
        start(grid, [watching, stranger])
    assert isinstance(watching.calls[-1][1], ZeroDivisionError)
    assert stranger.calls == []


@pytest.mark.parametrize("make", [FedAvg, FedAdam, AdditiveStrategy])
def test_any_strategy_runs_with_all_of_them(make, grid, tmp_path):
    best = KeepBest("central/loss", folder=tmp_path / "best")
    callbacks = [
        best,
        KeepBest("evaluate/accuracy"),
        StopWhen("central/loss", patience=3),
        StopAfter(600),
        Schedule("lr", Piecewise({1: 1.0, 3: 0.5})),
    ]
    watching = Watching()
    tracker = Tracker(tmp_path / "run", tensorboard=False, per_client=True)
    result = start(grid, [*callbacks, watching], strategy=make(), tracker=tracker)
    plain = start(grid, [callbacks[-1]], 4, strategy=make())
    assert sorted(result.train_metrics_clientapp) == list(range(1, 8))
    assert best.number == 4
    if make is FedAvg:  # the mean moves by what the clients are told
        moved = 1 + 1 + 5 * 0.5
        assert from_record(result.arrays)["w"] == pytest.approx(moved, rel=1e-5)
    np.testing.assert_allclose(
        from_record(best.arrays)["w"], from_record(plain.arrays)["w"], rtol=1e-6
    )
    assert len(read_metrics(tmp_path / "run")) == 7
    assert {row["client"] for row in read_clients(tmp_path / "run")} == {0, 1, 2}


# A callback's own errors ------------------------------------------------------------


class Failing(Watching):
    """Fails in some rounds."""

    def __init__(self, *rounds):
        super().__init__()
        self.rounds = rounds

    def round(self, this):
        super().round(this)
        if this.number in self.rounds:
            raise RuntimeError(f"a mistake in round {this.number}")


def test_a_mistake_in_the_first_round_ends_the_run_after_it_is_saved(grid, tmp_path):
    before, after = Watching(), Watching()
    with pytest.raises(RuntimeError, match="a mistake in round 1"):
        start(grid, [before, Failing(1), after], checkpoint=tmp_path)
    assert before.calls[-2:-1] == after.calls[-2:-1] == [("round", 1)]
    with pytest.raises(RuntimeError, match="a mistake in round 2"):
        start(grid, [Failing(2)], checkpoint=tmp_path)
    result = start(grid, [Failing()], checkpoint=tmp_path)
    whole = start(grid, [])
    assert from_record(result.arrays)["w"].tolist() == (
        from_record(whole.arrays)["w"].tolist()
    )


def test_a_later_mistake_is_said_once_and_costs_no_round(grid, caplog):
    watching = Watching()
    result = start(grid, [Failing(2, 3, 5), watching])
    assert sorted(result.train_metrics_clientapp) == list(range(1, 9))
    assert sum(call[0] == "round" for call in watching.calls) == 8
    errors = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert [r.message for r in errors] == ["Failing failed in round 2"]
    assert "a mistake in round 2" in str(errors[0].exc_info[1])
    assert "Failing failed in 3 of 8 rounds" in caplog.text


@pytest.mark.parametrize(
    ("callbacks", "text"),
    [
        (KeepBest, "must be a list of Callbacks"),
        ([KeepBest], "must be Callbacks: an instance, not the class"),
        ([print], "must be Callbacks"),
    ],
)
def test_what_is_no_callback_is_refused(grid, callbacks, text):
    with pytest.raises(ValueError, match=text):
        start(grid, callbacks)


# The best model -----------------------------------------------------------------------


@pytest.mark.parametrize("folder", [None, "best"])
def test_the_best_of_a_hand_made_sequence_is_kept(folder, tmp_path):
    best = KeepBest("central/loss", folder=folder and tmp_path / folder)
    best.begin(RunInfo(8))
    found = []
    for number, loss in enumerate(LOSSES, 1):
        best.round(finished(number, loss))
        found.append((best.number, len(best.arrays["w"].numpy()), best.value))
    assert found == [
        (1, 1, 9.0),
        (2, 2, 5.0),
        (2, 2, 5.0),
        (4, 4, 2.0),
        (4, 4, 2.0),
        (4, 4, 2.0),
        (4, 4, 2.0),
        (8, 8, 1.0),
    ]
    if folder:
        assert load_file(tmp_path / folder / "best.safetensors")["w"].shape == (8,)
    best.begin(RunInfo(8))
    assert best.number is None
    with pytest.raises(ValueError, match="no round has had a number for central/loss"):
        assert best.arrays


def test_the_largest_is_best_where_it_is_asked_for():
    best = KeepBest("central/f1", mode="max")
    best.begin(RunInfo(3))
    for number, value in enumerate([math.nan, 0.5, math.nan, 0.75, 0.75], 1):
        best.round(finished(number, 1.0, f1=value))
        assert (best.number is None) == (number == 1)
    assert (best.number, best.value) == (4, 0.75)


@pytest.mark.parametrize(
    ("metric", "mode"),
    [
        ("central/loss", "min"),
        ("train/eval-error", "min"),
        ("evaluate/accuracy", "max"),
    ],
)
def test_the_name_of_a_metric_tells_which_values_are_good(metric, mode):
    assert KeepBest(metric).mode == mode


@pytest.mark.parametrize("folder", [None, "best"])
@pytest.mark.parametrize("done", [1, 3, 5])
def test_the_best_of_a_resumed_run_is_that_of_the_whole(grid, tmp_path, folder, done):
    def resumed(rounds, name):
        best = KeepBest("central/loss", folder=folder and tmp_path / name)
        start(grid, [best], rounds, checkpoint=tmp_path / f"saved-{name}")
        return best

    whole = resumed(7, "whole")
    resumed(done, "parts")
    parts = resumed(7, "parts")
    assert (parts.number, parts.value) == (whole.number, whole.value) == (4, 2.0)
    assert parts.arrays["w"].numpy().tolist() == whole.arrays["w"].numpy().tolist()


def test_a_best_model_that_was_not_saved_is_that_of_the_round_before(grid, tmp_path):
    """Killed after a best model was written and before the round was saved."""
    folder = tmp_path / "best"
    start(grid, [KeepBest("central/loss", folder=folder)], 3, checkpoint=tmp_path / "s")
    late = KeepBest("central/loss", folder=folder)
    late.load_state_dict({"value": 5.0, "number": 2})
    late.round(finished(4, 1.0))
    best = KeepBest("central/loss", folder=folder)
    start(grid, [best], 3, checkpoint=tmp_path / "s")
    assert best.number == 2
    assert best.arrays["w"].numpy().tolist() == [2, 2]


def test_a_best_model_that_is_lost_is_refused(grid, tmp_path):
    folder, saved = tmp_path / "best", tmp_path / "saved"

    def run(rounds, **options):
        start(grid, [KeepBest("central/loss", **options)], rounds, checkpoint=saved)

    run(3, folder=folder)
    with pytest.raises(CheckpointError, match="is not in the checkpoint: the saved"):
        run(4)
    save_file({"w": np.ones(1)}, folder / "best.safetensors")
    (folder / "best-before.safetensors").unlink()
    with pytest.raises(CheckpointError, match="lacks the best model, that of round 2"):
        run(4, folder=folder)


def test_a_best_model_moves_from_the_checkpoint_to_a_folder(grid, tmp_path):
    start(grid, [KeepBest("central/loss")], 3, checkpoint=tmp_path / "s")
    best = KeepBest("central/loss", folder=tmp_path / "best")
    start(grid, [best], 3, checkpoint=tmp_path / "s")
    assert best.arrays["w"].numpy().tolist() == [2, 2]


# An earlier end ----------------------------------------------------------------------


def rounds_of(result):
    return sorted(result.train_metrics_clientapp)


@pytest.mark.parametrize(
    ("stop", "last", "reason"),
    [
        (
            {"patience": 3},
            7,
            "central/loss was not better than 2 for 3 rounds",
        ),
        ({"patience": 4}, 8, ""),
        ({"patience": 1}, 3, "central/loss was not better than 5 for 1 rounds"),
        # 9, 5 is better by 4; NaN and 2 are not better than 5 by more than 3.5.
        (
            {"patience": 2, "min_change": 3.5},
            4,
            "central/loss was not better than 5 for 2 rounds",
        ),
        ({"at_most": 2.0}, 4, "central/loss is 2, at most 2"),
        ({"at_least": 9}, 1, "central/loss is 9, at least 9"),
        ({"patience": 2, "mode": "max"}, 3, "not better than 9 for 2 rounds"),
    ],
)
def test_the_run_ends_after_the_round_and_says_why(grid, stop, last, reason, caplog):
    result = start(grid, [StopWhen("central/loss", **stop)])
    assert rounds_of(result) == list(range(1, last + 1))
    assert result.arrays["w"].numpy()[0] == last
    if reason:
        assert f"The run ends after round {last}: " in caplog.text
        assert reason in caplog.text


def test_rounds_without_the_metric_do_not_count():
    stop = StopWhen("central/loss", patience=2)
    stop.begin(RunInfo(9))
    found = []
    for number, loss in enumerate([1.0, None, None, None, 1.0, None, 1.0], 1):
        this = FinishedRound(number) if loss is None else finished(number, loss)
        found.append(stop.round(this))
    assert found[:-1] == [None] * 6
    assert found[-1] == "central/loss was not better than 1 for 2 rounds"


@pytest.mark.parametrize("done", range(1, 7))
def test_patience_of_a_resumed_run_is_that_of_the_whole(grid, tmp_path, done):
    def run(rounds, folder):
        stop = StopWhen("central/loss", patience=3)
        return start(grid, [stop], rounds, checkpoint=folder)

    whole = run(8, tmp_path / "whole")
    run(done, tmp_path / "parts")
    parts = run(8, tmp_path / "parts")
    assert rounds_of(parts) == rounds_of(whole) == list(range(1, 8))
    assert parts.arrays["w"].numpy().tolist() == whole.arrays["w"].numpy().tolist()


def test_a_run_that_was_ended_stays_ended(grid, tmp_path, caplog):
    for _ in range(2):
        caplog.clear()
        stop = StopWhen("central/loss", at_most=2.0)
        result = start(grid, [stop], checkpoint=tmp_path)
        assert rounds_of(result) == [1, 2, 3, 4]
        assert "The run ends after round 4: central/loss is 2" in caplog.text
    result = start(grid, [StopWhen("central/loss", at_most=1.5)], checkpoint=tmp_path)
    assert rounds_of(result) == list(range(1, 9))


@pytest.mark.parametrize("killed_in", [1, 3, 5, 7])
def test_a_run_that_is_killed_ends_where_the_whole_does(grid, tmp_path, killed_in):
    def callbacks():
        best = KeepBest("central/loss", folder=tmp_path / "best")
        return [best, StopWhen("central/loss", patience=3)]

    def kill(server_round, arrays):
        if server_round == killed_in:
            os._exit(9)  # no exception, no clean-up
        return central(server_round, arrays)

    def run(evaluate_fn):
        made = callbacks()
        saved = tmp_path / "saved"
        return made[0], start(grid, made, checkpoint=saved, evaluate_fn=evaluate_fn)

    process = multiprocessing.get_context("fork").Process(target=run, args=[kill])
    process.start()
    process.join()
    assert process.exitcode == 9
    best, result = run(central)
    whole = start(grid, [StopWhen("central/loss", patience=3)])
    assert rounds_of(result) == rounds_of(whole) == list(range(1, 8))
    assert result.arrays["w"].numpy().tolist() == whole.arrays["w"].numpy().tolist()
    assert best.number == 4
    assert best.arrays["w"].numpy().tolist() == [4, 4]


def test_time_before_an_interruption_counts(grid, tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))

    def slow(server_round, arrays):
        clock.now += 10.0
        return

    result = start(grid, [StopAfter(35)], 2, evaluate_fn=slow, checkpoint=tmp_path)
    clock.now = 1e6
    result = start(grid, [StopAfter(35)], evaluate_fn=slow, checkpoint=tmp_path)
    assert rounds_of(result) == [1, 2, 3]  # 10 before the first, 10 in each
    assert rounds_of(start(grid, [StopAfter(35)], 8, checkpoint=tmp_path)) == [1, 2, 3]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: StopWhen("central/loss"), "needs at_least, at_most or patience"),
        (lambda: StopWhen("central/loss", patience=0), "patience=0 must be an integer"),
        (
            lambda: StopWhen("central/loss", patience=1, min_change=-1),
            "min_change=-1 must be a finite number >= 0",
        ),
        (
            lambda: StopWhen("central/loss", at_least=math.nan),
            "at_least=nan must be a finite number",
        ),
        (
            lambda: StopWhen("central/f1", patience=2),
            "mode=None must be 'min' or 'max'",
        ),
        (lambda: KeepBest("central/f1"), "'central/f1' does not say which is better"),
        (lambda: KeepBest("central/f1", "up"), "mode='up' must be one of"),
        (lambda: KeepBest("loss"), "metric='loss' must be a metric with its phase"),
        (lambda: StopAfter(0), "seconds=0 must be a finite number > 0"),
        (lambda: Schedule("lr", 0.1), "schedule=0.1 must be a function of the round"),
        (lambda: Schedule(1, Cosine(0.1, 5)), "key=1 must be the name of a value"),
    ],
)
def test_bad_arguments_are_refused(make, text):
    with pytest.raises(ValueError, match=text):
        make()


# A metric that is not there -----------------------------------------------------------


@pytest.mark.parametrize("make", [KeepBest, lambda m: StopWhen(m, patience=2)])
def test_a_name_that_is_in_no_round_is_refused_after_the_first(grid, make):
    calls = []

    def counted(server_round, arrays):
        calls.append(server_round)
        return central(server_round, arrays)

    with pytest.raises(ValueError, match=r"'central/test-loss' must be one.*'cent"):
        start(grid, [make("central/test-loss")], evaluate_fn=counted)
    assert calls == [0, 1]
    with pytest.raises(ValueError, match="did you mean 'evaluate/accuracy'"):
        start(grid, [make("evaluate/acuraccy-error")], strategy=FedAvg())


def test_central_metrics_need_a_central_evaluation(grid):
    with pytest.raises(ValueError, match="the run has no evaluate_fn"):
        start(grid, [KeepBest("central/loss")], evaluate_fn=None)


def test_a_central_evaluation_may_measure_in_some_rounds_only(grid, caplog):
    def seldom(server_round, arrays):
        return central(server_round, arrays) if server_round % 4 == 0 else None

    best = KeepBest("central/loss")
    start(grid, [best], evaluate_fn=seldom)
    assert best.number == 8
    start(grid, [KeepBest("central/an-error")], evaluate_fn=seldom)
    assert "KeepBest(central/an-error) failed in round 4" in caplog.text
    assert "must be one that the rounds have, of ['central/loss'" in caplog.text


def test_a_round_without_a_reply_tells_nothing_of_the_metrics():
    best = KeepBest("train/loss")
    best.begin(RunInfo(3))
    counts = {"num-replies": 0, "num-errors": 0, "num-dropped": 0}
    best.round(FinishedRound(1, train=MetricRecord(counts)))
    best.round(FinishedRound(2, train=MetricRecord({**counts, "loss": 0.5})))
    assert best.number == 2
    best = KeepBest("train/an-error")
    best.begin(RunInfo(3))
    with pytest.raises(ValueError, match="must be one that the rounds have"):
        best.round(FinishedRound(2, train=MetricRecord({**counts, "loss": 0.5})))


def test_a_metric_must_be_one_number(grid):
    def lists(server_round, arrays):
        return MetricRecord({"loss": [1.0, 2.0]})

    with pytest.raises(ValueError, match="must be one that is a number"):
        start(grid, [KeepBest("central/loss")], evaluate_fn=lists)


# Under a mechanism ------------------------------------------------------------------


def private(rounds=4, amplified=False, **options):
    mechanism = Mechanism(
        clipping=1.0,
        num_rounds=rounds,
        num_sampled_clients=2,
        population_size=3,
        noise_multiplier=1.0,
        target_delta=0.01,
        amplified=amplified,
        **options,
    )
    sampler = PoissonSampler(probability=2 / 3) if amplified else None
    return AdditiveStrategy(mechanism=mechanism, sampler=sampler)


def test_raw_metrics_are_withheld_and_the_error_names_it(grid):
    for metric in ("train/loss", "evaluate/accuracy"):
        with pytest.raises(ValueError, match="clients' own metrics are withheld"):
            start(grid, [KeepBest(metric)], 4, strategy=private())


def test_the_best_of_released_models_is_kept(grid):
    best, watching = KeepBest("central/loss"), Watching()
    start(grid, [best, watching], 4, strategy=private())
    assert best.number == 4
    assert watching.last.clients == ()


def test_metrics_that_are_reported_unprotected_may_be_watched(grid):
    best = KeepBest("train/loss")
    start(grid, [best], 2, strategy=private(unprotected_metrics=True))
    assert best.number is not None


def test_of_secret_cohorts_neither_time_nor_bytes_are_seen(grid):
    watching = Watching()
    start(
        grid,
        [watching, StopWhen("central/loss", at_most=5.0)],
        4,
        strategy=private(amplified=True),
    )
    this = watching.last
    assert this.number == 2
    assert this.clients == ()
    assert this.seconds_train is this.seconds_evaluate is this.down is this.up is None
    with pytest.raises(ValueError, match="cohorts are secret"):
        start(grid, [StopAfter(60)], 4, strategy=private(amplified=True))


def test_rows_of_single_clients_are_refused_before_the_run(grid, tmp_path):
    tracker = Tracker(tmp_path, tensorboard=False, per_client=True)
    for options in ({}, {"unprotected_metrics": True}):
        with pytest.raises(ValueError, match="per_client=True must be False under a m"):
            start(grid, [], 4, strategy=private(**options), tracker=tracker)
    assert not (tmp_path / "metrics.jsonl").exists()


# Schedules ----------------------------------------------------------------------------


class Told(AdditiveStrategy):
    """Keeps what it is told."""

    def configure_train(self, server_round, arrays, config, grid):
        self.told = [*getattr(self, "told", []), config["lr"]]
        return super().configure_train(server_round, arrays, config, grid)


def test_a_value_is_that_of_its_round_also_when_resumed(grid, tmp_path):
    cosine = Cosine(0.5, rounds=8)
    expected = [cosine(r) for r in range(1, 9)]
    whole = Told()
    result = start(
        grid, [Schedule("lr", cosine)], strategy=whole, train_config=ConfigRecord()
    )
    assert whole.told == expected
    told = []
    for rounds in (3, 8):
        strategy = Told()
        parts = start(
            grid,
            [Schedule("lr", cosine)],
            rounds,
            strategy=strategy,
            checkpoint=tmp_path,
        )
        told += strategy.told
    assert told == expected
    assert from_record(parts.arrays)["w"].tolist() == (
        from_record(result.arrays)["w"].tolist()
    )
    assert from_record(result.arrays)["w"] == pytest.approx(sum(expected), rel=1e-5)


def test_another_schedule_of_the_rounds_before_is_refused(grid, tmp_path):
    start(grid, [Schedule("lr", lambda r: 0.5 / r)], 2, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="'lr' was 0.25 in round 2, by this sch"):
        start(grid, [Schedule("lr", Cosine(0.5, 8))], 4, checkpoint=tmp_path)
    longer = Schedule("lr", Piecewise({1: 0.5, 2: 0.25, 3: 0.1}))
    assert rounds_of(start(grid, [longer], 4, checkpoint=tmp_path)) == [1, 2, 3, 4]


def test_a_schedule_is_tried_before_the_run(grid):
    values = {1: 0.1, 2: np.float32(0.5), 3: 7, 4: "text", 5: None}
    watching = Watching()
    with pytest.raises(ValueError, match="'lr' of round 5=None must be a number, a te"):
        start(grid, [watching, Schedule("lr", values.get)], 5)
    assert ("configure", 1) not in watching.calls
    config = ConfigRecord()
    Schedule("lr", values.get).configure(2, config)
    assert type(config["lr"]) is float


# Saved with the run -------------------------------------------------------------------


def test_two_of_a_kind_keep_their_own_states(grid, tmp_path):
    def both():
        return [
            StopWhen("central/loss", at_most=0.0),
            StopWhen("central/loss", patience=3),
        ]

    start(grid, both(), 5, checkpoint=tmp_path)
    assert rounds_of(start(grid, both(), checkpoint=tmp_path)) == list(range(1, 8))


def test_callbacks_that_come_and_go_are_said(grid, tmp_path, caplog):
    start(grid, [StopWhen("central/loss", patience=3)], 5, checkpoint=tmp_path)
    best = KeepBest("central/loss")
    start(grid, [best], 6, checkpoint=tmp_path)
    assert "StopWhen(central/loss) was part of the saved run" in caplog.text
    assert "KeepBest(central/loss) was not part of the saved run" in caplog.text
    assert (best.number, best.value) == (6, 2.0)


def test_a_callback_of_ones_own_may_have_a_state(grid, tmp_path):
    class Count(Callback):
        def begin(self, run):
            self.seen = self.seen if run.restored else []

        def round(self, this):
            self.seen.append(this.number)

        def state_dict(self):
            return {"seen": list(self.seen), "array": np.float64([len(self.seen)])}

        def load_state_dict(self, state):
            self.seen = list(state["seen"])
            assert state["array"] == [len(self.seen)]

    start(grid, [Count()], 2, checkpoint=tmp_path)
    counting = Count()
    start(grid, [counting], 4, checkpoint=tmp_path)
    assert counting.seen == [1, 2, 3, 4]


# Rows of single clients ---------------------------------------------------------------


@pytest.mark.parametrize("make", [AdditiveStrategy, FedAvg])
def test_every_reply_of_every_client_has_a_row(make, grid, tmp_path):
    tracker = Tracker(tmp_path, tensorboard=False, per_client=True)
    start(grid, [], 2, strategy=make(), tracker=tracker)
    rows = read_clients(tmp_path)
    keys = [(row["round"], row["phase"], row["client"]) for row in rows]
    assert keys == [
        (number, phase, client)
        for number in (1, 2)
        for phase in ("train", "evaluate")
        for client in (0, 1, 2)
    ]
    assert [row["train/num-examples"] for row in rows[:3]] == [2, 3, 4]
    assert [row["train/loss"] for row in rows[:3]] == [0.0, 1.0, 2.0]
    assert [row.get("evaluate/accuracy") for row in rows[3:6]] == [0.25, 0.5, None]
    assert "no data" in rows[5]["error"]
    assert rows[5]["bytes/up"] == 0
    for number, summed in enumerate(read_metrics(tmp_path), 1):
        own = sum(row["bytes/up"] for row in rows if row["round"] == number)
        assert own == summed["bytes/up"] > 0


def test_rows_of_a_resumed_run_are_those_of_the_whole(grid, tmp_path):
    for rounds in (2, 4):
        tracker = Tracker(tmp_path / "run", tensorboard=False, per_client=True)
        start(grid, [], rounds, tracker=tracker, checkpoint=tmp_path / "saved")
    assert [row["round"] for row in read_clients(tmp_path / "run")[::6]] == [1, 2, 3, 4]


def test_a_new_run_without_them_leaves_none_of_the_last_ones(grid, tmp_path):
    for per_client in (True, False):
        tracker = Tracker(tmp_path, tensorboard=False, per_client=per_client)
        start(grid, [], 1, tracker=tracker)
    assert read_clients(tmp_path) == []
    assert read_clients(tmp_path / "nothing") == []


def test_without_a_reader_no_client_is_looked_at(grid, monkeypatch):
    seen = []

    class Plain(Callback):
        def round(self, this):
            seen.append(this.clients)

    start(grid, [Plain()], 1)
    assert seen == [()]


def test_rows_are_strict_json(grid, tmp_path):
    tracker = Tracker(tmp_path, tensorboard=False, per_client=True)
    start(grid, [], 1, tracker=tracker)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    for line in (tmp_path / "clients.jsonl").read_text("utf-8").splitlines():
        json.loads(line, parse_constant=refuse)
