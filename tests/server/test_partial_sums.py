"""Replies added up where they are made: the same model, counts and metrics."""

import math
import pickle
import warnings

import numpy as np
import pytest
from adding_grid import AddingGrid
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from flwr.serverapp.exception import InconsistentMessageReplies

from flower_ext import AdditiveStrategy
from flower_ext.client.app import client_app
from flower_ext.core.arrays import to_record
from flower_ext.core.contribution import Total
from flower_ext.core.sampling import MinSeparationSampler
from flower_ext.privacy import AdaptiveClipping, Mechanism, PerLayerClipping
from flower_ext.server.partial_sums import PartialSum, Summed, SummingGrid
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.server.tracking import Tracker, read_clients, read_metrics
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import (
    FLASC,
    BoundedGroupLoss,
    FedFish,
    FedFishClient,
    FLASCClient,
)


def asked(strategy):
    """Let a strategy ask eight clients, of nodes 1000 to 1007."""
    grid = LocalGrid(ClientApp(), 8)
    strategy.configure_train(1, to_record(SENT), ConfigRecord(), grid)


def private(**options):
    return Mechanism(
        **{
            "num_rounds": 3,
            "num_sampled_clients": 4,
            "population_size": 8,
            "noise_multiplier": 0.5,
            "target_delta": 1e-2,
            "seed": 1,
            **options,
        }
    )


# What the table of all methods, tests/strategies/test_every_method.py, does not have.
STRATEGIES = {
    "FLASC-senders": lambda: FLASC(aggregation="senders", tier_of=None),
    "FedFish-private": lambda: FedFish(
        mechanism=private(clipping=PerLayerClipping(0.01)),
        sampler=MinSeparationSampler(2),
    ),
    "adaptive": lambda: AdditiveStrategy(
        mechanism=private(clipping=AdaptiveClipping(0.01), factorization="identity"),
        sampler=MinSeparationSampler(2),
    ),
}


@pytest.fixture
def app(task):
    return client_app(task, FedFishClient, FLASCClient)


def test_only_grids_that_say_so_add_up(app):
    assert isinstance(AddingGrid(app, 1), SummingGrid)
    assert not isinstance(LocalGrid(app, 1), SummingGrid)


@pytest.mark.parametrize("name", STRATEGIES)
def test_results_are_those_of_replies_that_arrive(name, app, initial, tmp_path):
    results = []
    for kind in (LocalGrid, AddingGrid):
        tracker = Tracker(tmp_path / kind.__name__, tensorboard=False)
        results.append(
            STRATEGIES[name]().start(
                kind(app, 8, {"batch-size": 4, "lr": 0.1}),
                initial,
                num_rounds=3,
                tracker=tracker,
            )
        )
    plain, ours = results
    moved = 0.0
    for key, array in plain.arrays.items():
        expected = array.numpy()
        np.testing.assert_allclose(
            ours.arrays[key].numpy(), expected, rtol=1e-6, atol=1e-8
        )
        moved += float(np.abs(expected - initial[key].numpy()).sum())
    assert moved > 0.01
    for field in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        for number, metrics in getattr(plain, field).items():
            found = getattr(ours, field)[number]
            assert dict(found) == pytest.approx(dict(metrics), rel=1e-6)
    rows = [read_metrics(tmp_path / kind.__name__) for kind in (LocalGrid, AddingGrid)]
    for expected, found in zip(*rows, strict=True):
        traffic = {k for k in expected if "bytes" in k or "parameters" in k}
        assert traffic
        assert {k: found[k] for k in traffic} == {k: expected[k] for k in traffic}


def test_rows_of_single_clients_are_those_of_replies_that_arrive(
    app, initial, tmp_path
):
    found = []
    for kind in (LocalGrid, AddingGrid):
        tracker = Tracker(tmp_path / kind.__name__, False, per_client=True)
        AdditiveStrategy().start(kind(app, 8), initial, num_rounds=2, tracker=tracker)
        found.append(read_clients(tmp_path / kind.__name__))
    assert len(found[0]) == 2 * 2 * 8
    assert all(row["train/num-examples"] > 0 for row in found[0][:8])
    assert found[0] == found[1]


def test_the_sum_does_not_depend_on_who_replied_first(app, initial):
    class Shuffled(AddingGrid):
        def deliver(self, replies):
            return [replies[i] for i in np.random.default_rng(5).permutation(8)]

    first, second = (
        AdditiveStrategy().start(kind(app, 8), initial, num_rounds=2).arrays
        for kind in (AddingGrid, Shuffled)
    )
    assert first == second


# One bad client in a pack ---------------------------------------------------------

SENT = {"w": np.float32([1.0, -2.0]), "n": np.array(5)}


def model(*w):
    return {"w": np.float32(w), "n": np.array(5)}


@pytest.fixture
def play(scripted, reply):
    """Run one round of scripted clients, plain and summed."""

    def run(make, contents, kind=AddingGrid):
        found = []
        for grid_of in (LocalGrid, kind):
            grid = scripted(contents, grid_of)
            result = make().start(grid, to_record(SENT), num_rounds=1)
            found.append((result.arrays, dict(result.train_metrics_clientapp[1])))
        return found

    return run


def no_evaluation(**options):
    return AdditiveStrategy(fraction_evaluate=0.0, **options)


def fedfish():
    return FedFish(fraction_evaluate=0.0)


def bad_contents(reply):
    missing = reply(model(9, 9))
    del missing["arrays"]
    other = reply({"w": np.float32([1, 2, 3]), "n": np.array(5)})
    unweighted = reply(model(9, 9))
    unweighted["metrics"] = MetricRecord({"loss": 1.0})
    unreadable = reply(model(9, 9))
    unreadable["arrays"] = ArrayRecord(
        {
            "w": Array("float32", (2,), "numpy.ndarray", b"\x93NUMPY garbage"),
            "n": Array(np.array(5)),
        }
    )
    return {
        "not finite": reply(model(math.nan, 1)),
        "infinite": reply(model(1, math.inf)),
        "no arrays": missing,
        "another shape": other,
        "no weight": unweighted,
        "negative weight": reply(model(9, 9), -1),
        "unreadable": unreadable,
        "an exception": RuntimeError("no"),
    }


@pytest.mark.parametrize("kind", [no_evaluation, fedfish, "private"])
@pytest.mark.parametrize(
    "what",
    ["not finite", "infinite", "no arrays", "another shape", "no weight",
     "negative weight", "unreadable", "an exception"],
)  # fmt: skip
def test_a_bad_client_is_left_out_of_its_pack_alone(kind, what, reply, play):
    def make():
        if kind == "private":
            plan = private(num_rounds=1, num_sampled_clients=7)
            return no_evaluation(mechanism=plan)
        return kind()

    contents = [reply(model(i, 2 * i), i + 1) for i in range(7)]
    for content in contents:
        content["fisher"] = to_record({"w": np.float32([1, 2])})
    contents[3] = bad_contents(reply)[what]
    if what in ("not finite", "infinite"):
        contents[3]["fisher"] = to_record({"w": np.float32([1, 2])})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, ours = play(make, contents)
    np.testing.assert_allclose(ours[0]["w"].numpy(), plain[0]["w"].numpy(), rtol=1e-6)
    assert ours[1] == pytest.approx(plain[1])
    lost = ours[1]["num-errors"], ours[1]["num-dropped"]
    assert lost == ((1, 0) if what == "an exception" else (0, 1))
    assert ours[1]["num-replies"] == 6


def test_packs_of_errors_only_end_the_run_in_its_first_round(reply, play):
    contents = [RuntimeError("no")] * 4
    with pytest.raises(EveryClientFailed):
        play(no_evaluation, contents)


def test_a_first_round_of_which_nothing_is_usable_ends_the_run(reply, play):
    with pytest.raises(InconsistentMessageReplies, match="can use no reply"):
        play(FedFish, [reply(model(1, 1))] * 4)


def test_a_sum_that_overflows_keeps_the_model(reply, play):
    contents = [reply({"w": np.float32([3e38, 0]), "n": np.array(5)}, 1e30)] * 4
    plain, ours = play(no_evaluation, contents)
    assert ours[0] == to_record(SENT) == plain[0]


# Nobody counts twice --------------------------------------------------------------


class Repeats(AddingGrid):
    """Delivers a reply twice."""

    def deliver(self, replies):
        return [*replies, replies[0]]


class Loses(AddingGrid):
    """Delivers one reply less."""

    def deliver(self, replies):
        return replies[1:]


@pytest.mark.parametrize(("kind", "dropped"), [(Repeats, 5), (Loses, 3)])
def test_a_sum_of_more_than_those_who_count_is_left_out(kind, dropped, reply, play):
    contents = [reply(model(i, 2 * i), 1) for i in range(7)]
    _, (arrays, metrics) = play(no_evaluation, contents, kind)
    # The last, 6, is the one repeated or lost, and added up with 0, 2 and 4.
    expected = np.mean([[i, 2 * i] for i in (1, 3, 5)], axis=0)
    np.testing.assert_allclose(arrays["w"].numpy(), expected)
    assert (metrics["num-replies"], metrics["num-dropped"]) == (3, dropped)


def test_a_number_that_cannot_travel_takes_no_other_reply_of_its_pack_along(
    reply, play
):
    contents = [reply(model(i, 2 * i), 1) for i in range(7)]
    contents[0]["metrics"]["loss"] = 2**84
    _, (arrays, metrics) = play(no_evaluation, contents, AddingGrid)
    expected = np.mean([[i, 2 * i] for i in range(1, 7)], axis=0)
    np.testing.assert_allclose(arrays["w"].numpy(), expected)
    assert (metrics["num-replies"], metrics["num-dropped"]) == (6, 1)


def test_one_client_moves_a_partial_sum_by_at_most_the_norm(reply):
    strategy = no_evaluation(mechanism=private(clipping=0.25))
    asked(strategy)
    part = PartialSum(pickle.loads(pickle.dumps(strategy.summand())))
    node = next(iter(strategy.summand().places))
    part.add(reply(model(500, -700), 10), node)
    assert np.linalg.norm(part.total.arrays["delta"]["w"]) == pytest.approx(0.25)
    part.add(reply(model(500, -700), 10), node)
    assert np.linalg.norm(part.total.arrays["delta"]["w"]) == pytest.approx(0.5)


# What goes to the workers ---------------------------------------------------------


def test_neither_seeds_nor_noise_go_to_workers(app):
    class Secret(MinSeparationSampler):
        pass

    strategy = no_evaluation(
        mechanism=private(seed=987_654_321), sampler=Secret(2, seed=123_456_789)
    )
    asked(strategy)
    bare = strategy.summand().strategy
    assert vars(bare)["fraction_evaluate"] == 0.0
    assert not any(name.startswith("_") for name in vars(bare))
    sent = pickle.dumps(strategy.summand())
    for seed in (987_654_321, 123_456_789):
        assert seed.to_bytes(4, "little") not in sent
    assert strategy.mechanism.seed == 987_654_321


def test_a_strategy_that_reads_replies_itself_gets_them(app, initial):
    class Own(AdditiveStrategy):
        def aggregate_train(self, server_round, replies):
            replies = list(replies)
            assert all("arrays" in reply.content for reply in replies)
            return super().aggregate_train(server_round, replies)

    Own().start(AddingGrid(app, 4), initial, num_rounds=1)
    assert Own().summand() is None and AdditiveStrategy().summand() is None


# Totals -----------------------------------------------------------------------------


def test_merging_adds_everything_and_leaves_the_other_alone(reply):
    strategy = BoundedGroupLoss(groups=["a"], upper_bound=1.0)
    asked(strategy)
    summand = strategy.summand()
    sums = {"group-loss-sums": 2.0, "group-counts": 4.0}
    contents = [reply(model(i, -i), i + 4, **sums) for i in range(4)]
    whole, parts = PartialSum(summand), [PartialSum(summand) for _ in range(2)]
    for i, content in enumerate(contents):
        whole.add(content, 1000 + i)
        parts[i // 2].add(content, 1000 + i)
    before = pickle.dumps(parts[1].total)
    for part in parts:
        for arrays in part.total.arrays.values():
            for array in arrays.values():
                array.flags.writeable = False  # as in Ray's shared memory
    merged = Total()
    for part in parts:
        merged.merge(part.total)
    assert pickle.dumps(parts[1].total) == before
    assert merged.count == 4 and merged.weight == whole.total.weight == 22
    assert merged.scalars["group-counts"].tolist() == [16.0]
    for name, array in whole.total.arrays["delta"].items():
        np.testing.assert_allclose(merged.arrays["delta"][name], array)


def test_a_summed_reply_is_a_record_dict_without_arrays(reply):
    strategy = no_evaluation()
    asked(strategy)
    rest = PartialSum(strategy.summand()).add(reply(model(1, 1), 3, loss=0.5), 1000)
    assert isinstance(rest, Summed) and rest.problem == ""
    assert dict(rest.metric_records["metrics"]) == {"num-examples": 3, "loss": 0.5}
    answered = Message(rest, 7, "train")
    assert answered.content is rest
