"""GPUs of clients: the mod on Ray's made-up GPUs, and the plan."""

import os
import re
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flower_ext.simulation import LocalGrid, PackedGrid, resources
from flower_ext.simulation.gpus import CUDA_MIB, main, plan
from flower_ext.simulation.machines import Machine, Resources


@pytest.fixture(scope="module")
def app(importable):
    import gpus_seen

    return gpus_seen.app


def seen(replies):
    return [reply.content["where"]["gpus"] for reply in replies]


def test_outside_ray_the_work_is_done_here(app, ask, monkeypatch):
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    for _ in range(2):
        replies = ask(LocalGrid(app, 2), [1000, 1001])
        assert {r.content["metrics"]["pid"] for r in replies} == {os.getpid()}


@pytest.mark.slow
def test_each_client_sees_the_gpus_that_it_needs(app, ask, cluster):
    cluster()
    grid = LocalGrid(app, 10)
    for visit in (1, 2):  # the state comes back from the task
        replies = ask(grid, [1000, 1001, 1009])
        assert seen(replies)[0] in "0123" and seen(replies)[1] in "0123"
        pids = [reply.content["metrics"]["pid"] for reply in replies]
        assert pids[0] != os.getpid() != pids[1]
        assert pids[2] == os.getpid()  # needs none
        assert [r.content["metrics"]["visits"] for r in replies] == [visit] * 3


@pytest.mark.slow
def test_more_demand_than_supply_waits(app, ask, cluster):
    cluster()
    grids = [LocalGrid(app, 1) for _ in range(6)]  # each client needs a whole GPU
    with ThreadPoolExecutor(6) as pool:
        replies = [r for rs in pool.map(lambda g: ask(g, [1000]), grids) for r in rs]
    assert set(seen(replies)) <= {"0", "1", "2", "3"}
    assert len(replies) == 6


@pytest.mark.slow
def test_what_does_not_exist_and_what_fails_is_the_clients_error(app, ask, cluster):
    cluster()
    grid = LocalGrid(app, 10, {"many": 5})
    [none, failed] = [ask(grid, [1009])[0], ask(grid, [1001], fail=True)[0]]
    assert "client 9 needs 1 CPUs and 5 GPUs, more than any machine" in (
        none.error.reason
    )
    assert "told to fail" in failed.error.reason


@pytest.mark.slow
def test_gpus_that_the_worker_itself_holds_are_not_waited_for(app, ask, cluster):
    cluster()
    whole = {"num_gpus": 4}
    with PackedGrid(num_clients=10, client_app=app, resources=whole) as grid:
        refused, none = ask(grid, [0, 9])
    assert "the worker holds 4 GPUs, for which the mod 'resources'" in (
        refused.error.reason
    )
    assert not none.has_error()  # needs none


@pytest.mark.slow
def test_the_mod_works_behind_packed(app, ask, cluster):
    cluster()
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
    found = plan([Machine("a", 16.0, [1.0, 1.0])], 3000, 12_000)
    assert found.num_gpus == 0.3333  # 3 of 3,800 MiB
    assert found.at_once == 6
    assert found.options == (
        "client-resources-num-cpus=1 client-resources-num-gpus=0.3333"
    )


def test_the_cpus_limit():
    found = plan([Machine("a", 4.0, [1.0, 1.0])], 3000, 11_000, num_cpus=2)
    assert found.at_once == 2
    assert "the CPUs allow no more" in found.why


def fill(machines, need):
    """Start clients as Ray does until nothing fits; return how many each GPU got."""
    counts = []
    for machine in machines:
        machine, on_each = machine.empty(), [0] * len(machine.gpus)
        while (place := machine.place(need)) is not None:
            machine.take(need, place)
            for gpu in place:
                on_each[gpu] += 1
        counts.append(on_each)
    return counts


def is_balanced(counts):
    return all(max(gpus) - min(gpus) <= 1 for gpus in counts if gpus)


@given(
    st.lists(st.tuples(st.integers(0, 24), st.integers(0, 6)), min_size=1, max_size=3),
    st.integers(1, 12),
    st.integers(1, 4),
)
@example([(4, 2)], 6, 1)  # all four fit on one GPU
@example([(9, 4)], 6, 1)  # three on each would leave the last one idle
@example([(16, 2), (4, 2)], 6, 1)
@example([(200, 1)], 159, 1)  # whose share, in ten thousandths, fits 161 times
def test_no_plan_takes_too_much_or_leaves_a_gpu_behind(sizes, most, num_cpus):
    machines = [Machine(str(i), c, [1.0] * g) for i, (c, g) in enumerate(sizes)]
    if not any(c >= num_cpus and g for c, g in sizes):
        with pytest.raises(ValueError, match="Ray reports no GPU|needs"):
            plan(machines, 1000, (1000 + CUDA_MIB) * most, num_cpus)
        return
    found = plan(machines, 1000, (1000 + CUDA_MIB) * most, num_cpus)
    counts = fill(machines, Resources(found.num_gpus, num_cpus))
    assert is_balanced(counts)
    assert found.at_once == sum(map(sum, counts))
    for (cpus, gpus), on_each in zip(sizes, counts, strict=True):
        assert all(count <= most for count in on_each)
        assert sum(on_each) * num_cpus <= cpus or not gpus
        # As Flower counts its workers: what it starts more would wait for ever.
        assert min(cpus // num_cpus, int(gpus / found.num_gpus)) == sum(on_each)
    # No other number of clients on a GPU lets more of them run at once.
    for share in range(1, min(most, 24) + 1):
        other = fill(machines, Resources(1 / share, num_cpus))
        assert not is_balanced(other) or sum(map(sum, other)) <= found.at_once


def test_clients_are_spread_over_the_gpus_when_the_cpus_limit():
    found = plan([Machine("a", 4.0, [1.0, 1.0])], 3000, 24_000)
    assert (found.num_gpus, found.at_once) == (0.5, 4)
    assert "2 on each (the CPUs allow no more)" in found.why


def test_gpus_of_a_cluster_are_counted_by_machine():
    machines = [Machine("a", 4.0, [1.0]), Machine("b", 4.0, [1.0] * 2)]
    assert plan(machines, 6000, 8000).at_once == 3


@pytest.mark.parametrize(
    ("machines", "memory", "message"),
    [
        ([Machine("a", 4.0)], 100, "Ray reports no GPU"),
        ([Machine("a", 4.0, [1.0])], 9000, "a client takes 9000 MiB and 800 MiB for"),
        ([Machine("a", 0.5, [1.0])], 100, "client 0 needs 1 CPUs and"),
        ([Machine("a", 4.0, [1.0])], 0, "memory=0 must be a finite number > 0"),
    ],
)
def test_what_does_not_fit_is_said(machines, memory, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        plan(machines, memory, 8000)


@pytest.mark.slow
def test_the_command_prints_the_options(cluster, capsys):
    cluster()
    assert main(["--memory", "3000", "--gpu-memory", "8000"]) == 0
    out = capsys.readouterr().out
    assert "2 clients of 3800 MiB fit into a GPU of 8000 MiB; 4 run at once" in out
    assert "client-resources-num-cpus=1 client-resources-num-gpus=1" in out
    assert "client-resources-num-gpus=0" in out
    assert main(["--memory", "9000", "--gpu-memory", "8000"]) == 1
    assert "nothing fits" in capsys.readouterr().err


ELSEWHERE = ["--memory", "3000", "--gpu-memory", "80000", "--gpus", "8", "--cpus", "64"]


def test_a_machine_that_is_not_at_hand_is_planned_without_ray(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(ELSEWHERE) == 0
    out = capsys.readouterr().out
    assert "64 run at once on 8 GPUs, 8 on each (the CPUs allow no more)" in out
    assert "client-resources-num-cpus=1 client-resources-num-gpus=0.125" in out
    assert main([*ELSEWHERE, "--machines", "2", "--num-cpus", "4"]) == 0
    assert "32 run at once on 16 GPUs, 2 on each" in capsys.readouterr().out


def test_without_a_clients_memory_the_cpus_alone_decide(capsys):
    assert main(["--gpus", "8", "--cpus", "64"]) == 0
    out = capsys.readouterr().out
    assert "memory was not asked about; 64 run at once on 8 GPUs, 8 on each" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--gpus", "8"], "--cpus=None must be an integer >= 1: --gpus and --cpus go"),
        (["--gpus", "0", "--cpus", "4"], "--gpus=0 must be an integer >= 1"),
        (["--gpus", "8", "--cpus", "4"], "--gpu-memory=None must be given: the"),
        ([*ELSEWHERE[2:], "--num-cpus", "0"], "num_cpus=0 must be an integer >= 1"),
    ],
)
def test_what_is_missing_of_such_a_machine_is_said(options, message, capsys):
    assert main(["--memory", "3000", *options]) == 1
    assert message in capsys.readouterr().err
