"""Published accountings, dp-accounting called independently, Flower's vocabulary."""

import json
import math
import subprocess
import sys
import time

import dp_accounting
import dp_accounting.rdp
import numpy as np
import pytest
import scipy.stats
from flwr import serverapp

from flower_ext.privacy import (
    BandedToeplitz,
    BufferedToeplitz,
    GaussianAccountant,
    Identity,
    SampledGaussianAccountant,
    TreeAggregation,
    epsilon_for,
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    noise_multiplier_for,
)
from flower_ext.privacy.accounting.calibration import (
    fixed_cohort_epsilon,
    fixed_cohort_loss,
    grid,
    least_noise,
    loss_on_grid,
    noise_multiplier_without_replacement,
)


def configuration(sampling="no-amplification", **options):
    options = {"target_delta": 1e-6, "population_size": 10_000} | options
    return serverapp.PrivacyConfig(
        neighboring_relation=serverapp.NeighboringRelation.ADD_OR_REMOVE_ONE,
        sampling_method=serverapp.SamplingMethod(sampling),
        **options,
    )


def test_published_epsilons(reference):
    for row in reference["published"]:
        mu = math.sqrt(row["sensitivity_squared"]) / row["noise_over_clip"]
        assert mu**2 / 2 == pytest.approx(row["rho"], rel=1e-12)
        epsilon = gaussian_epsilon(mu, row["delta"])
        assert epsilon == pytest.approx(row["epsilon"], abs=5e-6)


def test_published_tree(reference):
    row = reference["tree_published"]
    tree = TreeAggregation(row["rounds"], estimator="online")
    # The publication counts the rounds between; ours is one more.
    sensitivity = tree.sensitivity(row["separation_between"] + 1, row["participations"])
    mu = sensitivity.value / row["noise_over_clip"]
    assert mu**2 / 2 == pytest.approx(row["rho"], abs=0.005)
    # Published is the looser epsilon that goes through Renyi privacy.
    assert 0.9 < gaussian_epsilon(mu, row["delta"]) / row["rdp_epsilon"] < 1


def test_epsilon_table(reference):
    for row in reference["gaussian"]:
        mu = 1 / row["noise_multiplier"]
        epsilon = gaussian_epsilon(mu, row["delta"])
        assert epsilon == pytest.approx(row["epsilon"], abs=6e-6)
        assert epsilon < row["rdp_epsilon"]
        assert epsilon_for(1 / mu, row["delta"]) == epsilon


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.5, 30.0])
@pytest.mark.parametrize("delta", [1e-10, 1e-6, 1e-2])
def test_gaussian_against_dp_accounting(sigma, delta):
    other = dp_accounting.get_epsilon_gaussian(sigma, delta)
    epsilon = gaussian_epsilon(1 / sigma, delta)
    assert epsilon == pytest.approx(other, abs=1e-9)
    if epsilon > 0:
        assert gaussian_delta(1 / sigma, epsilon) <= delta
        assert gaussian_delta(1 / sigma, epsilon * (1 - 1e-6)) > delta
        assert 1 / gaussian_mu(epsilon, delta) == pytest.approx(sigma, rel=1e-6)
        assert gaussian_epsilon(gaussian_mu(epsilon, delta), delta) <= epsilon + 1e-9


def test_gaussian_limits():
    assert gaussian_delta(0.0, 1.0) == 0.0
    assert gaussian_epsilon(0.0, 1e-6) == 0.0
    assert gaussian_epsilon(1e-9, 1e-6) == 0.0
    assert gaussian_epsilon(100.0, 1e-6) == pytest.approx(
        dp_accounting.get_epsilon_gaussian(0.01, 1e-6), rel=1e-9
    )
    # Total variation distance at epsilon 0: 2 Phi(mu / 2) - 1.
    assert gaussian_delta(1.0, 0.0) == pytest.approx(math.erf(0.5 / math.sqrt(2)))


def test_spent_after_each_round_is_that_of_the_first_rows(enumerate_sensitivity):
    factorization = BufferedToeplitz.optimize(12, 4, 3, buffers=2)
    accountant = GaussianAccountant(factorization, 1.3, 4, 3, configuration())
    matrix = factorization.strategy_matrix()
    assert accountant.get_epsilon(1e-6) == 0.0
    previous = 0.0
    for done in range(1, 13):
        accountant.advance()
        part = enumerate_sensitivity(matrix[:done, :done], 4, 3)
        mu = part / accountant.noise_std
        assert accountant.mu_after(done) == pytest.approx(mu, rel=1e-9)
        spent = accountant.get_privacy_spent()
        assert spent.epsilon == pytest.approx(gaussian_epsilon(mu, 1e-6), rel=1e-8)
        assert spent.num_releases == done
        assert spent.epsilon >= previous
        assert accountant.get_delta(spent.epsilon) <= 1e-6 * (1 + 1e-9)
        previous = spent.epsilon
    assert previous == gaussian_epsilon(1 / 1.3, 1e-6)
    with pytest.raises(ValueError, match="planned rounds"):
        accountant.advance()


def test_identity_is_composition_of_gaussians():
    accountant = GaussianAccountant(Identity(9), 2.0, 1, 9, configuration())
    accountant.advance(9)
    pld = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    pld.compose(dp_accounting.GaussianDpEvent(accountant.noise_std), 9)
    assert accountant.get_epsilon(1e-6) == pytest.approx(
        pld.get_epsilon(1e-6), rel=1e-4
    )


def test_poisson_against_dp_accounting():
    accountant = SampledGaussianAccountant(1.0, 1000, 0.01, configuration("poisson"))
    accountant.advance(1000)
    pld = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    gaussian = dp_accounting.GaussianDpEvent(1.0)
    pld.compose(dp_accounting.PoissonSampledDpEvent(0.01, gaussian), 1000)
    epsilon = accountant.get_epsilon(1e-6)
    assert epsilon == pytest.approx(pld.get_epsilon(1e-6), rel=1e-9)
    assert epsilon == pytest.approx(2.1253, abs=5e-5)
    assert accountant.get_delta(epsilon) == pytest.approx(1e-6, rel=1e-3)
    assert accountant.get_privacy_spent().accounting_method == "pld"


@pytest.mark.parametrize(
    ("group", "sigma", "epsilon", "digits"),
    [(4, 4.0, 1.4175, 4), (16, 16.0, 1.376, 3), (16, 4.0, 6.65, 2)],
)
def test_example_level_sampling(group, sigma, epsilon, digits):
    found = epsilon_for(
        sigma, 1e-6, rounds=1000, sampling_probability=0.01, group_size=group
    )
    assert round(found, digits) == epsilon


def test_group_of_one_is_client_sampling_and_full_sampling_is_exact():
    options = {"rounds": 50, "sampling_probability": 0.02}
    one = epsilon_for(4.0, 1e-6, group_size=1, **options)
    assert epsilon_for(4.0, 1e-6, group_size=2, **options) > one
    everyone = epsilon_for(8.0, 1e-6, rounds=4, group_size=3)
    assert everyone == gaussian_epsilon(2 * 3 / 8.0, 1e-6)
    accountant = SampledGaussianAccountant(
        8.0, 4, 1.0, configuration("poisson"), group_size=3
    )
    assert accountant.epsilon_after(4, 1e-6) == everyone
    delta = accountant.delta_after(4, everyone)
    assert delta == pytest.approx(1e-6, rel=0.01)


def test_cyclic_poisson():
    banded = BandedToeplitz.optimize(100, 8)
    config = configuration("poisson")
    accountant = SampledGaussianAccountant.cyclic(banded, 1.0, 50, config)
    assert accountant.sampling_probability == pytest.approx(50 * 8 / 10_000)
    pld = dp_accounting.pld.PLDAccountant(value_discretization_interval=1e-3)
    gaussian = dp_accounting.GaussianDpEvent(1.0)
    pld.compose(dp_accounting.PoissonSampledDpEvent(0.04, gaussian), 13)  # ceil(100/8)
    assert accountant.epsilon_after(100, 1e-6) == pytest.approx(pld.get_epsilon(1e-6))
    assert accountant.epsilon_after(8, 1e-6) == accountant.epsilon_after(1, 1e-6)
    assert accountant.epsilon_after(9, 1e-6) > accountant.epsilon_after(8, 1e-6)
    scaled = BandedToeplitz(100, 3 * banded.coefficients)
    louder = SampledGaussianAccountant.cyclic(scaled, 1.0, 50, config)
    assert accountant.noise_std == pytest.approx(1.0)
    assert louder.noise_std == pytest.approx(3.0)
    with pytest.raises(ValueError, match="another mechanism"):
        louder.load_state_dict(accountant.state_dict())
    with pytest.raises(ValueError, match="cycle=7 must be >= bands=8"):
        SampledGaussianAccountant.cyclic(banded, 1.0, 50, config, cycle=7)
    with pytest.raises(ValueError, match="sampling_probability=1.6"):
        SampledGaussianAccountant.cyclic(banded, 1.0, 2000, config)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rounds": 30},
        {"rounds": 200, "sampling_probability": 0.02},
        {"rounds": 200, "sampling_probability": 0.1, "cycle": 10},
    ],
)
def test_noise_from_a_target_and_back(options):
    noise = noise_multiplier_for(2.0, 1e-6, **options)
    spent = epsilon_for(noise, 1e-6, **options)
    assert 2.0 * (1 - 1e-3) < spent <= 2.0


@pytest.mark.parametrize(
    ("spent", "at_most"),
    [
        (lambda noise: 2.5 / noise, 6),
        (lambda noise: 3 / noise**2 + 0.2 / noise, 8),
        (lambda noise: math.expm1(2 / noise), 8),
        (lambda noise: 9.0 if noise < 1.2345 else 0.0, 15),  # as long as bisection
        (lambda noise: math.inf if noise < 1.2345 else 2 / noise, 15),
    ],
)
def test_the_search_is_short_and_ends_just_above_the_least_noise(spent, at_most):
    asked = []

    def counted(noise):
        asked.append(noise)
        return spent(noise)

    found = least_noise(counted, 1.9, (1.0, 2.0), (spent(1.0), spent(2.0)))
    assert spent(found) <= 1.9 < spent(found / 1.0001001)
    assert len(asked) <= at_most
    assert all(1 < noise < 2 for noise in asked)


def test_a_target_that_sampling_alone_meets_ends_the_search():
    options = {"rounds": 2, "sampling_probability": 1e-4}
    assert noise_multiplier_for(1.0, 1e-3, **options) < 0.5


def test_budget_stops_before_it_is_exceeded():
    from flwr.serverapp.exception import PrivacyBudgetExhausted

    accountant = GaussianAccountant(
        Identity(10), 1.0, 1, 10, configuration(max_epsilon=2.0)
    )
    with pytest.raises(PrivacyBudgetExhausted, match="would exceed max_epsilon=2.0"):
        for _ in range(10):
            accountant.require_budget()
            accountant.advance()
    assert 0 < accountant.get_epsilon(1e-6) <= 2.0
    assert accountant.epsilon_after(accountant.num_releases + 1, 1e-6) > 2.0
    unlimited = GaussianAccountant(Identity(1), 1.0, 1, 1, configuration())
    unlimited.require_budget()
    unlimited.advance()
    with pytest.raises(PrivacyBudgetExhausted, match="planned"):
        unlimited.require_budget()


def test_state_round_trip_and_foreign_states():
    def build(noise=1.0, rounds=10):
        return GaussianAccountant(TreeAggregation(rounds), noise, 3, 2, configuration())

    accountant = build()
    accountant.advance(4)
    state = json.loads(json.dumps(accountant.state_dict()))
    resumed = build()
    resumed.load_state_dict(state)
    assert resumed.get_privacy_spent() == accountant.get_privacy_spent()
    for other in (build(noise=2.0), build(rounds=11)):
        with pytest.raises(ValueError, match="another mechanism"):
            other.load_state_dict(state)
    for releases in (-1, 11, None, 1.5):
        with pytest.raises(ValueError, match="releases"):
            build().load_state_dict(state | {"releases": releases})


def test_protocol_and_refusals():
    accountant = GaussianAccountant(Identity(4), 1.0, 1, 4, configuration())
    flowers = {name for name in vars(serverapp.PrivacyAccountant) if name[0] != "_"}
    missing = {name for name in flowers if not hasattr(accountant, name)}
    assert missing == {"compose", "would_exceed"}  # they take independent events
    with pytest.raises(ValueError, match="must be what the sampler does"):
        GaussianAccountant(Identity(4), 1.0, 1, 4, configuration("poisson"))
    with pytest.raises(ValueError, match="sampling_method='no-amplification'"):
        SampledGaussianAccountant(1.0, 4, 0.1, configuration())
    for noise in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="noise_multiplier"):
            GaussianAccountant(Identity(4), noise, 1, 4, configuration())
    with pytest.warns(UserWarning, match="should be < 1 / population_size"):
        GaussianAccountant(Identity(4), 1.0, 1, 4, configuration(target_delta=1e-4))
    for bad in (0.0, 1.0, math.nan):
        with pytest.raises(ValueError, match="delta"):
            gaussian_epsilon(1.0, bad)


def test_noise_std_is_the_multiplier_times_the_sensitivity():
    accountant = GaussianAccountant(Identity(16), 1.5, 4, 4, configuration())
    assert accountant.noise_std == pytest.approx(1.5 * 2)
    assert np.isclose(accountant.sensitivity.value, 2.0)


@pytest.mark.slow
def test_the_layer_imports_without_scipy_dp_accounting_or_torch():
    code = (
        "import sys, importlib.util, types\n"
        "root = importlib.util.find_spec('flower_ext').submodule_search_locations\n"
        "package = types.ModuleType('flower_ext')\n"
        "package.__path__ = list(root)\n"
        "sys.modules['flower_ext'] = package\n"
        "import flower_ext.privacy\n"
        "heavy = {'scipy', 'dp_accounting', 'torch', 'flwr'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


FAINT = {
    "many rounds": (20.0, 0.01, 20000, 1e-7, 1),
    "a small rate": (8.0, 0.001, 100000, 1e-7, 1),
    "much noise": (50.0, 0.1, 1000, 1e-6, 1),
    "one round": (10.0, 0.01, 1, 1e-6, 1),
    "a user with three examples": (16.0, 0.002, 2000, 1e-6, 3),
    "an ordinary run": (1.1, 0.01, 300, 1e-5, 1),
}


@pytest.mark.parametrize(
    ("noise", "rate", "rounds", "delta", "group"), FAINT.values(), ids=FAINT
)
def test_epsilon_by_default_is_within_a_hundredth_of_a_fine_grid(
    noise, rate, rounds, delta, group
):
    options = {"rounds": rounds, "sampling_probability": rate, "group_size": group}
    found = epsilon_for(noise, delta, **options)
    spread = rate * math.sqrt(math.expm1((group / noise) ** 2))
    fine = epsilon_for(noise, delta, **options, interval=min(spread, 3e-3) / 40)
    assert fine <= found <= fine * 1.01
    if group == 1:  # never looser than on a grid of a thousandth
        loss = dp_accounting.pld.privacy_loss_distribution.from_gaussian_mechanism(
            noise, sampling_prob=rate, value_discretization_interval=1e-3
        )
        assert found <= loss.self_compose(rounds).get_epsilon_for_delta(delta)


@pytest.mark.parametrize(("rate", "rounds"), [(1e-5, 1000), (1e-6, 1), (1e-8, 10**6)])
def test_rare_clients_and_little_noise_cost_no_minutes(rate, rounds):
    """Their largest losses are far beyond the spread that the grid should resolve."""
    before = time.process_time()
    epsilon = epsilon_for(0.5, 1e-6, rounds=rounds, sampling_probability=rate)
    assert time.process_time() - before < 20
    assert 0 <= epsilon <= epsilon_for(0.5, 1e-6, rounds=rounds) / 100


def test_large_groups_and_little_noise_cost_no_minutes():
    before = time.process_time()
    options = {"rounds": 200, "sampling_probability": 1e-4, "group_size": 32}
    epsilon = epsilon_for(0.5, 1e-5, **options)
    assert time.process_time() - before < 20
    one = epsilon_for(0.5, 1e-5, **{**options, "group_size": 1})
    assert one < epsilon < 32 * 50


def test_noise_by_default_is_within_a_hundredth_of_a_fine_grid():
    """On a grid of a thousandth it would be 5.5, half as much again as needed."""
    target = {"rounds": 20000, "sampling_probability": 0.002}
    noise = noise_multiplier_for(0.3, 1e-6, **target)
    assert epsilon_for(noise, 1e-6, **target) <= 0.3
    assert epsilon_for(noise / 1.01, 1e-6, **target, interval=1e-6) > 0.3


def test_delta_follows_the_same_grid():
    config = configuration("poisson")
    accountant = SampledGaussianAccountant(8.0, 20000, 0.001, config)
    delta = accountant.delta_after(20000, 0.05)
    assert accountant.epsilon_after(20000, delta) == pytest.approx(0.05, rel=1e-3)


def test_a_tree_says_that_it_is_bounded():
    config = configuration()
    for plan, method in (
        (TreeAggregation(8), "gaussian-upper-bound"),
        (Identity(8), "gaussian-exact"),
    ):
        spent = GaussianAccountant(plan, 1.0, 2, 3, config).get_privacy_spent()
        assert spent.accounting_method == method


# Cohorts of a fixed size ------------------------------------------------------------

FIXED = {
    "many rounds": (2.0, 1000, 10, 1000, 1e-6),
    "large cohorts": (4.0, 1000, 100, 100, 1e-5),
    "half of all": (8.0, 100, 50, 50, 1e-4),
    "one round": (1.0, 10_000, 50, 1, 1e-6),
    "little noise": (0.7, 1000, 20, 50, 1e-5),
}


def by_renyi(noise, population, cohort, rounds, delta):
    """Wang, Balle and Kasiviswanathan 2019, by dp-accounting."""
    relation = dp_accounting.NeighboringRelation.REPLACE_ONE
    accountant = dp_accounting.rdp.RdpAccountant(None, relation)
    one = dp_accounting.GaussianDpEvent(noise / 2)
    round_ = dp_accounting.SampledWithoutReplacementDpEvent(population, cohort, one)
    events = dp_accounting.SelfComposedDpEvent(round_, rounds)
    return accountant.compose(events).get_epsilon(delta)


def by_attack(noise, population, cohort, rounds, delta):
    """Return epsilon that an adversary reaches: all others send zero.

    The exchanged client sends 1 or -1 and is in a cohort at random; the outcomes are
    put in bins, which only loses information.
    """
    rate, width = cohort / population, noise / 200
    edges = np.arange(-1 - 12 * noise, 1 + 12 * noise, width)

    def mixture(value):
        drawn = scipy.stats.norm.cdf(edges, value, noise)
        away = scipy.stats.norm.cdf(edges, 0, noise)
        mass = np.diff(rate * drawn + (1 - rate) * away)
        return {i: math.log(x) for i, x in enumerate(mass) if x > 0}

    one, other = mixture(1.0), mixture(-1.0)
    both = one.keys() & other.keys()
    loss = dp_accounting.pld.privacy_loss_distribution
    found = loss.from_two_probability_mass_functions(
        {i: one[i] for i in both},
        {i: other[i] for i in both},
        pessimistic_estimate=False,
        value_discretization_interval=1e-4,
    )
    return found.self_compose(rounds).get_epsilon_for_delta(delta)


@pytest.mark.parametrize("setting", FIXED.values(), ids=FIXED)
def test_fixed_cohorts_are_between_an_attack_and_renyi(setting):
    noise, population, cohort, rounds, delta = setting
    found = fixed_cohort_epsilon(rounds, delta, noise, population, cohort)
    attack, renyi = by_attack(*setting), by_renyi(*setting)
    assert attack <= found < renyi / 1.2
    # The sum of a Poisson cohort that moves as far is no more private.
    poisson = epsilon_for(
        noise / 2, delta, rounds=rounds, sampling_probability=cohort / population
    )
    assert poisson <= found * 1.001


@pytest.mark.parametrize("rate", [0.01, 0.3, 0.999])
@pytest.mark.parametrize("noise", [0.8, 3.0])
def test_one_fixed_cohort_is_the_closed_form(rate, noise):
    loss, mu = fixed_cohort_loss(noise, rate), 2 / noise
    for epsilon in (0.0, 0.1, 0.5, 2.0):
        inner = math.log1p(math.expm1(epsilon) / rate)
        exact = rate * gaussian_delta(mu, inner)
        found = loss.get_delta_for_epsilon(epsilon)
        assert exact * (1 - 1e-9) <= found <= exact * 1.02 + 1e-12


def test_profile_of_a_fixed_cohort_is_symmetric():
    """Both orders of two neighbours: the second by the divergence of the first."""
    loss, epsilon = fixed_cohort_loss(2.0, 0.2), 0.3
    forth = loss.get_delta_for_epsilon(epsilon)
    back = loss.get_delta_for_epsilon(-epsilon)
    assert back == pytest.approx(1 - math.exp(-epsilon) * (1 - forth), rel=1e-3)


def test_a_cohort_of_all_is_a_gaussian():
    found = fixed_cohort_epsilon(10, 1e-5, 4.0, 50, 50)
    assert found == gaussian_epsilon(2 * math.sqrt(10) / 4.0, 1e-5)
    nearly = fixed_cohort_epsilon(10, 1e-5, 4.0, 10**6, 10**6 - 1)
    assert found <= nearly * 1.0001 <= found * 1.02


@pytest.mark.parametrize("epsilon", [0.1, 2.0, 12.0])
def test_least_noise_of_fixed_cohorts(epsilon):
    target = {"rounds": 200, "population": 1000, "cohort": 20}
    noise = noise_multiplier_without_replacement(epsilon, 1e-6, **target)
    assert fixed_cohort_epsilon(200, 1e-6, noise, 1000, 20) <= epsilon
    assert fixed_cohort_epsilon(200, 1e-6, noise / 1.001, 1000, 20) > epsilon


@pytest.mark.parametrize(
    ("noise", "rate", "group"), [(1.0, 0.01, 4), (4.0, 0.05, 16), (0.7, 0.3, 2)]
)
def test_examples_of_one_user_lose_what_two_other_computations_say(noise, rate, group):
    interval = grid(noise, rate, group, 1e-3)
    found = loss_on_grid(noise, rate, group, interval)
    # By integration of max(0, P - e^epsilon Q), and the other way round.
    x = np.linspace(-12 * noise, group + 12 * noise, 400_001)
    counts = np.arange(group + 1)
    chances = [
        math.comb(group, k) * rate**k * (1 - rate) ** (group - k) for k in counts
    ]
    alone = np.exp(-((x / noise) ** 2) / 2)
    user = sum(
        chance * np.exp(-(((x - k) / noise) ** 2) / 2)
        for k, chance in zip(counts, chances, strict=True)
    )
    scale = (x[1] - x[0]) / (noise * math.sqrt(2 * math.pi))
    for p, q, one_way in (
        (user, alone, found._pmf_remove),
        (alone, user, found._pmf_add),
    ):
        for epsilon in (-0.5, 0.0, 0.005, 0.05, 0.5, 2.0):
            least = scale * np.maximum(p - math.exp(epsilon) * q, 0.0).sum()
            spent = one_way.get_delta_for_epsilon(epsilon)
            assert least * (1 - 1e-6) <= spent <= least * 1.001 + 1e-9
    # By dp-accounting's own search for the roots, over many rounds.
    theirs = (
        dp_accounting.pld.privacy_loss_distribution.from_mixture_gaussian_mechanism(
            noise,
            [float(k) for k in counts],
            chances,
            value_discretization_interval=interval,
        )
    )
    for delta in (1e-3, 1e-6):
        ours = found.self_compose(50).get_epsilon_for_delta(delta)
        peer = theirs.self_compose(50).get_epsilon_for_delta(delta)
        assert ours == pytest.approx(peer, rel=1e-6)
