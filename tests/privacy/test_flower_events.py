"""Flower's accountant protocol, answered exactly."""

import math

import pytest
from flwr.serverapp import (
    GaussianPrivacyEvent,
    NeighboringRelation,
    PrivacyConfig,
    RdpAccountant,
    SamplingMethod,
)

from flower_ext.privacy import EventAccountant, gaussian_epsilon

DELTA = 1e-5


def config(**changes):
    options = {
        "target_delta": DELTA,
        "population_size": 1000,
        "neighboring_relation": NeighboringRelation.ADD_OR_REMOVE_ONE,
        "sampling_method": SamplingMethod.NO_AMPLIFICATION,
    }
    return PrivacyConfig(**options | changes)


def event(noise, size=100):
    return GaussianPrivacyEvent(noise, size, 1000)


def test_nothing_is_spent_at_first():
    spent = EventAccountant(config()).get_privacy_spent()
    assert (spent.epsilon, spent.delta, spent.num_releases) == (0.0, DELTA, 0)
    assert EventAccountant(config()).get_delta(1.0) == 0.0


def test_noises_add_up_as_one_gaussian():
    accountant = EventAccountant(config())
    accountant.compose(event(3.0), count=4)
    accountant.compose(event(5.0, size=10))
    mu = math.sqrt(4 / 9 + 1 / 25)
    assert accountant.num_releases == 5
    assert accountant.get_epsilon(1e-6) == gaussian_epsilon(mu, 1e-6)
    assert accountant.get_delta(accountant.get_epsilon(1e-6)) == pytest.approx(1e-6)


@pytest.mark.parametrize(("noise", "count"), [(1.0, 1), (10.0, 50), (30.0, 1000)])
def test_it_is_below_flowers_and_by_little(noise, count):
    ours, flowers = EventAccountant(config()), RdpAccountant(config())
    for accountant in (ours, flowers):
        accountant.compose(event(noise), count)
    assert 0.8 < ours.get_epsilon(DELTA) / flowers.get_epsilon(DELTA) < 1


def test_the_limit_is_that_of_the_budget():
    accountant = EventAccountant(config(max_epsilon=1.0))
    most = next(
        n
        for n in range(1, 1000)
        if gaussian_epsilon(math.sqrt(n + 1) / 10, DELTA) > 1.0
    )
    accountant.compose(event(10.0), most - 1)
    assert not accountant.would_exceed(event(10.0))
    assert accountant.would_exceed(event(10.0), count=2)
    assert not accountant.would_exceed(event(10.0), max_epsilon=2.0, count=2)
    assert accountant.num_releases == most - 1
    with pytest.raises(ValueError, match="max_epsilon=None must be given"):
        EventAccountant(config()).would_exceed(event(1.0))


def test_it_continues_from_its_state_and_no_other():
    first, second = EventAccountant(config()), EventAccountant(config())
    first.compose(event(3.0), 4)
    second.load_state_dict(first.state_dict())
    second.compose(event(3.0))
    first.compose(event(3.0))
    assert second.get_privacy_spent() == first.get_privacy_spent()
    other = EventAccountant(config(target_delta=1e-6))
    with pytest.raises(ValueError, match=r"state\['plan'\]"):
        other.load_state_dict(first.state_dict())


def test_it_refuses_what_an_event_does_not_say():
    with pytest.raises(ValueError, match="sampling_method='poisson' must be"):
        EventAccountant(config(sampling_method=SamplingMethod.POISSON))
    with pytest.raises(ValueError, match="population_size=1000 must be 10"):
        EventAccountant(config(population_size=10)).compose(event(1.0))
