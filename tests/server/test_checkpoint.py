"""Saving and continuing runs: bit for bit, and whatever happens to the disk."""

import errno
import functools
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg, Result

from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import PoissonSampler, UniformSampler
from flower_ext.core.strict_json import read
from flower_ext.server import checkpoint as module
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.checkpoint import Checkpoint, CheckpointError
from flower_ext.server.optimizers import SGD, Adagrad, Adam, TorchOptimizer, Yogi
from flower_ext.server.rounds import run_rounds
from flower_ext.simulation.local import LocalGrid

OPTIMIZERS = {
    "plain": SGD,
    "momentum": lambda: SGD(0.7, momentum=0.9),
    "nesterov": lambda: SGD(0.7, momentum=0.9, nesterov=True),
    "adagrad": lambda: Adagrad(0.05),
    "adam": lambda: Adam(0.05, bias_correction=True),
    "yogi": lambda: Yogi(0.05),
    "torch": lambda: TorchOptimizer(functools.partial(torch.optim.AdamW, lr=0.05)),
}


def central(server_round, arrays):
    """A central evaluation with an integer, a float, a list and a NaN."""
    norm = float(np.sum(arrays["out.weight"].numpy().astype(float) ** 2))
    return MetricRecord(
        {"round": server_round, "norm": norm, "list": [norm, 0.1], "undefined": [norm]}
    )


def strategy_with(optimizer=None, sampler=None, **options):
    return AdditiveStrategy(
        fraction_train=0.5,
        fraction_evaluate=0.5,
        server_optimizer=optimizer or SGD(0.7, momentum=0.9),
        sampler=sampler or UniformSampler(3),
        **options,
    )


@pytest.fixture
def clients():
    """A ClientApp that moves every number a little, each client in its own way."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        client = context.node_config["partition-id"]
        arrays = {
            name: (x + np.sin(x + client)).astype(x.dtype)
            if x.dtype.kind == "f"
            else x + 1
            for name, x in from_record(message.content["arrays"]).items()
        }
        metrics = MetricRecord({"num-examples": 10 + client, "loss": 1 / (1 + client)})
        content = RecordDict({"arrays": to_record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        total = sum(
            float(x.sum()) for x in from_record(message.content["arrays"]).values()
        )
        metrics = MetricRecord({"num-examples": 3, "loss": total})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


@pytest.fixture
def start(clients, initial, monkeypatch):
    """Run rounds of half of six clients; return the result."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)

    def run(rounds, folder=None, strategy=None, app=clients, **options):
        grid = LocalGrid(app, 6, {"batch-size": 4, "lr": 0.1})
        options = {"evaluate_fn": central, "initial_arrays": initial, **options}
        return run_rounds(
            strategy or strategy_with(),
            grid,
            num_rounds=rounds,
            checkpoint=folder,
            **options,
        )

    return run


def saved_rounds(folder):
    """What is in a folder, but for the file that keeps other runs out of it."""
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


# Continuing -----------------------------------------------------------------------


def test_what_is_not_finite_is_strict_json_and_comes_back(tmp_path, initial):
    class Odd(AdditiveStrategy):
        def state_dict(self):
            return {"dual": np.inf, "named": "inf", "many": [np.nan, {"low": -np.inf}]}

        def load_state_dict(self, state):
            self.loaded = dict(state)

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    result = Result(arrays=initial)
    result.train_metrics_clientapp[1] = MetricRecord({"loss": np.nan, "all": [np.inf]})
    assert Checkpoint(tmp_path, Odd()).save(1, result)
    path = tmp_path / "round-00001" / "state.json"
    json.loads(path.read_text("utf-8"), parse_constant=refuse)

    def restored():
        strategy, found = Odd(), Result(arrays=initial)
        assert Checkpoint(tmp_path, strategy).restore(found) == 1
        return str(strategy.loaded), str(dict(found.train_metrics_clientapp[1]))

    state = "{'dual': inf, 'named': 'inf', 'many': [nan, {'low': -inf}]}"
    assert restored() == (state, "{'loss': nan, 'all': [inf]}")
    path.write_text(json.dumps(read(path.read_text("utf-8"))))  # with bare NaN
    assert "NaN" in path.read_text()
    assert restored() == (state, "{'loss': nan, 'all': [inf]}")


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_two_and_two_rounds_are_four_bit_for_bit(start, tmp_path, make):
    strategies = [strategy_with(make()) for _ in range(3)]
    whole = start(4, strategy=strategies[0])
    start(2, tmp_path, strategies[1])
    resumed = start(4, tmp_path, strategies[2])
    assert resumed == whole
    kept = [s.server_optimizer.state_dict() for s in (strategies[0], strategies[2])]
    assert kept[0].keys() == kept[1].keys()
    for slot, arrays in kept[0].items():
        for name, array in arrays.items():
            assert kept[1][slot][name].dtype == array.dtype
            assert kept[1][slot][name].tobytes() == array.tobytes()


def test_the_second_half_of_that_comparison_depends_on_what_was_saved(start, tmp_path):
    # Without the checkpoint the momentum starts anew, and the result is another.
    first = start(2)
    again = start(2, initial_arrays=first.arrays)
    assert again.arrays != start(4).arrays


@pytest.mark.parametrize("at", [1, 2, 3])
def test_a_run_killed_within_a_round_continues_to_the_same_result(start, tmp_path, at):
    def killed(server_round, arrays):
        if server_round == at:
            raise KeyboardInterrupt
        return central(server_round, arrays)

    whole = start(4)
    with pytest.raises(KeyboardInterrupt):
        start(4, tmp_path, evaluate_fn=killed)
    assert start(4, tmp_path) == whole


def test_a_poisson_sampled_run_continues_with_the_same_cohorts(start, tmp_path):
    def strategy():
        return strategy_with(sampler=PoissonSampler(5))

    whole = start(4, strategy=strategy())
    start(2, tmp_path, strategy())
    assert start(4, tmp_path, strategy()) == whole


def test_a_finished_run_returns_its_result_without_a_round(start, tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr")
    whole = start(2, tmp_path)
    assert "already complete" not in caplog.text
    assert start(2, tmp_path, evaluate_fn=pytest.fail) == whole
    assert "already complete" in caplog.text


def test_a_run_of_fewer_rounds_than_are_saved_is_refused(start, tmp_path):
    start(2, tmp_path)
    with pytest.raises(CheckpointError, match=r"num_rounds=1 must be >= 2, the rounds"):
        start(1, tmp_path, evaluate_fn=pytest.fail)


def test_the_initial_evaluation_is_not_done_again(start, tmp_path):
    seen = []

    def noting(server_round, arrays):
        seen.append(server_round)
        return central(server_round, arrays)

    start(1, tmp_path, evaluate_fn=noting)
    result = start(2, tmp_path, evaluate_fn=noting)
    assert seen == [0, 1, 2]
    assert list(result.evaluate_metrics_serverapp) == [0, 1, 2]


def test_continuing_says_after_which_round(start, tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr")
    start(2, tmp_path)
    assert "Continuing" not in caplog.text
    start(3, tmp_path)
    assert "Continuing after round 2" in caplog.text


def test_a_strategys_own_start_takes_the_folder(task, initial, grid, tmp_path):
    strategy_with().start(grid, initial, num_rounds=1, checkpoint=str(tmp_path / "a"))
    assert saved_rounds(tmp_path / "a") == ["round-00001"]


def test_nothing_is_written_without_a_folder(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    start(1)
    assert saved_rounds(tmp_path) == []


# What is kept ---------------------------------------------------------------------


def test_the_last_two_rounds_are_kept(start, tmp_path):
    start(5, tmp_path)
    assert saved_rounds(tmp_path) == ["round-00004", "round-00005"]


def test_the_folder_is_made_with_its_parents(start, tmp_path):
    start(1, tmp_path / "a" / "b")
    assert saved_rounds(tmp_path / "a" / "b") == ["round-00001"]


def test_rounds_are_ordered_as_numbers(start, tmp_path):
    start(1, tmp_path)
    shutil.copytree(tmp_path / "round-00001", tmp_path / "round-99999")
    shutil.copytree(tmp_path / "round-00001", tmp_path / "round-100000")
    assert Checkpoint(tmp_path, strategy_with()).rounds() == [1, 99999, 100000]


def test_files_of_others_in_the_folder_are_left_alone(start, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "round-1").mkdir()
    start(3, tmp_path)
    assert {"notes.txt", "round-1"} < set(saved_rounds(tmp_path))


class Holding(AdditiveStrategy):
    """A strategy whose state is whatever it is given."""

    held: object = None

    def state_dict(self):
        return {"held": self.held}

    def load_state_dict(self, state):
        self.held = state["held"]


def through_disk(tmp_path, arrays, held=None):
    """Save a round and restore it; return the arrays and the strategy's state."""
    first, second = Holding(), Holding()
    first.held = held
    assert Checkpoint(tmp_path, first).save(1, Result(arrays=to_record(arrays)))
    result = Result(arrays=to_record(arrays))
    assert Checkpoint(tmp_path, second).restore(result) == 1
    return from_record(result.arrays), second.held


def test_a_multiple_of_a_0d_array_comes_back_as_an_array(tmp_path):
    """NumPy makes a scalar of it, which is a float too."""
    held = {"w": np.array(2.5, np.float32) * 2, "v": 0.5 * np.array(3.0), "n": 0.5}
    _, found = through_disk(tmp_path, {"x": np.ones(1)}, held)
    assert (found["w"].dtype, found["v"].dtype) == (np.float32, np.float64)
    assert (found["w"] * 2).shape == () and type(found["n"]) is float
    assert found == {"w": 5.0, "v": 1.5, "n": 0.5}


ODD_ARRAYS = {
    "zero-d": np.array(2.5, np.float32),
    "zero-d integer": np.array(2**60 + 1),
    "a float16": np.float16([1, 2, 65504]),
    "float64": np.array([1 + 2**-52]),
    "flags": np.array([[True, False]]),
    "bytes": np.uint8([0, 255]),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "strided": np.arange(10.0)[::3],
    "empty": np.empty((0, 4), np.float32),
    "nan": np.float32([np.nan, -np.inf, -0.0]),
}


def assert_same(left, right):
    assert list(left) == list(right)
    for name, array in right.items():
        assert left[name].dtype == array.dtype, name
        assert left[name].shape == array.shape, name
        assert left[name].tobytes() == array.tobytes(), name


def test_models_of_odd_arrays_survive_in_order(tmp_path):
    found, _ = through_disk(tmp_path, ODD_ARRAYS)
    assert_same(found, ODD_ARRAYS)
    backwards = dict(reversed(ODD_ARRAYS.items()))
    assert_same(through_disk(tmp_path / "b", backwards)[0], backwards)


def test_states_of_odd_arrays_and_values_survive(tmp_path):
    held = {
        "arrays": ODD_ARRAYS,
        "deep": {"er": {"x": np.ones(2)}, "": np.array(1)},
        "values": [1, 2.5, "text", None, True, [0.1]],
        "empty": {},
        "nan": float("nan"),
        "tiny": 5e-324,
    }
    _, found = through_disk(tmp_path, {"w": np.ones(1)}, held)
    assert_same(found["arrays"], held["arrays"])
    assert found["deep"]["er"]["x"].tolist() == [1, 1]
    assert found["deep"][""].shape == ()
    assert found["values"] == held["values"]
    assert found["empty"] == {}
    assert np.isnan(found["nan"])
    assert found["tiny"] == 5e-324


def test_a_model_without_arrays_is_saved(tmp_path):
    assert through_disk(tmp_path, {})[0] == {}


def test_metrics_keep_their_types_and_values(tmp_path):
    metrics = {"i": 2**60, "f": 0.1, "l": [1, 2], "e": [], "n": [float("inf")]}
    result = Result(
        arrays=to_record({}),
        train_metrics_clientapp={3: MetricRecord(metrics)},
        evaluate_metrics_clientapp={12: MetricRecord({"a": 1})},
        evaluate_metrics_serverapp={0: MetricRecord({"nan": float("nan")})},
    )
    saved = Checkpoint(tmp_path, Holding())
    saved.save(12, result)
    found = Result(arrays=to_record({}))
    assert saved.restore(found) == 12
    assert found.train_metrics_clientapp == {3: MetricRecord(metrics)}
    assert type(found.train_metrics_clientapp[3]["i"]) is int
    assert found.evaluate_metrics_clientapp == {12: MetricRecord({"a": 1})}
    assert np.isnan(found.evaluate_metrics_serverapp[0]["nan"])


def test_an_empty_folder_restores_nothing(tmp_path):
    result = Result(arrays=to_record({"w": np.ones(1)}))
    assert Checkpoint(tmp_path, Holding()).restore(result) == 0
    assert result == Result(arrays=to_record({"w": np.ones(1)}))


# Another run's checkpoint -----------------------------------------------------------


def refused(start, folder, text, strategy=None, **options):
    """Continuing is refused before anything runs."""
    with pytest.raises(CheckpointError, match=text):
        start(3, folder, strategy, evaluate_fn=pytest.fail, **options)


class Other(AdditiveStrategy):
    pass


def test_a_checkpoint_of_another_strategy_is_refused(start, tmp_path):
    start(1, tmp_path)
    refused(
        start, tmp_path, r"saved by .*AdditiveStrategy, this run uses .*Other", Other()
    )


def test_a_checkpoint_of_another_sampler_seed_is_refused(start, tmp_path):
    start(1, tmp_path)
    other = strategy_with(sampler=UniformSampler(4))
    text = r"Sampler was UniformSampler\(seed=3\), is now UniformSampler\(seed=4\)"
    refused(start, tmp_path, text, other)


def test_a_checkpoint_of_another_server_optimizer_is_refused(start, tmp_path):
    start(1, tmp_path)
    text = "Server optimizer was SGD.*, is now Adam"
    refused(start, tmp_path, text, strategy_with(Adam()))


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {**arrays, "scale": np.float32([1.0])},
        lambda arrays: {**arrays, "scale": np.array(1.0)},
        lambda arrays: {k: x for k, x in arrays.items() if k != "scale"},
    ],
    ids=["shape", "dtype", "name"],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_array(
    start, tmp_path, initial, change
):
    start(1, tmp_path)
    arrays = to_record(change(from_record(initial)))
    text = r"another model: \['scale'\] differ"
    refused(start, tmp_path, text, initial_arrays=arrays)


def test_a_checkpoint_of_a_later_format_is_refused(start, tmp_path):
    start(1, tmp_path)
    change_state(tmp_path / "round-00001", format=99)
    refused(start, tmp_path, "format 99, not 3")


def test_flowers_own_strategies_are_refused(start, tmp_path):
    refused(start, tmp_path / "a", "FedAvg has no state_dict", FedAvg())
    assert not (tmp_path / "a").exists()


# Damage ---------------------------------------------------------------------------


def change_state(folder, **changes):
    path = folder / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "name", ["state.json", "model.safetensors", "state.safetensors"]
)
@pytest.mark.parametrize("damage", ["missing", "empty", "cut off", "junk", "flipped"])
def test_a_damaged_file_is_refused_with_what_to_do(start, tmp_path, name, damage):
    start(2, tmp_path)
    path = tmp_path / "round-00002" / name
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "flipped":
        changed = bytearray(data)
        changed[-5] ^= 0x55  # within the last numbers, or the last braces
        path.write_bytes(changed)
    else:
        new = {"empty": b"", "cut off": data[: len(data) // 2], "junk": b"\xff" * 99}
        path.write_bytes(new[damage])
    refused(start, tmp_path, r"round-00002 cannot be read .*delete it to continue from")


def test_after_deleting_the_damaged_round_the_run_continues(start, tmp_path):
    whole = start(4)
    start(3, tmp_path)
    (tmp_path / "round-00003" / "model.safetensors").write_bytes(b"junk")
    shutil.rmtree(tmp_path / "round-00003")
    assert start(4, tmp_path) == whole


@pytest.mark.parametrize("content", ["null", "[]", "3", '"text"', "{}"])
def test_a_state_of_another_structure_is_refused(start, tmp_path, content):
    start(1, tmp_path)
    (tmp_path / "round-00001" / "state.json").write_text(content)
    refused(start, tmp_path, "round-00001 cannot be read")


@pytest.mark.parametrize("key", ["format", "round", "strategy", "model", "metrics"])
def test_a_state_that_lacks_something_is_refused(start, tmp_path, key):
    start(1, tmp_path)
    path = tmp_path / "round-00001" / "state.json"
    state = json.loads(path.read_text())
    del state[key]
    path.write_text(json.dumps(state))
    refused(start, tmp_path, f"round-00001 cannot be read .*{key}")


# Interruptions while writing --------------------------------------------------------


@pytest.mark.parametrize("step", ["save_file", "flush", "rename"])
def test_a_process_killed_while_writing_loses_only_that_round(
    start, tmp_path, monkeypatch, step
):
    whole = start(3)
    start(1, tmp_path)

    def kill(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if step == "rename":
            patch.setattr(Path, "rename", kill)
        else:
            patch.setattr(module, step, kill)
        with pytest.raises(KeyboardInterrupt):
            start(3, tmp_path)
    assert [n for n in saved_rounds(tmp_path) if n[0] != "."] == ["round-00001"]
    assert start(3, tmp_path) == whole


def test_what_a_killed_process_left_behind_is_removed(start, tmp_path):
    (tmp_path / ".partial-1").mkdir()
    (tmp_path / ".partial-1" / "model.safetensors").write_bytes(b"half a model")
    start(1, tmp_path)
    assert saved_rounds(tmp_path) == ["round-00001"]


def test_a_round_appears_only_when_its_files_are_complete(start, tmp_path, monkeypatch):
    seen = []
    rename = Path.rename

    def look(self, target):
        seen.append((saved_rounds(tmp_path), sorted(p.name for p in self.iterdir())))
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", look)
    start(1, tmp_path)
    [(there, files)] = seen
    assert not any(name.startswith("round-") for name in there)
    assert files == ["model.safetensors", "state.json", "state.safetensors"]


def test_files_are_flushed_to_the_disk_before_the_round_appears(
    start, tmp_path, monkeypatch
):
    events = []
    rename = Path.rename
    monkeypatch.setattr(os, "fsync", lambda handle: events.append("fsync"))
    monkeypatch.setattr(
        Path, "rename", lambda self, to: events.append("rename") or rename(self, to)
    )
    start(1, tmp_path)
    # three files and their folder; then the folder that holds the new name
    assert events == ["fsync"] * 4 + ["rename", "fsync"]


# A disk that is full ----------------------------------------------------------------


@pytest.fixture
def full_disk(monkeypatch):
    """Make the disk full from the given save on, at the given place."""

    def fill(place, first):
        calls = []

        def full(*args, **kwargs):
            calls.append(args)
            if len(calls) >= first:
                raise OSError(errno.ENOSPC, "No space left on device")
            return original(*args, **kwargs)

        owner, name = place
        original = getattr(owner, name)
        monkeypatch.setattr(owner, name, full)

    return fill


PLACES = {
    "arrays": ((module, "save_file"), 5),  # two files a round: from round 3 on
    "json": ((Path, "write_text"), 3),
    "flush": ((module, "flush"), 12),  # five a round: in round 3
    "folder": ((Path, "rename"), 3),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_full_disk_does_not_end_the_run(start, tmp_path, full_disk, caplog, place):
    whole = start(4)
    full_disk(*place)
    assert start(4, tmp_path) == whole
    errors = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "Round 3 could not be saved" in errors[0]
    assert "No space left on device" in errors[0]
    assert errors[1].endswith("the last saved round is 2")


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES.keys())
def test_a_full_disk_leaves_the_earlier_rounds_intact(
    start, tmp_path, full_disk, monkeypatch, place
):
    whole = start(4)
    full_disk(*place)
    start(4, tmp_path)
    monkeypatch.undo()
    assert saved_rounds(tmp_path) == ["round-00001", "round-00002"]
    assert start(4, tmp_path) == whole


def test_a_disk_that_is_full_from_the_start_says_that_nothing_is_saved(
    start, tmp_path, full_disk, caplog
):
    full_disk((module, "save_file"), 1)
    start(1, tmp_path)
    assert "the last saved round is none" in caplog.text


def test_after_a_full_disk_saving_goes_on(start, tmp_path, monkeypatch):
    save_file, rounds = module.save_file, []

    def full_in_round_2(arrays, path):
        rounds.append(path)
        if len(rounds) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        save_file(arrays, path)

    monkeypatch.setattr(module, "save_file", full_in_round_2)
    start(4, tmp_path)
    assert saved_rounds(tmp_path) == ["round-00003", "round-00004"]


def test_a_folder_that_vanished_is_made_again(start, tmp_path):
    folder = tmp_path / "run"

    def vanish(server_round, arrays):
        if server_round == 2:
            shutil.rmtree(folder)

    start(3, folder, evaluate_fn=vanish)
    assert saved_rounds(folder) == ["round-00002", "round-00003"]


def test_a_folder_that_became_a_file_does_not_end_the_run(start, tmp_path, caplog):
    folder = tmp_path / "run"

    def replace(server_round, arrays):
        if server_round == 2:
            shutil.rmtree(folder)
            folder.write_text("in the way")

    result = start(3, folder, evaluate_fn=replace)
    assert list(result.train_metrics_clientapp) == [1, 2, 3]
    assert "Round 3 could not be saved" in caplog.text


def test_a_folder_that_cannot_be_written_is_an_error_before_the_first_round(
    start, tmp_path
):
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        refused(start, folder, r"checkpoint='.*file.*' must be a folder that can be wr")


def test_a_read_only_folder_is_an_error_before_the_first_round(
    start, tmp_path, monkeypatch
):
    def read_only(self, data):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", read_only)  # root may write anywhere
    refused(start, tmp_path, "must be a folder that can be written: Permission denied")


# Settings ---------------------------------------------------------------------------


LEARNING = {"train_config": ConfigRecord({"lr": 0.1, "name": "adam"})}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"strategy": strategy_with(min_train_nodes=3)}, "min_train_nodes was 2, is n"),
        ({"strategy": strategy_with(SGD(0.7))}, "momentum=0.9.* is now .*momentum=0,"),
        ({"strategy": strategy_with(min_replies=2)}, "min_replies was 1, is now 2"),
        ({"train_config": None}, r"train_config\['lr'\] was 0.1, is now absent"),
        (
            {"train_config": ConfigRecord({"lr": 5.0, "name": "adam"})},
            r"train_config\['lr'\] was 0.1, is now 5.0",
        ),
        (
            {"train_config": ConfigRecord({"lr": 0.1, "name": "sgd"})},
            r"train_config\['name'\] is another",
        ),
        (
            {"evaluate_config": ConfigRecord({"bins": 10})},
            r"evaluate_config\['bins'\] was absent, is now 10",
        ),
    ],
    ids=lambda value: None if isinstance(value, dict) else value[:20],
)
@pytest.mark.parametrize("saved", [2, 3], ids=["interrupted", "finished"])
def test_a_run_with_other_settings_is_refused_by_name(
    start, tmp_path, options, text, saved
):
    start(saved, tmp_path, **LEARNING)
    refused(start, tmp_path, text, **{**LEARNING, **options})


def test_the_settings_of_a_torch_optimizer_are_compared(start, tmp_path):
    def strategy(rate):
        factory = functools.partial(torch.optim.AdamW, lr=rate)
        return strategy_with(TorchOptimizer(factory))

    start(2, tmp_path, strategy(0.05))
    text = "Server optimizer was .*AdamW, lr=0.05.*, is now .*AdamW, lr=0.1"
    refused(start, tmp_path, text, strategy(0.1))


def test_the_options_of_a_subclass_are_compared(start, tmp_path):
    class Decaying(AdditiveStrategy):
        def __init__(self, decay=0.5):
            super().__init__()
            self.decay = decay

    start(1, tmp_path, Decaying())
    refused(start, tmp_path, "decay was 0.5, is now 0.9", Decaying(0.9))


def test_a_finished_run_from_another_initial_model_is_refused(
    start, tmp_path, initial, caplog
):
    other = to_record({k: x + 1 for k, x in from_record(initial).items()})
    whole = start(4)
    start(3, tmp_path)
    refused(start, tmp_path, "another initial model", initial_arrays=other)
    # A model that is initialised without a seed is another in every process.
    assert start(4, tmp_path, initial_arrays=other) == whole
    assert "initial_arrays are not those that the saved run began with" in caplog.text
    with pytest.raises(CheckpointError, match="another initial model"):
        start(4, tmp_path, evaluate_fn=pytest.fail, initial_arrays=other)


def test_another_run_config_is_warned_of_by_name(initial, clients, tmp_path, caplog):
    def run(rounds=1, **config):
        caplog.clear()
        config["num-server-rounds"] = rounds
        grid = LocalGrid(clients, 6, config)
        strategy_with().start(grid, initial, num_rounds=rounds, checkpoint=tmp_path)
        return caplog.text

    assert "run config" not in run(lr=0.1, results="a")
    again = run(lr=0.1, results="a")
    assert "run config" not in again and "already complete" in again
    assert "Continuing" not in again
    more = run(2, lr=0.1, results="a")  # more rounds are no other run
    assert "run config" not in more and "Continuing after round 1" in more
    text = run(2, lr=0.5, results="b")
    assert "not that of the saved run: lr was 0.1, is now 0.5; results is ano" in text


def test_words_of_a_configuration_are_not_in_the_files(start, tmp_path):
    secret = ConfigRecord({"token": "hunter2", "key": b"hunter3", "all": ["hunter4"]})
    start(1, tmp_path, train_config=secret)
    for path in (tmp_path / "round-00001").iterdir():
        assert b"hunter" not in path.read_bytes()
        assert b"hunter3".hex().encode() not in path.read_bytes()


class Halving(AdditiveStrategy):
    """Halves the learning rate in rounds 2 and 4, as Flower's documentation does it."""

    def configure_train(self, server_round, arrays, config, grid):
        if server_round in (2, 4):
            config["lr"] *= 0.5
            config["history"] = [*config.get("history", []), float(server_round)]
            config.pop("warm", None)
        return super().configure_train(server_round, arrays, config, grid)

    def configure_evaluate(self, server_round, arrays, config, grid):
        config["seen"] = bytes([*config.get("seen", b""), server_round])
        return super().configure_evaluate(server_round, arrays, config, grid)


@pytest.mark.parametrize("stops", [(1,), (2,), (4,), (2, 3)])
def test_a_schedule_continues_where_it_was(start, tmp_path, stops):
    told = {"train": [], "evaluate": []}
    app = ClientApp()

    def note(phase):
        def answer(message, context):
            if context.node_config["partition-id"] == 0:
                told[phase].append(dict(message.content["config"]))
            metrics = MetricRecord({"num-examples": 1})
            content = {"arrays": message.content["arrays"], "metrics": metrics}
            return Message(RecordDict(content), reply_to=message)

        return answer

    app.train()(note("train"))
    app.evaluate()(note("evaluate"))
    config = ConfigRecord({"lr": 0.1, "warm": True})

    def run(rounds, folder=None):
        start(rounds, folder, Halving(), app, train_config=config)

    run(5)
    whole = {phase: list(seen) for phase, seen in told.items()}
    assert [c["lr"] for c in whole["train"]] == [0.1, 0.05, 0.05, 0.025, 0.025]
    assert ["warm" in c for c in whole["train"]] == [True] + [False] * 4
    assert whole["evaluate"][-1]["seen"] == bytes([1, 2, 3, 4, 5])
    for seen in told.values():
        seen.clear()
    for rounds in (*stops, 5):
        run(rounds, tmp_path)
    assert told == whole
    assert dict(config) == {"lr": 0.1, "warm": True}


# One run at a time ------------------------------------------------------------------


def test_a_folder_belongs_to_one_run_at_a_time(start, tmp_path):
    def second(server_round, arrays):
        text = rf"in use by another run, process {os.getpid()} on .*, since \d{{4}}"
        with pytest.raises(CheckpointError, match=text):
            start(2, tmp_path)
        return central(server_round, arrays)

    assert start(2, tmp_path, evaluate_fn=second) == start(2)
    assert start(3, tmp_path) == start(3)


def test_the_folder_of_a_killed_run_is_free(start, tmp_path):
    code = (
        "import os, sys\n"
        "from flower_ext.server.additive import AdditiveStrategy\n"
        "from flower_ext.server.checkpoint import Checkpoint\n"
        "with Checkpoint(sys.argv[1], AdditiveStrategy()).locked():\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout.readline() == b"held\n"
        refused(start, tmp_path, f"in use by another run, process {process.pid} ")
        process.kill()
        process.wait()
        start(1, tmp_path)


def test_a_folder_that_cannot_be_locked_is_used_with_a_warning(
    start, tmp_path, monkeypatch, caplog
):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(module.fcntl, "flock", unsupported)
    start(1, tmp_path)
    assert "cannot be locked (No locks available)" in caplog.text


# Paths ------------------------------------------------------------------------------


def test_the_home_is_expanded_and_the_whole_path_is_said(
    start, tmp_path, monkeypatch, caplog
):
    caplog.set_level(logging.INFO, "flwr")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    start(1, "~/run")
    assert saved_rounds(tmp_path / "home" / "run") == ["round-00001"]
    start(1, "run")
    assert f"Rounds are saved in {tmp_path / 'run'}" in caplog.text
    assert saved_rounds(tmp_path) == ["home", "run"]


@pytest.mark.parametrize("folder", ["", True, 3])
def test_what_is_no_path_is_refused(start, folder):
    refused(start, folder, f"checkpoint={folder!r} must be the path of a folder")
