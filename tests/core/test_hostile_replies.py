"""Replies tampered with in every way, through whole runs of every strategy."""

import math

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given, settings
from hypothesis import strategies as st

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import Mechanism
from flower_ext.server.optimizers import Adam
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import (
    FLASC,
    BoundedGroupLoss,
    BoundedGroupLossClient,
    FedFish,
    FedFishClient,
    FLASCClient,
    MaxFL,
    MaxFLClient,
)
from flower_ext.testing import _TASK, _make_model

HALVES = (FedFishClient, FLASCClient, MaxFLClient, BoundedGroupLossClient)
CONFIG = {"batch-size": 5, "lr": 0.1, "counter": True}


def noisy():
    plan = {"num_rounds": 2, "num_sampled_clients": 3, "population_size": 3}
    return Mechanism(
        **plan,
        noise_multiplier=1.0,
        target_delta=1e-2,
        seed=1,
        unprotected_metrics=True,
    )


STRATEGIES = {
    "fedavg": AdditiveStrategy,
    "adam": lambda: AdditiveStrategy(server_optimizer=Adam()),
    "noise": lambda: AdditiveStrategy(mechanism=noisy()),
    "fedfish": FedFish,
    "flasc": FLASC,
    "maxfl": lambda: MaxFL(warmup_steps=2),
    "bounded group loss": lambda: BoundedGroupLoss(groups=["a", "b"], upper_bound=0.3),
}
NUMBERS = st.one_of(
    st.sampled_from([0, -1, 1e300, 3e38, 5e-324, math.nan, math.inf, -math.inf]),
    st.sampled_from([2**63 - 1, -(2**63), 2**84, -(2**84), 10**400]),
    st.floats(width=64),
)
VALUES = st.one_of(
    NUMBERS,
    st.lists(st.floats(), max_size=4),
    st.lists(st.integers(-(2**90), 2**90), max_size=4),
)
FILLS = st.sampled_from([math.nan, math.inf, -math.inf, 1e300, 3e38, -3e38, 1e19, 0])
DTYPES = st.sampled_from(["f2", "f4", "f8", "i8", "u1", "c8", "?"])


def metrics_of(content):
    return [k for k, x in content.items() if isinstance(x, MetricRecord)]


def arrays_of(content):
    return [k for k, x in content.items() if isinstance(x, ArrayRecord)]


def tamper(content, draw):
    """Change one thing in a copy of a reply."""
    content = RecordDict({key: record.copy() for key, record in content.items()})
    ways = ["metric", "no metric", "key", "twice", "config", "tied", "no record"]
    ways += ["array", "bytes", "no array", "array key"] * bool(arrays_of(content))
    way = draw(st.sampled_from(ways))
    key = draw(st.sampled_from(metrics_of(content)))
    name = draw(st.sampled_from(sorted(content[key])))
    if way == "metric":
        content[key][name] = draw(VALUES)
    elif way == "no metric":
        del content[key][name]
    elif way == "key":
        content[draw(st.sampled_from(["odd", "Metrics", ""]))] = content.pop(key)
    elif way == "twice":
        content["again"] = MetricRecord({name: draw(VALUES), "x/y": draw(VALUES)})
    elif way == "config":
        content[draw(st.sampled_from(["config", "arrays", "tied"]))] = ConfigRecord(
            {"a": b"1", "b": ["x"], "c": 2**90}
        )
    elif way == "tied":
        content["tied"] = ConfigRecord(
            {"linear.bias": "linear.weight", "scale": "scale", "counter": "scale"}
        )
    elif way == "no record":
        del content[draw(st.sampled_from(sorted(content)))]
    else:
        tamper_arrays(content, draw, way)
    return content


def tamper_arrays(content, draw, way):
    key = draw(st.sampled_from(arrays_of(content)))
    name = draw(st.sampled_from(sorted(content[key]) or [""]))
    if name == "":
        return
    array = content[key][name]
    if way == "array key":
        content["odd"] = content.pop(key)
    elif way == "no array":
        del content[key][name]
    elif way == "bytes":
        place = draw(st.integers(0, len(array.data) - 1))
        data = array.data[:place] + bytes([draw(st.integers(0, 255))])
        data += array.data[place + 1 :] * draw(st.booleans())
        content[key][name] = Array(array.dtype, array.shape, array.stype, data)
    else:
        shape = draw(st.sampled_from([array.shape, (), (1,), (0,), (2, 3)]))
        with np.errstate(all="ignore"):
            filled = np.full(shape, draw(FILLS)).astype(draw(DTYPES))
        content[key][name] = Array(filled)


@pytest.mark.parametrize("make", STRATEGIES.values(), ids=STRATEGIES)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@settings(max_examples=40, deadline=None, derandomize=True)
@given(data=st.data())
def test_no_reply_ends_a_run_or_spoils_the_model(make, data):
    honest = client_app(_TASK, *HALVES)
    app = ClientApp()

    def answer(message, context):
        reply = honest(message, context)
        if context.node_config["partition-id"] == 1 and not reply.has_error():
            return Message(tamper(reply.content, data.draw), reply_to=message)
        return reply

    app.train()(answer)
    app.evaluate()(answer)
    first = {k: x.numpy() for k, x in _make_model(CONFIG).state_dict().items()}
    grid = LocalGrid(app, 3, CONFIG)
    result = make().start(grid, to_record(first), num_rounds=2)
    last = from_record(result.arrays)
    assert {k: (x.shape, x.dtype) for k, x in last.items()} == {
        k: (x.shape, x.dtype) for k, x in first.items()
    }
    assert all(np.isfinite(x).all() for x in last.values())
    assert not np.array_equal(first["linear.weight"], last["linear.weight"])
