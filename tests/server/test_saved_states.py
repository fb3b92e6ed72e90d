"""Clients' states in a checkpoint: of the model's own round, and written once."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy import Result

from flower_ext.client.app import client_app
from flower_ext.client.half import ClientHalf
from flower_ext.core.arrays import to_record
from flower_ext.server import saved_states as module
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.checkpoint import Checkpoint, CheckpointError
from flower_ext.server.optimizers import SGD
from flower_ext.simulation.local import LocalGrid
from flower_ext.simulation.states import ClientStates

LARGE = 50_000  # float32 numbers: 200 KB, in a file of the store
MIDDLE = 5_000  # 20 KB: in memory, and in a file of its own in a checkpoint


def state(value, size):
    arrays = ArrayRecord({"w": Array(np.full(size, value, np.float32))})
    return RecordDict({"model": arrays, "n": MetricRecord({"n": value})})


def value(states, client):
    """Return what a client's state was made of."""
    found = states.read(client)
    [array] = found["model"].values()
    assert (array.numpy() == found["n"]["n"]).all()
    return found["n"]["n"]


class Run:
    """A run in a folder, without clients: its states are put by hand."""

    def __init__(self, folder, num_clients=10, *, states=True, **options):
        self.states = ClientStates(num_clients) if states else None
        grid = SimpleNamespace(states=self.states)
        strategy = AdditiveStrategy()
        self.checkpoint = Checkpoint(folder, strategy, grid=grid, **options)
        self.result = Result(arrays=to_record({"w": np.zeros(1, np.float32)}))

    def save(self, server_round, **states):
        for name, new in states.items():
            self.states.write(int(name.removeprefix("c")), new)
        return self.checkpoint.save(server_round, self.result)

    def restore(self):
        return self.checkpoint.restore(self.result)


@pytest.fixture(autouse=True)
def no_waiting_for_disks(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)


def clients(folder, server_round):
    """Return the files of states of a saved round, by name."""
    place = folder / f"round-{server_round:05d}" / "clients"
    return {path.name: path for path in place.iterdir()}


def inode(path):
    return path.stat().st_ino


def test_states_come_back_with_their_round(tmp_path):
    first = Run(tmp_path)
    first.save(1, c0=state(1, 1), c3=state(1, MIDDLE), c7=state(1, LARGE))
    first.save(2, c0=state(2, 1), c7=state(2, LARGE), c8=state(2, 1))
    for expected in ({0: 2, 3: 1, 7: 2, 8: 2}, {0: 1, 3: 1, 7: 1}):
        again = Run(tmp_path)
        again.restore()
        assert {c: value(again.states, c) for c in again.states.versions()} == expected
        rounds = again.checkpoint.rounds()
        shutil.rmtree(tmp_path / f"round-{rounds[-1]:05d}")


def test_only_new_states_are_written(tmp_path):
    run = Run(tmp_path)
    run.save(1, c1=state(1, MIDDLE), c2=state(1, LARGE), c3=state(1, 1))
    run.save(2, c2=state(2, LARGE))
    one, two = clients(tmp_path, 1), clients(tmp_path, 2)
    assert set(one) == set(two) == {"1", "2", "small"}
    assert inode(one["1"]) == inode(two["1"])
    assert inode(one["2"]) != inode(two["2"])
    again = Run(tmp_path)  # what goes on knows what is written
    again.restore()
    again.save(3, c1=state(3, MIDDLE))
    three = clients(tmp_path, 3)
    assert inode(two["2"]) == inode(three["2"])
    assert inode(two["1"]) != inode(three["1"])
    assert [value(again.states, c) for c in (1, 2, 3)] == [3, 2, 1]


def test_a_round_that_is_saved_again_writes_nothing_twice(tmp_path):
    run = Run(tmp_path)
    run.save(1, c2=state(1, LARGE), c3=state(1, MIDDLE))
    before = {name: inode(path) for name, path in clients(tmp_path, 1).items()}
    run.save(1)
    after = {name: inode(path) for name, path in clients(tmp_path, 1).items()}
    assert (after["2"], after["3"]) == (before["2"], before["3"])


def test_a_thousand_clients_of_which_ten_change_cost_ten(tmp_path, monkeypatch):
    run = Run(tmp_path, 1000)
    for client in range(1000):
        run.states.write(client, state(0, MIDDLE))
    assert run.save(1)
    written = []
    monkeypatch.setattr(module, "flush", lambda path: written.append(path.name))
    for server_round in range(2, 6):
        written.clear()
        for client in range(10):
            run.states.write(100 * client + server_round, state(server_round, MIDDLE))
        assert run.save(server_round)
        assert len(written) == 12  # ten, the small ones, and the folder
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    size = sum({inode(path): path.stat().st_size for path in files}.values())
    assert size < 1.1 * 1010 * 4 * MIDDLE
    again = Run(tmp_path, 1000)
    assert again.restore() == 5
    values = [value(again.states, client) for client in range(12)]
    assert values == [0, 0, 2, 3, 4, 5, 0, 0, 0, 0, 0, 0]


def test_a_round_stands_without_the_others(tmp_path):
    run = Run(tmp_path / "a")
    run.save(1, c2=state(1, LARGE), c3=state(1, MIDDLE))
    for server_round in range(2, 6):
        run.save(server_round, c3=state(server_round, MIDDLE))
    assert run.checkpoint.rounds() == [4, 5]
    (tmp_path / "b").mkdir()
    shutil.copytree(tmp_path / "a" / "round-00005", tmp_path / "b" / "round-00005")
    shutil.rmtree(tmp_path / "a")
    again = Run(tmp_path / "b")
    assert again.restore() == 5
    assert (value(again.states, 2), value(again.states, 3)) == (1, 5)


def test_states_are_saved_also_where_a_disk_has_no_links(tmp_path, monkeypatch):
    def refuse(self, target):
        raise OSError("no links here")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    test_states_come_back_with_their_round(tmp_path / "a")
    run = Run(tmp_path / "b")
    run.save(1, c2=state(1, LARGE))
    shutil.rmtree(tmp_path / "b" / "round-00001")  # or where the round is gone
    run.save(2)
    again = Run(tmp_path / "b")
    again.restore()
    assert value(again.states, 2) == 1


def test_a_state_that_ends_is_in_no_later_round(tmp_path):
    run = Run(tmp_path)
    run.save(1, c1=state(1, 1), c2=state(1, LARGE))
    run.save(2, c1=RecordDict(), c2=RecordDict())
    assert not (tmp_path / "round-00002" / "clients").exists()
    again = Run(tmp_path)
    again.states.write(5, state(9, 1))  # of another run on the same grid
    again.restore()
    assert not again.states.versions()


def test_a_run_without_states_writes_no_folder(tmp_path):
    run = Run(tmp_path)
    run.save(1)
    assert not (tmp_path / "round-00001" / "clients").exists()
    assert Run(tmp_path).restore() == 1


def test_what_others_may_read_of_states_is_nothing(tmp_path):
    Run(tmp_path).save(1, c1=state(1, LARGE))
    assert (tmp_path / "round-00001" / "clients").stat().st_mode & 0o077 == 0


# Halves ------------------------------------------------------------------------------


class OwnModel(ClientHalf):
    """Keeps a model that follows the trained one with momentum, and is evaluated."""

    name = "own-model"

    def after_training(self, local):
        own = local.personal.arrays("model", like=local.start, first=local.start)
        speed = local.personal.arrays("speed", like=local.start)
        speed = {k: 0.9 * v + 0.3 * (local.end[k] - own[k]) for k, v in speed.items()}
        own = {k: v + speed[k] for k, v in own.items()}
        visits = local.personal.number("visits", 0) + 1
        local.personal.save(model=own, speed=speed, visits=visits)

    def model_to_evaluate(self, local):
        return local.personal.arrays("model", like=local.start, first=local.start)


class Personalized(AdditiveStrategy):
    client_half = OwnModel


@pytest.mark.parametrize("stops", [(1,), (2,), (1, 3)])
def test_personal_models_continue_bit_for_bit(initial, tmp_path, task, stops):
    def run(rounds, folder=None):
        strategy = Personalized(fraction_train=0.5, server_optimizer=SGD(momentum=0.9))
        grid = LocalGrid(client_app(task, OwnModel), 6, {"batch-size": 4, "lr": 0.1})
        return strategy.start(grid, initial, num_rounds=rounds, checkpoint=folder)

    whole = run(4)
    for rounds in (*stops, 4):
        resumed = run(rounds, tmp_path)
    assert resumed == whole
    # It is not so by itself: what clients evaluate depends on what they kept.
    shutil.rmtree(tmp_path / "round-00004")
    path = tmp_path / "round-00003" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "clients": None}))
    assert run(4, tmp_path) != whole


# Damage ------------------------------------------------------------------------------


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.unlink()  # and not through all of its names
    path.write_bytes(data)


DAMAGE = {"cut": cut, "flipped": flip, "gone": Path.unlink, "empty": Path.touch}


@pytest.mark.parametrize("file", ["1", "2", "small"])
@pytest.mark.parametrize("how", ["cut", "flipped", "gone", "of another round"])
def test_a_damaged_state_is_refused_and_the_round_before_is_there(tmp_path, file, how):
    run = Run(tmp_path)
    for i in (1, 2):
        run.save(i, c1=state(i, MIDDLE), c2=state(i, LARGE), c3=state(i, 1))
    path = clients(tmp_path, 2)[file]
    if how == "of another round":
        shutil.copyfile(clients(tmp_path, 1)[file], path)
    else:
        DAMAGE[how](path)
    again = Run(tmp_path)
    again.states.write(0, state(7, 1))
    with pytest.raises(CheckpointError, match=f"round-00002 cannot be read.*{file}"):
        again.restore()
    assert list(again.states.versions()) == [0]  # nothing was taken over
    shutil.rmtree(tmp_path / "round-00002")
    assert again.restore() == 1
    assert [value(again.states, client) for client in (1, 2, 3)] == [1, 1, 1]


def test_states_of_clients_that_are_not_there_are_refused(tmp_path):
    Run(tmp_path).save(1, c9=state(1, 1))
    with pytest.raises(CheckpointError, match="num_clients=9 must be > 9, a client wi"):
        Run(tmp_path, 9).restore()


def test_a_full_disk_leaves_the_round_before(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save(1, c1=state(1, MIDDLE))

    def full(self, data):
        raise OSError("No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert not run.save(2, c1=state(2, MIDDLE))
    again = Run(tmp_path)
    assert again.restore() == 1 and value(again.states, 1) == 1
    assert run.save(3)  # what could not be written is still new
    last = Run(tmp_path)
    assert last.restore() == 3 and value(last.states, 1) == 2


# Out of reach ------------------------------------------------------------------------


def test_where_states_are_out_of_reach_the_log_says_so(tmp_path, caplog):
    def run():
        caplog.clear()
        run = Run(tmp_path, states=False)
        run.restore()
        return run, caplog.text

    plain, text = run()
    assert "anew" not in text  # but in what the run says first
    assert "clients of a continued run start anew" in plain.checkpoint.contents()
    plain.save(1)
    _, text = run()
    assert text.count("Clients start anew: their states are not in the checkp") == 1
    caplog.clear()
    now = Run(tmp_path)
    assert now.checkpoint.contents() == f"{tmp_path}, with what clients keep"
    now.restore()  # in reach now, too late
    assert caplog.text.count("Clients start anew: their states are not in the ch") == 1


def test_states_that_cannot_be_handed_out_are_not_forgotten(tmp_path, caplog):
    Run(tmp_path).save(1, c1=state(1, 1), c2=state(1, LARGE))
    text = "holds the states of 2 clients, which this grid cannot hand to them"
    with pytest.raises(CheckpointError, match=text):
        Run(tmp_path, states=False).restore()
    Run(tmp_path / "b").save(1)  # there are none to forget
    assert Run(tmp_path / "b", states=False).restore() == 1
    assert "Clients start anew" in caplog.text


def test_what_a_client_has_spent_is_not_put_back(tmp_path):
    spent = RecordDict(
        {"account/silo": ConfigRecord({"steps": [2]}), **state(1, LARGE)}
    )
    run = Run(tmp_path)
    run.save(1, c1=spent)
    again = Run(tmp_path)
    again.restore()
    assert set(again.states.read(1)) == {"model", "n"}
    again.save(2)
    same = run.states.read(1)
    same["account/silo"]["steps"] = [5]
    run.states.write(1, same)
    run.restore()
    assert run.states.read(1)["account/silo"]["steps"] == [5]
