"""Private choices: what they reveal, by frequency, and how they add up with DP-SGD."""

import math
from statistics import NormalDist

import dp_accounting
import numpy as np
import pytest
from dp_accounting.pld import common
from dp_accounting.pld import privacy_loss_distribution as pld

from flower_ext.privacy import SiloPrivacy, StepLedger
from flower_ext.privacy.selection import choice_noise_multiplier, noisy_least
from flower_ext.privacy.silo_budget import noise_for_steps

DELTA = 1e-5


def chances(scores, scale):
    """Return the exponential mechanism's probabilities."""
    weights = np.exp(-(np.array(scores) - min(scores)) / scale)
    return weights / weights.sum()


def frequencies(scores, scale, draws=40_000):
    rng = np.random.default_rng(0)
    found = [noisy_least(scores, scale, u) for u in rng.random((draws, len(scores)))]
    return np.bincount(found, minlength=len(scores)) / draws


def test_frequencies_are_those_of_the_exponential_mechanism():
    scores, scale = [3.0, 2.0, 2.5, 9.0], 1.0
    expected = chances(scores, scale)
    spread = np.sqrt(expected * (1 - expected) / 40_000)
    assert np.all(np.abs(frequencies(scores, scale) - expected) < 5 * spread)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_an_attack_that_counts_choices_stays_within_the_bound(epsilon):
    """One example there or not: adds from 0 to the cap to every model's score."""
    cap, others = 2.0, np.array([4.0, 3.5, 5.0])
    example = np.array([cap, 0.0, cap / 3])
    scale = cap / epsilon
    there, gone = (frequencies(x, scale) for x in (others + example, others))
    error = 5 * (1 / np.sqrt(40_000 * there) + 1 / np.sqrt(40_000 * gone))
    ratios = np.log(there / gone)
    assert np.all(np.abs(ratios) <= epsilon + error)
    assert np.ptp(ratios) <= epsilon + error.max()
    # The bound on the range is met: with half the noise it would be broken.
    exact = np.log(chances(others + example, scale) / chances(others, scale))
    assert np.ptp(exact) == pytest.approx(epsilon)
    assert np.ptp(ratios) == pytest.approx(epsilon, abs=error.max())
    assert np.abs(exact).max() < epsilon


def corner(epsilon, t):
    """Return a bounded range's most revealing errors, of the first and second kind."""
    q = (math.exp(-t) - math.exp(-epsilon)) / (1 - math.exp(-epsilon))
    return q, 1 - q * math.exp(t)


@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3, 1, 2, 4, 8, 16, 30])
def test_a_gaussian_of_that_noise_reveals_no_less(epsilon):
    mu = 1 / choice_noise_multiplier(epsilon)
    normal = NormalDist()
    tightest = math.inf
    for t in np.linspace(0, epsilon, 400)[1:-1]:
        first, second = corner(epsilon, t)
        if min(first, second) < 1e-15:
            continue
        gaussian = normal.cdf(normal.inv_cdf(1 - first) - mu)
        assert gaussian <= second * (1 + 1e-9)
        tightest = min(tightest, second / gaussian if gaussian else math.inf)
    assert tightest == pytest.approx(1, abs=1e-2)  # in the middle it is met


def by_renyi(choices, epsilon, steps=0, rate=1.0, noise=1.0):
    """Return the bound by Renyi's: ``a epsilon^2 / 8`` a choice, and DP-SGD's."""
    orders = [1 + x / 10 for x in range(1, 100)] + list(range(11, 300))
    accountant = dp_accounting.rdp.RdpAccountant(orders)
    if steps:
        step = dp_accounting.PoissonSampledDpEvent(
            rate, dp_accounting.GaussianDpEvent(noise)
        )
        accountant.compose(step, steps)
    spent = accountant._rdp if steps else np.zeros(len(orders))
    total = np.asarray(spent) + choices * np.array(orders) * epsilon**2 / 8
    return dp_accounting.rdp.compute_epsilon(orders, total, DELTA)[0]


def at_least(choices, epsilon, steps=0, rate=1.0, noise=1.0):
    """Return what is certainly revealed: by an answer at the bound's middle."""
    answer = common.DifferentialPrivacyParameters(epsilon / 2)
    found = pld.from_privacy_parameters(
        answer, value_discretization_interval=1e-3
    ).self_compose(choices)
    if steps:
        step = pld.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=1e-3
        )
        found = found.compose(step.self_compose(steps))
    return found.get_epsilon_for_delta(DELTA)


@pytest.mark.parametrize(
    ("choices", "epsilon", "steps", "rate", "noise"),
    [
        (1, 0.5, 0, 1.0, 1.0),
        (50, 0.2, 0, 1.0, 1.0),
        (20, 0.3, 100, 0.1, 1.5),
        (100, 0.05, 1000, 0.02, 1.0),
        (10, 1.0, 10, 1.0, 4.0),
    ],
)
def test_choices_and_steps_add_up_as_by_two_other_accounts(
    choices, epsilon, steps, rate, noise
):
    ledger = StepLedger().add(1.0, choice_noise_multiplier(epsilon), choices)
    spent = ledger.add(rate, noise, steps).epsilon(DELTA)
    least = at_least(choices, epsilon, steps, rate, noise)
    renyi = by_renyi(choices, epsilon, steps, rate, noise)
    assert least <= spent * (1 + 1e-2)  # two grids
    # Both are upper bounds: neither is always the smaller, and they are not far apart.
    assert 0.5 * renyi <= spent <= 1.3 * renyi or choices == 1


def test_a_choice_costs_what_it_costs_beside_the_steps():
    steps = StepLedger().add(0.1, 1.5, 100)
    more = steps.add(1.0, choice_noise_multiplier(0.5), 20)
    assert more.epsilon(DELTA) > steps.epsilon(DELTA) + 0.5
    assert more.total == 120


def test_a_target_is_met_with_its_choices():
    noise = choice_noise_multiplier(0.1)
    found = noise_for_steps(2.0, DELTA, 100, 0.1, 1, 20, noise)
    ledger = StepLedger().add(1.0, noise, 20)
    spent = ledger.add(0.1, found, 100).epsilon(DELTA)
    assert 1.98 < spent <= 2.0
    assert found > noise_for_steps(2.0, DELTA, 100, 0.1, 1)
    with pytest.raises(ValueError, match="nothing is left for the training"):
        noise_for_steps(2.0, DELTA, 100, 0.1, 1, 2000, noise)


def test_a_user_of_several_examples_is_one_unit():
    one, three = (
        SiloPrivacy(
            noise_multiplier=1.0,
            clipping_norm=1.0,
            delta=1e-3,
            max_examples_per_user=most,
            selection_epsilon=0.5,
            loss_cap=1.0,
        )
        for most in (None, 3)
    )
    spent = [
        StepLedger(p.group_size)
        .add(1.0, p.choice_noise(p.group_size), 10)
        .epsilon(DELTA)
        for p in (one, three)
    ]
    assert spent[0] == pytest.approx(spent[1])


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"loss_cap": None}, "a choice needs both"),
        ({"selection_epsilon": None}, "a choice needs both"),
        ({"loss_cap": 0.0}, "loss_cap=0.0 must be"),
        ({"loss_cap": math.inf}, "loss_cap=inf must be"),
        ({"selection_epsilon": 0.0}, "selection_epsilon=0.0 must be"),
        ({"selection_epsilon": 31}, "selection_epsilon=31 must be <= 30, or infinity"),
    ],
)
def test_what_is_no_choice(options, says):
    usual = {"noise_multiplier": 1.0, "clipping_norm": 1.0, "delta": 1e-3}
    usual |= {"selection_epsilon": 0.5, "loss_cap": 1.0}
    with pytest.raises(ValueError, match=says):
        SiloPrivacy(**{**usual, **options})
