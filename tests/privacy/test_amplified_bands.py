"""Bands and groups of clients under secret cohorts, chosen by accounting."""

import math
from functools import lru_cache

import numpy as np
import pytest
from flwr import serverapp

from flower_ext import AdditiveStrategy
from flower_ext.core.sampling import CyclicPoissonSampler
from flower_ext.privacy import (
    BandedToeplitz,
    Identity,
    Mechanism,
    SampledGaussianAccountant,
    Workload,
    best_amplified,
    best_bands,
    epsilon_for,
    noise_multiplier_for,
)

PLAN = {"rounds": 30, "num_sampled_clients": 10, "population_size": 120}
TARGET = {"max_epsilon": 6.0, "target_delta": 1e-4}
SERVERS = [Workload(), Workload(momentum=0.9)]


@lru_cache
def least_noise(cycle):
    return noise_multiplier_for(
        6.0, 1e-4, rounds=30, sampling_probability=cycle / 12, cycle=cycle
    )


def noise_of(cycle, bands, workload=SERVERS[0]):
    """The noise in the models, all of it asked of other parts."""
    mechanism = BandedToeplitz.optimize(
        30, bands, normalize_columns=True, workload=workload
    )
    matrix = mechanism.strategy_matrix()
    models = workload.matrix(30) @ np.linalg.inv(matrix)
    column = np.linalg.norm(matrix, axis=0).max()
    return least_noise(cycle) * column * math.sqrt((models**2).sum() / 30)


@pytest.mark.parametrize("workload", SERVERS, ids=str)
def test_of_all_cycles_and_bands_none_has_less_noise(workload):
    choice = best_amplified(**PLAN, **TARGET, memory=30, workload=workload)
    brute = {
        (cycle, bands): noise_of(cycle, bands, workload)
        for cycle in range(1, 13)
        for bands in {1, cycle // 2, cycle} - {0}
    }
    least = min(brute.values())
    found = choice.compared[0]
    assert found.noise == pytest.approx(least, rel=2e-3)
    assert found.noise == pytest.approx(brute[found.cycle, found.bands], rel=1e-9)
    chosen = noise_of(choice.cycle, choice.factorization.bands, workload)
    assert chosen <= found.noise * (1 + 1.1e-3)
    assert choice.probability == pytest.approx(choice.cycle / 12)
    assert 1 < choice.cycle < 12  # neither plain Poisson cohorts nor all in a turn
    assert f"cycle={choice.cycle}" in choice.reason


def test_one_group_is_independent_noise_in_poisson_cohorts():
    alone = best_amplified(**PLAN, **TARGET, memory=0).compared
    line = next(line for line in alone if line.cycle == 1)
    assert line.bands == 1
    least = noise_multiplier_for(6.0, 1e-4, rounds=30, sampling_probability=1 / 12)
    assert line.noise_multiplier == least
    assert line.noise == pytest.approx(least * Identity(30).rms_error())
    # Of those without memory more groups only take away from the amplification.
    assert min(alone, key=lambda line: line.noise).bands == 1
    everybody = best_amplified(30, 10, 10, **TARGET)
    assert everybody.compared[0].probability == 1.0


@pytest.mark.parametrize("workload", SERVERS, ids=str)
@pytest.mark.parametrize(("cycle", "memory"), [(1, 4), (3, 9), (8, 4), (40, 29)])
def test_for_given_groups_the_error_decides(cycle, memory, workload):
    def error(bands):
        return BandedToeplitz.optimize(
            30, bands, normalize_columns=True, workload=workload
        ).rms_error(workload)

    found = best_bands(30, cycle, memory=memory, workload=workload)
    widest = min(cycle, memory + 1, 30)
    errors = {bands: error(bands) for bands in range(1, widest + 1)}
    least = min(errors.values())
    assert found.bands == min(b for b, e in errors.items() if e <= least * 1.001)
    assert found.sensitivity(1, 1).value == pytest.approx(1.0)


def test_a_mechanism_takes_them_and_is_accounted_for_as_ever():
    choice = best_amplified(**PLAN, **TARGET)
    assert choice.cycle > 1
    sampler = CyclicPoissonSampler(choice.probability, choice.cycle)
    mechanism = Mechanism(
        num_rounds=30,
        num_sampled_clients=10,
        population_size=120,
        amplified=True,
        **TARGET,
    )
    strategy = AdditiveStrategy(mechanism=mechanism, sampler=sampler)
    factorization = strategy.private_sum.factorization
    assert factorization.fingerprint() == choice.factorization.fingerprint()
    accountant = strategy.private_sum.accountant
    line = next(line for line in choice.compared if line.cycle == choice.cycle)
    assert strategy.private_sum.noise_std == pytest.approx(line.noise_multiplier)
    turns = -(-30 // choice.cycle)
    spent = epsilon_for(
        line.noise_multiplier,
        1e-4,
        rounds=turns,
        sampling_probability=choice.probability,
    )
    assert accountant.epsilon_after(30, 1e-4) == pytest.approx(spent, rel=1e-9)
    assert spent <= 6.0
    config = serverapp.PrivacyConfig(
        target_delta=1e-4,
        population_size=120,
        neighboring_relation=serverapp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=serverapp.SamplingMethod.POISSON,
    )
    own = SampledGaussianAccountant.cyclic(
        choice.factorization, line.noise_multiplier, 10, config, cycle=choice.cycle
    )
    assert own.epsilon_after(30, 1e-4) == accountant.epsilon_after(30, 1e-4)


def test_the_servers_momentum_chooses_other_bands_of_the_same_privacy():
    plan = {"num_rounds": 30, "num_sampled_clients": 10, "population_size": 200}
    sampler = CyclicPoissonSampler(0.25, 5)
    plain, other = (
        Mechanism(**plan, **TARGET, amplified=True, workload=w) for w in SERVERS
    )
    chosen = [m.choose(sampler) for m in (plain, other)]
    assert chosen[0].fingerprint() != chosen[1].fingerprint()
    noise = [
        m.account(f, sampler).noise_std
        for m, f in zip((plain, other), chosen, strict=True)
    ]
    assert noise[0] == pytest.approx(noise[1], rel=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_sampled_clients": 201}, "num_sampled_clients=201 must be <= pop"),
        ({"max_epsilon": 0.0}, "max_epsilon=0.0"),
        ({"target_delta": 1.0}, "target_delta=1.0"),
        ({"memory": -1}, "memory=-1"),
        ({"objective": "mean"}, "objective='mean'"),
        ({"rounds": 0}, "rounds=0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        best_amplified(**{**PLAN, **TARGET, **changes})
