"""DP2: its two kinds of rounds, each by hand, and what changes between them."""

import numpy as np
import pytest
from flwr.app import ConfigRecord
from private_runs import KINDS, private, run

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import AdaptiveClipping, Mechanism
from flower_ext.server.optimizers import SGD
from flower_ext.strategies import DP2
from flower_ext.wire import NF4, Chain, ErrorFeedback, TopK

ALL = {"fraction_evaluate": 0.0, "min_available_nodes": 0, "min_train_nodes": 0}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture
def app(task):
    return client_app(task)


@pytest.fixture
def model(initial):
    return from_record(initial)


def dp2(**settings):
    return lambda **options: DP2(**settings, **options)


# Degenerate limits ------------------------------------------------------------------


@EVERY_KIND
def test_without_adaptive_rounds_it_is_fedavg_bit_for_bit(kind, app, model):
    never = dp2(plain_rounds=4, adaptive_clipping_norm=0.1, adaptive_rate=9.0)
    found, spent = run(private(never, kind), app, model)
    expected, its = run(private(AdditiveStrategy, kind), app, model)
    assert spent == its
    for name, x in expected.items():
        assert np.array_equal(found[name], x), name
    # Epsilon is the same with them.
    found, spent = run(private(dp2(plain_rounds=1), kind), app, model)
    assert spent == its
    assert any(np.any(found[n] != x) for n, x in expected.items())


@EVERY_KIND
def test_of_factors_of_one_it_is_fedavg_of_the_other_norm_and_rate(kind, app, model):
    """v = (1 - tau)^2 and C2 = C1 / 4: powers of two, so that it is bit for bit."""

    class One(DP2):
        def advance(self, total, round):
            self.preconditioner = {n: np.ones(x.shape) for n, x in self._likes.items()}

    def other(**options):
        strategy = One(
            adaptive_clipping_norm=norm / 4, adaptive_rate=0.5, tau=0.25, **options
        )
        strategy._likes = {n: x for n, x in model.items() if x.dtype.kind == "f"}
        strategy._likes = {n: x for n, x in strategy._likes.items() if "run" not in n}
        strategy.advance(None, None)
        return strategy

    norm = 0.5
    clipping = KINDS[kind].get("clipping", norm)
    smaller = type(clipping)(norm / 4) if clipping is not norm else norm / 4
    found, _ = run(private(other, kind), app, model)
    plain = private(
        lambda **o: AdditiveStrategy(server_optimizer=SGD(0.5), **o),
        kind,
        clipping=smaller,
    )
    expected, _ = run(plain, app, model)
    for name, x in expected.items():
        if "running" not in name:  # no parameters: the rate is not theirs
            assert np.array_equal(found[name], x), name


# The algorithm ----------------------------------------------------------------------

SENT = {"w": np.array([1.0, 2.0, -1.0]), "counter": np.array([3], np.int64)}
CHANGES = np.array([[0.3, 0.01, 0.0], [0.1, 0.03, 0.002], [-3.0, 0.4, 0.01]])


def plan(**options):
    usual = {"num_rounds": 9, "num_sampled_clients": 3, "population_size": 3}
    usual |= {"target_delta": 1e-2, "noise_multiplier": 0.0, "seed": 1}
    return Mechanism(**{**usual, "factorization": "identity", **options})


class Rounds:
    """Rounds of clients that always change the model by the same."""

    def __init__(self, strategy, scripted, reply, changes=CHANGES):
        self.strategy, self.changes = strategy, changes
        self.scripted, self.reply = scripted, reply
        self.model, self.number, self.metrics = SENT, 0, {}

    def step(self):
        """Return the change of the model in the next round."""
        self.number += 1
        moved = [{**self.model, "w": self.model["w"] + x} for x in self.changes]
        grid = self.scripted([self.reply(x) for x in moved])
        sent = to_record(self.model)
        messages = self.strategy.configure_train(
            self.number, sent, ConfigRecord(), grid
        )
        replies = grid.send_and_receive(messages)
        record, self.metrics = self.strategy.aggregate_train(self.number, replies)
        before, self.model = self.model["w"], from_record(record)
        assert self.model["counter"] == 3
        return self.model["w"] - before


@pytest.fixture
def rounds(scripted, reply):
    return lambda strategy, **how: Rounds(strategy, scripted, reply, **how)


def clipped_mean(changes, norm):
    lengths = np.linalg.norm(changes, axis=1)
    return (changes * np.minimum(1, norm / lengths)[:, None]).mean(0)


@pytest.mark.parametrize("moments", ["rmsprop", "adagrad"])
def test_without_noise_or_clipping_it_is_by_hand(moments, rounds):
    """Delays of 2 and 1, twice: v of the mean of the two plain steps before."""
    strategy = DP2(
        plain_rounds=2,
        adaptive_rounds=1,
        adaptive_rate=0.3,
        moments=moments,
        decay=0.75,
        tau=0.05,
        **ALL,
    )
    run, v, mean = rounds(strategy), 0.0, CHANGES.mean(0)
    for cycle in range(1, 3):
        for _ in range(2):
            assert run.step() == pytest.approx(mean, rel=1e-9)
            assert run.metrics["adaptive-round"] == 0
        square = mean**2
        v = v + square if moments == "adagrad" else 0.75 * v + 0.25 * square
        expected = 0.3 * mean / (np.sqrt(v) + 0.05)
        assert run.step() == pytest.approx(expected, rel=1e-9)
        assert run.metrics["adaptive-round"] == 1
        # The next cycle has other changes, so that what is old can be told.
        run.changes = CHANGES * (cycle + 1) ** 2
        mean = run.changes.mean(0)


def test_with_a_delay_of_one_it_is_delayed_adagrad(rounds):
    """s1 = s2 = 1, C infinite: w += d / (sqrt(sum of squares so far) + tau)."""
    strategy = DP2(
        plain_rounds=1,
        adaptive_rounds=1,
        moments="adagrad",
        tau=0.01,
        mechanism=plan(clipping=np.inf),
    )
    run, squares = rounds(strategy), np.zeros(3)
    for cycle in range(4):
        run.changes = CHANGES / (1 + cycle)
        squares += run.step() ** 2
        run.changes = CHANGES * (1 + cycle)
        expected = run.changes.mean(0) / (np.sqrt(squares) + 0.01)
        assert run.step() == pytest.approx(expected, rel=1e-9)


def test_each_kind_of_round_clips_to_its_own_norm(rounds):
    strategy = DP2(
        plain_rounds=1,
        adaptive_rounds=2,
        adaptive_clipping_norm=5.0,
        tau=0.01,
        decay=0.0,
        mechanism=plan(clipping=0.2),
    )
    run = rounds(strategy)
    plain = run.step()
    assert plain == pytest.approx(clipped_mean(CHANGES, 0.2), rel=1e-9)
    assert run.metrics["clipping-norm"] == 0.2
    divided = CHANGES / (np.abs(plain) + 0.01)
    lengths = np.linalg.norm(divided, axis=1)
    assert min(lengths) < 5.0 < max(lengths)
    for _ in range(2):  # v stays
        assert run.step() == pytest.approx(clipped_mean(divided, 5.0), rel=1e-9)
        assert run.metrics["clipping-norm"] == pytest.approx(5.0)


@pytest.mark.parametrize("size", [1e-3, 1.0, 1e12])
def test_one_client_moves_an_adaptive_sum_by_its_norm_at_most(size, rounds):
    """Whatever it sends, also where nothing has moved and the factors are largest."""
    for hostile in size * np.eye(3):
        means = []
        for last in (hostile, 0 * hostile):
            strategy = DP2(
                plain_rounds=1,
                adaptive_rounds=1,
                adaptive_clipping_norm=7.0,
                tau=1e-9,
                mechanism=plan(clipping=0.2),
            )
            run = rounds(strategy, changes=CHANGES * [1, 1, 0])
            run.step()
            run.changes = np.array([*CHANGES[:2], last])
            means.append(run.step())
        # The mean is over the planned three.
        moved = 3 * np.linalg.norm(means[0] - means[1])
        assert moved <= 7.0 * (1 + 1e-9)
        if size >= 1:
            assert moved == pytest.approx(7.0)


def test_the_noise_of_adaptive_rounds_is_of_their_norm_and_not_divided(rounds):
    """Preconditioned noise would be another algorithm: see the negative control."""

    def noise_of(rate=1.0, norm=None, changes=CHANGES):
        noisy, quiet = (
            rounds(
                DP2(
                    plain_rounds=1,
                    adaptive_rounds=1,
                    adaptive_clipping_norm=norm,
                    adaptive_rate=rate,
                    tau=0.1,
                    mechanism=plan(noise_multiplier=z, clipping=0.5),
                ),
                changes=changes,
            )
            for z in (1.0, 0.0)
        )
        first = noisy.step() - quiet.step()
        # Second moments are of what was released: give both the same.
        quiet.strategy.preconditioner = noisy.strategy.preconditioner
        factors = noisy.strategy.preconditioner["w"]
        second = noisy.step() - quiet.step()
        return first, second, factors, noisy.metrics["noise-std"]

    # That of plain averages, round by round, of the same seed.
    still = rounds(
        AdditiveStrategy(mechanism=plan(noise_multiplier=1.0, clipping=0.5)),
        changes=0 * CHANGES,
    )
    expected = [still.step(), still.step()]
    first, second, factors, std = noise_of(rate=0.5, norm=4.0)
    assert first == pytest.approx(expected[0], abs=1e-9)
    assert second == pytest.approx(0.5 * 4.0 / 0.5 * expected[1], abs=1e-9)
    assert std == pytest.approx(still.metrics["noise-std"] * 4.0 / 0.5)
    # What noise that is preconditioned as well would be.
    assert np.ptp(factors) > 0.1 * np.max(factors)
    wrong = 0.5 * 4.0 / 0.5 * expected[1] * factors
    assert np.abs(second - wrong).min() > 0.1


def test_second_moments_are_of_what_was_released(rounds):
    """Not of the sum before the noise, which no epsilon covers."""
    strategy = DP2(
        plain_rounds=2,
        adaptive_rounds=1,
        decay=0.0,
        tau=0.1,
        mechanism=plan(noise_multiplier=3.0, clipping=0.5),
    )
    run = rounds(strategy)
    released = np.mean([run.step(), run.step()], 0)
    assert np.abs(released - clipped_mean(CHANGES, 0.5)).max() > 0.1
    found = strategy.preconditioner["w"]
    assert found == pytest.approx(1 / (np.abs(released) + 0.1), rel=1e-9)


def test_a_round_without_replies_is_not_counted(rounds, scripted, reply):
    strategy = DP2(plain_rounds=2, adaptive_rounds=1, tau=0.1, **ALL)
    run = rounds(strategy)
    run.step()
    grid = scripted([ValueError("out")] * 3)
    sent = to_record(SENT)
    messages = strategy.configure_train(2, sent, ConfigRecord(), grid)
    strategy.aggregate_train(2, grid.send_and_receive(messages))
    run.step()
    assert run.metrics["adaptive-round"] == 0
    run.step()
    assert run.metrics["adaptive-round"] == 1


def test_adaptive_norms_move_together(rounds):
    adaptive = AdaptiveClipping(0.4, target_quantile=0.9)
    strategy = DP2(
        plain_rounds=1,
        adaptive_rounds=1,
        adaptive_clipping_norm=2.0,
        mechanism=plan(clipping=adaptive),
    )
    run, norms = rounds(strategy), []
    for _ in range(4):
        run.step()
        norms.append(run.metrics["clipping-norm"] / (0.4, 2.0)[len(norms) % 2])
    assert norms[0] == 1 and len({*norms}) == 4


# Saved and resumed ------------------------------------------------------------------

CUT = dp2(plain_rounds=2, adaptive_rounds=2, adaptive_clipping_norm=1.0, tau=0.01)


@pytest.mark.parametrize("kind", ["blt", "tree"])
@pytest.mark.parametrize("cut", [1, 2, 3])
def test_a_run_resumed_in_mid_phase_is_the_same(kind, cut, app, model, tmp_path):
    whole, _ = run(private(CUT, kind), app, model)
    run(private(CUT, kind), app, model, cut, checkpoint=tmp_path)
    found, _ = run(private(CUT, kind), app, model, checkpoint=tmp_path)
    for name, x in whole.items():
        assert np.array_equal(found[name], x), name


def test_encoded_changes_are_decoded_before_they_are_divided(app, model):
    codec = ErrorFeedback(Chain(TopK(0.5), NF4()))
    settings = {"plain_rounds": 1, "adaptive_rounds": 1, "adaptive_rate": 0.01, **ALL}
    lossy, lossless = DP2(**settings, upload=codec), DP2(**settings)
    found, _ = run(lossy, app, model, rounds=2)
    expected, _ = run(lossless, app, model, rounds=2)
    for name, x in expected.items():
        assert found[name] == pytest.approx(x, abs=0.1)
    assert any(np.any(found[n] != x) for n, x in expected.items())


# Bad input --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"plain_rounds": 0}, "plain_rounds=0 must be an integer >= 1"),
        ({"adaptive_rounds": 0.5}, "adaptive_rounds=0.5 must be an integer >= 1"),
        ({"adaptive_rate": 0}, "adaptive_rate=0 must be a finite number > 0"),
        ({"adaptive_clipping_norm": -1.0}, "adaptive_clipping_norm=-1.0 must be a fin"),
        ({"moments": "adam"}, "moments='adam' must be one of"),
        ({"decay": 1.0}, "decay=1.0 must be < 1: the second moments would stay 0"),
        ({"tau": 0.0}, "tau=0.0 must be a finite number > 0"),
        (
            {"adaptive_clipping_norm": 1.0, "mechanism": plan(clipping=np.inf)},
            "adaptive_clipping_norm=1.0 must be left out: the mechanism's",
        ),
    ],
)
def test_options_that_make_no_sense_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        DP2(**options)
