"""Replies in which one thing is wrong, drawn by hypothesis."""

import math

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import strategies as st

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
    # Arrays of which only the numbers are wrong come more often than all else.
    others = ["array", "array", "array", "bytes", "no array", "array key"]
    ways += others * bool(arrays_of(content))
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
            {"out.bias": "out.weight", "scale": "scale", "norm.bias": "norm.weight"}
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
        shape, dtype = array.shape, array.dtype
        if draw(st.booleans()):
            shape = draw(st.sampled_from([shape, (), (1,), (0,), (2, 3)]))
            dtype = draw(DTYPES)
        with np.errstate(all="ignore"):
            filled = np.full(shape, draw(FILLS)).astype(dtype)
        content[key][name] = Array(filled)
