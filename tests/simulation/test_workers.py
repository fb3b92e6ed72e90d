"""Workers, in Ray and beside it: what happens when they die, which GPUs they see."""

import random
import re
import time
from collections import Counter
from functools import partial

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord
from flwr.serverapp.strategy import FedAvg

from flower_ext import AdditiveStrategy
from flower_ext._flower import CLIENT_CRASHED, NO_REPLY
from flower_ext.simulation import LocalGrid, policy

pytestmark = pytest.mark.slow


INITIAL = ArrayRecord({"w": Array(np.zeros(3, np.float32))})


@pytest.fixture(params=["ray", "processes"])
def make(request, four_gpus, packed_grids):
    """Make packed grids on a machine of four GPUs."""
    four_gpus(request.param)
    return partial(packed_grids, transport=request.param)


def values(replies, key):
    return [reply.content["metrics"][key] for reply in replies]


def test_an_app_that_cannot_be_loaded_ends_the_run(make, ask):
    with pytest.raises(RuntimeError, match="a worker cannot run clients") as caught:
        ask(make(client_app="no_such_module:app", num_workers=1), [0])
    assert "No module named 'no_such_module'" in str(caught.value)


def test_half_a_gigabyte_of_states_is_in_nobodys_memory(make, ask):
    from heavy import resident

    grid = make(500, client_app="heavy:app")
    first = max(values(ask(grid, range(10)), "mib"))
    before = resident()
    for count in (0, 1):
        replies = ask(grid, range(10, 500), timeout=300)
        assert set(values(replies, "count")) == {count}
        # Of 490 MB; a pack's states, and what Ray maps of its store, come and go.
        assert max(values(replies, "mib")) < first + 200
        assert resident() < before + 250
    assert grid.states.in_memory == 0
    assert len(list(grid.states.shelf().folder.iterdir())) < 1000
    folder = grid.states.shelf().folder
    grid.close()
    assert not folder.exists()


# Workers that die, and clients that hang --------------------------------------------


def test_a_client_that_kills_its_worker_is_the_only_error(make, ask):
    grid = make()
    assert values(ask(grid, range(12)), "visits") == [1] * 12
    replies = ask(grid, range(12), kill=[5])
    assert [r.has_error() for r in replies] == [i == 5 for i in range(12)]
    assert replies[5].error.code == CLIENT_CRASHED
    assert "its worker process died" in replies[5].error.reason
    # Nothing was counted twice, though some ran twice.
    good = [reply for reply in replies if not reply.has_error()]
    assert values(good, "visits") == [2] * 11
    assert values(ask(grid, [5]), "visits") == [2]


@pytest.mark.parametrize("partial_sums", [True, False])
def test_a_run_with_a_killed_worker_is_that_without(
    make, virtual, tmp_path, partial_sums
):
    def run(grid, **config):
        return AdditiveStrategy(fraction_train=0.5, fraction_evaluate=0.0).start(
            grid, INITIAL, num_rounds=3, train_config=ConfigRecord(config)
        )

    mark = tmp_path / "killed"
    plain = run(LocalGrid(virtual, 12))
    ours = run(make(partial_sums=partial_sums), **{"kill-once": str(mark)})
    assert mark.exists()
    np.testing.assert_allclose(
        ours.arrays["w"].numpy(), plain.arrays["w"].numpy(), rtol=1e-6
    )
    for metrics in ours.train_metrics_clientapp.values():
        assert (metrics["num-replies"], metrics["num-errors"]) == (6, 0)
    assert [m["visits"] for m in ours.train_metrics_clientapp.values()] == [
        m["visits"] for m in plain.train_metrics_clientapp.values()
    ]


KILLED = {"kill": 1}
EATS = {"eat": 1, "mib": 256}


@pytest.mark.parametrize(
    ("partial_sums", "faults"),
    [(True, [EATS, {**EATS, "killed": True}]), (False, [KILLED])],
)
def test_a_round_says_how_many_were_lost(make, partial_sums, faults):
    grid = make(6, partial_sums=partial_sums)
    for fault in faults:
        strategy = AdditiveStrategy(fraction_evaluate=0.0)
        result = strategy.start(
            grid, INITIAL, num_rounds=1, train_config=ConfigRecord(fault)
        )
        counts = result.train_metrics_clientapp[1]
        assert (counts["num-replies"], counts["num-errors"]) == (5, 1)
        # Clients 0 and 2 to 5 of 1, 3, 4, 5, 6 examples: each moves by its number.
        np.testing.assert_allclose(
            result.arrays["w"].numpy(), np.dot([0, 2, 3, 4, 5], [1, 3, 4, 5, 6]) / 19
        )


def test_a_client_that_cannot_be_interrupted_is_stopped(make, ask, monkeypatch):
    grid = make(client_timeout=1.0, num_examples=[1.0] * 12)
    ask(grid, range(4))
    monkeypatch.setattr(policy, "HANG_SECONDS", 1.0)
    replies = ask(grid, [0, 1], stuck=[1])
    assert [reply.has_error() for reply in replies] == [False, True]
    assert "client_timeout=1 s" in replies[1].error.reason
    assert not any(reply.has_error() for reply in ask(grid, range(4)))


def test_after_the_timeout_there_are_errors_and_the_next_round_goes_on(make, ask):
    grid = make()
    ask(grid, range(4))
    begun = time.monotonic()
    replies = ask(grid, [0, 1], timeout=2, sleep=[1])
    assert time.monotonic() - begun < 45  # the client sleeps for 60
    assert [reply.has_error() for reply in replies] == [False, True]
    assert replies[1].error.code == NO_REPLY
    assert replies[1].error.reason == "no reply after timeout=2 s"
    assert values(ask(grid, [1, 0]), "visits") == [2, 3]


# GPUs ------------------------------------------------------------------------------


def gpus(replies):
    return [reply.content["where"]["gpus"] for reply in replies]


def test_each_worker_sees_its_own_gpus(make, ask):
    grid = make(num_workers=None, resources={"num_gpus": 2})
    seen = set(gpus(ask(grid, range(12))))
    assert len(seen) == 2
    devices = [device for pair in seen for device in pair.split(",")]
    assert sorted(devices) == ["0", "1", "2", "3"]


def test_fractions_share_a_gpu(make, ask):
    grid = make(num_workers=4, resources={"num_gpus": 0.5})
    replies = ask(grid, range(12))
    workers = {}
    for pid, gpu in zip(values(replies, "pid"), gpus(replies), strict=True):
        workers[pid] = gpu
    assert len(workers) == 4
    assert sorted(Counter(workers.values()).values()) == [2, 2]


def resources(partition_id, run_config):
    """One client needs all four GPUs, one a half, the other none."""
    if partition_id == 0:
        return {"num_gpus": 4}
    if partition_id == run_config["smaller"]:
        return {"num_gpus": 0.5}
    return {}


def test_clients_may_differ_and_more_demand_than_supply_waits(make, ask):
    grid = make(num_workers=None, resources=resources, run_config={"smaller": 1})
    for _ in range(2):
        seen = gpus(ask(grid, range(3), timeout=100))
        assert sorted(seen[0].split(",")) == ["0", "1", "2", "3"]
        assert seen[1] in ["0", "1", "2", "3"]
        assert seen[2] == "none"


@pytest.mark.parametrize(
    ("need", "message"),
    [
        ({"num_gpus": 5}, "client 0 needs 1 CPUs and 5 GPUs, more than any machine"),
        ({"num_cpus": 64}, "client 0 needs 64 CPUs and 0 GPUs, more than any machine"),
        (lambda i, _: {"num_gpus": i}, "client 5 needs 1 CPUs and 5 GPUs"),
    ],
)
def test_what_does_not_exist_is_refused_before_the_first_round(make, need, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(num_workers=None, resources=need)


# Cohorts ----------------------------------------------------------------------------


def test_cohorts_of_flowers_own_strategies_follow_the_global_seed(make):
    grid = make(1000)
    strategy = FedAvg(fraction_train=0.01)
    arrays = ArrayRecord({"w": Array(np.zeros(1))})
    cohorts = []
    for _ in range(2):
        random.seed(5)
        messages = strategy.configure_train(1, arrays, ConfigRecord(), grid)
        cohorts.append([message.metadata.dst_node_id for message in messages])
    assert cohorts[0] == cohorts[1] and len(set(cohorts[0])) == 10
