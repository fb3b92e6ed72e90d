"""The log of bytes: it adds up to what the tracker counts, whatever travels."""

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy, Tracker
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import Mechanism
from flower_ext.server.byte_log import SERVER, ByteLog, read_bytes
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import read_metrics
from flower_ext.simulation.local import LocalGrid
from flower_ext.wire import NF4
from flower_ext.wire.codec import PAYLOAD
from flower_ext.wire.traffic import REST, serialized_bytes

MODEL = {"a": np.zeros(3), "b": np.zeros((2, 4), np.float32)}


app = ClientApp()


@app.train()
@app.evaluate()
def work(message, context):
    """Train, or evaluate; client 1 fails."""
    client = int(context.node_config["partition-id"])
    if client == 1:
        raise RuntimeError("no data")
    content = {"metrics": MetricRecord({"num-examples": 1 + client, "loss": 0.5})}
    if message.metadata.message_type.startswith("train"):
        record = message.content.array_records["arrays"]
        arrays = {name: x + 1 for name, x in from_record(record).items()}
        content["arrays"] = to_record(arrays)
    return Message(RecordDict(content), reply_to=message)


def run(folder, rounds=2, strategy=None, grid=None, **options):
    return run_rounds(
        strategy or AdditiveStrategy(),
        grid or LocalGrid(app, 4),
        to_record(MODEL),
        num_rounds=rounds,
        tracker=Tracker(folder),
        callbacks=[ByteLog(folder / "bytes.csv")],
        **options,
    )


def added_up(rows, **of):
    chosen = [r for r in rows if all(r[key] == x for key, x in of.items())]
    return sum(row["bytes"] for row in chosen)


def test_rows_add_up_to_what_the_tracker_counts(tmp_path):
    run(tmp_path)
    rows = read_bytes(tmp_path / "bytes.csv")
    for metrics in read_metrics(tmp_path):
        number = metrics["round"]
        assert added_up(rows, round=number, sender=SERVER) == metrics["bytes/down"]
        assert added_up(rows, round=number, receiver=SERVER) == metrics["bytes/up"]
    assert {row["round"] for row in rows} == {1, 2}
    # A model down to each in both phases, a model up from those that do not fail.
    assert {row["receiver"] for row in rows} == {SERVER, 0, 1, 2, 3}
    assert {row["sender"] for row in rows} == {SERVER, 0, 2, 3}
    assert all((row["sender"] == SERVER) != (row["receiver"] == SERVER) for row in rows)
    up = [r for r in rows if r["receiver"] == SERVER and r["round"] == 1]
    names = [(r["phase"], r["name"]) for r in up if r["sender"] == 2]
    assert names == [
        *(("train", x) for x in ("arrays/a", "arrays/b", REST)),
        ("evaluate", REST),
    ]


def test_an_array_takes_what_its_absence_saves(tmp_path):
    run(tmp_path, 1)
    rows = read_bytes(tmp_path / "bytes.csv")
    found = [row["bytes"] for row in rows if row["name"] == "arrays/a"]
    with_a, without = (
        serialized_bytes(RecordDict({"arrays": to_record(x)}))
        for x in (MODEL, {"b": MODEL["b"]})
    )
    # The record's own length takes a byte more or less.
    assert all(abs(size - (with_a - without)) <= 2 for size in found)
    assert len(found) == 4 + 4 + 3 and min(found) > MODEL["a"].nbytes


def test_what_a_codec_makes_is_one_array(tmp_path, encoded_app):
    strategy = AdditiveStrategy(download=NF4(), upload=NF4(), fraction_evaluate=0.0)
    result = run(tmp_path, strategy=strategy, grid=LocalGrid(encoded_app, 2))
    # A step of SGD takes 0.1 off every value, and what is alike in a block is exact.
    for x in from_record(result.arrays).values():
        np.testing.assert_allclose(x, -0.2, rtol=1e-6)
    rows = read_bytes(tmp_path / "bytes.csv")
    assert {row["name"] for row in rows} == {f"arrays/{PAYLOAD}", REST}
    total = sum(x["bytes/down"] + x["bytes/up"] for x in read_metrics(tmp_path))
    assert added_up(rows) == total


@pytest.fixture
def encoded_app():
    """An app of the package, whose model has the arrays of the others here."""
    import torch

    from flower_ext import Task, client_app

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
            self.b = torch.nn.Parameter(torch.zeros(2, 4))

        def forward(self, x):
            return x * (self.a.sum() + self.b.sum())

    data = {"x": torch.ones(4)}
    task = Task(lambda _: Model(), lambda _: (data, data), lambda m, b: m(b["x"]))
    return client_app(task)


def test_a_continued_run_keeps_earlier_rounds_and_a_new_one_does_not(tmp_path):
    saved = {"checkpoint": tmp_path / "saved"}
    run(tmp_path, 1, **saved)
    path = tmp_path / "bytes.csv"
    first = read_bytes(path)
    with path.open("a", newline="") as file:  # an interruption in round 2
        file.write("2,train,-1,0,arrays/a,99\r\n2,train,-1,0,arr")
    assert [row["bytes"] for row in read_bytes(path)][-1] == 99
    run(tmp_path, 2, **saved)
    rows = read_bytes(path)
    assert rows[: len(first)] == first and len(rows) == 2 * len(first)
    run(tmp_path, 1)
    again = read_bytes(path)
    assert len(again) == len(first) and {row["round"] for row in again} == {1}


def test_it_is_refused_under_a_mechanism(tmp_path):
    mechanism = Mechanism(
        num_rounds=1,
        num_sampled_clients=4,
        population_size=4,
        noise_multiplier=1.0,
        target_delta=1e-3,
    )
    with pytest.raises(ValueError, match="ByteLog.*left out under a mechanism"):
        run(tmp_path, 1, strategy=AdditiveStrategy(mechanism=mechanism))


def test_a_full_disk_ends_nothing_and_leaves_no_half_round(tmp_path, monkeypatch):
    class Full(ByteLog):
        def round(self, this):
            def fail(this):
                yield {"round": this.number}
                raise OSError("no space left")

            if this.number == 1:
                with monkeypatch.context() as patch:
                    patch.setattr("flower_ext.server.byte_log._rows", fail)
                    return super().round(this)
            return super().round(this)

    run_rounds(
        AdditiveStrategy(),
        LocalGrid(app, 4),
        to_record(MODEL),
        num_rounds=2,
        callbacks=[Full(tmp_path / "bytes.csv")],
    )
    assert {row["round"] for row in read_bytes(tmp_path / "bytes.csv")} == {2}
