"""A silo's steps: those that also move sums whose batch an example is not in."""

import math

import pytest
from dp_accounting.pld import privacy_loss_distribution as pld

from flower_ext.privacy.accounting.gaussian import gaussian_epsilon
from flower_ext.privacy.silo_budget import StepLedger, noise_for_steps

DELTA = 1e-5


def mixture(noise, shift, rate, count, group_size=1):
    """Of the number of a unit's examples in a batch, beside a shift that is always."""
    numbers = range(group_size + 1)
    loss = pld.from_mixture_gaussian_mechanism(
        noise,
        [shift + number for number in numbers],
        [
            math.comb(group_size, k) * rate**k * (1 - rate) ** (group_size - k)
            for k in numbers
        ],
        value_discretization_interval=1e-3,
    )
    return loss.self_compose(count).get_epsilon_for_delta(DELTA)


@pytest.mark.parametrize(
    ("noise", "shift", "rate", "group_size", "above"),
    [
        (10.0, 0.5, 0.01, 1, 1.01),
        (40.0, 2.0, 0.01, 1, 1.01),
        (2.0, 0.05, 0.05, 1, 1.15),
        (20.0, 1.0, 0.02, 3, 1.02),
    ],
)
def test_splitting_the_noise_costs_little_and_never_counts_too_little(
    noise, shift, rate, group_size, above
):
    ledger = StepLedger(group_size, unit="user").add(rate, noise, 500, shift)
    exact = mixture(noise, shift, rate, 500, group_size)
    assert exact <= ledger.epsilon(DELTA) * 1.001 <= exact * above


def test_without_sampling_shifts_add_up():
    ledger = StepLedger().add(1.0, 6.0, 9, shift=2.0)
    expected = gaussian_epsilon((1 + 2) / 6 * 3, DELTA)
    assert ledger.epsilon(DELTA) == pytest.approx(expected, rel=1e-9)


def test_a_step_without_shift_is_an_ordinary_one():
    assert StepLedger().add(0.1, 2.0, 3, 0.0) == StepLedger().add(0.1, 2.0, 3)


def test_a_shift_without_noise_tells_all():
    assert StepLedger().add(0.1, 0.0, 3, 1.0).epsilon(DELTA) == math.inf


def test_a_huge_shift_is_counted_without_a_grid():
    ledger = StepLedger().add(0.01, 1.0, 1000, shift=100.0)
    assert gaussian_epsilon(math.sqrt(1000) * 100, DELTA) <= ledger.epsilon(DELTA)
    assert ledger.epsilon(DELTA) < 2 * gaussian_epsilon(math.sqrt(1000) * 101, DELTA)


@pytest.mark.parametrize("shift", [0.5, 128.0])
def test_a_target_is_met_with_the_shift_and_just_so(shift):
    noise = noise_for_steps(4.0, DELTA, 100, 0.05, 1, shift=shift)
    assert StepLedger().add(0.05, noise, 100, shift).epsilon(DELTA) <= 4.0
    assert StepLedger().add(0.05, 0.99 * noise, 100, shift).epsilon(DELTA) > 4.0


def test_steps_whose_losses_need_different_grids_compose():
    ledger = StepLedger().add(0.01, 1.0, 100).add(0.01, 20.0, 100)
    one = StepLedger().add(0.01, 1.0, 100)
    assert one.epsilon(DELTA) < ledger.epsilon(DELTA) < 1.05 * one.epsilon(DELTA)
