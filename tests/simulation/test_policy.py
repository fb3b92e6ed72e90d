"""Who is late, what runs again and what is given up, by a clock of made-up seconds."""

import math

import pytest

from flower_ext._flower import CLIENT_CRASHED
from flower_ext.simulation.jobs import Job
from flower_ext.simulation.machines import Resources
from flower_ext.simulation.policy import (
    FALSE_STARTS,
    HANG_SECONDS,
    LOOK_SECONDS,
    START_SECONDS,
    Attempt,
    Pack,
    Policy,
)

HELD = 300.0


def pack(*clients, **options):
    """Make a pack; the key of a client's job is ten times its number."""
    jobs = [Job(10 * client, client, "train", "", {}, {}) for client in clients]
    return Pack(jobs, Resources(), **options)


def attempt(*clients, sent=0.0, begun=None):
    return Attempt(pack=pack(*clients), sent=sent, begun=begun)


def clients(packs):
    return [[job.client for job in each.jobs] for each in packs]


@pytest.fixture
def policy():
    return Policy(client_timeout=2.0, held_seconds=HELD)


# Death ------------------------------------------------------------------------------


def test_clients_of_a_dead_worker_run_again_each_alone(policy):
    verdict = policy.died(pack(3, 1, 2, broadcast="b"), "killed")
    assert clients(verdict.again) == [[3], [1], [2]]
    assert all(each.again and each.broadcast == "b" for each in verdict.again)
    assert verdict.outcomes == []


def test_one_client_is_given_a_second_chance_and_no_third(policy):
    [second] = policy.died(pack(7), "killed").again
    verdict = policy.died(second, "killed")
    assert verdict.again == []
    [outcome] = verdict.outcomes
    assert (outcome.key, outcome.content) == (70, None)
    assert outcome.error.code == CLIENT_CRASHED
    assert outcome.error.reason == "its worker process died: killed"


def test_a_false_start_is_no_clients_fault(policy):
    first = pack(1, 2)
    for _ in range(FALSE_STARTS):
        assert policy.false_start(first, "no memory").again == [first]
    with pytest.raises(RuntimeError, match="no worker stays alive: no memory"):
        policy.false_start(first, "no memory")


def test_false_starts_count_in_a_row(policy):
    for _ in range(3 * FALSE_STARTS):
        policy.false_start(pack(1), "no memory")
        policy.answered()


# Time -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 4])
def test_a_pack_hangs_once_all_its_clients_could_have_been_interrupted(policy, size):
    running = attempt(*range(size), sent=50.0, begun=100.0)
    due = 100.0 + 2.0 * size + HANG_SECONDS
    assert policy.hung(running, due - 0.01) is None
    assert policy.hung(running, due) is not None
    assert policy.patience([running], 101.0, None) == pytest.approx(due - 101.0)


def test_nobody_hangs_without_a_limit_or_before_the_worker_is_ready(policy):
    patient = Policy(None, HELD)
    assert patient.hung(attempt(1, begun=0.0), math.inf) is None
    assert patient.patience([attempt(1, begun=0.0)], 5.0, None) is None
    assert policy.hung(attempt(1), math.inf) is None


def test_one_that_hangs_is_over_its_time_and_does_not_run_again(policy):
    verdict = policy.hung(attempt(7, begun=0.0), 100.0)
    assert verdict.again == []
    [outcome] = verdict.outcomes
    assert outcome.key == 70
    assert "client_timeout=2 s" in outcome.error.reason


def test_of_several_nobody_knows_which_one_hangs(policy):
    verdict = policy.hung(attempt(7, 8, begun=0.0), 100.0)
    assert clients(verdict.again) == [[7], [8]]
    assert verdict.outcomes == []


def test_the_first_moment_decides_how_long_to_wait(policy):
    running = attempt(1, begun=0.0)  # due at 2 s and the margin
    starting = attempt(2)
    soon = 2.0 + HANG_SECONDS - LOOK_SECONDS / 2
    assert policy.patience([running, starting], soon, None) == LOOK_SECONDS / 2
    assert policy.patience([running, starting], 0.0, None) == LOOK_SECONDS
    assert policy.patience([running, starting], 0.0, 0.3) == 0.3
    assert policy.patience([running], 50.0, None) == 0.0
    assert policy.patience([], 50.0, None) is None


# Room -------------------------------------------------------------------------------


def test_a_worker_is_late_unless_it_has_begun(policy):
    assert not policy.is_late(attempt(1, sent=10.0), 10.0 + START_SECONDS)
    assert policy.is_late(attempt(1, sent=10.0), 10.1 + START_SECONDS)
    assert not policy.is_late(attempt(1, sent=10.0, begun=11.0), math.inf)


def test_others_do_the_work_of_one_that_has_no_room(policy, caplog):
    for _ in range(3):
        assert policy.no_room(attempt(1), 10 * HELD, others=True, free="0 of 4 GPUs")
    [warning] = [record.message for record in caplog.records]
    assert "1 CPUs and 0 GPUs has waited 3000 s for others" in warning
    assert "0 of 4 GPUs" in warning


def test_without_others_it_waits_and_in_the_end_the_run_ends(policy):
    assert not policy.no_room(attempt(1), HELD, others=False, free="nothing")
    with pytest.raises(RuntimeError, match=r"no worker can start: .*\(nothing\)"):
        policy.no_room(attempt(1), HELD + 0.1, others=False, free="nothing")


# Giving up --------------------------------------------------------------------------


def test_what_is_left_of_a_pack_keeps_its_order_and_its_history():
    left = pack(3, 1, 2, again=True).without({10})
    assert clients([left]) == [[3, 2]]
    assert left.again
    assert pack(3, 1).without({10, 30}) is None
