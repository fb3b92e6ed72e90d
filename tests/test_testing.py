"""The conformance suite: sound strategies pass, broken ones fail for the right rule."""

import re
from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedAvgM, FedYogi

from flower_ext import AdditiveStrategy, ClientHalf
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.contribution import Contribution
from flower_ext.privacy import Mechanism
from flower_ext.server.optimizers import (
    LAMB,
    SGD,
    Adagrad,
    Adam,
    FedExP,
    Muon,
    OneShotSparsity,
    PruneAfter,
    TorchOptimizer,
    Yogi,
)
from flower_ext.strategies import BoundedGroupLoss
from flower_ext.testing import ConformanceError, check_strategy

RULES = 36
CONTRACT = {
    "runs two rounds",
    "keeps the model in a round without replies",
    "keeps the model in a round of errors only",
    "ignores error replies",
    "does not depend on the order of replies",
    "mutates nothing that it was given",
    "is picklable",
    "continues from its saved state",
    "ignores error replies to an evaluation",
}


@pytest.fixture(scope="module")
def quick_app():
    """Clients that train by adding a number: no torch, one millisecond."""

    def moved(array, by):
        x = array.numpy()
        return Array(np.asarray(x + by, x.dtype) if x.dtype.kind == "f" else x)

    app = ClientApp()

    @app.train()
    def train(message, context):
        client = context.node_config["partition-id"]
        arrays = {
            name: moved(array, 0.1 * (client + 1) ** 2)
            for name, array in message.content["arrays"].items()
        }
        metrics = {"num-examples": client + 1, "loss": 1.0, "score": 0.5}
        return answer(message, {"arrays": ArrayRecord(arrays)}, metrics)

    @app.evaluate()
    def evaluate(message, context):
        client = context.node_config["partition-id"]
        return answer(message, {}, {"num-examples": client + 1, "loss": 1.0 * client})

    def answer(message, records, metrics):
        content = RecordDict({**records, "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    return app


# Sound strategies -----------------------------------------------------------------


def test_a_sound_strategy_passes_every_rule():
    report = check_strategy(AdditiveStrategy)
    assert report.limitations == {}
    assert len(report.passed) == RULES
    assert set(report.passed) > CONTRACT


@pytest.mark.parametrize(
    "make",
    [
        partial(SGD, 0.5),
        partial(SGD, momentum=0.9),
        partial(SGD, momentum=0.9, nesterov=True),
        Adagrad,
        Adam,
        partial(Adam, bias_correction=True, initial_accumulator=0.0),
        Yogi,
        LAMB,
        Muon,
        FedExP,
        partial(PruneAfter, SGD(), OneShotSparsity(0.0)),
        partial(TorchOptimizer, partial(torch.optim.AdamW, lr=0.1)),
    ],
)
def test_every_server_optimizer_conforms(quick_app, make):
    def factory():
        return AdditiveStrategy(server_optimizer=make())

    assert len(check_strategy(factory, quick_app).passed) == RULES


def test_flowers_fedavg_keeps_the_contract_and_has_limitations():
    report = check_strategy(FedAvg)
    assert set(report.passed) >= CONTRACT
    assert len(report.passed) + len(report.limitations) == RULES
    for rule in (
        "integer arrays keep their dtype and value",
        "leaves out a reply with a nan",
        "leaves out a reply with a negative weight",
        "leaves out a client that replied twice",
    ):
        assert re.match(r"\w+: ", report.limitations[rule])  # an error and its text
    assert "Not equal" in report.limitations["leaves out a reply with a nan"]


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize(
    "kind", [FedAdam, FedYogi, partial(FedAvgM, server_momentum=1)]
)
def test_flowers_strategies_with_moments_keep_the_contract(quick_app, kind):
    report = check_strategy(kind, quick_app)
    assert set(report.passed) >= CONTRACT
    assert "leaves out a reply with a nan" in report.limitations


def test_robustness_can_be_required_of_any_strategy(quick_app):
    with pytest.raises(ConformanceError, match=rf"25 of {RULES} rules are broken") as e:
        check_strategy(FedAvg, quick_app, robust=True)
    assert "- leaves out a reply with a nan: " in str(e.value)


# Broken strategies ----------------------------------------------------------------


def shifted(record, by):
    """Return float arrays plus a number."""
    arrays = from_record(record)
    return to_record(
        {k: np.asarray(x + by, x.dtype) if x.ndim else x for k, x in arrays.items()}
    )


class ChangesAReply(AdditiveStrategy):
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        result = super().aggregate_train(server_round, replies)
        for reply in replies:
            if reply.has_content():
                reply.content["metrics"] = MetricRecord({"num-examples": 1})
        return result


class ChangesTheModelItWasGiven(AdditiveStrategy):
    def configure_train(self, server_round, arrays, config, grid):
        messages = super().configure_train(server_round, arrays, config, grid)
        arrays["scale"] = Array(np.array(0, np.float32))
        return messages


class ChangesTheConfiguration(AdditiveStrategy):
    def configure_train(self, server_round, arrays, config, grid):
        config["lr"] = 0.25
        return super().configure_train(server_round, arrays, config, grid)


class DependsOnTheOrder(AdditiveStrategy):
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        nodes = [reply.metadata.src_node_id for reply in replies]
        record, metrics = super().aggregate_train(server_round, replies)
        if nodes != sorted(nodes) and record is not None:
            record = shifted(record, 1e-3)
        return record, metrics


class Float64(AdditiveStrategy):
    def aggregate_train(self, server_round, replies):
        record, metrics = super().aggregate_train(server_round, replies)
        if record is not None:
            wide = {k: x * np.float64(1) for k, x in from_record(record).items()}
            wide |= {
                k: x for k, x in from_record(record).items() if x.dtype.kind == "i"
            }
            record = to_record(wide)
        return record, metrics


class AveragesIntegers(AdditiveStrategy):
    def aggregate_train(self, server_round, replies):
        record, metrics = super().aggregate_train(server_round, replies)
        if record is not None and "counter" in record:
            record["counter"] = Array(np.float32(5))
        return record, metrics


class ArraysInAnEmptyRound(AdditiveStrategy):
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        record, metrics = super().aggregate_train(server_round, replies)
        return (record if replies else ArrayRecord()), metrics


class ArraysInARoundOfErrors(AdditiveStrategy):
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        record, metrics = super().aggregate_train(server_round, replies)
        if replies and all(reply.has_error() for reply in replies):
            record = ArrayRecord()
        return record, metrics


class AnythingGoes(Contribution):
    def can_move(self, sent):
        return True


class AveragesNaN(AdditiveStrategy):
    def contribution(self, reply, round):
        term = super().contribution(reply, round)
        return AnythingGoes(term.arrays, reply.num_examples)


class CountsErrors(AdditiveStrategy):
    def aggregate_train(self, server_round, replies):
        replies = list(replies)
        record, metrics = super().aggregate_train(server_round, replies)
        errors = sum(reply.has_error() for reply in replies)
        if record is not None and errors:
            record = shifted(record, 1e-3 * errors)
        return record, metrics


class CountsErrorsInEvaluation(AdditiveStrategy):
    def aggregate_evaluate(self, server_round, replies):
        replies = list(replies)
        super().aggregate_evaluate(server_round, replies)
        return MetricRecord({"replies": len(replies)})


class TrustsEvaluations(AdditiveStrategy):
    def aggregate_evaluate(self, server_round, replies):
        replies = [reply for reply in replies if not reply.has_error()]
        losses = [reply.content["metrics"]["loss"] for reply in replies]
        return MetricRecord({"sum": sum(losses)})


class CannotBePickled(AdditiveStrategy):
    def __init__(self):
        super().__init__()
        self.callback = lambda: None


class LosesItsState(AdditiveStrategy):
    def __init__(self):
        super().__init__(server_optimizer=SGD(momentum=0.9))

    def state_dict(self):
        return {**super().state_dict(), "server-optimizer": {}}


class TakesAnythingForItsMetric(AdditiveStrategy):
    consumed_metrics = ("score",)

    def contribution(self, reply, round):
        score = reply.content["metrics"].get("score", 0.0)
        term = super().contribution(reply, round)
        weight = reply.num_examples * (1 + np.nan_to_num(score))
        return Contribution(term.arrays, weight)


class DoesNothing(AdditiveStrategy):
    def update(self, total, round):
        return {name: 0 * x for name, x in total.mean().items()}


class ForgetsAnArray(FedAvg):
    def aggregate_train(self, server_round, replies):
        record, metrics = super().aggregate_train(server_round, replies)
        if record is not None:
            del record["scale"]
        return record, metrics


ROBUST = {"leaves out a reply with a nan", "leaves out a reply with an infinity"}
OTHER_KEYS = "finds metrics under whatever key"
ODD_NUMBERS = "stays finite whatever numbers a reply has"
EXTRA = "leaves out a reply whose metrics for the strategy itself are not there"


@pytest.mark.parametrize(
    ("factory", "rules"),
    [
        (ChangesTheConfiguration, {"mutates nothing that it was given"}),
        (DependsOnTheOrder, {"does not depend on the order of replies"}),
        (Float64, {"arrays keep their dtype"}),
        (AveragesIntegers, {"integer arrays keep their dtype and value"}),
        (ArraysInAnEmptyRound, {"keeps the model in a round without replies"}),
        (ArraysInARoundOfErrors, {"keeps the model in a round of errors only"}),
        (AveragesNaN, ROBUST),
        (CountsErrors, {"ignores error replies"}),
        (CountsErrorsInEvaluation, {"ignores error replies to an evaluation"}),
        (TrustsEvaluations, {"takes hostile replies to an evaluation without failing"}),
        (CannotBePickled, {"is picklable"}),
        (LosesItsState, {"continues from its saved state"}),
        (TakesAnythingForItsMetric, {EXTRA, OTHER_KEYS, ODD_NUMBERS}),
        (DoesNothing, {"runs two rounds"}),
    ],
)
def test_broken_strategy_fails_for_the_right_rule(quick_app, factory, rules):
    with pytest.raises(ConformanceError) as caught:
        check_strategy(factory, quick_app)
    listed = re.findall(r"^- (.*?): \w+: ", str(caught.value), re.MULTILINE)
    assert set(listed) == rules
    assert str(caught.value).startswith(f"{len(rules)} of {RULES} rules are broken")


@pytest.mark.parametrize(
    ("factory", "why"),
    [
        (ChangesAReply, "the replies were changed"),
        (ChangesTheModelItWasGiven, "the model that was sent was changed"),
    ],
)
def test_strategy_that_mutates_may_break_other_rules_too(quick_app, factory, why):
    rule = "mutates nothing that it was given"
    with pytest.raises(ConformanceError, match=f"- {rule}: AssertionError: {why}"):
        check_strategy(factory, quick_app)


def test_contract_binds_strategies_that_promise_nothing_more(quick_app):
    with pytest.raises(ConformanceError, match="- runs two rounds: KeyError: 'scale'"):
        check_strategy(ForgetsAnArray, quick_app)


def test_strategy_that_cannot_be_made_says_why():
    with pytest.raises(TypeError, match="upper_bound"):
        check_strategy(partial(BoundedGroupLoss, groups=["a"]))


def test_strategy_with_another_weight(quick_app):
    """What is tampered with is the metric that the strategy weighs by."""

    def factory():
        return AdditiveStrategy(weighted_by_key="score")

    def renamed(message, context):
        answer = quick_app(message, context)
        metrics = answer.content["metrics"]
        metrics["score"] = metrics.pop("num-examples")
        return answer

    app = ClientApp()
    app.train()(renamed)
    app.evaluate()(renamed)
    assert len(check_strategy(factory, app).passed) == RULES


class AtHome(AdditiveStrategy):
    """Clients keep their models, and have nothing to contribute."""

    def contribution(self, reply, round):
        return Contribution({})


def test_clients_that_send_no_model_move_none(quick_app):
    app = ClientApp()

    @app.train()
    def train(message, context):
        reply = quick_app(message, context)
        reply.content["arrays"] = ArrayRecord()
        return reply

    app.evaluate()(quick_app)
    assert check_strategy(AtHome, app).limitations == {}
    # Where models are sent, a strategy that ignores them is broken.
    with pytest.raises(ConformanceError, match="left the model as it was"):
        check_strategy(AtHome, quick_app)


def test_app_without_an_evaluation(quick_app):
    app = ClientApp()
    app.train()(lambda message, context: quick_app(message, context))
    assert len(check_strategy(AdditiveStrategy, app).passed) == RULES


# Several models -------------------------------------------------------------------


def of(arrays, index):
    """Return one of several models."""
    prefix = f"{index}/"
    return {n[len(prefix) :]: x for n, x in arrays.items() if n.startswith(prefix)}


def twice(model):
    return {f"{i}/{name}": x for i in range(2) for name, x in model.items()}


class SecondClient(ClientHalf):
    name = "second"

    def receive(self, local, arrays):
        return of(arrays, 1)


class Second(AdditiveStrategy):
    """Trains the second of two models, which start alike."""

    client_half = SecondClient

    def contribution(self, reply, round):
        change = reply.change(round, start=of(round.sent, 1)).arrays
        return Contribution({"delta": {f"1/{n}": x for n, x in change.items()}})


class SecondTold(Second):
    def find_ties(self, sent):
        ties = super().find_ties(of(sent, 1))
        return {f"1/{name}": f"1/{first}" for name, first in ties.items()}


def private(kind):
    return lambda: kind(
        mechanism=Mechanism(
            num_rounds=4,
            num_sampled_clients=3,
            population_size=3,
            noise_multiplier=0.1,
            target_delta=1e-2,
            seed=1,
        )
    )


def test_what_starts_from_several_models():
    for factory in (Second, private(SecondTold)):
        report = check_strategy(factory, initial=twice)
        assert len(report.passed) == RULES
    with pytest.raises(ConformanceError, match="not those of Task.model"):
        check_strategy(Second)


def test_under_a_mechanism_models_that_start_alike_need_ties_of_their_own():
    with pytest.raises(ConformanceError, match="'0/linear.weight' and '1/linear"):
        check_strategy(private(Second), initial=twice)


def test_of_several_models_a_counter_is_looked_at():
    class Counts(Second):
        def contribution(self, reply, round):
            term = super().contribution(reply, round)
            delta = {**term.arrays["delta"]}
            if "1/counter" in delta:
                delta["1/counter"] = np.array(1)
            return Contribution({"delta": delta})

    with pytest.raises(ConformanceError, match="1/counter of 5 became 6"):
        check_strategy(Counts, initial=twice)
