"""Strategies of five kinds on the hooks of a round, to see that the hooks suffice.

None is more than a sketch: what is beside the model, parts that some clients lack,
models that differ in size, aggregation that is no sum.
"""

import logging
import math

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import (
    AdditiveStrategy,
    Contribution,
    LocalGrid,
    Mechanism,
    PackedGrid,
    Payload,
    RoundStrategy,
)
from flower_ext.core.arrays import from_record, subtract, to_record, zeros_like
from flower_ext.core.contribution import DELTA
from flower_ext.core.protocol import Reply, Round
from flower_ext.core.replies import MalformedReply
from flower_ext.testing import check_strategy

SENT = {"w": np.float32([1.0, -2.0]), "b": np.float32(0.5)}
ANY = {"min_train_nodes": 0, "min_available_nodes": 0, "fraction_evaluate": 0.0}


def app_of(answer):
    """Make a ClientApp of a function ``(client, content) -> (records, metrics)``."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        client = int(context.node_config["partition-id"])
        arrays, metrics = answer(client, message.content)
        records = {key: to_record(x) for key, x in arrays.items()}
        metrics = MetricRecord({"num-examples": client + 1, **metrics})
        return Message(RecordDict({**records, "metrics": metrics}), reply_to=message)

    return app


def arrays_of(content, key="arrays"):
    return {name: x.copy() for name, x in from_record(content[key]).items()}


def run(strategy, app, clients, sent=SENT, rounds=1, grid=LocalGrid, **options):
    return strategy.start(
        grid(app, clients), to_record(sent), num_rounds=rounds, **options
    )


# Something beside the model, both ways ---------------------------------------------


class Controlled(AdditiveStrategy):
    """Sends a control beside the model, and moves it by the mean of what comes back."""

    def __init__(self, **options):
        super().__init__(**options)
        self._control = {"w": np.zeros(2, np.float32)}

    def payload(self, variant, round):
        return Payload(round.sent, {"strength": 2.0}, beside={"control": self._control})

    other_arrays = ("control-change",)

    def zero(self, sent):
        nothing = zeros_like(sent)
        return Contribution({DELTA: nothing, "control": {"w": nothing["w"]}})

    def contribution(self, reply, round):
        like = {"w": round.sent["w"]}
        change = reply.arrays("control-change", like)
        return Contribution({DELTA: reply.delta(round), "control": change})

    def advance(self, total, round):
        share = total.count / round.population
        change = total.mean("control")["w"]
        self._control = {"w": np.float32(self._control["w"] + share * change)}


def test_a_control_travels_beside_the_model():
    seen = []

    def answer(client, content):
        seen.append(arrays_of(content, "control")["w"].tolist())
        assert content["config"]["strength"] == 2.0
        change = {"w": np.float32([1.0, client])}
        return {"arrays": arrays_of(content), "control-change": change}, {}

    for kind in (LocalGrid, packed):
        seen.clear()
        run(Controlled(**ANY), app_of(answer), 2, rounds=2, grid=kind)
        # Weights are 1 and 2 examples: the mean of 0 and 1 is 2/3.
        assert seen[:2] == [[0.0, 0.0]] * 2
        assert seen[2] == seen[3] == pytest.approx([1.0, 2 / 3])


def packed(app, clients):
    inner = LocalGrid(ClientApp(), 1)
    return PackedGrid(inner, num_clients=clients, client_app=app, run_config={})


# Parts that some clients lack --------------------------------------------------------


class Clusters(AdditiveStrategy):
    """Several models, stacked; each client trains the one that it says."""

    num_clusters = 3

    def zero(self, sent):
        one = {name: x[0] for name, x in zeros_like(sent).items()}
        parts = {f"cluster-{j}": one for j in range(self.num_clusters)}
        return Contribution(parts, weights=dict.fromkeys(parts, 0.0))

    def contribution(self, reply, round):
        mine = reply.whole("cluster", below=self.num_clusters)
        start = {name: x[mine] for name, x in round.sent.items()}
        new = reply.model(round, like=start)
        delta = {name: subtract(new[name], x) for name, x in start.items()}
        part = f"cluster-{mine}"
        return Contribution({part: delta}, weights={part: reply.num_examples})

    def update(self, total, round):
        means = [total.mean(f"cluster-{j}") for j in range(self.num_clusters)]
        return {name: np.stack([m[name] for m in means]) for name in round.sent}


STACKED = {"w": np.float32([[0.0, 0.0], [10.0, 10.0], [5.0, 5.0]])}


def cluster_answer(client, content):
    stacked = arrays_of(content)["w"]
    mine = client % 2
    return {"arrays": {"w": stacked[mine] + np.float32(client)}}, {"cluster": mine}


@pytest.mark.parametrize("grid", [LocalGrid, packed])
def test_a_part_that_nobody_has_stays_as_it_is(grid):
    strategy = Clusters(**ANY)
    new = run(strategy, app_of(cluster_answer), 4, STACKED, grid=grid).arrays
    # Examples are 1 to 4: cluster 0 has clients 0 and 2, cluster 1 has 1 and 3.
    expected = [(0 * 1 + 2 * 3) / 4, 10 + (1 * 2 + 3 * 4) / 6, 5.0]
    np.testing.assert_allclose(new["w"].numpy(), np.array([expected] * 2).T, rtol=1e-6)


def test_weights_of_parts_are_in_the_clipped_vector():
    free = mechanism(4, noise_multiplier=0, clipping=math.inf)
    options = {"fraction_evaluate": 0.0}
    found = [
        run(Clusters(**o), app_of(cluster_answer), 4, STACKED).arrays["w"].numpy()
        for o in (ANY, {**options, "mechanism": free})
    ]
    np.testing.assert_allclose(*found, rtol=1e-6)
    noisy = mechanism(4, noise_multiplier=3.0, clipping=1.0)
    strategy = Clusters(**options, mechanism=noisy)
    new = run(strategy, app_of(cluster_answer), 4, STACKED).arrays["w"].numpy()
    assert np.all(np.isfinite(new)) and np.all(new[2] != STACKED["w"][2])


def mechanism(clients, **options):
    return Mechanism(
        num_rounds=2,
        num_sampled_clients=clients,
        population_size=clients,
        target_delta=1e-2,
        factorization="identity",
        seed=5,
        **options,
    )


# Models that differ in size ----------------------------------------------------------


class Slices(AdditiveStrategy):
    """Odd clients hold the first coordinate only."""

    def variant(self, client, round):
        return 1 if client % 2 else 2

    def payload(self, width, round):
        return Payload({"w": round.sent["w"][:width]})

    def zero(self, sent):
        count = {DELTA: {name: np.zeros(x.shape) for name, x in sent.items()}}
        return Contribution({DELTA: zeros_like(sent)}, counts=count)

    def contribution(self, reply, round):
        width = self.variant(reply.client, round)
        start = {"w": round.sent["w"][:width]}
        delta, count = np.zeros(2, np.float32), np.zeros(2)
        delta[:width] = reply.model(round, like=start)["w"] - start["w"]
        count[:width] = 1
        return Contribution({DELTA: {"w": delta}}, counts={DELTA: {"w": count}})


@pytest.mark.parametrize("grid", [LocalGrid, packed])
def test_a_coordinate_is_the_mean_over_those_who_have_it(grid):
    widths = []

    def answer(client, content):
        arrays = arrays_of(content)
        widths.append(arrays["w"].size)
        return {"arrays": {"w": arrays["w"] + np.float32(client)}}, {}

    sent = {"w": np.float32([0.0, 0.0])}
    new = run(Slices(**ANY), app_of(answer), 3, sent, grid=grid).arrays["w"].numpy()
    assert sorted(widths) == [1, 2, 2]
    # Weights 1, 2, 3: the first has 0, 1 and 2 of all, the second 0 and 2 of two.
    assert new.tolist() == pytest.approx([(2 + 6) / 6, 6 / 4])


def test_a_payload_is_made_once_for_all_clients_of_a_kind():
    made = []

    class Counts(Slices):
        def payload(self, width, round):
            made.append(width)
            return super().payload(width, round)

    grid = LocalGrid(ClientApp(), 6)
    messages = list(
        Counts(**ANY).configure_train(
            1, to_record({"w": np.float32([0, 0])}), ConfigRecord(), grid
        )
    )
    assert sorted(made) == [1, 2]
    assert len({id(message.content) for message in messages}) == 2


# What is absent is zero --------------------------------------------------------------


def test_an_array_that_a_client_lacks_counts_as_no_change():
    class Partly(AdditiveStrategy):
        def contribution(self, reply, round):
            delta = reply.delta(round)
            kept = {"w": delta["w"]} if reply.client else delta
            return Contribution({DELTA: kept})

    def answer(client, content):
        return {"arrays": {k: x + 3 for k, x in arrays_of(content).items()}}, {}

    new = run(Partly(**ANY), app_of(answer), 2).arrays
    assert new["w"].numpy() == pytest.approx(SENT["w"] + 3)
    assert float(new["b"].numpy()) == pytest.approx(0.5 + 3 * 1 / 3)  # client 0 has 1

    class Nothing(AdditiveStrategy):
        def contribution(self, reply, round):
            return Contribution({})

    new = run(Nothing(**ANY), app_of(answer), 2).arrays
    assert all(np.array_equal(new[k].numpy(), x) for k, x in SENT.items())


# No sum ------------------------------------------------------------------------------


class Median(RoundStrategy):
    """Moves each coordinate by the median of the changes."""

    def aggregate(self, round, replies):
        models = [reply.model(round) for reply in replies]
        return {
            name: np.median([m[name] - np.float64(x) for m in models], axis=0)
            for name, x in round.sent.items()
        }

    def finish(self, round, replies):
        return {"most": float(max(reply.num_examples for reply in replies))}


def far_out(values):
    def answer(client, content):
        return {"arrays": {k: x + np.float32(values[client])
                           for k, x in arrays_of(content).items()}}, {}  # fmt: skip

    return app_of(answer)


def test_a_median_is_no_sum():
    result = run(Median(**ANY), far_out([1.0, 2.0, 1e6]), 3)
    assert result.arrays["w"].numpy() == pytest.approx(SENT["w"] + 2)
    assert result.train_metrics_clientapp[1]["most"] == 3


def test_a_strategy_that_is_no_sum_keeps_the_contract():
    report = check_strategy(Median)
    assert not report.limitations


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_client_that_is_not_finite_is_left_out_of_what_is_no_sum(value):
    class Mean(Median):
        def aggregate(self, round, replies):
            models = [reply.model(round) for reply in replies]
            return {
                name: np.mean([m[name] - np.float64(x) for m in models], axis=0)
                for name, x in round.sent.items()
            }

    result = run(Mean(**ANY), far_out([1.0, value, 3.0]), 3)
    assert result.arrays["w"].numpy() == pytest.approx(SENT["w"] + 2)
    assert result.train_metrics_clientapp[1]["num-dropped"] == 1


def test_too_few_replies_keep_the_model(caplog):
    caplog.set_level(logging.WARNING, logger="flwr")
    strategy = Median(min_replies=3, **ANY)
    result = run(strategy, far_out([1.0, 2.0]), 2)
    assert result.arrays["w"].numpy() == pytest.approx(SENT["w"])
    assert "2 usable replies, at least 3 are needed: the model is kept" in caplog.text


def test_a_mechanism_is_for_sums_only():
    with pytest.raises(TypeError, match="Median has no option 'mechanism'"):
        Median(mechanism=mechanism(2, noise_multiplier=1.0))


# A round and a reply -----------------------------------------------------------------


def test_hooks_are_told_the_round_and_who_speaks():
    told = []

    class Curious(AdditiveStrategy):
        def tell(self, round):
            return {"of": round.population, "phase": round.phase}

        def contribution(self, reply, round):
            told.append((round.number, reply.client, round.told["of"], round.cohort))
            return super().contribution(reply, round)

        def report_evaluate(self, replies, round):
            return {"evaluators": len(replies), "in": round.number}

    result = run(Curious(**ANY), far_out([1.0, 2.0]), 2, rounds=2)
    assert sorted(told) == [(1, 0, 2, ()), (1, 1, 2, ()), (2, 0, 2, ()), (2, 1, 2, ())]
    assert result.arrays["w"].numpy() == pytest.approx(SENT["w"] + 2 * 5 / 3)


def test_what_begins_with_an_underscore_does_not_travel():
    class Large(AdditiveStrategy):
        def __init__(self, **options):
            super().__init__(**options)
            self.shift = 3.0
            self._average = np.zeros(100_000)

    strategy = Large(**ANY)
    strategy.configure_train(
        1, to_record(SENT), ConfigRecord(), LocalGrid(ClientApp(), 3)
    )
    bare = vars(strategy.summand().strategy)
    assert bare["shift"] == 3.0 and "_average" not in bare
    assert not {"server_optimizer", "sampler", "train_metrics_aggr_fn"} & set(bare)


READ = {"share": 0.5, "whole": 2, "half": 1.5, "many": [1.0, 2.0], "less": -1.0}


@pytest.mark.parametrize(
    ("read", "problem"),
    [
        (lambda r: r.number("nothing"), "no metric 'nothing'"),
        (lambda r: r.number("less"), ">= 0"),
        (lambda r: r.share("whole"), "'whole'=2.0 must be <= 1"),
        (lambda r: r.whole("half", 3), "'half'=1.5 must be a whole number < 3"),
        (lambda r: r.whole("whole", 2), "'whole'=2.0 must be a whole number < 2"),
        (lambda r: r.vector("many", 3), "must be 3 finite number"),
        (lambda r: r.arrays("nowhere", SENT), "no ArrayRecord 'nowhere'"),
        (lambda r: r.model(Round(1, {"v": SENT["w"]})), "not those expected"),
    ],
)
def test_what_a_reply_lacks_is_malformed_and_names_whose_it_is(read, problem):
    metrics = MetricRecord(READ)
    reply = Reply(RecordDict({"arrays": to_record(SENT), "metrics": metrics}), 7)
    with pytest.raises(MalformedReply, match=problem) as found:
        read(reply)
    assert found.value.client == 7


def test_what_a_reply_has_is_read():
    metrics = MetricRecord({"num-examples": 5, **READ})
    reply = Reply(RecordDict({"arrays": to_record(SENT), "metrics": metrics}), 7)
    assert reply.num_examples == 5 and reply.share("share") == 0.5
    assert reply.whole("whole", 3) == 2 and reply.number("less", low=-2) == -1
    assert reply.vector("many", 2).tolist() == [1, 2]
    assert reply.has("half") and reply.has("arrays") and not reply.has("nothing")


def test_a_strategy_that_says_nothing_of_aggregation_is_refused_at_once():
    class Silent(RoundStrategy):
        pass

    with pytest.raises(
        TypeError, match=r"Silent must have aggregate\(round, replies\)"
    ):
        Silent()
