"""What samplers guarantee is true, and a mechanism counts on nothing else."""

from collections import defaultdict
from itertools import pairwise

import numpy as np
import pytest

from flower_ext.core.sampling import (
    AllClients,
    BallsInBinsSampler,
    CyclicPoissonSampler,
    Guarantee,
    HeldOutSampler,
    MinSeparationSampler,
    PoissonSampler,
    Sampler,
    UniformSampler,
)
from flower_ext.privacy import BandedToeplitz, Mechanism, PrivateSum

ROUNDS, CLIENTS, COHORT = 400, 24, 6
SAMPLERS = {
    "fixed-size": lambda: UniformSampler(3),
    "poisson": lambda: PoissonSampler(3, probability=0.25),
    "cyclic-poisson": lambda: CyclicPoissonSampler(0.75, 3, seed=3),
    "balls-in-bins": lambda: BallsInBinsSampler(3, seed=3),
    "limited": lambda: MinSeparationSampler(3, 50, seed=3),
    "all": AllClients,
    "unstated": lambda: HeldOutSampler(3, num_training_clients=12),
}


class Own(Sampler):
    """States nothing."""

    def sample(self, clients, size, server_round, purpose):
        return list(clients)[:size]


class Quiet(PoissonSampler):
    """Changes nothing that can be seen, and states nothing."""


class Mixin:
    def sample(self, clients, size, server_round, purpose):
        return list(clients)[::2]


class Mixed(Mixin, PoissonSampler):
    """Draws otherwise without a ``sample`` of its own."""


class Stated(PoissonSampler):
    """Draws as the class above it, and says so."""

    def guarantee(self):
        return super().guarantee()


class Coins(Sampler):
    """Poisson sampling of one's own."""

    def sample(self, clients, size, server_round, purpose):
        draws = self.generator(server_round, purpose).random(len(clients))
        return [c for c, draw in zip(clients, draws, strict=True) if draw < 0.25]

    def guarantee(self):
        return Guarantee(kind="poisson", probability=0.25, can_be_secret=True)


class PublicCoins(Coins):
    """The same with chance that everybody sees."""

    def guarantee(self):
        return Guarantee(kind="poisson", probability=0.25)


def private(sampler, **changes):
    usual = {
        "num_rounds": 12,
        "num_sampled_clients": COHORT,
        "population_size": CLIENTS,
        "noise_multiplier": 1.1,
        "target_delta": 1e-3,
        "factorization": "identity",
    }
    return PrivateSum(Mechanism(**{**usual, **changes}), sampler, {})


def epsilon(sampler, **changes):
    return private(sampler, **changes).accountant.epsilon_after(12, 1e-3)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_cohorts_are_as_guaranteed(kind):
    sampler = SAMPLERS[kind]()
    guarantee = sampler.guarantee()
    clients, taken, sizes = list(range(CLIENTS)), defaultdict(list), []
    for server_round in range(1, ROUNDS + 1):
        cohort = sampler.sample(clients, COHORT, server_round, "train")
        sizes.append(len(cohort))
        for client in cohort:
            taken[client].append(server_round)
    assert guarantee.kind == kind
    for rounds in taken.values():
        assert len(rounds) <= (guarantee.max_participations or ROUNDS)
        gaps = [later - earlier for earlier, later in pairwise(rounds)]
        assert min(gaps) >= guarantee.min_separation
    if kind == "balls-in-bins":  # as few gaps as bins allow, and no other
        assert all(b - a == 3 for r in taken.values() for a, b in pairwise(r))
    if kind == "fixed-size":
        assert set(sizes) == {COHORT}
    if kind == "all":
        assert set(sizes) == {CLIENTS}
    if guarantee.probability is not None:
        turns = CLIENTS * ROUNDS / guarantee.min_separation
        share = sum(sizes) / turns
        deviation = np.sqrt(guarantee.probability * (1 - guarantee.probability) / turns)
        assert abs(share - guarantee.probability) < 4 * deviation
    # Amplification is for who may be drawn in every round, from all clients.
    if guarantee.can_be_secret:
        assert len(taken) == CLIENTS


def bins_of(sampler, clients):
    """Return the bin of every client: the round, modulo 3, that it is in."""
    found = {}
    for server_round in (3, 4, 5):
        for client in sampler.sample(clients, 1, server_round, "train"):
            assert client not in found
            found[client] = server_round % 3
    return found


def test_bins_are_drawn_uniformly_and_independently():
    found = bins_of(BallsInBinsSampler(3, seed=2**100), range(9000))
    bins = np.array([found[client] for client in range(9000)])
    counts = np.bincount(bins, minlength=3)
    pairs = np.bincount(3 * bins[:-1] + bins[1:], minlength=9)
    # 3,000 each and 1,000 of each pair; standard deviations 45 and 30.
    assert abs(counts - 3000).max() < 200 and abs(pairs - 1000).max() < 140
    other = bins_of(BallsInBinsSampler(3, seed=2**100 + 1), range(9000))
    same = sum(found[client] == other[client] for client in range(9000))
    assert abs(same - 3000) < 200


def test_a_bin_does_not_depend_on_who_else_is_there_or_when():
    all_at_once = bins_of(BallsInBinsSampler(3, seed=5), list(range(40)))
    sampler = BallsInBinsSampler(3, seed=5)
    early = bins_of(sampler, list(range(10)))
    late = bins_of(sampler, list(range(5, 40)))
    assert {**early, **late} == all_at_once
    assert all(late[client] == early[client] for client in range(5, 10))


def test_bins_are_those_of_a_seed_that_is_loaded():
    sampler, other = BallsInBinsSampler(3), BallsInBinsSampler(3)
    for each in (sampler, other):
        each.keep_secret()
    clients = list(range(40))
    drawn = bins_of(sampler, clients)
    assert bins_of(other, clients) != drawn
    other.load_state_dict(sampler.state_dict())
    assert bins_of(other, clients) == drawn


def test_evaluation_tells_no_bins_unless_it_is_the_same():
    sampler = BallsInBinsSampler(3, seed=5)
    drawn = {tuple(sampler.sample(range(40), 20, r, "evaluate")) for r in range(6)}
    assert len(drawn) == 6
    same = BallsInBinsSampler(3, seed=5, same_for_evaluation=True)
    for server_round in range(3):
        train, evaluate = (
            same.sample(range(40), 20, server_round, purpose)
            for purpose in ("train", "evaluate")
        )
        assert train == evaluate == sampler.sample(range(40), 1, server_round, "train")


@pytest.mark.parametrize("kind", [Own, Quiet, Mixed])
def test_a_sampler_that_states_nothing_is_the_worst_case(kind):
    sampler = kind() if kind is Own else kind(probability=0.25)
    assert sampler.guarantee() == Guarantee()
    assert epsilon(sampler) == epsilon(AllClients())
    with pytest.raises(ValueError, match=rf"says how it draws, not {kind.__name__}"):
        private(sampler, amplified=True)


def test_limits_are_not_inherited_by_a_sampler_that_may_break_them():
    class Anyone(MinSeparationSampler):
        def sample(self, clients, size, server_round, purpose):
            return list(clients)[:size]

    class Unlimited(MinSeparationSampler):
        def _may(self, number, server_round):
            return True

    assert epsilon(MinSeparationSampler(4)) == epsilon(Own())
    kept = private(MinSeparationSampler(4)).noise_std
    for sampler in (Anyone(4), Unlimited(4)):
        # sqrt(12) instead of sqrt(3) participations at the same epsilon.
        assert private(sampler).noise_std == pytest.approx(2 * kept)
    bands = BandedToeplitz(12, np.array([1.0, 0.5]))
    private(MinSeparationSampler(2), factorization=bands)
    with pytest.raises(ValueError, match="at most 1 bands"):
        private(Unlimited(2), factorization=bands)


def test_a_stated_guarantee_of_ones_own_amplifies():
    target = {"noise_multiplier": None, "max_epsilon": 2.0}
    poisson = PoissonSampler(probability=0.25)
    expected = private(poisson, amplified=True, **target).noise_std
    assert expected < private(poisson, **target).noise_std / 2
    for sampler in (Stated(probability=0.25), Coins()):
        assert private(sampler, amplified=True, **target).noise_std == expected
        assert sampler.is_secret and sampler.seed is None


def test_cohorts_that_cannot_be_secret_do_not_amplify():
    with pytest.raises(ValueError, match=r"says how it draws, not PublicCoins"):
        private(PublicCoins(), amplified=True)


def test_a_simulation_keeps_samplers_that_have_no_limits():
    def drawn(sampler):
        return type(private(sampler, simulated_cohort=2).sampler)

    assert drawn(Own()) is Own
    assert drawn(HeldOutSampler(num_training_clients=6)) is HeldOutSampler
    for kind in ("poisson", "cyclic-poisson", "balls-in-bins", "limited", "all"):
        assert drawn(SAMPLERS[kind]()) is UniformSampler


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"kind": "Poisson"}, "kind='Poisson' must be one of"),
        ({"kind": "poisson", "probability": 0.0}, "probability=0.0"),
        ({"kind": "fixed-size", "probability": 0.5}, "probability=0.5 must be None"),
        ({"kind": "cyclic-poisson"}, "probability=None must be given"),
        ({"kind": "limited", "min_separation": 0}, "min_separation=0"),
        ({"kind": "limited", "max_participations": 0}, "max_participations=0"),
        ({"kind": "poisson", "min_separation": 2}, "kind='poisson' must be 'limited'"),
        ({"max_participations": 2}, "kind='unstated' must be 'limited'"),
    ],
)
def test_guarantees_that_contradict_themselves_are_refused(values, text):
    with pytest.raises(ValueError, match=text):
        Guarantee(**values)


def test_a_sampler_whose_object_draws_in_its_own_way_is_refused():
    sampler = PoissonSampler(probability=0.25)
    sampler.sample = lambda clients, *_: list(clients)
    with pytest.raises(
        ValueError, match=r"PoissonSampler's \['sample'\]=.* the class's"
    ):
        private(sampler)


def test_a_cohort_of_another_size_than_was_stated_is_refused():
    class Greedy(Sampler):
        def sample(self, clients, size, server_round, purpose):
            return list(clients)[: size + 1]

        def guarantee(self):
            return Guarantee(kind="fixed-size", can_be_secret=True)

    amplified = private(Greedy(), amplified=True)
    amplified.require_cohort(range(COHORT))
    for drawn in (range(COHORT + 1), range(COHORT - 1), [0] * COHORT):
        with pytest.raises(ValueError, match="Greedy's cohort must be of 6 clients"):
            amplified.require_cohort(drawn)
    private(Greedy()).require_cohort(range(COHORT + 1))
