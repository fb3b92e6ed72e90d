"""Personal state: it stays over rounds, and as it was where a client fails."""

import doctest
import pickle

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from torch import nn

from flower_ext import ClientHalf, Task, client_app
from flower_ext.client import personal as personal_module
from flower_ext.client.personal import PERSONAL, Personal, kept_unless_done
from flower_ext.core.arrays import to_record
from flower_ext.simulation import LocalGrid

LIKE = {"w": torch.zeros(2), "n": torch.zeros((), dtype=torch.int64)}
GROUP = {"w": torch.tensor([1.5, -2.0]), "n": torch.tensor(7)}


def test_it_gives_back_what_was_saved():
    state = RecordDict()
    personal = Personal(state)
    assert list(personal) == [] and "model" not in personal
    personal.save(model=GROUP, own={"loss": 0.5, "round": 3}, visits=2)
    again = Personal(pickle.loads(pickle.dumps(state)))
    assert sorted(again) == ["model", "own", "visits"] and "model" in again
    found = again.arrays("model", like=LIKE)
    for name, x in GROUP.items():
        assert torch.equal(found[name], x) and found[name].dtype == x.dtype
    assert again.numbers("own") == {"loss": 0.5, "round": 3}
    assert again.number("visits", 0) == 2
    again.save(own={"loss": 1.0})  # a group is replaced, not merged
    assert again.numbers("own") == {"loss": 1.0}
    again.drop("own")
    again.drop("own")
    assert again.numbers("own") == {}


def test_before_anything_was_saved_there_are_zeros_or_what_is_given():
    personal = Personal(RecordDict())
    found = personal.arrays("model", like=GROUP)
    assert found["w"].tolist() == [0, 0] and found["n"].dtype == torch.int64
    assert personal.arrays("model", like=LIKE, first=GROUP) == GROUP
    assert personal.number("visits", 4) == 4
    assert personal.numbers("own") == {}
    assert list(personal) == []


def test_what_was_saved_stays_as_it_was_when_the_tensors_change():
    personal, own = Personal(RecordDict()), {"w": torch.ones(2)}
    personal.save(model=own)
    own["w"] += 1
    found = personal.arrays("model", like=own)
    assert found["w"].tolist() == [1, 1]
    found["w"] += 1
    assert personal.arrays("model", like=own)["w"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("other", "text"),
    [
        ({**LIKE, "w": torch.zeros(3)}, r"'w' of 'model'=\(2,\) must be \(3,\)"),
        ({"w": LIKE["w"]}, r"'n' of 'model'=\(\) must be None"),
        ({**LIKE, "v": torch.zeros(1)}, r"'v' of 'model'=None must be \(1,\)"),
    ],
)
def test_arrays_of_another_model_are_refused(other, text):
    personal = Personal(RecordDict())
    personal.save(model=GROUP)
    with pytest.raises(ValueError, match=f"personal array {text}: was it saved"):
        personal.arrays("model", like=other)


def test_it_is_one_place_of_the_state_and_leaves_the_rest_alone():
    state = RecordDict({"mine": MetricRecord({"x": 1.0})})
    personal = Personal(state)
    personal.save(mine=2.0)
    assert sorted(state) == ["mine", PERSONAL + "mine"]
    assert list(personal) == ["mine"]
    with pytest.raises(KeyboardInterrupt), kept_unless_done(state):
        personal.save(mine=3.0, new=1.0)
        state["mine"] = MetricRecord({"x": 5.0})
        raise KeyboardInterrupt
    assert personal.number("mine", 0) == 2.0 and "new" not in personal
    assert state["mine"]["x"] == 5.0
    with pytest.raises(ValueError, match="gone"), kept_unless_done(state):
        personal.drop("mine")
        raise ValueError("gone")
    assert personal.number("mine", 0) == 2.0


# In a client ------------------------------------------------------------------------


def linear_task():
    data = {"x": torch.ones(4, 2), "y": torch.ones(4)}

    def loss(model, batch):
        return (model(batch["x"]).squeeze(1) - batch["y"]) ** 2

    return Task(lambda config: nn.Linear(2, 1), lambda context: (data, data), loss)


ARRAYS = {"weight": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}


class Counting(ClientHalf):
    """Counts its trainings and keeps its last model; fails where it is told to."""

    name = "plain"

    def count(self, local, where):
        local.personal.save(visits=local.personal.number("visits", 0) + 1)
        local.personal.save(model=local.end)
        if local.config.get("fails-in") == where:
            raise RuntimeError("told to fail")

    def begin(self, local):
        if local.config.get("fails-in") == "begin":
            self.count(local, "begin")

    def after_training(self, local):
        if local.config.get("fails-in") == "after_training":
            self.count(local, "after_training")

    def records(self, local):
        self.count(local, "records")
        # A metric that Flower refuses, after the half is done.
        bad = local.config.get("fails-in") == "reply"
        return {}, {"visits": {} if bad else local.personal.number("visits", 0)}

    def evaluate(self, local):
        if local.config.get("fails-in") == "evaluate":
            self.count(local, "evaluate")
        return {"visits": local.personal.number("visits", 0)}


@pytest.mark.parametrize(
    "where", ["begin", "after_training", "records", "reply", "evaluate"]
)
def test_a_client_that_fails_keeps_what_it_had(where):
    grid = LocalGrid(client_app(linear_task(), Counting), 1)
    [node] = grid.get_node_ids()

    def send(kind, **config):
        record = ConfigRecord({"lr": 0.1, **config})
        content = RecordDict({"arrays": to_record(ARRAYS), "config": record})
        [reply] = grid.send_and_receive([Message(content, node, kind)])
        return reply

    send("train")
    assert send("evaluate").content["metrics"]["visits"] == 1
    kind = "evaluate" if where == "evaluate" else "train"
    for _ in range(2):
        assert send(kind, **{"fails-in": where}).has_error()
        assert send("evaluate").content["metrics"]["visits"] == 1
    assert send("train").content["metrics"]["visits"] == 2


def test_nothing_of_it_is_in_a_reply():
    grid = LocalGrid(client_app(linear_task(), Counting), 1)
    [node] = grid.get_node_ids()
    content = RecordDict({"arrays": to_record(ARRAYS), "config": ConfigRecord()})
    [reply] = grid.send_and_receive([Message(content, node, "train")])
    assert sorted(reply.content) == ["arrays", "metrics"]


def test_doctests_pass():
    found = doctest.testmod(personal_module)
    assert found.attempted and not found.failed
