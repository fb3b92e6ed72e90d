"""Packs: longest first, about equal, as many as are worth sending."""

import numpy as np
import pytest

from flower_ext.simulation.jobs import Job
from flower_ext.simulation.packing import Workload, pack_evenly


def jobs(clients, kind="train"):
    return [Job(i, client, kind, "", {}, {}) for i, client in enumerate(clients)]


def clients(packs):
    return [[job.client for job in pack] for pack in packs]


def test_every_item_is_packed_once():
    sizes = np.random.default_rng(0).random(50)
    packs = pack_evenly(sizes, [0.0] * 7)
    assert sorted(i for pack in packs for i in pack) == list(range(50))


def test_longest_first_is_within_a_third_of_the_best():
    # Graham's bound: at most 4/3 of the optimum, which is at least the mean.
    sizes = np.random.default_rng(1).exponential(size=40)
    totals = [sum(sizes[i] for i in pack) for pack in pack_evenly(sizes, [0.0] * 4)]
    assert max(totals) <= 4 / 3 * max(sizes.sum() / 4, sizes.max())


def test_the_longest_starts_each_pack():
    packs = pack_evenly([1, 9, 2, 8, 3], [0, 0])
    assert [pack[0] for pack in packs] == [1, 3]


def test_what_is_there_already_counts():
    assert pack_evenly([1, 1], [5.0, 0.0]) == [[], [0, 1]]
    assert pack_evenly([], []) == []


def test_unknown_sizes_are_packed_evenly_into_more_packs_than_workers():
    packs = Workload().packs(jobs(range(80)), 2)
    assert len(packs) == 8
    assert {len(pack) for pack in packs} == {10}


def test_known_sizes_put_the_longest_first():
    packs = Workload([1, 100, 1, 1]).packs(jobs(range(4)), 2)
    assert clients(packs)[0] == [1]


def test_reported_sizes_put_the_longest_first():
    workload = Workload()
    for client, size in enumerate([1, 1, 50, 1]):
        workload.learn_size(client, size)
    assert clients(workload.packs(jobs(range(4)), 1))[0] == [2]


def test_a_client_that_never_replied_counts_as_the_mean():
    workload = Workload()
    workload.learn_size(0, 10)
    workload.learn_size(1, 30)
    assert workload.size(7) == 20


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_an_impossible_size_is_not_learned(bad):
    workload = Workload([5, 5])
    workload.learn_size(0, bad)
    assert workload.size(0) == 5


def test_tiny_clients_share_a_pack_and_long_ones_have_their_own():
    tiny, long = Workload(), Workload()
    tiny.learn_pace("train", [(i, 1e-5) for i in range(100)])
    long.learn_pace("train", [(i, 1.0) for i in range(100)])
    assert len(tiny.packs(jobs(range(100)), 2)) == 2
    assert len(long.packs(jobs(range(100)), 2)) == 100


def test_each_worker_gets_as_many_packs():
    workload = Workload()
    workload.learn_pace("train", [(i, 0.01) for i in range(100)])
    assert len(workload.packs(jobs(range(100)), 3)) % 3 == 0


def test_the_pace_is_of_a_kind_of_message():
    workload = Workload()
    workload.learn_pace("train", [(i, 1.0) for i in range(100)])
    assert len(workload.packs(jobs(range(100), "evaluate"), 2)) == 8


def test_nobody_is_no_pack():
    assert Workload().packs([], 2) == []


def test_a_run_that_goes_on_makes_the_packs_of_one_that_was_not_interrupted():
    whole = Workload()
    for client in range(20):
        whole.learn_size(client, [1, 2.5, 30, 0.1][client % 4])
    resumed = Workload()
    resumed.load_state_dict(whole.state_dict())
    for workload in (whole, resumed):
        workload.learn_size(3, 17)

    def packs(workload):
        return workload.packs(jobs(range(25)), 2, summed=True)

    assert packs(resumed) == packs(whole) != packs(Workload())
    whole.at_once = resumed.at_once = 9
    resumed.load_state_dict(whole.state_dict())
    assert packs(resumed) == packs(whole)
    assert Workload().state_dict() == {}


@pytest.mark.parametrize(
    ("at_once", "sizes"), [(1, [6] * 4), (8, [8] * 3), (10, [12] * 2), (99, [12] * 2)]
)
def test_packs_of_clients_that_are_trained_together_are_large(at_once, sizes):
    """But every worker gets one."""
    workload = Workload([1.0] * 24)
    workload.at_once = at_once
    for summed in (True, False):
        packs = workload.packs(jobs(range(24)), 2, summed=summed)
        if summed or at_once > 1:
            assert [len(pack) for pack in packs] == sizes
