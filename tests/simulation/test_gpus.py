"""GPUs of clients: the mod on Ray's made-up GPUs, and the plan."""

import os
import re
from concurrent.futures import ThreadPoolExecutor

import pytest

from flower_ext.simulation import LocalGrid, PackedGrid, resources
from flower_ext.simulation import gpus as gpus_module
from flower_ext.simulation.gpus import main, plan
from flower_ext.simulation.needs import Machine


@pytest.fixture(scope="module")
def app(importable):
    import gpus_seen

    return gpus_seen.app


def seen(replies):
    return [reply.content["where"]["gpus"] for reply in replies]


def test_outside_ray_the_work_is_done_here(app, ask, monkeypatch):
    monkeypatch.delitem(gpus_module.sys.modules, "ray", raising=False)
    for _ in range(2):
        replies = ask(LocalGrid(app, 2), [1000, 1001])
        assert {r.content["metrics"]["pid"] for r in replies} == {os.getpid()}


@pytest.mark.slow
def test_each_client_sees_the_gpus_that_it_needs(app, ask, ray_here):
    ray_here()
    grid = LocalGrid(app, 10)
    for visit in (1, 2):  # the state comes back from the task
        replies = ask(grid, [1000, 1001, 1009])
        assert seen(replies)[0] in "0123" and seen(replies)[1] in "0123"
        pids = [reply.content["metrics"]["pid"] for reply in replies]
        assert pids[0] != os.getpid() != pids[1]
        assert pids[2] == os.getpid()  # needs none
        assert [r.content["metrics"]["visits"] for r in replies] == [visit] * 3


@pytest.mark.slow
def test_more_demand_than_supply_waits(app, ask, ray_here):
    ray_here()
    grids = [LocalGrid(app, 1) for _ in range(6)]  # each client needs a whole GPU
    with ThreadPoolExecutor(6) as pool:
        replies = [r for rs in pool.map(lambda g: ask(g, [1000]), grids) for r in rs]
    assert set(seen(replies)) <= {"0", "1", "2", "3"}
    assert len(replies) == 6


@pytest.mark.slow
def test_what_does_not_exist_and_what_fails_is_the_clients_error(app, ask, ray_here):
    ray_here()
    grid = LocalGrid(app, 10, {"many": 5})
    [none, failed] = [ask(grid, [1009])[0], ask(grid, [1001], fail=True)[0]]
    assert "client 9 needs 1 CPUs and 5 GPUs, more than any machine" in (
        none.error.reason
    )
    assert "told to fail" in failed.error.reason


@pytest.mark.slow
def test_the_mod_works_behind_packed(app, ask, ray_here):
    ray_here()
    grid = PackedGrid(LocalGrid(app, 2), num_clients=10)
    for visit in (1, 2):
        replies = ask(grid, [0, 1, 9])
        assert seen(replies)[0] in "0123"
        assert [r.content["metrics"]["visits"] for r in replies] == [visit] * 3


def test_a_bad_need_is_refused_at_once():
    with pytest.raises(ValueError, match="num_gpus=1.5 must be a fraction"):
        resources({"num_gpus": 1.5})


# The plan -----------------------------------------------------------------------------


def test_clients_share_a_gpu_by_memory():
    found = plan([Machine("a", 16.0, [1.0, 1.0])], 3000, 11_000)
    assert found.num_gpus == 0.3333  # 3 of 3,500 MiB
    assert found.at_once == 6
    assert found.options == (
        "client-resources-num-cpus=1 client-resources-num-gpus=0.3333"
    )


def test_the_cpus_limit():
    found = plan([Machine("a", 4.0, [1.0, 1.0])], 3000, 11_000, num_cpus=2)
    assert found.at_once == 2
    assert "the CPUs allow no more" in found.why


def test_gpus_of_a_cluster_are_counted_by_machine():
    machines = [Machine("a", 4.0, [1.0]), Machine("b", 4.0, [1.0] * 2)]
    assert plan(machines, 6000, 8000).at_once == 3


@pytest.mark.parametrize(
    ("machines", "memory", "message"),
    [
        ([Machine("a", 4.0)], 100, "Ray reports no GPU"),
        ([Machine("a", 4.0, [1.0])], 9000, "a client takes 9000 MiB and 500 MiB for"),
        ([Machine("a", 0.5, [1.0])], 100, "client 0 needs 1 CPUs and"),
        ([Machine("a", 4.0, [1.0])], 0, "memory=0 must be a finite number > 0"),
    ],
)
def test_what_does_not_fit_is_said(machines, memory, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(machines, memory, 8000)


@pytest.mark.slow
def test_the_command_prints_the_options(ray_here, capsys):
    ray_here()
    assert main(["--memory", "3000", "--gpu-memory", "8000"]) == 0
    out = capsys.readouterr().out
    assert "2 clients of 3500 MiB fit into a GPU of 8000 MiB; 4 run at once" in out
    assert "client-resources-num-cpus=1 client-resources-num-gpus=0.5" in out
    assert "client-resources-num-gpus=0" in out
    assert main(["--memory", "9000", "--gpu-memory", "8000"]) == 1
    assert "nothing fits" in capsys.readouterr().err
