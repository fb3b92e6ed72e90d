"""A mechanism at work in a strategy: what is released, and what that costs."""

import math
from dataclasses import replace

import numpy as np
import pytest
from dp_accounting.pld import privacy_loss_distribution as pld
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext import AdditiveStrategy
from flower_ext._flower import InconsistentMessageReplies, PrivacyBudgetExhausted
from flower_ext.core.arrays import Lazy, from_record, to_record
from flower_ext.core.contribution import DELTA, Contribution, Total
from flower_ext.core.replies import MalformedReply
from flower_ext.core.sampling import (
    AllClients,
    CyclicPoissonSampler,
    HeldOutSampler,
    MinSeparationSampler,
    PoissonSampler,
    UniformSampler,
)
from flower_ext.privacy import (
    AdaptiveClipping,
    BandedToeplitz,
    Mechanism,
    NoiseStream,
    PerLayerClipping,
    SquareRootToeplitz,
    TreeAggregation,
    gaussian_epsilon,
)
from flower_ext.server.optimizers import SGD

SENT = {"w": np.float32([1.0, -1.0, 0.5]), "b": np.float32(2.0)}
ROUNDS = 6


def plan(**changes):
    usual = {
        "num_rounds": ROUNDS,
        "num_sampled_clients": 3,
        "population_size": 3,
        "noise_multiplier": 0.7,
        "target_delta": 1e-3,
        "factorization": "identity",
        "seed": 5,
    }
    return Mechanism(**{**usual, **changes})


def moved(change, weight=1.0):
    """Return what a client sends that adds ``change`` to every coordinate."""
    return {name: x + np.asarray(change, x.dtype) for name, x in SENT.items()}, weight


@pytest.fixture
def cohort(reply):
    """Return the replies of clients that change every coordinate by so much."""

    def make(*changes, weights=None, **metrics):
        weights = weights or [1.0] * len(changes)
        return [
            reply(moved(change)[0], weight, **metrics)
            for change, weight in zip(changes, weights, strict=True)
        ]

    return make


def released(strategy, aggregate, contents, rounds=1):
    """Return what rounds of the same replies add to the model, and their metrics."""
    found = []
    for server_round in range(1, rounds + 1):
        new, metrics = aggregate(strategy, SENT, contents, server_round)
        found.append(({name: new[name] - SENT[name] for name in SENT}, metrics))
    return found


class Equal(AdditiveStrategy):
    """The non-private strategy: every client weighs the same."""

    equal_weights = True


def clipped_mean(changes, clipping_norm):
    size = sum(x.size for x in SENT.values())
    norms = [abs(change) * math.sqrt(size) for change in changes]
    return sum(
        c * min(1.0, clipping_norm / n) if n else 0.0
        for c, n in zip(changes, norms, strict=True)
    ) / len(changes)


# What is released -----------------------------------------------------------------


def test_no_noise_and_no_clip_is_the_strategy_itself_momentum_included(
    cohort, aggregate
):
    contents = cohort(0.5, -2.0, 7.0, weights=[1, 50, 3])
    private = AdditiveStrategy(
        mechanism=plan(noise_multiplier=0, clipping=math.inf, factorization="best"),
        server_optimizer=SGD(0.7, momentum=0.9),
    )
    plain = Equal(server_optimizer=SGD(0.7, momentum=0.9))
    ours = released(private, aggregate, contents, 4)
    theirs = released(plain, aggregate, contents, 4)
    for (left, _), (right, _) in zip(ours, theirs, strict=True):
        for name in SENT:
            np.testing.assert_array_equal(left[name], right[name])


def test_identity_is_dp_fedavg_by_hand(cohort, aggregate):
    changes = (0.5, -2.0, 7.0)
    strategy = AdditiveStrategy(mechanism=plan(clipping=1.5, noise_multiplier=0.7))
    stream = NoiseStream(plan().choose(UniformSampler()), {"w": (3,), "b": ()}, seed=5)
    # Six rounds, each client in all of them: sensitivity sqrt(6).
    std = 0.7 * math.sqrt(ROUNDS)
    for found, metrics in released(strategy, aggregate, cohort(*changes), ROUNDS):
        noise = stream.next(std)
        for name in SENT:
            expected = clipped_mean(changes, 1.5) + 1.5 * noise[name] / 3
            np.testing.assert_allclose(found[name], expected, rtol=1e-5, atol=1e-6)
        assert metrics["noise-std"] == pytest.approx(std * 1.5 / 3)


def test_a_tree_restarted_in_every_round_is_dp_fedavg(cohort, aggregate):
    contents = cohort(0.5, -2.0, 7.0)
    tree = TreeAggregation(ROUNDS, restart_every=1)
    both = [
        released(
            AdditiveStrategy(mechanism=plan(factorization=kind)), aggregate, contents, 4
        )
        for kind in ("identity", tree)
    ]
    for (left, _), (right, _) in zip(*both, strict=True):
        np.testing.assert_allclose(left["w"], right["w"], rtol=1e-6)


def test_correlated_noise_is_the_streams(cohort, aggregate):
    strategy = AdditiveStrategy(
        mechanism=plan(factorization=SquareRootToeplitz(ROUNDS), scales={"delta": 4.0})
    )
    root = SquareRootToeplitz(ROUNDS)
    noise = np.linalg.solve(root.strategy_matrix(), np.eye(ROUNDS))
    assert strategy.private_sum.noise_std == pytest.approx(
        0.7 * root.sensitivity(1, ROUNDS).value
    )
    fresh = NoiseStream(plan().choose(UniformSampler()), {"w": (3,), "b": ()}, seed=5)
    z = np.array([fresh.next()["w"] for _ in range(ROUNDS)])
    found = released(strategy, aggregate, cohort(0.0, 0.0, 0.0), ROUNDS)
    values = np.array([new["w"] for new, _ in found])
    scale = strategy.private_sum.noise_std / 3 / 4.0
    np.testing.assert_allclose(values, noise @ z * scale, rtol=1e-4, atol=1e-6)


def test_dropouts_change_neither_noise_nor_divisor(cohort, aggregate):
    full = AdditiveStrategy(mechanism=plan(clipping=100.0))
    partial = AdditiveStrategy(mechanism=plan(clipping=100.0))
    nobody = AdditiveStrategy(mechanism=plan(clipping=100.0))
    a = released(full, aggregate, cohort(3.0, 3.0, 3.0))[0]
    b = released(partial, aggregate, [*cohort(3.0, 3.0), RuntimeError("lost")])[0]
    c = released(nobody, aggregate, [RuntimeError("lost")] * 3)[0]
    np.testing.assert_allclose(a[0]["w"] - b[0]["w"], 1.0, atol=1e-4)
    np.testing.assert_allclose(a[0]["w"] - c[0]["w"], 3.0, atol=1e-4)
    assert [m["num-replies"] for _, m in (a, b, c)] == [3, 2, 0]
    assert a[1]["epsilon"] == b[1]["epsilon"] == c[1]["epsilon"] > 0


def test_an_empty_poisson_cohort_is_released(aggregate, cohort, monkeypatch):
    sampler = PoissonSampler(probability=0.1)
    strategy = AdditiveStrategy(
        mechanism=plan(amplified=True, population_size=30), sampler=sampler
    )
    monkeypatch.setattr(PoissonSampler, "sample", lambda *args: [])
    new, _ = aggregate(strategy, SENT, cohort(1.0, 1.0, 1.0))
    assert np.all(new["w"] != SENT["w"])


def test_a_diverged_contribution_counts_as_none(cohort, aggregate):
    mechanism = plan(clipping=100.0)
    left = released(
        AdditiveStrategy(mechanism=mechanism), aggregate, cohort(1.0, 2.0, math.nan)
    )
    right = released(
        AdditiveStrategy(mechanism=mechanism),
        aggregate,
        [*cohort(1.0, 2.0), RuntimeError("lost")],
    )
    np.testing.assert_array_equal(left[0][0]["w"], right[0][0]["w"])
    assert left[0][1]["num-dropped"] == 1


def test_counters_stay_as_they_are(reply, aggregate):
    sent = {"w": np.float32([1.0]), "count": np.int64(7)}
    strategy = AdditiveStrategy(mechanism=plan())
    new, _ = aggregate(
        strategy, sent, [reply({"w": np.float32([2.0]), "count": np.int64(9)})] * 3
    )
    assert new["count"] == 7
    assert new["count"].dtype == np.int64
    assert new["w"] != sent["w"]


# Bounded, whatever is sent --------------------------------------------------------


class Pair(AdditiveStrategy):
    """Sends two parts, a scalar and a vector of sums."""

    scales = {"more": 3.0, "sums": 0.1}

    def contribution(self, reply, round):
        delta = reply.delta(round)
        return Contribution(
            {DELTA: delta, "more": {"w": delta["w"]}},
            scalars={"one": 5.0, "sums": np.array([1.0, -40.0])},
        )

    def zero(self, sent):
        nothing = {name: np.zeros_like(x) for name, x in sent.items()}
        return Contribution(
            {DELTA: nothing, "more": {"w": nothing["w"]}},
            scalars={"one": 0.0, "sums": np.zeros(2)},
        )


def pieces_of(term):
    """Return norms of the pieces of a contribution, scaled as ``Pair`` says."""
    norms = {
        f"{part}/{name}": np.linalg.norm(x.numpy() if hasattr(x, "numpy") else x)
        * Pair.scales.get(part, 1.0)
        for part, arrays in term.arrays.items()
        for name, x in arrays.items()
    }
    for name, x in term.scalars.items():
        norms[name] = np.linalg.norm(x) * Pair.scales.get(name, 1.0)
    return {name: float(norm) for name, norm in norms.items()}


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    st.lists(st.floats(-1e6, 1e6, width=32), min_size=3, max_size=3),
    st.floats(0.01, 100.0),
    st.booleans(),
)
def test_no_contribution_exceeds_the_norm(values, bound, layered):
    clipping = PerLayerClipping(bound) if layered else bound
    strategy = Pair(mechanism=plan(clipping=clipping))
    strategy.private_sum.open(strategy.zero(SENT))
    delta = {"w": np.float32(values), "b": np.float32(values[0])}
    term = Contribution(
        {DELTA: delta, "more": {"w": delta["w"]}},
        scalars={"one": 5.0, "sums": np.array([1.0, -40.0])},
    )
    norms = pieces_of(strategy.private_sum.clip(term))
    assert math.hypot(*norms.values()) <= bound
    if layered:
        assert max(norms.values()) <= bound / math.sqrt(len(norms)) * (1 + 1e-9)
    elif math.hypot(*pieces_of(term).values()) > bound:
        assert math.hypot(*norms.values()) == pytest.approx(bound, rel=1e-9)


def test_one_client_moves_the_sum_by_at_most_the_norm(cohort, aggregate):
    def total_without(contents):
        seen = {}

        class Spy(Pair):
            def update(self, total, round):
                seen.update(scalars=dict(total.scalars), arrays=dict(total.arrays))
                return total.mean()

        aggregate(Spy(mechanism=plan(clipping=2.0)), SENT, contents)
        return Contribution(seen["arrays"], scalars=seen["scalars"])

    kept = cohort(0.1, 0.2)
    base = total_without([*kept, RuntimeError("lost")])
    for change in (1e-3, 1.0, -1e8):
        other = total_without([*kept, *cohort(change)])
        difference = Contribution(
            {
                part: {k: other.arrays[part][k] - x for k, x in arrays.items()}
                for part, arrays in base.arrays.items()
            },
            scalars={k: other.scalars[k] - x for k, x in base.scalars.items()},
        )
        distance = math.hypot(*pieces_of(difference).values())
        assert 0 < distance <= 2.0 * (1 + 1e-6)


class Weighs(AdditiveStrategy):
    """Weighs clients by data, and says so."""

    declares_weight = True

    def contribution(self, reply, round):
        return Contribution({DELTA: reply.delta(round)}, reply.number("q"))


def test_a_weight_that_was_not_declared_is_refused(cohort, aggregate):
    class Forgets(AdditiveStrategy):
        contribution = Weighs.contribution

    contents = cohort(1.0, 1.0, 1.0)
    for content in contents:
        content["metrics"]["q"] = 2.0
    with pytest.raises(ValueError, match="a weight, for which no noise is planned"):
        aggregate(Forgets(mechanism=plan()), SENT, contents)


def test_a_declared_weight_is_clipped_and_noised_with_the_rest(cohort, aggregate):
    """In the limit it weighs as without a mechanism; else a term has one norm."""
    contents = cohort(1.0, 2.0, -1.0)
    for content, q in zip(contents, (3.0, 1.0, 0.5), strict=True):
        content["metrics"]["q"] = q
    free = plan(noise_multiplier=0, clipping=math.inf)
    found, _ = aggregate(Weighs(mechanism=free), SENT, contents)
    expected, _ = aggregate(Weighs(), SENT, contents)
    assert found["w"] == pytest.approx(expected["w"])
    assert expected["w"] - SENT["w"] == pytest.approx((3 + 2 - 0.5) / 4.5)
    strategy = Weighs(mechanism=plan(clipping=2.0))
    strategy.private_sum.open(strategy.zero(SENT))
    delta = {"w": np.float32([1.0, 2.0, -2.0]), "b": np.float32(0.0)}
    clipped = strategy.private_sum.clip(Contribution({DELTA: delta}, 4.0))
    assert clipped.scalars["weight"] == pytest.approx(2 * 4 / math.hypot(4, 12))
    assert math.hypot(*pieces_of(clipped).values()) == pytest.approx(2.0)
    loud, _ = aggregate(Weighs(mechanism=plan(noise_multiplier=50.0)), SENT, contents)
    assert np.all(np.isfinite(loud["w"]))


def test_weights_and_counts_of_parts_are_carried_as_well():
    term = Contribution(
        {DELTA: {"w": np.array([1.0, 2.0])}, "more": {"w": np.array([3.0, 4.0])}},
        scalars={"one": 5.0},
        weights={"more": 2.0},
        counts={DELTA: {"w": np.array([1.0, 0.0])}},
    )
    carried = dict(term.carried().pieces())
    assert {key: np.asarray(as_numpy(x)).tolist() for key, x in carried.items()} == {
        "delta/w": [1.0, 2.0],
        "more/w": [6.0, 8.0],
        "count-of-delta/w": [1.0, 0.0],
        "one": 5.0,
        "weight-of-more": 2.0,
    }
    total = Total()
    total.add(term.carried(), term.carried())
    total.noise = {"weight-of-more": 7.0, "count-of-delta": 0.5}
    total.uncarried()
    assert total.weights == {"more": 7.0}  # no less than its noise
    assert total.mean("more")["w"].tolist() == [12 / 7, 16 / 7]
    assert total.mean()["w"].tolist() == [1.0, 8.0]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"scalars": {"a/b": 1.0}}, "scalar's name='a/b' must be without '/'"),
        ({"scalars": {"weight": 1.0}}, "scalar's name='weight' must be"),
        ({"scalars": {"weight-of-delta": 1.0}}, "scalar's name='weight-of-delta'"),
        ({"scalars": {"within-clipping-norm": 1.0}}, "'within-clipping-norm' must be"),
        ({"arrays": {"a/b": {"w": np.zeros(3)}}}, "part's name='a/b' must be without"),
        ({"arrays": {"count-of-delta": {}}}, "part's name='count-of-delta' must be"),
        (
            {"arrays": {"a": {"": np.ones(2)}}},
            "array's name in 'a'='' must be not empty",
        ),
        ({"weights": {"delta/w": 1.0}}, "part's name='delta/w' must be without '/'"),
    ],
)
def test_names_by_which_a_piece_is_taken_for_another_are_refused(
    cohort, aggregate, names, message
):
    """``weight`` as a scalar would be the divisor, and ``a/b`` be released as 0."""

    class Named(AdditiveStrategy):
        def zero(self, sent):
            return replace(super().zero(sent), **names)

    with pytest.raises(ValueError, match=message):
        aggregate(Named(mechanism=plan()), SENT, cohort(1.0, 1.0, 1.0))


def test_counts_are_noised_whatever_their_kind(cohort, aggregate):
    """Flags, too: left out of the noise they would be released as 0, and the mean."""

    class Counted(AdditiveStrategy):
        def contribution(self, reply, round):
            counts = {DELTA: {k: np.ones(x.shape, bool) for k, x in SENT.items()}}
            return replace(super().contribution(reply, round), counts=counts)

        def zero(self, sent):
            counts = {DELTA: {k: np.zeros(x.shape, bool) for k, x in sent.items()}}
            return replace(super().zero(sent), counts=counts)

        def report(self, total, round):
            found = total.counts[DELTA]["w"]
            return {
                "counts": found.tolist(),
                "noise": total.noise.get("count-of-delta", 0),
            }

    bare = plan(noise_multiplier=0.0, clipping=math.inf)
    _, metrics = aggregate(Counted(mechanism=bare), SENT, cohort(1.0, 1.0, 1.0))
    assert metrics["counts"] == [3.0] * 3
    _, metrics = aggregate(Counted(mechanism=plan()), SENT, cohort(1.0, 1.0, 1.0))
    assert min(metrics["counts"]) >= metrics["noise"] > 0


def test_a_sum_of_weights_below_its_noise_counts_as_the_noise():
    total = Total({DELTA: {"w": np.array([4.0])}}, scalars={"weight": np.array(-3.0)})
    total.noise = {"weight": 2.0}
    assert total.uncarried().weight == 2.0
    assert total.mean()["w"].tolist() == [2.0]


def as_numpy(x):
    return x.numpy() if isinstance(x, Lazy) else x


def test_what_zero_does_not_name_is_refused(cohort, aggregate):
    class Forgets(Pair):
        def zero(self, sent):
            return AdditiveStrategy.zero(self, sent)

    with pytest.raises(
        InconsistentMessageReplies, match=r"\['more/w', 'one', 'sums'\]"
    ):
        aggregate(Forgets(mechanism=plan()), SENT, cohort(1.0, 1.0, 1.0))


@pytest.mark.parametrize(
    "stretched",
    [
        {"arrays": {"more": {"w": np.ones(1, np.float32)}}},
        {"arrays": {"more": {"w": np.ones((3, 1), np.float32)}}},
        {"arrays": {"more": {"w": np.float32(1.0)}}},
        {"arrays": {DELTA: {"w": np.ones(1), "b": np.zeros(())}}},
        {"scalars": {"sums": np.ones(1)}},
        {"scalars": {"sums": 1.0}},
        {"scalars": {"one": np.ones(2)}},
    ],
)
def test_a_contribution_that_numpy_would_stretch_is_no_contribution(
    cohort, aggregate, stretched
):
    """Its norm is 1 before, and far more once it is added to a larger array."""

    class Stretches(Pair):
        def contribution(self, reply, round):
            term = super().contribution(reply, round)
            if float(reply.content["arrays"]["b"].numpy()) < 5:
                return term
            arrays = {**term.arrays, **stretched.get("arrays", {})}
            return Contribution(
                arrays, scalars={**term.scalars, **stretched.get("scalars", {})}
            )

    strategy = Stretches(mechanism=plan())
    strategy.private_sum.open(strategy.zero(SENT))
    bad = {"arrays": {}, "scalars": {}, **stretched}
    with pytest.raises(MalformedReply, match="shape"):
        strategy.private_sum.clip(Contribution(bad["arrays"], scalars=bad["scalars"]))
    for mechanism in (plan(), plan(noise_multiplier=0, clipping=math.inf), None):
        contents = cohort(1.0, 9.0, 2.0)
        found, metrics = aggregate(Stretches(mechanism=mechanism), SENT, contents)
        contents[1] = RuntimeError("lost")
        expected, _ = aggregate(Stretches(mechanism=mechanism), SENT, contents)
        assert all(np.array_equal(found[k], x) for k, x in expected.items())
        assert metrics["num-dropped"] == 1


@pytest.mark.parametrize("kind", [np.complex64, object])
def test_a_contribution_of_no_real_numbers_is_no_contribution(cohort, aggregate, kind):
    class Odd(AdditiveStrategy):
        def contribution(self, reply, round):
            term = super().contribution(reply, round)
            if float(reply.content["arrays"]["b"].numpy()) < 5:
                return term
            odd = {
                name: x.numpy().astype(kind) for name, x in term.arrays[DELTA].items()
            }
            odd["b"] = np.full((), None if kind is object else 1j)
            return Contribution({DELTA: odd})

    _, metrics = aggregate(Odd(mechanism=plan()), SENT, cohort(1.0, 9.0, 2.0))
    assert metrics["num-dropped"] == 1


# Accounting -----------------------------------------------------------------------


def test_epsilon_is_that_of_one_gaussian_release(cohort, aggregate):
    strategy = AdditiveStrategy(mechanism=plan(factorization="best"))
    metrics = [
        m for _, m in released(strategy, aggregate, cohort(1.0, 1.0, 1.0), ROUNDS)
    ]
    spent = [m["epsilon"] for m in metrics]
    assert spent == sorted(spent)
    assert spent[-1] == pytest.approx(gaussian_epsilon(1 / 0.7, 1e-3), rel=1e-9)
    loss = pld.from_gaussian_mechanism(0.7, value_discretization_interval=1e-4)
    assert spent[-1] == pytest.approx(loss.get_epsilon_for_delta(1e-3), rel=1e-3)
    assert metrics[-1]["delta"] == 1e-3


def test_poisson_epsilon_is_dp_accountings(cohort, aggregate):
    strategy = AdditiveStrategy(
        mechanism=plan(amplified=True, noise_multiplier=1.1, population_size=300),
        sampler=PoissonSampler(probability=0.02),
    )
    *_, (_, metrics) = released(strategy, aggregate, cohort(1.0, 1.0, 1.0), 4)
    one = pld.from_gaussian_mechanism(
        1.1, sampling_prob=0.02, value_discretization_interval=1e-3
    )
    expected = one.self_compose(4).get_epsilon_for_delta(1e-3)
    assert metrics["epsilon"] == pytest.approx(expected, rel=1e-5)
    assert strategy.private_sum.noise_std == 1.1


@pytest.mark.parametrize(
    ("sampler", "changes"),
    [
        (MinSeparationSampler(3, 2), {"factorization": "best", "population_size": 9}),
        (UniformSampler(), {"factorization": "tree"}),
        (
            PoissonSampler(probability=0.1),
            {"amplified": True, "population_size": 30},
        ),
        (
            CyclicPoissonSampler(0.3, 3),
            {"amplified": True, "population_size": 30, "factorization": "best"},
        ),
        (
            CyclicPoissonSampler(0.3, 3),
            {
                "amplified": True,
                "population_size": 30,
                "factorization": BandedToeplitz(ROUNDS, [1.0, 0.5, 0.2]),
            },
        ),
        (UniformSampler(), {"amplified": True, "population_size": 60}),
    ],
)
def test_a_target_is_met_and_not_exceeded(sampler, changes):
    mechanism = plan(noise_multiplier=None, max_epsilon=3.0, **changes)
    strategy = AdditiveStrategy(mechanism=mechanism, sampler=sampler)
    accountant = strategy.private_sum.accountant
    spent = accountant.epsilon_after(ROUNDS, 1e-3)
    assert 2.97 < spent <= 3.0
    accountant.require_budget(ROUNDS)


def test_the_run_stops_before_its_budget_is_exceeded(cohort, scripted):
    mechanism = plan(max_epsilon=4.0, noise_multiplier=0.7)
    strategy = AdditiveStrategy(mechanism=mechanism, fraction_evaluate=0.0)
    grid = scripted(cohort(1.0, 1.0, 1.0))
    result = strategy.start(grid, to_record(SENT), num_rounds=ROUNDS)
    done = len(result.train_metrics_clientapp)
    assert 1 <= done < ROUNDS
    accountant = strategy.private_sum.accountant
    assert result.train_metrics_clientapp[done]["epsilon"] <= 4.0
    assert accountant.epsilon_after(done + 1, 1e-3) > 4.0
    assert not np.array_equal(from_record(result.arrays)["w"], SENT["w"])


def test_a_budget_for_no_round_at_all_is_an_error(cohort, scripted):
    strategy = AdditiveStrategy(mechanism=plan(max_epsilon=0.1))
    with pytest.raises(PrivacyBudgetExhausted, match="max_epsilon=0.1"):
        strategy.start(scripted(cohort(1.0, 1.0, 1.0)), to_record(SENT), num_rounds=3)


# Metrics --------------------------------------------------------------------------


def test_clients_metrics_are_withheld_unless_asked_for(cohort, scripted):
    for unprotected in (False, True):
        strategy = AdditiveStrategy(mechanism=plan(unprotected_metrics=unprotected))
        grid = scripted(cohort(1.0, 2.0, 3.0, accuracy=0.5))
        result = strategy.start(grid, to_record(SENT), num_rounds=1)
        assert ("accuracy" in result.train_metrics_clientapp[1]) is unprotected
        assert (1 in result.evaluate_metrics_clientapp) is unprotected


def test_clients_do_not_evaluate_where_nobody_may_read_it(cohort, scripted, caplog):
    caplog.set_level("INFO", "flwr")
    contents = cohort(1.0, 2.0, 3.0, loss=0.5)
    asked = {}
    for told in (False, True):
        grid = scripted(contents)
        asked[told] = []
        send = grid.send_and_receive

        def count(messages, *, timeout=None, send=send, to=asked[told]):
            messages = list(messages)
            to.extend(m.metadata.message_type for m in messages)
            return send(messages, timeout=timeout)

        grid.send_and_receive = count
        strategy = AdditiveStrategy(mechanism=plan(unprotected_metrics=told))
        strategy.start(grid, to_record(SENT), num_rounds=2)
    assert asked[True].count("evaluate") == 6
    assert asked[False] == ["train"] * 6
    assert caplog.text.count("Evaluation: clients are not asked") == 1


def test_evaluations_that_a_strategy_reads_itself_are_asked_for(cohort, scripted):
    class Own(AdditiveStrategy):
        seen = 0

        def aggregate_evaluate(self, server_round, replies):
            self.seen += len(list(replies))

    strategy = Own(mechanism=plan())
    strategy.start(scripted(cohort(1.0, 2.0, 3.0)), to_record(SENT), num_rounds=1)
    assert strategy.seen == 3


def test_signal_to_noise_is_estimated_from_the_release(aggregate, reply):
    size, clients = 40_000, 4
    sent = {"w": np.zeros(size, np.float32)}
    direction = np.random.default_rng(0).standard_normal(size)
    direction /= np.linalg.norm(direction)
    strategy = AdditiveStrategy(
        mechanism=plan(
            num_sampled_clients=clients,
            population_size=clients,
            clipping=50.0,
            noise_multiplier=0.002,
            factorization=SquareRootToeplitz(ROUNDS),
        )
    )
    contents = [reply({"w": np.float32(25.0 * direction)})] * clients
    root = SquareRootToeplitz(ROUNDS)
    rows = np.linalg.norm(np.linalg.inv(root.strategy_matrix()), axis=1)
    for t in range(3):
        _, metrics = aggregate(strategy, sent, contents, t + 1)
        noise = 50.0 * strategy.private_sum.noise_std * rows[t] * math.sqrt(size)
        expected = 25.0 * clients / noise
        assert metrics["signal-to-noise"] == pytest.approx(expected, rel=0.05)
        assert metrics["noise-std"] == pytest.approx(noise / math.sqrt(size) / clients)


def test_a_simulated_cohort_moves_as_the_planned_one(aggregate, cohort):
    changes = (0.01, -0.02, 0.03)
    planned = {"num_sampled_clients": 300, "population_size": 1500}
    sampler = MinSeparationSampler(5, 2)
    small = AdditiveStrategy(
        mechanism=plan(simulated_cohort=3, **planned), sampler=sampler
    )
    found, metrics = released(small, aggregate, cohort(*changes))[0]
    noise = NoiseStream(plan().choose(sampler), {"w": (3,), "b": ()}, seed=5).next(
        0.7 * math.sqrt(2)
    )
    expected = np.mean(changes) + noise["w"] / 300
    np.testing.assert_allclose(found["w"], expected, rtol=1e-4, atol=1e-7)
    assert metrics["planned-cohort"] == 300
    assert metrics["simulated-cohort"] == 3
    large = AdditiveStrategy(mechanism=plan(**planned), sampler=sampler)
    assert large.private_sum.noise_std == small.private_sum.noise_std
    assert "simulated with 3" in str(small.settings()["Mechanism"])
    assert "planned cohort" in str(small.settings()["Privacy"])


def test_in_a_simulation_held_out_clients_stay_held_out():
    held_out = HeldOutSampler(1, num_training_clients=3)
    planned = {"num_sampled_clients": 300, "population_size": 900}
    strategy = AdditiveStrategy(
        mechanism=plan(simulated_cohort=3, **planned), sampler=held_out
    )
    assert strategy.private_sum.sampler is strategy.sampler
    assert isinstance(strategy.sampler, HeldOutSampler)


# Adaptive clipping ----------------------------------------------------------------


@pytest.mark.parametrize(("change", "sign"), [(1e-6, -1), (100.0, +1)])
def test_the_norm_follows_the_contributions(cohort, aggregate, change, sign):
    strategy = AdditiveStrategy(
        mechanism=plan(noise_multiplier=0, clipping=AdaptiveClipping(1.0))
    )
    norms = [
        m["clipping-norm"]
        for _, m in released(strategy, aggregate, cohort(*[change] * 3), 3)
    ]
    # All or nobody within the norm: it moves by exp(-+ 0.2 * 0.5) a round.
    assert norms == pytest.approx([math.exp(sign * 0.1 * t) for t in range(3)])


def test_noise_belongs_to_the_norm_that_clipped(cohort, aggregate):
    mechanism = plan(
        clipping=AdaptiveClipping(1.0, clip_norm_lr=1.0, clipped_count_stddev=3.0)
    )
    strategy = AdditiveStrategy(mechanism=mechanism)
    stream = NoiseStream(
        mechanism.choose(UniformSampler()),
        {"w": (3,), "b": (), "bit": ()},
        seed=5,
    )
    norm, std = 1.0, strategy.private_sum.noise_std
    changes = (100.0, 100.0, 100.0)
    for found, metrics in released(strategy, aggregate, cohort(*changes), 3):
        noise = stream.next(std)
        assert metrics["clipping-norm"] == pytest.approx(norm)
        expected = clipped_mean(changes, norm) + norm * noise["w"] / 3
        np.testing.assert_allclose(found["w"], expected, rtol=1e-4)
        fraction = 0.5 + (-1.5 + 3.0 * float(noise["bit"]) / std) / 3
        norm *= math.exp(-(fraction - 0.5))


def test_the_bit_is_paid_for():
    plain = AdditiveStrategy(mechanism=plan()).private_sum
    adaptive = AdditiveStrategy(
        mechanism=plan(clipping=AdaptiveClipping(1.0, clipped_count_stddev=2.0))
    ).private_sum
    # mu^2 of the change and of the bit (sensitivity 1/2 a round) add up to the plan's.
    change = math.sqrt(ROUNDS) / adaptive.noise_std
    bit = 0.5 * math.sqrt(ROUNDS) / 2.0
    assert math.hypot(change, bit) == pytest.approx(1 / 0.7)
    assert adaptive.noise_std > plain.noise_std


def test_the_norm_changes_only_where_the_noise_restarts(cohort, aggregate):
    tree = TreeAggregation(ROUNDS, restart_every=3)
    strategy = AdditiveStrategy(
        mechanism=plan(
            factorization=tree, noise_multiplier=0, clipping=AdaptiveClipping(1.0)
        )
    )
    found = released(strategy, aggregate, cohort(100.0, 100.0, 100.0), 6)
    norms = [m["clipping-norm"] for _, m in found]
    assert norms == pytest.approx([1, 1, 1, *[math.exp(0.3)] * 3])
    with pytest.raises(ValueError, match="never restarts"):
        AdditiveStrategy(
            mechanism=plan(
                factorization=SquareRootToeplitz(ROUNDS), clipping=AdaptiveClipping(1.0)
            )
        )


# Resuming -------------------------------------------------------------------------


def continued(make, aggregate, contents, spoil=lambda state: state):
    first, second = make(), make()
    for server_round in (1, 2):
        aggregate(first, SENT, contents, server_round)
    second.load_state_dict(spoil(first.state_dict()))
    new, metrics = aggregate(second, SENT, contents, 3)
    expected, theirs = aggregate(first, SENT, contents, 3)
    np.testing.assert_array_equal(new["w"], expected["w"])
    assert metrics == theirs


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"factorization": "best"},
        {"clipping": AdaptiveClipping(0.3)},
        {"noise_multiplier": 0, "clipping": AdaptiveClipping(0.3)},
    ],
)
def test_a_resumed_run_continues_with_the_same_noise(cohort, aggregate, changes):
    contents = cohort(1.0, 2.0, 3.0)
    continued(lambda: AdditiveStrategy(mechanism=plan(**changes)), aggregate, contents)


def test_a_run_without_its_noise_is_not_resumed(cohort, aggregate):
    def forget(state):
        return {**state, "privacy": {**state["privacy"], "noise": None}}

    with pytest.raises(ValueError, match="noise is missing"):
        continued(
            lambda: AdditiveStrategy(mechanism=plan(factorization="best")),
            aggregate,
            cohort(1.0, 2.0, 3.0),
            forget,
        )


def test_a_run_with_other_privacy_is_not_resumed(cohort, aggregate):
    contents = cohort(1.0, 2.0, 3.0)
    first = AdditiveStrategy(mechanism=plan())
    aggregate(first, SENT, contents)
    for other in (
        AdditiveStrategy(),
        AdditiveStrategy(mechanism=plan(noise_multiplier=0)),
        AdditiveStrategy(mechanism=plan(noise_multiplier=0.8)),
        AdditiveStrategy(mechanism=plan(seed=6)),
    ):
        with pytest.raises(ValueError, match="saved run|checkpoint"):
            other.load_state_dict(first.state_dict())
            aggregate(other, SENT, contents)


@pytest.mark.parametrize("seed", [5, None])
def test_a_crash_after_the_release_does_not_repeat_it(cohort, scripted, tmp_path, seed):
    """The saved round is on the disk before clients see the model to evaluate it."""

    class Crash(Exception):
        pass

    class Crashes(AdditiveStrategy):
        broken = True

        def configure_evaluate(self, server_round, arrays, config, grid):
            if self.broken and server_round == 2:
                raise Crash
            return super().configure_evaluate(server_round, arrays, config, grid)

    grid = scripted(cohort(1.0, 2.0, 3.0))

    def start():
        strategy = Crashes(mechanism=plan(seed=seed, factorization="best"))
        return strategy, lambda: strategy.start(
            grid, to_record(SENT), num_rounds=3, checkpoint=tmp_path
        )

    with pytest.raises(Crash):
        start()[1]()
    assert (tmp_path / "round-00002").is_dir()
    Crashes.broken = False
    strategy, run = start()
    result = run()
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]
    assert strategy.private_sum.accountant.num_releases == 3
    assert strategy.private_sum._stream._round == 3


# What is refused ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"clipping": math.inf}, "clipping=inf must be finite"),
        ({"clipping": 0.0}, "clipping_norm=0.0"),
        ({"noise_multiplier": None}, "noise_multiplier=None and max_epsilon=None"),
        ({"noise_multiplier": -1.0}, "noise_multiplier=-1.0"),
        ({"noise_multiplier": math.nan}, "noise_multiplier=nan"),
        ({"max_epsilon": 0.0}, "max_epsilon=0.0"),
        ({"target_delta": 1.0}, "target_delta=1.0"),
        ({"num_sampled_clients": 4}, "num_sampled_clients=4 must be <= population"),
        ({"simulated_cohort": 4}, "simulated_cohort=4 must be <= num_sampled"),
        ({"factorization": "bands"}, "factorization='bands'"),
        ({"factorization": SquareRootToeplitz(5)}, "planned for num_rounds=6"),
        # Longer: a client could take part more often than the noise is for.
        ({"factorization": SquareRootToeplitz(7)}, "planned for num_rounds=6"),
        ({"scales": {"delta": 0.0}}, r"scales\['delta'\]=0.0"),
        ({"amplified": 1}, "amplified=1 must be True or False"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_a_bad_plan_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        plan(**changes)


BANDS = BandedToeplitz(ROUNDS, [1.0, 0.5, 0.2])


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        (UniformSampler(), {"factorization": BANDS}, "at most 1 bands"),
        (MinSeparationSampler(2), {"factorization": BANDS}, "at most 2 bands"),
        (AllClients(), {"amplified": True}, "not AllClients"),
        (
            HeldOutSampler(1, num_training_clients=3),
            {"amplified": True},
            "not HeldOutSampler",
        ),
        (PoissonSampler(), {"amplified": True}, "not PoissonSampler"),
        (
            PoissonSampler(probability=0.5),
            {"amplified": True, "factorization": "tree"},
            "must be identity",
        ),
        (
            CyclicPoissonSampler(0.5, 3),
            {"amplified": True},
            "must be a BandedToeplitz",
        ),
        (
            CyclicPoissonSampler(0.5, 2),
            {"amplified": True, "factorization": BANDS, "population_size": 30},
            "at most 2 bands",
        ),
    ],
)
def test_a_sampler_that_does_not_keep_the_promise_is_refused(sampler, changes, message):
    with pytest.raises(ValueError, match=message):
        AdditiveStrategy(mechanism=plan(**changes), sampler=sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction_train": 0.5}, "fraction_train=0.5 must be left out"),
        ({"min_train_nodes": 5}, "min_train_nodes=5 must be left out"),
        ({"min_replies": 2}, "min_replies=2 must be 1"),
        ({"mechanism": 1.0}, "mechanism=1.0 must be a Mechanism"),
    ],
)
def test_a_strategy_that_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdditiveStrategy(**{"mechanism": plan(), **options})


def test_a_longer_run_than_planned_is_refused(cohort, scripted):
    strategy = AdditiveStrategy(mechanism=plan())
    with pytest.raises(ValueError, match="num_rounds=7 must be <= 6"):
        strategy.start(scripted(cohort(1.0)), to_record(SENT), num_rounds=7)


@pytest.mark.parametrize(
    ("sampler", "changes", "message"),
    [
        (
            MinSeparationSampler(5),
            {"num_sampled_clients": 3, "population_size": 14},
            r"num_sampled_clients=3 must be at most 2.8: .*min_separation=5 .*size=14 ",
        ),
        (
            MinSeparationSampler(1, 2),
            {"num_sampled_clients": 3, "population_size": 8},
            r"max_participations=2 must be >= 3: 6 rounds of 3 of population_size=8",
        ),
        (
            CyclicPoissonSampler(1.0, 4),
            {"num_sampled_clients": 5, "population_size": 8, "seed": None},
            r"at most 4: .*CyclicPoissonSampler with min_separation=4 finds",
        ),
        (
            PoissonSampler(probability=0.01),
            {"num_sampled_clients": 3, "population_size": 100, "amplified": True},
            r"at most 2: .*PoissonSampler",
        ),
        (
            HeldOutSampler(num_training_clients=2),
            {"num_sampled_clients": 3, "population_size": 9},
            r"at most 2: .*HeldOutSampler",
        ),
        (
            HeldOutSampler(num_training_clients=2),
            {"num_sampled_clients": 90, "population_size": 900, "simulated_cohort": 3},
            r"num_sampled_clients=3 must be at most 2: ",
        ),
        (  # A plan that nobody could carry out is not made by simulating it.
            MinSeparationSampler(5),
            {"num_sampled_clients": 90, "population_size": 400, "simulated_cohort": 3},
            r"num_sampled_clients=90 must be at most 80: ",
        ),
        (
            MinSeparationSampler(5),
            {"population_size": 14, "noise_multiplier": 0},
            r"num_sampled_clients=3 must be at most 2.8: ",
        ),
    ],
)
def test_a_plan_that_runs_short_of_clients_is_refused(sampler, changes, message):
    with pytest.raises(ValueError, match=message):
        AdditiveStrategy(mechanism=plan(**changes), sampler=sampler)


@pytest.mark.parametrize(
    ("sampler", "population"),
    [
        (MinSeparationSampler(5), 15),
        (MinSeparationSampler(2, 3), 6),
        (MinSeparationSampler(6, 1), 18),
    ],
)
def test_a_plan_that_just_has_enough_clients_fills_every_round(
    sampler, population, cohort, scripted
):
    mechanism = plan(population_size=population)
    strategy = AdditiveStrategy(mechanism=mechanism, sampler=sampler)
    grid = scripted(cohort(*[1.0] * population))
    result = strategy.start(grid, to_record(SENT), num_rounds=ROUNDS)
    metrics = result.train_metrics_clientapp.values()
    assert [m["num-replies"] for m in metrics] == [3] * ROUNDS


def test_a_client_more_than_planned_for_ends_the_run(cohort, scripted, caplog):
    """One that left and came back under another id could not be told from it."""
    contents = cohort(*[1.0] * 8)

    class Moving(type(scripted(contents))):
        is_fixed = False
        gone = 0

        def get_node_ids(self):
            return list(super().get_node_ids())  # a range is a simulation's

        def get_nodes(self):
            return list(super().get_nodes())[self.gone : self.gone + 6]

    grid = scripted(contents)
    grid.__class__ = Moving
    strategy = AdditiveStrategy(
        mechanism=plan(population_size=7), sampler=MinSeparationSampler(2)
    )

    def leave(server_round, arrays):
        grid.gone = {2: 1, 4: 2}.get(server_round, grid.gone)

    result = strategy.start(grid, to_record(SENT), num_rounds=ROUNDS, evaluate_fn=leave)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3, 4]
    assert "population_size=7 must be >= 8" in caplog.text
    assert caplog.text.count("node(s) are new") == 2


def test_cohorts_of_fixed_size_need_everybody(cohort, aggregate):
    strategy = AdditiveStrategy(mechanism=plan(amplified=True, population_size=60))
    with pytest.raises(ValueError, match="population_size=60 must be the 3 connected"):
        aggregate(strategy, SENT, cohort(1.0, 2.0, 3.0))


def test_a_useless_delta_is_warned_of():
    with pytest.warns(UserWarning, match="target_delta=0.4"):
        AdditiveStrategy(mechanism=plan(target_delta=0.4))


def test_replies_of_those_not_asked_are_not_in_the_sum(cohort, exchange):
    strategy = AdditiveStrategy(mechanism=plan(clipping=100.0))
    twin = AdditiveStrategy(mechanism=plan(clipping=100.0))
    contents = cohort(1.0, 2.0, 3.0)
    replies = exchange(strategy, SENT, contents)
    stranger = Message(contents[0], dst_node_id=77, message_type="train")
    extra = Message(contents[0], reply_to=stranger)
    new, _ = strategy.aggregate_train(1, [*replies, extra])
    expected, _ = twin.aggregate_train(1, exchange(twin, SENT, contents))
    np.testing.assert_array_equal(from_record(new)["w"], from_record(expected)["w"])
