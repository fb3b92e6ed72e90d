"""Bounded Gaussians: against quadrature, samples, the Gaussian, and DP-SGD by hand."""

import json
import math

import numpy as np
import pytest
import torch
from dp_accounting.rdp import compute_epsilon
from scipy.integrate import quad
from scipy.stats import kstest, norm
from torch import nn

from flower_ext import AdditiveStrategy, Task, client_app
from flower_ext.client import dp_sgd
from flower_ext.client.bounded_steps import BoundedSteps
from flower_ext.client.dp_sgd import DPSGD
from flower_ext.client.user_level import ULS
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import (
    BoundedGaussian,
    InstanceAccount,
    InstanceReport,
    SiloPrivacy,
)
from flower_ext.privacy.bounded import ORDERS, epsilon_of_divergences
from flower_ext.simulation import LocalGrid

KINDS = ["rectified", "truncated"]
CASES = [  # lower, upper, mean, other mean, deviation
    (-1.0, 1.0, 0.0, 0.5, 1.0),
    (-1.0, 1.0, 0.3, -0.2, 1.0),
    (-0.5, 2.0, 1.5, 0.2, 0.6),
    (-math.inf, 0.7, -1.0, 0.5, 0.8),
]


def log_law(noise, mean, s):
    """Return the masses of the ends, and the log density between them."""
    low, high = ((x - mean) / s for x in (noise.lower, noise.upper))
    if noise.is_post_processing:
        tails = norm.cdf(low), norm.sf(high)
        return tails, lambda y: norm.logpdf(y, mean, s)
    mass = norm.cdf(high) - norm.cdf(low)
    return (0.0, 0.0), lambda y: norm.logpdf(y, mean, s) - math.log(mass)


def law(noise, mean, s):
    """Return the masses of the ends, and the density between them."""
    tails, log_density = log_law(noise, mean, s)
    return tails, lambda y: np.exp(log_density(y))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_fisher_information_is_that_of_the_law(kind, case):
    """The mean square of the score, by finite differences and quadrature."""
    lower, upper, mean, _, s = case
    noise, h = BoundedGaussian(lower, upper, kind), 1e-5
    (ends, density), (up, above), (down, below) = (
        law(noise, mean + shift, s) for shift in (0.0, h, -h)
    )

    def integrand(y):
        slope = (above(y) - below(y)) / (2 * h)
        return slope**2 / density(y)

    expected = quad(integrand, max(lower, -12), upper)[0]
    for mass, more, less in zip(ends, up, down, strict=True):
        expected += ((more - less) / (2 * h)) ** 2 / mass if mass else 0.0
    found = noise.fisher_information(mean, s)
    assert found == pytest.approx(expected, rel=1e-6)
    assert 0 < found < 1 / s**2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("order", [1.1, 2.0, 8.0])
def test_divergence_is_that_of_the_laws(kind, case, order):
    lower, upper, mean, other, s = case
    noise = BoundedGaussian(lower, upper, kind)
    (ends, density), (others, against) = (log_law(noise, x, s) for x in (mean, other))

    def integrand(y):
        return math.exp(order * density(y) + (1 - order) * against(y))

    middle = order * mean + (1 - order) * other
    low = lower if math.isfinite(lower) else middle - 9 * s
    moment = quad(integrand, low, upper, epsabs=0)[0]
    for one, two in zip(ends, others, strict=True):
        moment += one**order * two ** (1 - order) if one else 0.0
    found = noise.renyi_divergence(order, mean, other, s)
    assert found == pytest.approx(math.log(moment) / (order - 1), rel=1e-6)
    if kind == "rectified":  # post-processing tells no more
        assert found <= order * (mean - other) ** 2 / (2 * s**2) + 1e-12


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bound", [math.inf, 60.0])
def test_far_bounds_are_the_gaussian(kind, bound):
    noise, means = BoundedGaussian(-bound, bound, kind), np.array([-3.0, 0.0, 2.0])
    np.testing.assert_allclose(noise.fisher_information(means, 1.5), 1.5**-2)
    np.testing.assert_allclose(
        noise.renyi_divergence(3.0, means, means + 0.7, 1.5), 3 * 0.7**2 / (2 * 1.5**2)
    )
    assert np.all(noise.renyi_divergence(3.0, means, means, 1.5) < 1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_wider_bounds_tell_more(kind):
    bounds = [BoundedGaussian(-b, b, kind) for b in (0.5, 1.0, 1.5, 2.5, 4.0)]
    told = [
        (float(x.fisher_information(0.2, 1.0)), float(x.renyi_divergence(4, 0.2, 0, 1)))
        for x in bounds
    ]
    assert np.all(np.diff(told, axis=0) > 0)


def test_far_tails_stay_finite_and_ordered():
    noise = BoundedGaussian(-1.0, 1.0)
    found = noise.renyi_divergence(64.0, [50.0, 0.3], [-50.0, 0.2], 0.1)
    assert np.isfinite(found).all() and found[0] > found[1] > 0
    assert noise.fisher_information([50.0, -50.0], 0.1).max() < 1e-6
    truncated = BoundedGaussian(0.0, 1.0, "truncated")
    assert np.isfinite(truncated.renyi_divergence(64.0, [0.0], [1.0], 0.05)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_samples_follow_the_law(kind):
    noise, mean, s = BoundedGaussian(-1.0, 0.5, kind), 0.2, 0.9
    drawn = noise.sample(np.full(20_000, mean), s, np.random.default_rng(0))
    assert drawn.min() >= -1 and drawn.max() <= 0.5
    (low, high), density = law(noise, mean, s)
    for end, mass in ((-1.0, low), (0.5, high)):
        assert abs(np.mean(drawn == end) - mass) < 5 * math.sqrt(0.25 / len(drawn))
    inside = drawn[(drawn > -1) & (drawn < 0.5)]
    grid = np.linspace(-1, 0.5, 400)
    cumulated = np.array([quad(density, -1, y)[0] for y in grid])
    cumulated /= cumulated[-1]
    assert kstest(inside, lambda y: np.interp(y, grid, cumulated)).pvalue > 1e-3
    # Had all been cut or all redrawn, the other's law would not fit.
    assert (len(inside) < len(drawn)) == (kind == "rectified")


def test_epsilon_is_that_of_an_independent_accountant():
    """A looser conversion there: never below, and near where delta is small."""
    for mu in (0.3, 1.0, 3.0):
        divergences = [order * mu**2 / 2 for order in ORDERS]
        expected, _ = compute_epsilon(ORDERS, divergences, 1e-6)
        found = epsilon_of_divergences(divergences, 1e-6)
        assert found == pytest.approx(expected, rel=1e-9)
    assert epsilon_of_divergences([0.0] * len(ORDERS), 1e-6) < 0.02


# In a silo --------------------------------------------------------------------------

NOISY = {"noise_multiplier": 0.8, "clipping_norm": 0.5, "delta": 1e-3, "seed": 7}
EXAMPLES, CONFIG = 12, {"lr": 0.3, "batch-size": 6, "local-steps": 3}
WHOLE = {**CONFIG, "batch-size": EXAMPLES}  # without sampling epsilon is soon found


def columns():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(EXAMPLES, 3, generator=generator)
    return {"x": x, "y": (x[:, 0] > 0).long(), "user": torch.arange(EXAMPLES) % 4}


def loss(model, batch):
    return nn.functional.cross_entropy(model(batch["x"]), batch["y"], reduction="none")


def net(config=None):
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.2), nn.Linear(4, 2))


def run(rounds=2, config=CONFIG, privacy=NOISY, **options):
    """Return the replies to training, and the model after them."""
    seen = []

    class Tapped(LocalGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = list(super().send_and_receive(messages, timeout=timeout))
            seen.extend(replies)
            return replies

    task = Task(net, lambda context: (columns(), columns()), loss)
    app = client_app(task, trainer=DPSGD(SiloPrivacy(**privacy), **options))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        initial = {n: x.numpy().copy() for n, x in net().state_dict().items()}
    strategy = AdditiveStrategy(
        fraction_evaluate=0.0, min_train_nodes=1, min_available_nodes=1
    )
    grid = Tapped(app, 1, config)
    result = strategy.start(grid, to_record(initial), num_rounds=rounds)
    assert not any(reply.has_error() for reply in seen), seen
    return seen, from_record(result.arrays), initial


def contents(replies):
    """Return all that replies hold, byte for byte."""
    return [
        [
            (key, name, x.data if hasattr(x, "data") else x)
            for key, record in reply.content.items()
            for name, x in record.items()
        ]
        for reply in replies
    ]


@pytest.fixture
def steps(monkeypatch):
    """The sums before and after the noise, and the examples that were drawn."""
    found = []

    class Recording(BoundedSteps):
        def summed(self, batch):
            total, clipped = super().summed(batch)
            found.append({"drawn": self._drawn, "sum": self._flat(clipped)})
            return total, clipped

        def noised(self, total):
            out = super().noised(total)
            found[-1].setdefault("released", []).append(out.numpy().ravel().copy())
            return out

    monkeypatch.setattr(dp_sgd, "BoundedSteps", Recording)
    return found


def test_noisy_sums_are_cut_to_clipping_norms_and_epsilon_is_the_gaussians(steps):
    cut, _, _ = run(config=WHOLE, noise=BoundedGaussian(-0.6, 0.9))
    released = np.concatenate([x for step in steps for x in step["released"]])
    assert released.min() == -0.3 and released.max() == 0.45
    assert 0.1 < np.mean((released > -0.3) & (released < 0.45)) < 0.9
    whole, _, _ = run(config=WHOLE)
    for one, other in zip(cut, whole, strict=True):
        spent = [x.content["metrics"]["example-epsilon"] for x in (one, other)]
        assert spent[0] == spent[1] > 0
    assert contents(cut) != contents(whole)


def test_no_bounds_are_the_plain_run_but_for_the_noise_that_is_drawn(monkeypatch):
    """Another manner has noise of its own; with the same it is the same bit for bit."""
    monkeypatch.setattr(DPSGD, "manner", lambda *_: ())
    bounded, arrays, _ = run(noise=BoundedGaussian(-math.inf, math.inf))
    plain, expected, _ = run()
    assert contents(bounded) == contents(plain)
    assert all(np.array_equal(x, expected[name]) for name, x in arrays.items())


@pytest.mark.parametrize("mode", ["hooks", "ghost"])
def test_nothing_of_an_account_is_in_a_reply(tmp_path, mode):
    """The replies are those without one, bit for bit, and so is what is kept."""
    plain, _, _ = run(mode=mode)
    watched, _, _ = run(mode=mode, instances=InstanceReport(tmp_path, (0, 5)))
    assert contents(watched) == contents(plain)
    assert [x.name for x in tmp_path.iterdir()] == ["instances-0.json"]


@pytest.mark.parametrize("bounds", [None, (-0.6, 0.9)])
def test_an_account_is_that_of_the_sums_with_and_without(tmp_path, steps, bounds):
    """Of example 2, by the per-example gradients of autograd."""
    noise = None if bounds is None else BoundedGaussian(*bounds)
    report = InstanceReport(tmp_path, (2, 3))
    config = {**CONFIG, "local-steps": 1, "batch-size": 8}
    data = columns()
    model = net()[:2].append(net()[3])  # without dropout, which is drawn
    # One step from the first model: what it is there is known.
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "net", lambda config=None: nn.Sequential(*fresh()))
        for seed in range(20):  # until the example is drawn
            steps.clear()
            path = report.path(0)
            path.unlink(missing_ok=True)
            privacy = {**NOISY, "seed": seed}
            _, _, initial = run(1, config, privacy, noise=noise, instances=report)
            if 2 in steps[0]["drawn"]:
                break
    model = nn.Sequential(*fresh())
    model.load_state_dict({n: torch.tensor(x) for n, x in initial.items()})

    def gradient(i):
        model.zero_grad()
        loss(model, {k: x[i : i + 1] for k, x in data.items()}).sum().backward()
        flat = torch.cat([p.grad.double().ravel() for p in model.parameters()]).numpy()
        return flat * min(1.0, 0.5 / np.linalg.norm(flat))

    drawn = steps[0]["drawn"]
    with_it = sum(gradient(i) for i in drawn)
    own = gradient(2)
    np.testing.assert_allclose(steps[0]["sum"], with_it, rtol=1e-4, atol=1e-6)
    account = InstanceAccount.load(report.path(0), (2, 3))
    law = noise or BoundedGaussian(-math.inf, math.inf)
    law = BoundedGaussian(0.5 * law.lower, 0.5 * law.upper)
    s = 0.8 * 0.5
    expected = np.sum(own**2 * law.fisher_information(with_it, s))
    assert account.fisher[0] == pytest.approx(expected, rel=1e-4)
    assert account.fisher_information_loss(2) == pytest.approx(
        math.sqrt(expected), rel=1e-4
    )
    ways = [
        [law.renyi_divergence(a, *pair, s).sum() for a in ORDERS]
        for pair in ((with_it, with_it - own), (with_it - own, with_it))
    ]
    np.testing.assert_allclose(account.divergences[:, 0], ways, rtol=1e-3)
    epsilon = max(epsilon_of_divergences(way, 1e-3) for way in ways)
    assert account.epsilon(2, 1e-3) == pytest.approx(epsilon, rel=1e-3)
    assert account.steps == 1
    if 3 not in drawn:
        assert account.epsilon(3, 1e-3) == account.unbounded_epsilon(3, 1e-3) == 0
    unbounded = account.unbounded_epsilon(2, 1e-3)
    closed = [a * np.sum(own**2) / (2 * s**2) for a in ORDERS]
    assert unbounded == pytest.approx(epsilon_of_divergences(closed, 1e-3), rel=1e-4)
    assert (account.epsilon(2, 1e-3) < 0.99 * unbounded) == (noise is not None)
    if noise is None:  # the Gaussian's closed form
        assert account.epsilon(2, 1e-3) == pytest.approx(unbounded, rel=1e-9)
        assert account.fisher[0] == pytest.approx(np.sum(own**2) / s**2, rel=1e-4)


def fresh():
    return nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)


def test_accounts_add_up_over_rounds_and_runs(tmp_path):
    report = InstanceReport(tmp_path, (0, 5))
    run(rounds=2, instances=report)
    first = InstanceAccount.load(report.path(0), (0, 5))
    run(rounds=2, instances=report)
    second = InstanceAccount.load(report.path(0), (0, 5))
    assert (first.steps, second.steps) == (6, 12)
    np.testing.assert_allclose(second.fisher, 2 * first.fisher)
    np.testing.assert_allclose(second.divergences, 2 * first.divergences)
    np.testing.assert_allclose(second.shifts, 2 * first.shifts)
    assert first.fisher.all() and second.epsilon(0, 1e-3) > first.epsilon(0, 1e-3)


# Refused ----------------------------------------------------------------------------


def test_bounds_that_are_none_are_refused():
    with pytest.raises(ValueError, match="lower=1.0 must be < upper=1.0"):
        BoundedGaussian(1.0, 1.0)
    with pytest.raises(ValueError, match="lower=nan"):
        BoundedGaussian(math.nan, 1.0)
    with pytest.raises(ValueError, match="upper='1' must be a number"):
        BoundedGaussian(0.0, "1")
    with pytest.raises(ValueError, match="kind='cut' must be one of"):
        BoundedGaussian(0.0, 1.0, "cut")
    noise = BoundedGaussian(-1.0, 1.0, "truncated")
    with pytest.raises(ValueError, match=r"means=2.0 must be in \[-1, 1\]"):
        noise.fisher_information([0.0, 2.0], 1.0)
    with pytest.raises(ValueError, match="standard_deviation=0"):
        noise.fisher_information(0.0, 0)
    with pytest.raises(ValueError, match="order=1 must be > 1"):
        noise.renyi_divergence(1, 0.0, 0.1, 1.0)
    with pytest.raises(ValueError, match="means=.*must be finite"):
        noise.sample([math.nan], 1.0, np.random.default_rng(0))


def test_noise_without_a_worst_case_is_no_mechanism(tmp_path):
    privacy = SiloPrivacy(**NOISY)
    truncated = BoundedGaussian(-1.0, 1.0, "truncated")
    with pytest.raises(ValueError, match='noise=.*must be of kind="rectified"'):
        DPSGD(privacy, noise=truncated)
    with pytest.raises(ValueError, match="noise=.*must be around 0"):
        DPSGD(privacy, noise=BoundedGaussian(0.0, 1.0))
    with pytest.raises(ValueError, match="noise=1.0 must be a BoundedGaussian"):
        DPSGD(privacy, noise=1.0)
    with pytest.raises(ValueError, match="instances=.*must be an InstanceReport"):
        DPSGD(privacy, instances=str(tmp_path))
    users = SiloPrivacy(**NOISY, max_examples_per_user=2)
    with pytest.raises(ValueError, match="noise=.*must be None for ULS"):
        ULS(users, noise=BoundedGaussian(-1.0, 1.0))


@pytest.mark.parametrize(
    ("examples", "privacy", "words"),
    [
        ((12,), {}, r"examples=\(12,\) must be below the 12 of the silo"),
        ((0,), {"noise_multiplier": 0.0}, "must be > 0 with instances"),
        ((0,), {"max_examples_per_user": 2}, "None with max_examples_per_user"),
    ],
)
def test_accounts_of_nothing_are_refused(tmp_path, examples, privacy, words):
    report = InstanceReport(tmp_path, examples)
    with pytest.raises(Exception, match=words):
        run(config=WHOLE, privacy={**NOISY, **privacy}, instances=report)
    assert not list(tmp_path.iterdir())


def test_files_of_other_examples_and_damaged_ones_are_refused(tmp_path):
    report = InstanceReport(tmp_path, (0, 5))
    for wrong in ((), (0, 0), (-1,), (True,)):
        with pytest.raises(ValueError, match="examples=.*different places"):
            InstanceReport(tmp_path, wrong)
    with pytest.raises(ValueError, match="absolute path"):
        InstanceReport("here", (0,))
    with pytest.raises(ValueError, match="a folder that is there"):
        InstanceReport(tmp_path / "none", (0,))
    run(instances=report)
    with pytest.raises(ValueError, match=r"examples=\(1,\) must be \[0, 5\]"):
        InstanceAccount.load(report.path(0), (1,))
    kept = json.loads(report.path(0).read_text())
    report.path(0).write_text(json.dumps({**kept, "format": 2}))
    with pytest.raises(ValueError, match="format=2"):
        InstanceAccount.load(report.path(0), (0, 5))
    report.path(0).write_text("{")
    with pytest.raises(ValueError, match="cannot be read"):
        InstanceAccount.load(report.path(0), (0, 5))
