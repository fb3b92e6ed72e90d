"""Under a mechanism every round is released once: by starts, copies and restarts."""

import copy
import errno
import json
import logging
import os
import pickle
import shutil
from collections import defaultdict
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy
from flower_ext._flower import PrivacyBudgetExhausted
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    MinSeparationSampler,
    PoissonSampler,
    UniformSampler,
)
from flower_ext.privacy import BandedToeplitz, Mechanism, gaussian_epsilon
from flower_ext.server import checkpoint as module
from flower_ext.server.checkpoint import CheckpointError
from flower_ext.server.tracking import Tracker
from flower_ext.simulation.local import LocalGrid

ROUNDS, CLIENTS, COHORT = 8, 12, 3
MODEL = to_record({"w": np.zeros(4, np.float32)})
BANDS = BandedToeplitz(ROUNDS, [1.0, 0.5, 0.2])


class Asking(LocalGrid):
    """Clients that all send one change; notes who trains in which exchange."""

    def __init__(self, left=()):
        app = ClientApp()

        @app.train()
        def train(message, context):
            number = context.node_config["partition-id"]
            if number in left:
                raise RuntimeError("left")
            arrays = from_record(message.content["arrays"])
            change = np.float32([number == i for i in range(4)])
            content = {
                "arrays": to_record({"w": arrays["w"] + change}),
                "metrics": MetricRecord({"num-examples": 1}),
            }
            return Message(RecordDict(content), reply_to=message)

        super().__init__(app, CLIENTS)
        self.asked = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if messages:
            self.asked.append([m.metadata.dst_node_id for m in messages])
        return super().send_and_receive(messages, timeout=timeout)


def make(sampler=None, **changes):
    usual = {
        "num_rounds": ROUNDS,
        "num_sampled_clients": COHORT,
        "population_size": CLIENTS,
        "noise_multiplier": 3.0,
        "target_delta": 1e-3,
        "factorization": "identity",
    }
    return AdditiveStrategy(
        mechanism=Mechanism(**{**usual, **changes}),
        sampler=sampler or MinSeparationSampler(4),
    )


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


# Started again ----------------------------------------------------------------------


SAMPLERS = {
    "poisson": (lambda: PoissonSampler(probability=0.25), {"amplified": True}),
    "uniform": (UniformSampler, {"amplified": True}),
    "cyclic": (
        lambda: CyclicPoissonSampler(1.0, 3, 5),
        {"factorization": BANDS, "num_sampled_clients": 4},
    ),
    "bins": (lambda: BallsInBinsSampler(3), {"amplified": True}),
    "apart": (lambda: MinSeparationSampler(4, 2), {}),
}


@pytest.mark.parametrize("kind", SAMPLERS)
@pytest.mark.parametrize("lengths", [[1] * 8, [3, 1, 4], [8]])
def test_cohorts_noise_and_epsilon_follow_the_releases_over_all_starts(kind, lengths):
    sampler, changes = SAMPLERS[kind]
    seed = 2**127 + 1
    whole, parts = make(sampler(), seed=seed, **changes), None
    parts = make(sampler(), seed=seed, **changes)
    if changes.get("amplified"):
        whole.sampler.seed = parts.sampler.seed = seed
    once, again = Asking(), Asking()
    whole.start(once, MODEL, num_rounds=ROUNDS)
    spent = []
    for rounds in lengths:
        result = parts.start(again, MODEL, num_rounds=rounds)
        spent += [m["epsilon"] for m in result.train_metrics_clientapp.values()]
    assert again.asked == once.asked
    accountant = whole.private_sum.accountant
    assert spent == [accountant.epsilon_after(r, 1e-3) for r in range(1, ROUNDS + 1)]
    with pytest.raises(PrivacyBudgetExhausted, match="after the 8 planned rounds"):
        parts.start(again, MODEL, num_rounds=1)


@pytest.mark.parametrize("kind", ["cyclic", "apart"])
def test_limits_hold_over_all_starts(kind):
    sampler, changes = SAMPLERS[kind]
    strategy, grid = make(sampler(), **changes), Asking()
    for _ in range(ROUNDS):
        strategy.start(grid, MODEL, num_rounds=1)
    taken = defaultdict(list)
    for release, cohort in enumerate(grid.asked):
        for client in cohort:
            taken[client].append(release)
    assert len(taken) == CLIENTS
    for releases in taken.values():
        gaps = [b - a for a, b in pairwise(releases)]
        assert all(gap >= strategy.sampler.guarantee().min_separation for gap in gaps)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_a_cohort_is_for_one_release(kind):
    sampler, changes = SAMPLERS[kind]
    strategy, grid = make(sampler(), **changes), Asking()
    shallow = copy.copy(strategy)
    asked = [
        list(one.configure_train(1, MODEL, ConfigRecord(), grid))
        for one in (strategy, shallow)
    ]
    replies = [list(grid.send_and_receive(messages)) for messages in asked]
    strategy.aggregate_train(1, replies[0])
    for one in (strategy, shallow):
        with pytest.raises(ValueError, match="release 2 needs a cohort of its own"):
            one.aggregate_train(1, replies[1])
    assert strategy.private_sum.accountant.num_releases == 1


def test_a_seed_is_for_one_run():
    mechanism = make(seed=2**127).mechanism
    with pytest.raises(ValueError, match="seed must be another one"):
        AdditiveStrategy(mechanism=mechanism, sampler=MinSeparationSampler(4))


def test_another_model_needs_another_strategy():
    strategy = make()
    strategy.start(Asking(), MODEL, num_rounds=1)
    longer = to_record({"w": np.zeros(5, np.float32)})
    with pytest.raises(ValueError, match="make a new strategy for another model"):
        strategy.start(Asking(), longer, num_rounds=1)


def test_strategies_that_share_sampler_and_mechanism_are_runs_of_their_own():
    sampler = MinSeparationSampler(4)
    mechanism = make().mechanism
    first, second = (
        AdditiveStrategy(mechanism=mechanism, sampler=sampler) for _ in range(2)
    )
    grid = Asking()
    for strategy in (first, second):
        result = strategy.start(grid, MODEL, num_rounds=ROUNDS)
        epsilon = result.train_metrics_clientapp[ROUNDS]["epsilon"]
        assert epsilon == pytest.approx(gaussian_epsilon(1 / 3, 1e-3))
    assert grid.asked[:ROUNDS] == grid.asked[ROUNDS:]  # the public seed's, in each
    assert all(len(cohort) == COHORT for cohort in grid.asked)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))]
)
def test_a_strategy_that_has_begun_is_not_copied(copied):
    strategy = make()
    copied(strategy).start(Asking(), MODEL, num_rounds=1)
    strategy.start(Asking(), MODEL, num_rounds=2)
    with pytest.raises(ValueError, match="with 2 releases, cannot be copied"):
        copied(strategy)
    resumed = make()
    resumed.load_state_dict(strategy.state_dict())
    with pytest.raises(ValueError, match="with 2 releases, cannot be copied"):
        copied(resumed)


def test_releases_are_not_forgotten_by_loading_another_run(tmp_path):
    make().start(Asking(), MODEL, num_rounds=2, checkpoint=tmp_path)
    strategy = make()
    strategy.start(Asking(), MODEL, num_rounds=2)
    with pytest.raises(CheckpointError, match="made 2 releases that the saved run"):
        strategy.start(Asking(), MODEL, num_rounds=3, checkpoint=tmp_path)


def test_a_strategy_goes_on_from_its_own_checkpoint(tmp_path):
    strategy = make()
    strategy.start(Asking(), MODEL, num_rounds=2, checkpoint=tmp_path)
    result = strategy.start(Asking(), MODEL, num_rounds=4, checkpoint=tmp_path)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert strategy.private_sum.accountant.num_releases == 4


# A disk that fails ------------------------------------------------------------------


class Seen:
    """Whatever shows of a run: its log, its results folder, what evaluate_fn sees."""

    def __init__(self, folder, caplog):
        caplog.set_level(logging.DEBUG, "flwr")
        self.caplog = caplog
        self.tracker = Tracker(folder, tensorboard=False)
        self.models = []
        self.crash = None

    def evaluate(self, server_round, arrays):
        self.models.append((server_round, from_record(arrays)["w"].tolist()))
        if server_round == self.crash:
            raise KeyboardInterrupt
        return MetricRecord({"norm": float(np.sum(arrays["w"].numpy()))})

    def start(self, rounds, folder, left=(), **changes):
        strategy = make(UniformSampler(3), **changes)
        return strategy.start(
            Asking(left),
            MODEL,
            num_rounds=rounds,
            evaluate_fn=self.evaluate,
            tracker=self.tracker,
            checkpoint=folder,
        )

    def rounds(self):
        return [r for r, _ in self.models]


@pytest.fixture
def seen(tmp_path, caplog):
    return Seen(tmp_path / "results", caplog)


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


STEPS = {
    "model": (module, "save_file"),
    "json": (Path, "write_text"),
    "flush": (module, "flush"),
    "rename": (Path, "rename"),
    "note": (Path, "replace"),
}


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("seed", [None, 1234567])
def test_a_round_that_cannot_be_saved_is_not_released(
    seen, tmp_path, monkeypatch, step, seed
):
    folder = tmp_path / "saved"
    seen.start(2, folder, seed=seed)
    logged = len(seen.caplog.records)
    metrics = (tmp_path / "results" / "metrics.jsonl").read_text()
    with monkeypatch.context() as patch:
        begun = Asking.send_and_receive

        def fill(self, messages, *, timeout=None):
            patch.setattr(*step, full)
            return begun(self, messages, timeout=timeout)

        patch.setattr(Asking, "send_and_receive", fill)
        with pytest.raises(CheckpointError, match="round 3 could not be saved and was"):
            seen.start(6, folder, seed=seed)
    assert seen.rounds() == [0, 1, 2]
    assert (tmp_path / "results" / "metrics.jsonl").read_text() == metrics
    said = [record.getMessage() for record in seen.caplog.records[logged:]]
    assert not any("Aggregated" in line for line in said)
    result = seen.start(6, folder, seed=seed, left=(7,))
    after = [3, 4, 5, 6] if step[1] not in ("replace",) else [4, 5, 6]
    assert seen.rounds()[3:] == after
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4, 5, 6]


def test_without_a_mechanism_the_run_goes_on(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(module, "save_file", full)
    strategy = AdditiveStrategy(fraction_train=0.5)
    result = strategy.start(Asking(), MODEL, num_rounds=2, checkpoint=tmp_path)
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert "could not be saved" in caplog.text


@pytest.mark.parametrize("at", ["rename", "flush", "rmtree"])
def test_a_saved_round_is_there_all_the_time(seen, tmp_path, monkeypatch, at):
    """Killed while the round is saved for a second time, with its evaluation."""
    folder = tmp_path / "saved"
    seen.start(2, folder)
    owner = {"rename": Path, "flush": module, "rmtree": shutil}[at]
    original = getattr(owner, at)
    evaluated = seen.evaluate

    class Killed(BaseException):
        pass

    for nth in range(1, 9):
        copied = tmp_path / f"{at}-{nth}"
        shutil.copytree(folder, copied)
        calls = []

        def evaluate(server_round, arrays, nth=nth, calls=calls):
            def kill(*args, **kwargs):
                calls.append(args)
                if len(calls) == nth:
                    raise Killed
                return original(*args, **kwargs)

            monkeypatch.setattr(owner, at, kill)
            return evaluated(server_round, arrays)

        seen.models.clear()
        seen.evaluate = evaluate
        with suppress(Killed):
            seen.start(3, copied)
        monkeypatch.setattr(owner, at, original)
        seen.evaluate = evaluated
        seen.start(4, copied)
        assert seen.rounds() == [3, 4]
        names = sorted(path.name for path in copied.glob("[!.]*"))
        assert names == ["released.json", "round-00003", "round-00004"]


def test_a_crash_after_saving_releases_nothing_twice(seen, tmp_path):
    seen.crash = 3
    with pytest.raises(KeyboardInterrupt):
        seen.start(6, tmp_path / "saved")
    seen.crash = None
    seen.start(6, tmp_path / "saved", left=(7,))
    assert seen.rounds() == [0, 1, 2, 3, 4, 5, 6]


# A checkpoint that is damaged -------------------------------------------------------


@pytest.mark.parametrize("damage", ["state.safetensors", "model.safetensors", "gone"])
def test_no_older_round_is_continued(seen, tmp_path, damage):
    folder = tmp_path / "saved"
    seen.start(4, folder)
    last = folder / "round-00004"
    if damage != "gone":
        (last / damage).write_bytes(b"junk")
        with pytest.raises(CheckpointError, match="cannot be read") as caught:
            seen.start(6, folder)
        assert "delete it" not in str(caught.value)
        assert "would release another model in its place" in str(caught.value)
    for path in (last, folder / "round-00003"):
        shutil.rmtree(path)
        with pytest.raises(CheckpointError, match=r"lacks round 4, which was released"):
            seen.start(6, folder)
    assert seen.rounds() == [0, 1, 2, 3, 4]


def test_what_was_released_must_be_readable(seen, tmp_path):
    folder = tmp_path / "saved"
    seen.start(2, folder)
    assert json.loads((folder / "released.json").read_text()) == {"round": 2}
    (folder / "released.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"released.json cannot be read"):
        seen.start(3, folder)


def test_without_noise_an_older_round_is_continued(seen, tmp_path):
    folder = tmp_path / "saved"
    seen.start(3, folder, noise_multiplier=0)
    shutil.rmtree(folder / "round-00003")
    seen.start(4, folder, noise_multiplier=0)
    assert seen.rounds() == [0, 1, 2, 3, 3, 4]


def test_others_may_read_neither_noise_nor_seeds(tmp_path):
    make().start(Asking(), MODEL, num_rounds=2, checkpoint=tmp_path)
    for folder in tmp_path.glob("round-*"):
        assert folder.stat().st_mode & 0o077 == 0
