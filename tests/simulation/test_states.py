"""The store of clients' states: what comes back, where it is, and what it leaves."""

import gc
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
from flwr.app import (
    Array,
    ArrayRecord,
    ConfigRecord,
    Message,
    MetricRecord,
    RecordDict,
)

from flower_ext._flower import NO_REPLY
from flower_ext.simulation.clients import LostState, run_client
from flower_ext.simulation.jobs import Job
from flower_ext.simulation.setting import Setting
from flower_ext.simulation.states import ClientStates, PackStates, Shelf, encode


@pytest.fixture(autouse=True)
def temporary(tmp_path, monkeypatch):
    """Keep what the tests write apart from other processes' folders."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def arrays(size=1, value=0.0):
    return ArrayRecord({"w": Array(np.full(size, value, np.float32))})


def counted(n):
    return RecordDict({"visits": MetricRecord({"n": n})})


def files(store):
    return sorted(path.name for path in store.shelf().folder.iterdir())


ODD = RecordDict(
    {
        "z": MetricRecord({"i": -(2**62), "f": 0.1, "nan": float("nan"), "l": [1, 2]}),
        "a/b": ConfigRecord({"s": "ä", "b": b"\0\xff", "t": True, "many": [b"", b"x"]}),
        "": ArrayRecord(
            {
                "zero-d": Array(np.array(2.5, np.float16)),
                "empty": Array(np.zeros((0, 3))),
                "fortran": Array(np.asfortranarray(np.arange(6.0).reshape(2, 3))),
                "text": Array("object", (2,), "my-own", b"anything"),
            }
        ),
        "none": ArrayRecord(),
    }
)


def test_a_state_comes_back_as_it_was_whatever_is_in_it():
    for memory in (0, 10**6):
        store = ClientStates(5, memory)
        store.write(3, ODD)
        found = store.read(3)
        assert list(found) == list(ODD)
        assert repr(found["z"]) == repr(ODD["z"])
        assert type(found["z"]["i"]) is int and found["a/b"] == ODD["a/b"]
        for name, array in ODD[""].items():
            assert found[""][name] == array
        assert encode(found) == encode(ODD)
        # What is handed out is the caller's own.
        found["a/b"]["many"].append(b"y")
        assert store.read(3)["a/b"] == ODD["a/b"]


def test_a_client_without_a_state_has_an_empty_one_and_costs_nothing(temporary):
    store = ClientStates(3)
    assert len(store.read(1)) == 0
    store.write(1, RecordDict())
    store.write(2, counted(1))
    store.write(2, RecordDict())
    assert not store.versions() and store.in_memory == 0
    assert not list(temporary.iterdir())  # not even a folder


def test_small_states_are_in_memory_up_to_a_bound(temporary):
    size = len(encode(counted(1)))
    store = ClientStates(10, memory=3 * size)
    for client in range(5):
        store.write(client, counted(client))
    assert store.in_memory == 3 * size
    assert len(files(store)) == 2
    assert [store.read(i)["visits"]["n"] for i in range(5)] == [0, 1, 2, 3, 4]
    store.write(0, RecordDict())  # makes room
    store.write(4, counted(9))
    store.tidy()
    assert store.in_memory == 3 * size and len(files(store)) == 1
    assert store.read(4)["visits"]["n"] == 9


def test_a_large_state_is_a_file_and_the_one_before_is_removed_when_all_is_quiet():
    store = ClientStates(2)
    store.write(0, RecordDict({"model": arrays(50_000, 1.0)}))
    assert store.in_memory == 0
    [first] = files(store)
    lent = store.lend([0], named=True)
    store.write(0, RecordDict({"model": arrays(50_000, 2.0)}))
    # Whoever was sent the name before still finds it.
    assert store.shelf().read(lent[0])["model"]["w"].numpy()[0] == 1.0
    store.tidy()
    assert first not in files(store) and len(files(store)) == 1
    assert store.read(0)["model"]["w"].numpy()[0] == 2.0


def test_a_thousand_clients_of_a_megabyte_take_no_memory():
    import psutil

    store = ClientStates(1000)
    store.write(0, RecordDict({"model": arrays(250_000)}))
    gc.collect()
    before = psutil.Process().memory_info().rss
    for client in range(1000):
        store.write(client, RecordDict({"model": arrays(250_000, client)}))
    gc.collect()
    assert psutil.Process().memory_info().rss - before < 64 * 2**20
    assert store.in_memory == 0
    assert store.read(999)["model"]["w"].numpy()[-1] == 999
    store.close()


# What travels ------------------------------------------------------------------------


def test_names_travel_to_who_sees_the_folder_and_bytes_to_who_does_not(tmp_path):
    store = ClientStates(3)
    state = RecordDict({"model": arrays(50_000, 3.0)})
    store.write(0, state)
    elsewhere = Shelf(tmp_path / "of another machine")
    assert not elsewhere.is_here()
    for shelf in (store.shelf(), elsewhere):
        lent = store.lend([0, 2], named=shelf.is_here())
        assert shelf.read(lent.get(0)) == state and list(lent) == [0]
        kept = shelf.write(state)
        assert isinstance(kept, str) == shelf.is_here()
        store.take(1, kept)
        assert store.read(1) == state and store.in_memory == 0
    assert elsewhere.write(RecordDict()) is None
    assert isinstance(store.shelf().write(counted(1)), bytes)


def test_a_file_outside_the_folder_is_none(tmp_path):
    (tmp_path / "secret").write_bytes(b"")
    with pytest.raises(LostState, match="No such file"):
        ClientStates(1).shelf().read("../secret")


@pytest.mark.parametrize("damage", ["gone", "cut", "longer", "empty", "junk"])
def test_a_lost_file_is_said_and_no_empty_state(damage):
    store = ClientStates(1)
    store.write(0, RecordDict({"model": arrays(50_000)}))
    path = store.saved(0)
    data = path.read_bytes()
    path.unlink()
    if damage != "gone":
        changed = {"cut": data[:-7], "longer": data + b"x", "empty": b""}
        path.write_bytes(changed.get(damage, b"?" * len(data)))
    with pytest.raises(LostState):
        store.read(0)
    # The client says so once, to the server too, and starts anew.
    for named in (True, False):
        pack = PackStates(store.lend([0], named=named), store.shelf())
        outcome = run(pack)
        assert outcome.error.code == NO_REPLY
        assert "the client's state is lost, it starts anew" in outcome.error.reason
    store.take_back(pack.changed)
    assert run(store).content["visits"]["n"] == 1


# Where clients run -------------------------------------------------------------------


def count(message, context):
    """Count visits in the state; fail where told to, after it was changed."""
    visits = context.state.metric_records.get("visits", MetricRecord({"n": 0}))
    visits["n"] += 1
    context.state["visits"] = visits
    if message.metadata.message_type == "train.fail":
        raise ValueError("told to")
    return Message(RecordDict({"visits": visits}), reply_to=message)


def run(states, kind="train", client=0):
    job = Job(9, client, kind, "", {}, {})
    return run_client(count, Setting(None, range(3)), job, [], states)


@pytest.mark.parametrize("size", [0, 50_000])
def test_a_client_that_is_asked_twice_in_a_pack_goes_on_where_it_was(size):
    store = ClientStates(3)
    store.write(0, RecordDict({"beside": arrays(size), **counted(5)}))
    pack = PackStates(store.lend(range(3), named=True), store.shelf())
    assert run(pack).content["visits"]["n"] == 6
    assert run(pack, "train.fail").error is not None
    assert run(pack).content["visits"]["n"] == 7
    assert run(pack, client=1).content["visits"]["n"] == 1
    # What is not taken back, of a worker that died or is late, was never there.
    assert store.read(0)["visits"]["n"] == 5 and len(store.read(1)) == 0
    store.take_back(pack.changed)
    assert store.read(0)["visits"]["n"] == 7 and store.read(1) == counted(1)


def test_states_that_are_and_stay_empty_do_not_travel():
    store = ClientStates(3)
    store.write(1, counted(1))
    pack = PackStates(store.lend(range(3), named=True), store.shelf())
    for client in range(3):
        pack.write(client, RecordDict())
    assert pack.changed == {1: None}
    store.take_back(pack.changed)
    assert not store.versions()


# What a checkpoint does --------------------------------------------------------------


def test_each_new_state_has_another_version():
    store = ClientStates(3)
    seen = set()
    for _ in range(3):
        store.write(1, counted(1))
        seen.add(store.versions()[1])
    assert len(seen) == 3
    store.write(2, counted(1))
    assert len({*seen, *store.versions().values()}) == 4


def test_saved_states_replace_all_others(tmp_path):
    store = ClientStates(4)
    store.write(0, RecordDict({"model": arrays(50_000, 7.0)}))
    store.write(1, counted(1))
    other = ClientStates(4)
    other.write(1, counted(5))
    other.write(2, RecordDict({"model": arrays(50_000, 8.0)}))
    other.restore({client: store.saved(client) for client in store.versions()})
    store.close()  # what was restored does not hang on it
    assert set(other.versions()) == {0, 1}
    assert other.read(0)["model"]["w"].numpy()[0] == 7.0
    assert other.read(1)["visits"]["n"] == 1
    assert len(files(other)) == 1


def test_a_state_of_a_client_that_is_not_there_is_refused():
    store = ClientStates(3)
    store.write(1, counted(1))
    with pytest.raises(ValueError, match="num_clients=3 must be > 3, a client wi"):
        store.restore({0: encode(counted(2)), 3: encode(counted(2))})
    assert store.read(1)["visits"]["n"] == 1


def spent(n, **beside):
    return RecordDict({"account/silo": ConfigRecord({"steps": [n]}), **beside})


@pytest.mark.parametrize("size", [1, 50_000])
def test_what_was_spent_is_never_put_back(size):
    saved = encode(spent(2, model=arrays(size, 1.0)))
    fresh = ClientStates(2)
    fresh.restore({0: saved})
    assert list(fresh.read(0)) == ["model"]  # it has to know by itself
    used = ClientStates(2)
    used.write(0, spent(5, model=arrays(size, 2.0)))
    used.write(1, spent(4, model=arrays(size, 2.0)))
    used.restore({0: saved})
    assert used.read(0)["account/silo"]["steps"] == [5]
    assert used.read(0)["model"]["w"].numpy()[0] == 1.0
    assert used.read(1) == spent(4)
    bare = ClientStates(1)
    bare.write(0, spent(5))
    bare.restore({0: encode(RecordDict({"model": arrays(size, 1.0)}))})
    assert set(bare.read(0)) == {"account/silo", "model"}


# The folder --------------------------------------------------------------------------


def test_the_folder_ends_with_the_store(temporary):
    for end in (ClientStates.close, lambda store: None):
        store = ClientStates(1)
        store.write(0, RecordDict({"model": arrays(50_000)}))
        assert len(list(temporary.iterdir())) == 1
        end(store)
        del store
        gc.collect()
        assert not list(temporary.iterdir())
    store = ClientStates(1)
    store.close()
    store.write(0, RecordDict({"model": arrays(50_000)}))  # it may be used again
    assert store.read(0)["model"]["w"].numpy().shape == (50_000,)


def test_the_folder_of_a_killed_process_is_removed_and_no_others(temporary):
    code = (
        "import sys, tempfile\n"
        "tempfile.tempdir = sys.argv[1]\n"
        "from flower_ext.simulation.states import ClientStates\n"
        "store = ClientStates(1)\n"
        "print(store.shelf().folder, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code, str(temporary)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:
        folder = Path(process.stdout.readline().strip())
        first = ClientStates(1)
        first.shelf()
        assert folder.is_dir()
        process.kill()
        process.wait()
        assert folder.is_dir()
        second = ClientStates(1)
        second.shelf()
        assert not folder.exists()
        assert first.shelf().is_here()


@pytest.mark.parametrize("memory", [-1, 0.5, "1"])
def test_a_bound_that_is_none_is_refused(memory):
    with pytest.raises(ValueError, match="state_memory="):
        ClientStates(1, memory)
