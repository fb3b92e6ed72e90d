"""Cohort samplers: seeded, uniform, and free of any other state."""

import json
import math
import random
from collections import Counter
from itertools import combinations

import numpy as np
import pytest

from flower_ext.core.sampling import (
    AllClients,
    HeldOutSampler,
    PoissonSampler,
    UniformSampler,
)

CLIENTS = [101, 7, 55, 23, 999, 4, 60, 61, 62, 63]
drawing = pytest.mark.parametrize("kind", [UniformSampler, PoissonSampler])


def cohorts(sampler, rounds=range(1, 9), purpose="train", size=4):
    return [sampler.sample(CLIENTS, size, r, purpose) for r in rounds]


# Seeds ----------------------------------------------------------------------------


@drawing
def test_the_same_seed_draws_the_same_cohorts(kind):
    assert cohorts(kind(3)) == cohorts(kind(3))


@drawing
def test_another_seed_draws_other_cohorts(kind):
    assert cohorts(kind(3)) != cohorts(kind(4))


@drawing
def test_rounds_draw_different_cohorts(kind):
    assert len({tuple(cohort) for cohort in cohorts(kind(3))}) > 4


@drawing
def test_training_and_evaluation_draw_different_cohorts(kind):
    assert cohorts(kind(3)) != cohorts(kind(3), purpose="evaluate")


@drawing
def test_evaluation_can_draw_as_training(kind):
    sampler = kind(3, same_for_evaluation=True)
    assert cohorts(sampler, purpose="evaluate") == cohorts(kind(3))


@drawing
def test_a_cohort_does_not_depend_on_earlier_rounds(kind):
    used = kind(3)
    cohorts(used, range(1, 6))
    cohorts(used, range(1, 6), "evaluate")
    assert cohorts(used, [6]) == cohorts(kind(3), [6])


@drawing
def test_a_cohort_names_places_not_node_ids(kind):
    renamed = [client + 5000 for client in CLIENTS]
    found = kind(3).sample(renamed, 4, 1, "train")
    assert found == [client + 5000 for client in cohorts(kind(3), [1])[0]]


@drawing
def test_the_global_random_states_play_no_part_and_are_left_alone(kind):
    expected = cohorts(kind(3))
    np.random.seed(1)  # noqa: NPY002
    random.seed(1)
    before = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert cohorts(kind(3)) == expected
    after = np.random.get_state()[1].tolist(), random.getstate()  # noqa: NPY002
    assert before == after


# What is drawn --------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 4, 10])
def test_uniform_draws_exactly_as_many_and_none_twice(size):
    for cohort in cohorts(UniformSampler(3), size=size):
        assert len(cohort) == len(set(cohort)) == size


@drawing
def test_a_cohort_keeps_the_order_of_the_clients(kind):
    for cohort in cohorts(kind(3)):
        assert cohort == [client for client in CLIENTS if client in cohort]


def test_held_out_clients_evaluate_and_never_train():
    sampler = HeldOutSampler(3, num_training_clients=6)
    trained = {c for cohort in cohorts(sampler, range(40)) for c in cohort}
    asked = {c for cohort in cohorts(sampler, range(40), "evaluate") for c in cohort}
    assert trained == set(CLIENTS[:6])
    assert asked == set(CLIENTS)
    same = HeldOutSampler(3, num_training_clients=6, same_for_evaluation=True)
    assert cohorts(same, purpose="evaluate") == cohorts(sampler)
    with pytest.raises(ValueError, match="num_training_clients=0 must be"):
        HeldOutSampler(num_training_clients=0)


def test_all_clients_are_all_clients_in_their_order():
    assert cohorts(AllClients(), [1, 2], size=3) == [CLIENTS] * 2


def test_all_clients_hands_out_a_list_of_its_own():
    AllClients().sample(CLIENTS, 1, 1, "train").clear()
    assert len(CLIENTS) == 10


@pytest.mark.parametrize("kind", [UniformSampler, PoissonSampler, AllClients])
def test_of_no_clients_none_are_drawn(kind):
    assert kind().sample([], 0, 1, "train") == []


def test_poisson_takes_everyone_when_everyone_is_asked_for():
    assert cohorts(PoissonSampler(3), size=10) == [CLIENTS] * 8


# How often: 3000 seeded rounds; |z| < 4.5 has a chance of 7e-6 per figure to fail. ---

ROUNDS = 3000


@pytest.fixture(scope="module")
def drawn():
    """Cohorts of 4 of 10 over many rounds, by kind of sampler."""
    return {
        kind: cohorts(kind(12), range(1, ROUNDS + 1))
        for kind in (UniformSampler, PoissonSampler)
    }


def z_of_share(count, probability):
    """Deviation of a count of rounds from its mean, in standard deviations."""
    spread = math.sqrt(ROUNDS * probability * (1 - probability))
    return abs(count - ROUNDS * probability) / spread


@drawing
def test_every_client_is_drawn_equally_often(drawn, kind):
    times = Counter(client for cohort in drawn[kind] for client in cohort)
    for client in CLIENTS:
        assert z_of_share(times[client], 4 / 10) < 4.5


@pytest.mark.parametrize(
    ("kind", "probability"),
    [(UniformSampler, 4 / 10 * 3 / 9), (PoissonSampler, 4 / 10 * 4 / 10)],
)
def test_every_pair_is_drawn_equally_often(drawn, kind, probability):
    times = Counter(
        pair for cohort in drawn[kind] for pair in combinations(sorted(cohort), 2)
    )
    for pair in combinations(sorted(CLIENTS), 2):
        assert z_of_share(times[pair], probability) < 4.5


def test_poisson_cohorts_are_binomial_in_size(drawn):
    sizes = Counter(len(cohort) for cohort in drawn[PoissonSampler])
    for size in range(11):
        probability = math.comb(10, size) * 0.4**size * 0.6 ** (10 - size)
        assert z_of_share(sizes[size], probability) < 4.5


def test_the_next_round_does_not_depend_on_this_one(drawn):
    # A client that is in a uniform cohort is in the next one with chance 0.4 again.
    pairs = zip(drawn[UniformSampler], drawn[UniformSampler][1:], strict=False)
    again = sum(len(set(one) & set(two)) for one, two in pairs)
    mean, spread = 4 * 0.4, math.sqrt(4 * 0.4 * 0.6 * 6 / 9)  # hypergeometric
    n = ROUNDS - 1
    assert abs(again - n * mean) / (spread * math.sqrt(n)) < 4.5


# State and arguments --------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        UniformSampler(4),
        PoissonSampler(3),
        UniformSampler(3, same_for_evaluation=True),
        HeldOutSampler(3, num_training_clients=2),
    ],
)
def test_the_state_of_another_sampler_is_refused_with_both(other):
    with pytest.raises(ValueError, match="needs the same sampler") as caught:
        UniformSampler(3).load_state_dict(other.state_dict())
    assert str(other.state_dict()) in str(caught.value)
    assert str(UniformSampler(3).state_dict()) in str(caught.value)


def test_a_numpy_integer_is_a_seed_whose_state_is_json():
    sampler = UniformSampler(np.int64(3))
    assert json.loads(json.dumps(sampler.state_dict())) == sampler.state_dict()
    assert cohorts(sampler) == cohorts(UniformSampler(3))


def test_the_state_of_an_equal_sampler_is_accepted():
    sampler = UniformSampler(3)
    sampler.load_state_dict(UniformSampler(3).state_dict())
    assert cohorts(sampler) == cohorts(UniformSampler(3))


@pytest.mark.parametrize("bad", [-1, 1.5, True, "1"])
def test_a_bad_seed_is_refused(bad):
    with pytest.raises(ValueError, match=rf"^seed={bad!r} must be an integer >= 0$"):
        UniformSampler(bad)
