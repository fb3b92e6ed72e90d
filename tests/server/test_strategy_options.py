"""What a strategy is told, and what a subclass may say."""

import copy
import functools
import inspect
import logging
import pickle
import re
from math import nan

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord
from flwr.serverapp.strategy import FedAvg

from flower_ext.client.half import ClientHalf
from flower_ext.core.arrays import layout, to_record
from flower_ext.core.contribution import Contribution
from flower_ext.core.sampling import AllClients, PoissonSampler, UniformSampler
from flower_ext.server import options
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD, Adam, TorchOptimizer

SENT = {"w": np.float32([1.0, -2.0]), "n": np.array(5)}
COUNTS = ("num-replies", "num-errors", "num-dropped")
ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}


def model(*w, n=5):
    return {"w": np.float32(w), "n": np.array(n)}


def counts(metrics):
    return tuple(metrics[name] for name in COUNTS)


# Options --------------------------------------------------------------------------


def flowers_options():
    signature = inspect.signature(FedAvg.__init__)
    return {n: p for n, p in signature.parameters.items() if n != "self"}


def test_options_are_exactly_those_of_flowers_fedavg():
    assert list(options.FedAvgOptions.__annotations__) == list(flowers_options())


def test_every_option_of_fedavg_is_passed_on():
    def own(contents, key):
        return MetricRecord()

    chosen = {
        "fraction_train": 0.25,
        "fraction_evaluate": 0.75,
        "min_train_nodes": 3,
        "min_evaluate_nodes": 4,
        "min_available_nodes": 5,
        "weighted_by_key": "w",
        "arrayrecord_key": "a",
        "configrecord_key": "c",
        "train_metrics_aggr_fn": own,
        "evaluate_metrics_aggr_fn": own,
    }
    assert chosen.keys() == flowers_options().keys()
    strategy = AdditiveStrategy(**chosen)
    assert {name: getattr(strategy, name) for name in chosen} == chosen


def test_documented_defaults_are_flowers():
    documented = dict(
        re.findall(r"(\w+) : .*\(default: (.*)\)", options.FedAvgOptions.__doc__)
    )
    expected = {
        name: str(parameter.default).replace("'", '"')
        for name, parameter in flowers_options().items()
        if parameter.default is not None
    }
    assert {k: v.strip('"') for k, v in documented.items()} == expected


def test_an_unknown_option_is_refused():
    with pytest.raises(TypeError, match="fraction_fit"):
        AdditiveStrategy(fraction_fit=0.5)


def test_no_training_is_asked_for_with_fraction_train_0(initial, grid):
    strategy = AdditiveStrategy(fraction_train=0.0)
    result = strategy.start(grid, initial, num_rounds=2)
    assert result.arrays == initial
    assert result.train_metrics_clientapp == {}
    assert list(result.evaluate_metrics_clientapp) == [1, 2]


def test_no_evaluation_is_asked_for_with_fraction_evaluate_0(initial, grid):
    result = AdditiveStrategy(fraction_evaluate=0.0).start(grid, initial, num_rounds=2)
    assert list(result.train_metrics_clientapp) == [1, 2]
    assert result.evaluate_metrics_clientapp == {}


# What a strategy may say ----------------------------------------------------------


class Maximum(AdditiveStrategy):
    """Overrides everything a strategy may override."""

    consumed_metrics = ("own",)

    def contribution(self, reply, round):
        delta = reply.delta(round)
        return Contribution({"delta": delta}, 2.0, {"own": reply.number("own")})

    def update(self, total, round):
        return {name: 10 * x for name, x in total.mean().items()}

    def report(self, total, round):
        return {"sum-of-own": float(total.scalars["own"]), "terms": total.count}

    def report_evaluate(self, replies, round):
        return {"evaluators": len(replies)}

    def tell(self, round):
        return {"lr": 9.0, "more": "yes"}


def test_update_gets_the_sum_of_the_contributions(aggregate, reply):
    contents = [reply(model(2, -2), own=3.0), reply(model(4, -2), own=4.0)]
    new, metrics = aggregate(Maximum(), SENT, contents)
    assert new["w"].tolist() == [1 + 10 * (1 + 3) / 2, -2]
    assert metrics["sum-of-own"] == 7
    assert metrics["terms"] == 2


def test_consumed_metrics_are_not_averaged(aggregate, reply):
    contents = [reply(model(2, -2), own=3.0, loss=1.0)] * 2
    _, metrics = aggregate(Maximum(), SENT, contents)
    assert "own" not in metrics
    assert metrics["loss"] == 1


def test_report_evaluate_adds_metrics(exchange, reply):
    strategy = Maximum()
    replies = exchange(
        strategy, SENT, [reply(None, 1), reply(None, nan)], phase="evaluate"
    )
    assert strategy.aggregate_evaluate(1, replies)["evaluators"] == 1


def test_what_is_told_goes_before_the_users(scripted):
    strategy = Maximum()
    config = ConfigRecord({"lr": 0.5, "seed": 3})
    messages = strategy.configure_train(1, to_record(SENT), config, scripted([0, 0]))
    told = dict(messages[0].content["config"])
    assert told == {"lr": 9.0, "more": "yes", "seed": 3, "server-round": 1}


def test_the_sampler_decides_who_trains_and_who_evaluates(scripted):
    strategy = AdditiveStrategy(
        fraction_train=0.5,
        fraction_evaluate=0.5,
        sampler=UniformSampler(7, same_for_evaluation=True),
    )
    grid = scripted([None] * 8)
    arrays = to_record(SENT)
    nodes = list(grid.get_node_ids())
    for server_round in (1, 2):
        expected = UniformSampler(7).sample(nodes, 4, server_round, "train")
        for configure in (strategy.configure_train, strategy.configure_evaluate):
            messages = configure(server_round, arrays, ConfigRecord(), grid)
            assert [m.metadata.dst_node_id for m in messages] == expected


def test_an_empty_poisson_cohort_keeps_the_model(reply, scripted):
    options_ = {"fraction_train": 0.01, "fraction_evaluate": 0.0, **ANY}
    strategy = AdditiveStrategy(sampler=PoissonSampler(0), **options_)
    grid = scripted([reply(model(9, 9))] * 3)
    result = strategy.start(grid, to_record(SENT), num_rounds=2)
    assert result.arrays == to_record(SENT)
    assert [counts(m) for m in result.train_metrics_clientapp.values()] == [
        (0, 0, 0)
    ] * 2


def test_all_clients_take_part_with_that_sampler(scripted):
    strategy = AdditiveStrategy(fraction_train=0.1, sampler=AllClients())
    grid = scripted([None] * 9)
    messages = strategy.configure_train(1, to_record(SENT), ConfigRecord(), grid)
    assert len(messages) == 9


def test_state_continues_in_another_object(aggregate, reply):
    first = AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.9))
    contents = [reply(model(3, 4), 2), reply(model(6, 1), 1)]
    aggregate(first, SENT, contents)
    state = copy.deepcopy(first.state_dict())
    second = AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.9))
    second.load_state_dict(state)
    expected, _ = aggregate(first, SENT, contents, server_round=2)
    found, _ = aggregate(second, SENT, contents, server_round=2)
    assert found["w"].tobytes() == expected["w"].tobytes()
    fresh, _ = aggregate(
        AdditiveStrategy(server_optimizer=SGD(0.5, momentum=0.9)), SENT, contents
    )
    assert fresh["w"].tolist() != expected["w"].tolist()


def torch_optimizer(kind):
    return TorchOptimizer(functools.partial(kind, lr=0.1))


@pytest.mark.parametrize(
    ("saved", "other", "text"),
    [
        (SGD(), Adam(), "SGD, this one Adam"),
        (SGD(), torch_optimizer(torch.optim.SGD), r"SGD, .* TorchOptimizer\(SGD\)"),
        (
            torch_optimizer(torch.optim.SGD),
            torch_optimizer(torch.optim.AdamW),
            r"TorchOptimizer\(SGD\), this one TorchOptimizer\(AdamW\)",
        ),
    ],
)
def test_state_of_another_server_optimizer_is_refused(saved, other, text):
    state = AdditiveStrategy(server_optimizer=saved).state_dict()
    with pytest.raises(ValueError, match=text):
        AdditiveStrategy(server_optimizer=other).load_state_dict(state)


def test_state_of_other_settings_of_the_server_optimizer_is_accepted():
    state = AdditiveStrategy(server_optimizer=Adam(0.1)).state_dict()
    strategy = AdditiveStrategy(server_optimizer=Adam(0.01))
    strategy.load_state_dict(state)
    assert strategy.server_optimizer.learning_rate == 0.01


def test_state_of_another_sampler_is_refused():
    saved = AdditiveStrategy(sampler=UniformSampler(1)).state_dict()
    with pytest.raises(ValueError, match="same sampler"):
        AdditiveStrategy(sampler=UniformSampler(2)).load_state_dict(saved)


def test_a_pickled_strategy_continues(exchange, reply):
    strategy = AdditiveStrategy(server_optimizer=Adam())
    replies = exchange(strategy, SENT, [reply(model(3, 4)), reply(model(5, 6))])
    twin = pickle.loads(pickle.dumps(strategy))
    expected, _ = strategy.aggregate_train(1, replies)
    found, _ = twin.aggregate_train(1, replies)
    assert found == expected


def test_summary_logs_the_settings_and_flowers(caplog):
    caplog.set_level(logging.INFO, "flwr")
    strategy = AdditiveStrategy(
        server_optimizer=SGD(0.5), sampler=PoissonSampler(3), min_replies=4
    )
    strategy.summary()
    for text in (
        "AdditiveStrategy settings",
        "Server optimizer: SGD(learning_rate=0.5",
        "Sampler: PoissonSampler(seed=3)",
        "Minimum replies: 4",
        "Weighted by: 'num-examples'",
    ):
        assert text in caplog.text


def test_arrays_keep_names_order_shapes_and_dtypes(aggregate, reply):
    sent = {
        "z": np.float16([[1, 2, 3]]),
        "a": np.array(1.0),
        "k": np.array([True]),
        "b": np.empty((0, 2), np.float32),
        "i": np.int8([1]),
    }
    new, _ = aggregate(AdditiveStrategy(), sent, [reply(sent)] * 2)
    assert list(new) == list(sent)
    assert layout(new) == layout(sent)


def test_a_fortran_ordered_reply_is_read_in_its_own_order(aggregate, reply):
    sent = {"w": np.zeros((2, 3), np.float32)}
    w = np.asfortranarray(np.arange(6, dtype=np.float32).reshape(2, 3))
    new, _ = aggregate(AdditiveStrategy(), sent, [reply({"w": w})] * 2)
    assert new["w"].tolist() == w.tolist()


def test_unreadable_bytes_are_dropped(aggregate, reply):
    content = reply(model(1, 1))
    content["arrays"]["w"] = Array("float32", (2,), "numpy.ndarray", b"junk")
    new, metrics = aggregate(AdditiveStrategy(), SENT, [content, reply(model(3, 4))])
    assert new["w"].tolist() == [3, 4]
    assert counts(metrics) == (1, 0, 1)


def test_result_arrays_are_an_arrayrecord(initial, grid):
    result = AdditiveStrategy().start(grid, initial, num_rounds=1)
    assert isinstance(result.arrays, ArrayRecord)


class Half(ClientHalf):
    name = "half-of-the-test"


class NeedsHalf(AdditiveStrategy):
    client_half = Half


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_the_configuration_gets_the_round_as_from_flower_and_no_more(scripted, phase):
    config = ConfigRecord({"lr": 0.5})
    strategy = NeedsHalf()
    configure = getattr(strategy, f"configure_{phase}")
    configure(3, to_record(SENT), config, scripted([None, None]))
    assert dict(config) == {"lr": 0.5, "server-round": 3}


@pytest.mark.parametrize("phase", ["train", "evaluate"])
def test_clients_get_model_configuration_round_and_half(scripted, phase):
    strategy = NeedsHalf(arrayrecord_key="model", configrecord_key="settings")
    configure = getattr(strategy, f"configure_{phase}")
    arrays = to_record(SENT)
    messages = configure(3, arrays, ConfigRecord({"lr": 0.5}), scripted([None] * 3))
    assert [m.metadata.message_type for m in messages] == [phase] * 3
    for message in messages:
        assert message.content["model"] == arrays
        assert dict(message.content["settings"]) == {
            "lr": 0.5,
            "server-round": 3,
            "client-half": "half-of-the-test",
        }
