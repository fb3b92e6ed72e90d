"""Arrays that hold their values: to everybody else they are Flower's own."""

import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, RecordDict
from hypothesis import given
from hypothesis import strategies as st

from flower_ext.core.arrays import view
from flower_ext.core.held import (
    HeldArray,
    flower_array,
    holding_replies,
    num_bytes,
    reply_record,
)
from flower_ext.wire.traffic import measure_content

SIX = np.arange(6.0, dtype=np.float32)
VALUES = {
    "matrix": SIX.reshape(2, 3),
    "fortran": SIX.reshape(2, 3).T,
    "strided": SIX[::2],
    "slice": np.arange(24).reshape(2, 3, 4)[:, ::2],
    "number": np.array(3.0),
    "empty": np.zeros((0, 3), np.float32),
    "flags": np.ones(3, bool),
    "half": np.ones((5, 1), np.float16),
    "long": np.zeros((1,) * 30, np.int8),
}


@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_it_is_flowers_array(values):
    held, plain = HeldArray(values), Array(values)
    assert num_bytes(held) == len(plain.data) == num_bytes(plain)
    assert "_bytes" not in vars(held)  # they were not made to be counted
    assert held == plain and plain == held
    for name in ("dtype", "shape", "stype", "data"):
        assert getattr(held, name) == getattr(plain, name)
    np.testing.assert_array_equal(view(held), view(plain))
    own = held.numpy()
    assert own.dtype == values.dtype and np.array_equal(own, values)
    assert own.flags.writeable and not np.shares_memory(own, values)
    assert type(pickle.loads(pickle.dumps(held))) is Array
    assert pickle.loads(pickle.dumps(held)) == plain


def test_what_it_holds_cannot_be_changed_through_it():
    found = view(HeldArray(SIX))
    assert np.shares_memory(found, SIX) and SIX.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1.0


def test_with_other_bytes_it_is_a_plain_array():
    array = HeldArray(SIX)
    array.data = Array(SIX[:2]).data
    assert type(array) is Array
    assert array.numpy().tolist() == [0.0, 1.0]


def test_replies_hold_arrays_only_where_somebody_says_so():
    kinds = [{type(x) for x in reply_record(VALUES).values()}]
    with holding_replies():
        held = reply_record(VALUES)
    kinds += [{type(x) for x in held.values()}]
    assert kinds == [{Array}, {HeldArray}]
    assert list(held) == list(VALUES)


def test_a_reply_costs_what_it_would_cost():
    with holding_replies():
        held = measure_content(RecordDict({"arrays": reply_record(VALUES)}))
    record = ArrayRecord({name: Array(x) for name, x in VALUES.items()})
    assert held == measure_content(RecordDict({"arrays": record}))


@given(
    dtype=st.sampled_from(
        ["f2", "<f4", ">f4", "f8", "i1", ">i8", "u4", "?", "c8", "U3", "M8[s]"]
    ),
    shape=st.lists(st.integers(0, 3), max_size=4),
    order=st.sampled_from(["C", "F", "reversed", "strided"]),
)
def test_arrays_are_made_as_flower_makes_them(dtype, shape, order):
    values = np.arange(4 ** len(shape)).astype(dtype).reshape((4,) * len(shape))
    values = values[tuple(slice(size) for size in shape)]
    values = np.asarray(values)
    if order == "reversed":
        values = np.asarray(values[tuple(slice(None, None, -1) for _ in shape)])
    elif order != "strided":
        values = np.array(values, order=order)
    made, plain = flower_array(values), Array(values)
    assert type(made) is Array and vars(made).keys() <= vars(plain).keys()
    assert made == plain and made.data == plain.data
    assert made.object_id == plain.object_id


def test_an_array_keeps_the_values_that_it_was_made_of():
    values = np.zeros(3)
    made = flower_array(values)
    values[:] = 9
    assert made.numpy().tolist() == [0, 0, 0]
