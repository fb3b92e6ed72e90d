"""Clients' own metrics under a mechanism: clipped, noised, and within one budget."""

import json
import math
import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from dp_accounting import dp_event, privacy_accountant
from dp_accounting.pld import pld_privacy_accountant
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from flower_ext import AdditiveStrategy, client_app
from flower_ext.audit.bounds import Counts
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import (
    AllClients,
    BallsInBinsSampler,
    CyclicPoissonSampler,
    MinSeparationSampler,
    PoissonSampler,
    UniformSampler,
)
from flower_ext.privacy import (
    AdaptiveClipping,
    BandedToeplitz,
    Mechanism,
    NoiseStream,
    PrivateEvaluation,
    TreeAggregation,
    gaussian_epsilon,
)
from flower_ext.privacy.accounting.calibration import noise_multiplier_for
from flower_ext.server.callbacks import Callback, KeepBest, StopWhen
from flower_ext.server.checkpoint import CheckpointError
from flower_ext.server.tracking import Tracker
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import DPFTRL, BoundedGroupLoss, FedPer, MaxFL

ROUNDS, CLIENTS, EVERY, DELTA = 8, 12, 2, 1e-3
MODEL = {"w": np.zeros(4, np.float32)}
BOUNDS = {"accuracy": 1.0, "loss": (1.0, 5.0)}
MIDDLE = {"accuracy": 0.5, "loss": 3.0}


def evaluation(**changes):
    return PrivateEvaluation(**{"bounds": BOUNDS, "every": EVERY, **changes})


def plan(own=None, **changes):
    usual = {
        "num_rounds": ROUNDS,
        "num_sampled_clients": CLIENTS,
        "population_size": CLIENTS,
        "noise_multiplier": 2.0,
        "target_delta": DELTA,
        "factorization": "identity",
        "evaluation": evaluation(**(own or {})),
    }
    return Mechanism(**{**usual, **changes})


def make(own=None, *, sampler=None, kind=AdditiveStrategy, **changes):
    return kind(mechanism=plan(own, **changes), sampler=sampler)


class Measuring(LocalGrid):
    """Clients that train nothing and report ``metrics[i]``; notes who evaluates."""

    def __init__(self, metrics, clients=CLIENTS):
        app = ClientApp()
        told = metrics if callable(metrics) else lambda i: metrics[i % len(metrics)]

        @app.train()
        def train(message, context):
            metrics = MetricRecord({"num-examples": 1, "loss": 7.0})
            content = {"arrays": message.content["arrays"], "metrics": metrics}
            return Message(RecordDict(content), reply_to=message)

        @app.evaluate()
        def evaluate(message, context):
            own = told(context.node_config["partition-id"])
            if isinstance(own, Exception):
                raise own
            content = {"metrics": MetricRecord({"num-examples": 1, **own})}
            return Message(RecordDict(content), reply_to=message)

        super().__init__(app, clients)
        self.asked = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        if messages and messages[0].metadata.message_type == "evaluate":
            self.asked.append(len(messages))
        return super().send_and_receive(messages, timeout=timeout)


def start(strategy, grid, rounds=ROUNDS, **options):
    return strategy.start(grid, to_record(MODEL), num_rounds=rounds, **options)


def exact(metrics, clients=CLIENTS, **changes):
    """Return the mean that is released of clients' metrics, without noise."""
    strategy = make(noise_multiplier=0, num_rounds=2, **changes)
    result = start(strategy, Measuring(metrics, clients), 2)
    return dict(result.evaluate_metrics_clientapp[2])


# What is released -----------------------------------------------------------------


def test_without_noise_it_is_the_mean_of_clipped_metrics():
    metrics = [
        {"accuracy": 0.25, "loss": 2.0},
        {"accuracy": 0.5, "loss": 1000.0},  # counts as 5
        {"accuracy": 1.5, "loss": 0.1},  # as 1 and 1
        {"accuracy": -7.0, "loss": 1.0},  # as 0
    ]
    found = exact(metrics)
    assert found["accuracy"] == pytest.approx((0.25 + 0.5 + 1 + 0) / 4)
    assert found["loss"] == pytest.approx((2 + 5 + 1 + 1) / 4)
    assert found["accuracy-noise-std"] == 0.0
    assert found.keys() == {*BOUNDS, "accuracy-noise-std", "loss-noise-std"}


@pytest.mark.parametrize(
    "missing",
    [
        {},
        {"accuracy": math.nan, "loss": math.nan},
        {"accuracy": math.inf, "loss": -math.inf},
        {"accuracy": [1.0], "loss": [1.0, 2.0]},
        {"acc": 1.0},
        {"accuracy": 1.0, "loss": 5.0, "num-examples": 0},
        {"accuracy": 1.0, "loss": 5.0, "num-examples": -1},
        {"accuracy": 1.0, "loss": 5.0, "num-examples": math.nan},
        RuntimeError("left"),
    ],
)
def test_who_measures_nothing_adds_nothing_to_the_centred_sum(missing):
    """The divisor is the planned one, so that it counts as the middle of the range."""
    found = exact(lambda i: missing if i % 3 == 0 else {"accuracy": 1.0, "loss": 1.0})
    assert found["accuracy"] == pytest.approx((4 * 0.5 + 8 * 1.0) / 12)
    assert found["loss"] == pytest.approx((4 * 3.0 + 8 * 1.0) / 12)


def test_one_missing_metric_leaves_the_others():
    found = exact([{"loss": 2.0}])
    assert found["loss"] == pytest.approx(2.0)
    assert found["accuracy"] == 0.5


def test_integers_and_flags_count():
    found = exact([{"accuracy": 1, "loss": 2}])
    assert (found["accuracy"], found["loss"]) == pytest.approx((1.0, 2.0))


def test_a_huge_integer_ends_no_run():
    found = exact([{"accuracy": 10**400, "loss": 2}])
    assert found["accuracy"] == 0.5


def test_the_planned_number_is_asked_and_divides():
    grid = Measuring([{"accuracy": 1.0}])
    strategy = make(
        {"num_sampled_clients": 8}, num_sampled_clients=3, noise_multiplier=0
    )
    result = start(strategy, grid, EVERY)
    assert grid.asked == [8]
    assert result.evaluate_metrics_clientapp[EVERY]["accuracy"] == pytest.approx(1.0)
    grid = Measuring([{"accuracy": 1.0}], clients=6)
    strategy = make({"num_sampled_clients": 8}, noise_multiplier=0)
    result = start(strategy, grid, EVERY)
    assert grid.asked == [6]
    found = result.evaluate_metrics_clientapp[EVERY]["accuracy"]
    assert found == pytest.approx(0.5 + 6 * 0.5 / 8)


def test_half_the_clients_missing_is_said(caplog):
    strategy = make({"num_sampled_clients": 12}, num_sampled_clients=2)
    start(strategy, Measuring([{"accuracy": 1.0}], clients=3), EVERY)
    assert "round 2, evaluation, has 3 of its 12 planned clients" in caplog.text


def test_metrics_without_bounds_are_withheld():
    grid = Measuring([{"accuracy": 0.5, "loss": 2.0, "secret": 1.0}])
    result = start(make(), grid)
    for number in range(EVERY, ROUNDS + 1, EVERY):
        found = result.evaluate_metrics_clientapp[number]
        assert found.keys() == {*BOUNDS, *(f"{name}-noise-std" for name in BOUNDS)}
    assert "loss" not in result.train_metrics_clientapp[1]


def test_a_name_that_no_client_knows_is_said(caplog):
    start(make({"bounds": {"acc": 1.0}}), Measuring([{"accuracy": 1.0}]), EVERY)
    assert "no client reports a number 'acc', only ['accuracy'," in caplog.text


def test_evaluations_follow_every_so_many_releases_over_all_starts():
    strategy, grid = make({"every": 3}), Measuring([{"accuracy": 0.5}])
    found = [start(strategy, grid, n).evaluate_metrics_clientapp for n in (2, 5, 1)]
    assert [sorted(metrics) for metrics in found] == [[], [1, 4], []]


# Noise ----------------------------------------------------------------------------


def gate(own=None, **changes):
    return make(own, **changes).private_sum.evaluation


def draws(count=4000, **changes):
    """Return standardised noise of many evaluations, (evaluations, metrics)."""
    one = gate({"every": 1}, num_rounds=count, **changes)
    rows = [one.release(number, []) for number in range(1, count + 1)]
    return np.array(
        [[(row[k] - MIDDLE[k]) / one.noise_std[k] for k in BOUNDS] for row in rows]
    )


@pytest.mark.parametrize("seed", [None, 5])
def test_noise_is_normal_with_the_deviation_that_is_reported(seed):
    noise = draws(seed=seed)
    assert stats.kstest(noise.ravel(), "norm").pvalue > 1e-6
    # Of rounds, and of metrics, it is independent.
    assert abs(np.corrcoef(noise.T)[0, 1]) < 0.08
    assert abs(np.corrcoef(noise[1:, 0], noise[:-1, 0])[0, 1]) < 0.08


@pytest.mark.parametrize("simulated", [None, 3])
def test_the_deviation_by_hand(simulated):
    changes = {"num_sampled_clients": 600, "population_size": 6000}
    changes["target_delta"] = 1e-5
    strategy = make(
        {"num_sampled_clients": 2000, "share": 0.2},
        **changes,
        simulated_cohort=simulated,
    )
    # Four evaluations of two metrics; half a range is what one moves.
    std = 2.0 * math.sqrt(4 / 0.2) * math.sqrt(2) / 2 / 2000
    found = strategy.private_sum.evaluation.noise_std
    assert found == pytest.approx({"accuracy": std, "loss": 4 * std})
    asked = 10 if simulated else 2000
    assert strategy.private_sum.evaluation.cohort == asked
    assert (
        strategy.private_sum.evaluation.release(2, [])["accuracy-noise-std"]
        == (found["accuracy"])
    )


def test_a_simulation_has_the_planned_cohorts_noise():
    changes = {"num_sampled_clients": 600, "population_size": 6000}
    changes |= {"target_delta": 1e-5, "simulated_cohort": 3}
    noise = draws(count=2000, **changes)
    assert noise.std() == pytest.approx(1.0, abs=0.06)
    strategy = make(**changes)
    grid = Measuring([{"accuracy": 1.0, "loss": 5.0}])
    result = start(strategy, grid, EVERY)
    assert grid.asked == [3]
    found = result.evaluate_metrics_clientapp[EVERY]
    std = found["accuracy-noise-std"]
    assert abs(found["accuracy"] - 1.0) < 6 * std < 0.1


def test_a_seed_repeats_neither_noise_of_training_nor_of_evaluations():
    seed, rounds = 5, 50
    for factorization in ("identity", TreeAggregation(rounds)):
        one = gate(
            {"every": 1},
            num_rounds=rounds,
            seed=seed,
            factorization=factorization,
            noise_multiplier=1.0,
        )
        own = [
            (one.release(t, [])["accuracy"] - 0.5) / one.noise_std["accuracy"]
            for t in range(1, rounds + 1)
        ]
        assert len(set(own)) == rounds
        stream = NoiseStream(
            plan(num_rounds=rounds).choose(UniformSampler()),
            {"w": (3,)},
            seed=seed,
            dtype="float64",
        )
        theirs = {x for _ in range(rounds) for x in stream.next()["w"].tolist()}
        assert not any(min(abs(x - y) for y in theirs) < 1e-9 for x in own)


# The budget -----------------------------------------------------------------------


SAMPLERS = {
    "any": (UniformSampler, {}),
    "apart": (lambda: MinSeparationSampler(4), {"num_sampled_clients": 3}),
    "poisson": (
        lambda: PoissonSampler(probability=0.25),
        {"amplified": True, "num_sampled_clients": 3},
    ),
    "cyclic": (
        lambda: CyclicPoissonSampler(0.5, 2),
        {
            "amplified": True,
            "num_sampled_clients": 3,
            "factorization": BandedToeplitz(ROUNDS, [1.0, 0.5]),
        },
    ),
}


def accountant(kind, own=None, **changes):
    sampler, needs = SAMPLERS[kind]
    strategy = make(own, sampler=sampler(), **{**needs, **changes})
    return strategy.private_sum.accountant


def composed(kind, found, rounds):
    """Return epsilon of the same releases by dp-accounting, event by event."""
    events = []
    if kind in ("any", "apart"):
        # With independent noise a client that returns after b rounds is in every b-th.
        turns = -(-rounds // found.min_separation)
        events.append(
            dp_event.SelfComposedDpEvent(
                dp_event.GaussianDpEvent(found.noise_std), turns
            )
        )
    else:
        turns = -(-rounds // found.cycle)
        sampled = dp_event.PoissonSampledDpEvent(
            found.sampling_probability, dp_event.GaussianDpEvent(found.noise_multiplier)
        )
        events.append(dp_event.SelfComposedDpEvent(sampled, turns))
    if own := rounds // EVERY:
        noise = found.evaluations.noise_multiplier
        gaussian = dp_event.GaussianDpEvent(noise)
        events.append(dp_event.SelfComposedDpEvent(gaussian, own))
    relation = privacy_accountant.NeighboringRelation.ADD_OR_REMOVE_ONE
    independent = pld_privacy_accountant.PLDAccountant(relation)
    independent.compose(dp_event.ComposedDpEvent(events))
    return independent.get_epsilon(DELTA)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_epsilon_after_every_round_is_that_of_all_releases_so_far(kind):
    found = accountant(kind, {"share": 0.3})
    for rounds in (1, 2, 5, ROUNDS):
        ours, theirs = found.epsilon_after(rounds, DELTA), composed(kind, found, rounds)
        assert ours == pytest.approx(theirs, rel=5e-3)
        assert found.delta_after(rounds, ours) == pytest.approx(DELTA, rel=0.02)


@pytest.mark.parametrize("kind", SAMPLERS)
def test_evaluations_cost_noise_and_no_epsilon(kind):
    plain = accountant(kind, evaluation=None)
    shared = accountant(kind, {"share": 0.2})
    whole, same = (
        plain.epsilon_after(ROUNDS, DELTA),
        shared.epsilon_after(ROUNDS, DELTA),
    )
    assert same == pytest.approx(whole, rel=2e-3)
    assert shared.noise_std > plain.noise_std
    if kind in ("any", "apart"):
        assert same == pytest.approx(gaussian_epsilon(0.5, DELTA), rel=1e-9)
        ratio = shared.noise_std / plain.noise_std
        assert ratio == pytest.approx(1 / math.sqrt(0.8))
    met = accountant(kind, noise_multiplier=None, max_epsilon=3.0)
    spent = met.epsilon_after(ROUNDS, DELTA)
    assert spent <= 3.0
    assert spent == pytest.approx(3.0, rel=1e-3)


@given(
    share=st.floats(0.01, 0.99),
    noise=st.floats(0.3, 30.0),
    rounds=st.integers(1, 200),
    every=st.integers(1, 20),
)
@settings(max_examples=30, deadline=None)
def test_the_shares_of_mu_squared_add_up(share, noise, rounds, every):
    every = min(every, rounds)
    changes = {"num_rounds": rounds, "noise_multiplier": noise}
    own = {"share": share, "every": every}
    found = make(own, sampler=AllClients(), **changes).private_sum.accountant
    mu = found.evaluations.mu_after(rounds)
    assert mu**2 == pytest.approx(share / noise**2)
    assert 1 / found.noise_multiplier**2 + mu**2 == pytest.approx(1 / noise**2)
    assert (
        found.epsilon_after(rounds, DELTA) <= gaussian_epsilon(1 / noise, DELTA) + 1e-9
    )


@pytest.mark.parametrize("shared", [False, True])
def test_the_last_planned_round_is_never_beyond_the_target(shared):
    for number, epsilon in enumerate(np.geomspace(0.02, 40, 25)):
        changes = {"noise_multiplier": None, "max_epsilon": float(epsilon)}
        own = evaluation(share=0.03 + 0.03 * number) if shared else None
        found = accountant("any", evaluation=own, **changes)
        found.advance(ROUNDS - 1)
        found.require_budget()
        assert found.epsilon_after(ROUNDS, DELTA) == pytest.approx(epsilon, rel=1e-9)


@pytest.mark.parametrize(
    ("epsilon", "delta"),
    [(0.00106, 1e-6), (0.00158, 1e-6), (0.00274, 1e-10), (0.05, 1e-3), (0.3, 1e-5)],
)
def test_a_target_is_met_to_the_last_digit(epsilon, delta):
    noise = noise_multiplier_for(epsilon, delta)
    assert epsilon * (1 - 1e-9) < gaussian_epsilon(1 / noise, delta) <= epsilon


def test_noise_beside_a_gaussian_release():
    assert noise_multiplier_for(4.0, 1e-5, beside=0.0) == noise_multiplier_for(
        4.0, 1e-5
    )
    noise = noise_multiplier_for(4.0, 1e-5, beside=0.3)
    mu = math.hypot(1 / noise, 0.3)
    assert gaussian_epsilon(mu, 1e-5) == pytest.approx(4.0)
    with pytest.raises(ValueError, match="beside=2.0 must be < .*: that is all of eps"):
        noise_multiplier_for(4.0, 1e-5, beside=2.0)


def test_a_run_stops_before_the_round_whose_evaluation_would_exceed():
    whole = accountant("any")
    # Enough for three rounds and one evaluation, not for the fourth with its own.
    limit = whole.epsilon_after(4, DELTA) * (1 - 1e-6)
    assert limit > whole.epsilon_after(3, DELTA)
    grid = Measuring([{"accuracy": 0.5}])
    result = start(make(max_epsilon=limit), grid)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert sorted(result.evaluate_metrics_clientapp) == [2]
    # The model alone would have fitted.
    alone = make(
        max_epsilon=limit, evaluation=None, noise_multiplier=whole.noise_multiplier
    )
    assert sorted(start(alone, grid, 4).train_metrics_clientapp) == [1, 2, 3, 4]


def test_epsilon_of_a_round_covers_its_evaluation():
    result = start(make(), Measuring([{"accuracy": 0.5}]))
    spent = [result.train_metrics_clientapp[t]["epsilon"] for t in range(1, ROUNDS + 1)]
    counts = accountant("any")
    for rounds, epsilon in enumerate(spent, 1):
        mu2 = rounds / counts.noise_std**2
        mu2 += (rounds // EVERY) / counts.evaluations.noise_multiplier**2
        assert epsilon == pytest.approx(gaussian_epsilon(math.sqrt(mu2), DELTA))


@pytest.mark.parametrize("kind", ["any", "poisson"])
def test_training_is_as_without_but_for_its_noise(kind):
    sampler, needs = SAMPLERS[kind]
    models = []
    for own in (None, evaluation(share=0.19)):
        strategy = make(sampler=sampler(), seed=2**100, evaluation=own, **needs)
        strategy.sampler.seed = 2**101
        result = start(strategy, Measuring([{"accuracy": 0.5}]), 3)
        noise = strategy.private_sum.noise_std
        models.append(from_record(result.arrays)["w"] / noise)
    np.testing.assert_allclose(models[0], models[1], rtol=1e-5)


def test_without_evaluation_nothing_of_a_saved_run_changes():
    found = accountant("any", evaluation=None).state_dict()
    assert found["mechanism"].keys() == {
        "factorization",
        "noise-multiplier",
        "min-separation",
        "max-participations",
    }


# An attack ------------------------------------------------------------------------


def scores(one, games, canary, times=1):
    """Return what games show along the direction in which the canary moves them."""
    others = [{"accuracy": 0.4, "loss": 2.0}] * (CLIENTS - 1)
    own = [{"accuracy": 9.0, "loss": 9.0}] * (times * canary)
    found = []
    for number in range(1, games + 1):
        means = one.release(number, own + others)
        found.append(sum(means[name] / one.noise_std[name] for name in BOUNDS))
    return np.array(found)


def proved(times=1, **broken):
    """Return the mu that one evaluation has for certain, and the one it claims."""
    games = 6000
    one, other = (gate({"every": 1}, num_rounds=games, seed=i) for i in range(2))
    for each in (one, other):
        # As if it were one evaluation with all the budget, each time anew.
        each.noise_multiplier = 1.0
        vars(each).update(broken)
    seen, unseen = scores(one, games, 1, times), scores(other, games, 0)
    middle = (seen.mean() + unseen.mean()) / 2
    return Counts.at(seen, unseen, middle).mu(0.999), 1.0


def test_no_attack_shows_more_than_is_claimed():
    found, claimed = proved()
    assert 0.85 * claimed < found <= claimed


@pytest.mark.parametrize(
    ("times", "broken"), [(2, {}), (1, {"_unit": np.array([0.1, 0.1])})]
)
def test_a_client_that_counts_twice_or_is_not_clipped_is_seen(times, broken):
    found, claimed = proved(times, **broken)
    assert found > claimed


def test_a_client_counts_once_however_often_it_replies():
    strategy = make(noise_multiplier=0, num_rounds=2)
    grid = Measuring([{"accuracy": 1.0}])
    for number in (1, 2):
        model = to_record(MODEL)
        asked = list(strategy.configure_train(number, model, ConfigRecord(), grid))
        strategy.aggregate_train(number, grid.send_and_receive(asked))
    asked = list(strategy.configure_evaluate(2, model, ConfigRecord(), grid))
    replies = list(grid.send_and_receive(asked))
    found = strategy.aggregate_evaluate(2, [*replies, replies[0], replies[0]])
    assert found["accuracy"] == pytest.approx((11 * 1.0 + 0.5) / 12)


# Released once --------------------------------------------------------------------


def rounds_of(strategy, grid, numbers, evaluates=True):
    for number in numbers:
        model = to_record(MODEL)
        asked = list(strategy.configure_train(number, model, ConfigRecord(), grid))
        strategy.aggregate_train(number, grid.send_and_receive(asked))
        if evaluates:
            asked = strategy.configure_evaluate(number, model, ConfigRecord(), grid)
            replies = list(grid.send_and_receive(list(asked)))
            yield strategy.aggregate_evaluate(number, replies)


def test_an_evaluation_is_released_once():
    strategy, grid = make(), Measuring([{"accuracy": 1.0}])
    first, second = rounds_of(strategy, grid, (1, 2))
    assert first is None and second is not None
    model = to_record(MODEL)
    assert strategy.configure_evaluate(2, model, ConfigRecord(), grid) == []
    assert strategy.aggregate_evaluate(2, []) is None
    with pytest.raises(
        ValueError, match="evaluation of release 2 must be planned, and"
    ):
        strategy.private_sum.release_evaluation(2, [])


def test_an_evaluation_that_nobody_answers_is_released():
    """Whether anybody replies must not show: noise and divisor stay."""
    result = start(make(), Measuring(lambda i: RuntimeError("left")), EVERY)
    found = result.evaluate_metrics_clientapp[EVERY]
    assert found["accuracy"] != 0.5
    assert abs(found["accuracy"] - 0.5) < 6 * found["accuracy-noise-std"]


def test_models_are_not_evaluated_before_the_first_release():
    strategy, grid = make({"every": 1}), Measuring([{"accuracy": 1.0}])
    asked = strategy.configure_evaluate(1, to_record(MODEL), ConfigRecord(), grid)
    assert asked == []
    assert strategy.aggregate_evaluate(1, []) is None


class Crash(Callback):
    def __init__(self, number):
        self.number = number

    def round(self, this):
        if this.number == self.number:
            raise KeyboardInterrupt


def test_a_resumed_run_repeats_no_evaluation(tmp_path):
    """It may have been seen though only the model was saved."""
    grid, seed = Measuring([{"accuracy": 1.0}]), 2**100
    whole = start(make(seed=seed), grid).evaluate_metrics_clientapp
    folder = tmp_path / "saved"
    with pytest.raises(KeyboardInterrupt):
        start(make(seed=seed), grid, checkpoint=folder, callbacks=[Crash(4)])
    before = len(grid.asked)
    resumed = make(seed=seed)
    result = start(resumed, grid, checkpoint=folder)
    assert len(grid.asked) - before == 2  # after rounds 6 and 8
    found = result.evaluate_metrics_clientapp
    assert sorted(found) == [2, 6, 8]
    assert all(found[number] == whole[number] for number in found)
    # Just after loading: the last saved round is not evaluated again.
    last = make(seed=seed)
    last.load_state_dict(resumed.state_dict())
    assert not last.private_sum.evaluates(ROUNDS)


@pytest.mark.parametrize(
    "other", [{"share": 0.3}, {"every": 1}, {"bounds": {"accuracy": 2.0}}]
)
def test_a_saved_run_goes_on_with_the_same_evaluations(tmp_path, other):
    grid = Measuring([{"accuracy": 1.0}])
    start(make(), grid, 2, checkpoint=tmp_path)
    with pytest.raises(CheckpointError):
        start(make(other), grid, 4, checkpoint=tmp_path)
    assert sorted(start(make(), grid, 3, checkpoint=tmp_path).train_metrics_clientapp)


def test_workers_know_no_seed_of_it():
    strategy, grid = make(seed=5), Measuring([{"accuracy": 1.0}])
    list(rounds_of(strategy, grid, [1]))
    list(strategy.configure_train(2, to_record(MODEL), ConfigRecord(), grid))
    bare = strategy.private_sum.clipper()
    assert bare.evaluation is None and bare.mechanism.seed is None
    pickle.dumps(strategy.summand())


# Strategies and callbacks ---------------------------------------------------------


def test_what_a_strategy_makes_of_evaluations_is_withheld():
    class Telling(AdditiveStrategy):
        def report_evaluate(self, replies, round):
            raise AssertionError("it is told nothing")

    result = start(make(kind=Telling), Measuring([{"accuracy": 0.5}]), EVERY)
    assert "accuracy" in result.evaluate_metrics_clientapp[EVERY]


@pytest.mark.parametrize(
    ("kind", "needs", "name"),
    [
        (MaxFL, {"requirement": 1.0}, "appealed"),
        (BoundedGroupLoss, {"groups": ["a"], "upper_bound": 9.0}, "loss"),
        (FedPer, {"personal": "out.*"}, "accuracy"),
    ],
)
def test_metrics_of_a_methods_own_pass_the_same_gate(kind, needs, name, task, initial):
    changes = {"num_sampled_clients": 6, "population_size": 6, "num_rounds": 2}
    half = kind.client_half

    def data(context):
        return [
            {**columns, "group": torch.zeros_like(columns["y"])}
            for columns in task.data(context)
        ]

    grouped = replace(task, data=data)

    def start_with(**own):
        strategy = kind(mechanism=plan(**changes, **own), **needs)
        grid = LocalGrid(client_app(grouped, half), 6, {"batch-size": 4, "lr": 0.1})
        return strategy.start(grid, initial, num_rounds=2).evaluate_metrics_clientapp

    own = evaluation(bounds={name: 4.0})
    found = start_with(noise_multiplier=1e-6, evaluation=own)[2]
    raw = start_with(noise_multiplier=1e-6, evaluation=None, unprotected_metrics=True)[
        2
    ]
    assert set(found) == {name, f"{name}-noise-std"}
    assert set(raw) - {name}
    assert 0 < found[name] < 4


def test_own_readers_of_evaluations_are_refused():
    class Own(AdditiveStrategy):
        def aggregate_evaluate(self, server_round, replies):
            return None

    with pytest.raises(ValueError, match="left out with Own: its own aggregate_evalua"):
        make(kind=Own)


@pytest.mark.parametrize(
    "option", [{"fraction_evaluate": 0.5}, {"evaluate_metrics_aggr_fn": print}]
)
def test_options_that_would_not_be_heard_are_refused(option):
    (name,) = option
    with pytest.raises(ValueError, match=f"{name}=.* must be left out with PrivateEva"):
        AdditiveStrategy(mechanism=plan(), **option)


def test_dpftrl_takes_it():
    strategy = DPFTRL(
        num_rounds=ROUNDS,
        num_sampled_clients=CLIENTS,
        population_size=CLIENTS,
        max_epsilon=4.0,
        target_delta=DELTA,
        evaluation=evaluation(),
    )
    result = start(strategy, Measuring([{"accuracy": 0.5}]))
    assert sorted(result.evaluate_metrics_clientapp) == [2, 4, 6, 8]
    assert result.train_metrics_clientapp[ROUNDS]["epsilon"] <= 4.0


def test_adaptive_clipping_pays_from_the_trainings_share():
    clipping = AdaptiveClipping(1.0, clipped_count_stddev=5.0)
    found = accountant("any", clipping=clipping)
    assert found.epsilon_after(ROUNDS, DELTA) == pytest.approx(
        gaussian_epsilon(0.5, DELTA)
    )


def test_callbacks_read_it_in_the_rounds_that_have_it():
    best = KeepBest("evaluate/accuracy")
    stop = StopWhen("evaluate/accuracy", at_least=-100.0)
    result = start(make(), Measuring([{"accuracy": 0.5}]), callbacks=[best, stop])
    assert sorted(result.train_metrics_clientapp) == [1, 2]
    assert best.number == 2
    assert best.value == result.evaluate_metrics_clientapp[2]["accuracy"]


def test_a_metric_that_will_never_be_there_is_refused_before_the_run():
    grid = Measuring([{"accuracy": 0.5}])
    with pytest.raises(ValueError, match="'evaluate/acc' must be one of .'evaluate/ac"):
        start(make(), grid, callbacks=[KeepBest("evaluate/acc", "max")])
    assert grid.asked == []
    with pytest.raises(ValueError, match="clients' own metrics are withheld"):
        start(make(), grid, callbacks=[KeepBest("train/loss")])


def test_the_tracker_writes_it(tmp_path):
    tracker = Tracker(tmp_path, tensorboard=False)
    result = start(make(), Measuring([{"accuracy": 0.5}]), tracker=tracker)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = {row["round"]: row for row in map(json.loads, lines)}
    assert "evaluate/accuracy" not in rows[1]
    for number, found in result.evaluate_metrics_clientapp.items():
        assert rows[number]["evaluate/accuracy"] == found["accuracy"]
        assert rows[number]["evaluate/loss-noise-std"] == found["loss-noise-std"]


def test_the_summary_says_what_is_released():
    said = make().settings()["Evaluation"]
    assert said.startswith("PrivateEvaluation(bounds={'accuracy': 1.0, 'loss': (1.0, 5")
    assert "noise in the mean: accuracy 0.745, loss 2.98; all else is withheld" in said


# Secret cohorts -------------------------------------------------------------------


@pytest.mark.parametrize("same", [False, True])
def test_of_secret_cohorts_no_evaluation_tells_who_replied(same, caplog):
    caplog.set_level("DEBUG", "flwr")
    logs, results = [], []
    for metrics in ([{"accuracy": 0.5}], lambda i: RuntimeError(f"left {i}")):
        caplog.clear()
        sampler = PoissonSampler(2**100, probability=0.25, same_for_evaluation=same)
        strategy = make(sampler=sampler, seed=2**101, **SAMPLERS["poisson"][1])
        result = start(strategy, Measuring(metrics))
        results.append(result.evaluate_metrics_clientapp)
        logs.append([record.msg for record in caplog.records])
    assert logs[0] == logs[1]
    assert [sorted(x) for x in results[0].values()] == [
        sorted(x) for x in results[1].values()
    ]


def test_cohorts_of_fixed_size_are_refused_where_they_amplify():
    with pytest.raises(
        ValueError, match="left out with amplified=True and UniformSampler: it"
    ):
        make(sampler=UniformSampler(), amplified=True, num_sampled_clients=3)


def test_bins_that_amplify_are_not():
    strategy = make(
        sampler=BallsInBinsSampler(4), amplified=True, num_sampled_clients=3
    )
    result = start(strategy, Measuring([{"accuracy": 0.5, "loss": 2.0}]))
    assert sorted(result.evaluate_metrics_clientapp) == [2, 4, 6, 8]
    plain = make(
        sampler=BallsInBinsSampler(4),
        amplified=True,
        num_sampled_clients=3,
        evaluation=None,
    )
    with_them, without = (
        s.private_sum.accountant.epsilon_after(ROUNDS, DELTA) for s in (strategy, plain)
    )
    assert 0.95 * without < with_them <= 1.01 * without


def test_what_nobody_accounts_for_is_not_released():
    found = accountant("any", evaluation=None)
    with pytest.raises(ValueError, match="needs an accountant that counts it"):
        plan().evaluates(found)


def test_a_noise_whose_epsilon_cannot_be_shared_is_refused():
    with pytest.raises(
        ValueError, match="its epsilon=0.0 at target_delta=0.9 cannot b"
    ):
        make(
            sampler=PoissonSampler(probability=0.01),
            amplified=True,
            noise_multiplier=50.0,
            target_delta=0.9,
            num_sampled_clients=3,
            population_size=300,
        )


# Bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bounds": {}}, "bounds={} must be such as"),
        ({"bounds": ["accuracy"]}, "bounds=.'accuracy'. must be such as"),
        ({"bounds": {"": 1.0}}, "a name in bounds='' must be a word"),
        ({"bounds": {3: 1.0}}, "a name in bounds=3 must be a word"),
        ({"bounds": {"a": 0.0}}, "'a'.=0.0 must be a finite number > 0"),
        ({"bounds": {"a": math.inf}}, "'a'.=inf must be a finite number > 0"),
        ({"bounds": {"a": "1"}}, "'a'.='1' must be a finite number > 0"),
        ({"bounds": {"a": (1.0, 1.0)}}, "must be two numbers of which the first is le"),
        ({"bounds": {"a": (0.0, math.inf)}}, "'a'.=inf must be a finite number"),
        ({"bounds": {"a": (1.0, 2.0, 3.0)}}, "must be a number, or the two ends"),
        ({"bounds": {"a": 1.0, "a-noise-std": 1.0}}, "must be without '-noise-std'"),
        ({"every": 0}, "every=0 must be an integer >= 1"),
        ({"share": 0.0}, "share=0.0 must be"),
        ({"share": 1.0}, "share=1.0 must be"),
        ({"num_sampled_clients": 0}, "num_sampled_clients=0 must be"),
        ({"every": ROUNDS + 1}, "every=9 must be <= num_rounds=8: no round"),
        ({"num_sampled_clients": 13}, "=13 must be <= population_size=12"),
    ],
)
def test_bad_plans_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(changes)


def test_raw_averages_beside_noisy_ones_are_refused():
    with pytest.raises(
        ValueError, match="unprotected_metrics=True must be False with e"
    ):
        plan(unprotected_metrics=True)
    with pytest.raises(
        ValueError, match="evaluation='all' must be a PrivateEvaluation"
    ):
        plan(evaluation="all")
