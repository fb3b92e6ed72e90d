"""Ray actors: which GPUs they hold, and what others hold."""

import time
from functools import partial

import pytest

from flower_ext.simulation import policy, ray_workplace

pytestmark = pytest.mark.slow


@pytest.fixture
def make(cluster, packed_grids):
    """Make packed grids on Ray."""
    cluster()
    return partial(packed_grids, transport="ray")


def values(replies, key):
    return [reply.content["metrics"][key] for reply in replies]


@pytest.mark.parametrize("num_clients, free", [(12, 1), (2, 2)])
def test_workers_start_with_the_grid_and_are_not_more_than_clients(
    make, ask, num_clients, free
):
    import ray

    grid = make(num_clients, num_workers=3, resources={"num_gpus": 1})
    end = time.monotonic() + 30
    while ray.available_resources().get("GPU", 0) != free:
        assert time.monotonic() < end, ray.available_resources()
        time.sleep(0.1)
    # They are those that run the clients.
    assert values(ask(grid, [0]), "visits") == [1]
    assert ray.available_resources().get("GPU", 0) == free


@pytest.fixture
def hold(make):
    """Let somebody else hold GPUs of the four until the end of the test."""
    import ray

    make(1)  # Ray is there
    holders = []

    def start(num_gpus):
        holder = ray.remote(num_gpus=num_gpus)(
            type("Holder", (), {"ready": lambda self: 1})
        ).remote()
        ray.get(holder.ready.remote())
        holders.append(holder)

    yield start
    for holder in holders:
        ray.kill(holder)


def test_gpus_that_flowers_own_workers_hold_are_refused_not_waited_for(
    make, hold, monkeypatch
):
    hold(4)
    monkeypatch.setattr(ray_workplace, "in_simulation", lambda grid: True)
    with pytest.raises(ValueError, match="4 of 4 GPUs are held by others: by Flower's"):
        make(resources={"num_gpus": 0.5})
    make(1)  # who needs none is not refused


def test_flowers_workers_are_looked_at_once_they_are_there(make, monkeypatch):
    import ray

    make(1)
    now = iter([{"CPU": 4, "GPU": 4}, {"CPU": 4, "GPU": 4}, {"CPU": 2, "GPU": 3.5}])
    monkeypatch.setattr(ray, "available_resources", lambda: next(now))
    monkeypatch.setattr(ray_workplace, "in_simulation", lambda grid: True)
    with pytest.raises(ValueError, match=r"0\.5 of 4 GPUs are held by others"):
        make(resources={"num_gpus": 0.5})
    now = iter([{"CPU": 4, "GPU": 4}, {"CPU": 3, "GPU": 4}])
    make(resources={"num_gpus": 0.5})  # they hold CPUs only


def test_gpus_that_are_never_free_end_the_run_with_the_reason(
    make, ask, hold, monkeypatch
):
    monkeypatch.setattr(policy, "START_SECONDS", 0.5)
    monkeypatch.setattr(policy, "HELD_SECONDS", 1.0)
    hold(4)
    grid = make(resources={"num_gpus": 0.5})
    with pytest.raises(RuntimeError, match="no worker can start: a worker that needs"):
        ask(grid, range(4))


def test_workers_that_have_gpus_do_the_work_of_those_that_wait(
    make, ask, hold, monkeypatch, caplog
):
    monkeypatch.setattr(policy, "START_SECONDS", 1.0)
    hold(3)
    grid = make(num_workers=4, resources={"num_gpus": 1})
    for visit in (1, 2):
        replies = ask(grid, range(12))
        assert values(replies, "visits") == [visit] * 12
        assert len(set(values(replies, "pid"))) == 1
    [warning] = [r.message for r in caplog.records if "Not all workers" in r.message]
    assert "of 4 GPUs are free" in warning
