"""Samplers that limit participation: what they promise holds, also when resumed."""

import json
from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import MonkeyPatch

from flower_ext.core import nodes
from flower_ext.core.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    MinSeparationSampler,
    PoissonSampler,
    TooFewClients,
)

CLIENTS = [101, 7, 55, 23, 999, 4, 60, 61, 62, 63]


def rounds_of(sampler, rounds, size=3, clients=lambda server_round: CLIENTS):
    """Return in which rounds each client took part."""
    taken = defaultdict(list)
    for server_round in range(1, rounds + 1):
        now = clients(server_round)
        cohort = sampler.sample(now, size, server_round, "train")
        assert cohort == [client for client in now if client in set(cohort)]
        for client in cohort:
            taken[client].append(server_round)
    return taken


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.integers(1, 8),
    st.one_of(st.none(), st.integers(1, 4)),
    st.integers(0, 10),
    st.integers(0, 5),
    st.lists(st.lists(st.sampled_from(CLIENTS), unique=True), min_size=20, max_size=20),
)
def test_the_promise_is_kept(separation, most, size, seed, connected):
    sampler = MinSeparationSampler(separation, most, seed)
    taken = rounds_of(sampler, 20, size, lambda r: connected[r - 1])
    for rounds in taken.values():
        gaps = [b - a for a, b in zip(rounds, rounds[1:], strict=False)]
        assert all(gap >= separation for gap in gaps)
        assert most is None or len(rounds) <= most


def test_as_many_as_asked_for_while_there_are_so_many():
    sampler = MinSeparationSampler(3)
    sizes = [len(sampler.sample(CLIENTS, 3, r, "train")) for r in range(1, 20)]
    assert sizes == [3] * 19
    sampler = MinSeparationSampler(4)
    sizes = [len(sampler.sample(CLIENTS, 3, r, "train")) for r in range(1, 6)]
    assert sizes == [3, 3, 3, 1, 3]


def test_every_eligible_client_is_as_likely():
    counts = dict.fromkeys(CLIENTS, 0)
    for seed in range(600):
        for client in MinSeparationSampler(2, seed=seed).sample(CLIENTS, 4, 1, "train"):
            counts[client] += 1
    # 240 of 600 each, standard deviation 12: beyond 5 of them once in 10^5.
    assert all(abs(count - 240) < 60 for count in counts.values())


def test_evaluation_is_not_limited_and_does_not_count():
    sampler = MinSeparationSampler(5, 1)
    for server_round in (1, 2):
        assert sampler.sample(CLIENTS, 10, server_round, "evaluate") == CLIENTS
    assert sampler.sample(CLIENTS, 10, 2, "train") == CLIENTS


def test_a_short_round_is_smaller_or_not_at_all():
    for how in ("stop", "wait"):
        sampler = MinSeparationSampler(2, when_short=how)
        sampler.sample(CLIENTS, 8, 1, "train")
        with pytest.raises(TooFewClients, match=r"needs 8 clients, 2 of the 10"):
            sampler.sample(CLIENTS, 8, 2, "train")
        # Nobody was asked in vain: all are as they were.
        assert len(sampler.sample(CLIENTS, 2, 2, "train")) == 2
    sampler = MinSeparationSampler(2)
    sampler.sample(CLIENTS, 8, 1, "train")
    assert len(sampler.sample(CLIENTS, 8, 2, "train")) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinSeparationSampler(3, 2, seed=4),
        lambda: CyclicPoissonSampler(0.6, 3, seed=4),
        lambda: BallsInBinsSampler(3, seed=4),
    ],
)
def test_a_resumed_sampler_remembers(make):
    whole, first, second = make(), make(), make()
    expected = rounds_of(whole, 12)
    rounds_of(first, 6)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for server_round in range(7, 13):
        cohort = second.sample(CLIENTS, 3, server_round, "train")
        assert cohort == [c for c in CLIENTS if server_round in expected[c]]


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 10**6), st.booleans())
def test_nodes_that_return_under_other_ids_break_no_limit_unsaid(
    separation, most, seed, resumed
):
    """People leave and come back, some of them as another node, in another order."""
    rng = np.random.default_rng(seed)
    sampler = MinSeparationSampler(separation, most, seed)
    ids = {person: 100 + person for person in range(8)}
    fresh, taken, said = 1000, defaultdict(list), []
    with MonkeyPatch.context() as patch:
        patch.setattr(nodes, "log", lambda *args: said.append(args))
        for server_round in range(1, 16):
            if resumed and server_round == 8:
                state = json.loads(json.dumps(sampler.state_dict()))
                sampler = MinSeparationSampler(separation, most, seed)
                sampler.load_state_dict(state)
            for person in rng.permutation(8)[: rng.choice([0, 0, 0, 1, 4, 8])]:
                ids[int(person)], fresh = fresh, fresh + 1
            here = rng.permutation(8)[: rng.integers(1, 9)].tolist()
            people = {ids[person]: person for person in here}
            try:
                cohort = sampler.sample(list(people), 3, server_round, "train")
            except ValueError as problem:
                assert resumed and "cannot be told" in str(problem)
                return
            for node in cohort:
                taken[people[node]].append(server_round)
            for rounds in taken.values():
                gaps = [b - a for a, b in pairwise(rounds)]
                broken = len(rounds) > most or any(gap < separation for gap in gaps)
                assert said or not broken


@pytest.mark.parametrize(
    "make",
    [
        lambda: MinSeparationSampler(2),
        lambda: CyclicPoissonSampler(0.9, 2),
        lambda: BallsInBinsSampler(2),
    ],
)
def test_a_resumed_sampler_refuses_nodes_that_it_cannot_tell(make):
    first, second = make(), make()
    rounds_of(first, 3)
    second.load_state_dict(first.state_dict())
    strangers = [client + 5000 for client in reversed(CLIENTS)]
    with pytest.raises(ValueError, match="who took part before cannot be told"):
        second.sample(strangers, 3, 4, "train")


def test_rounds_that_are_counted_anew_are_refused():
    sampler = MinSeparationSampler(3)
    rounds_of(sampler, 6)
    with pytest.raises(ValueError, match=r"server_round=1 must be >= 6.* one run"):
        sampler.sample(CLIENTS, 3, 1, "train")


def test_another_limit_is_not_resumed():
    saved = MinSeparationSampler(3, 2).state_dict()
    with pytest.raises(ValueError, match="'min-separation': 3"):
        MinSeparationSampler(2, 2).load_state_dict(saved)
    with pytest.raises(ValueError, match="'max-participations': 2"):
        MinSeparationSampler(3).load_state_dict(saved)


def test_clients_take_turns_in_groups():
    taken = rounds_of(CyclicPoissonSampler(1.0, 4), 12)
    for number, client in enumerate(CLIENTS):
        assert all(r % 4 == number % 4 for r in taken[client])
        assert len(taken[client]) == 3
    assert CyclicPoissonSampler(1.0, 4).guarantee().min_separation == 4


def test_a_fixed_probability_does_not_look_at_the_size():
    for sampler, share in (
        (PoissonSampler(3, probability=0.2), 0.2),
        (CyclicPoissonSampler(0.6, 3, seed=3), 0.2),
    ):
        taken = rounds_of(sampler, 3000, size=10)
        total = sum(map(len, taken.values()))
        # 6,000 expected, standard deviation below 70.
        assert abs(total - 30_000 * share) < 350


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MinSeparationSampler(0), "min_separation=0"),
        (lambda: MinSeparationSampler(1, 0), "max_participations=0"),
        (lambda: MinSeparationSampler(1, when_short="skip"), "when_short='skip'"),
        (lambda: PoissonSampler(probability=0.0), "probability=0.0"),
        (lambda: CyclicPoissonSampler(1.5, 2), "probability=1.5"),
        (lambda: CyclicPoissonSampler(0.5, 0), "cycle=0"),
        (lambda: BallsInBinsSampler(0), "num_bins=0"),
    ],
)
def test_bad_limits_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
