"""Records between processes: what is shared, what is copied, what is read."""

import pickle

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from flower_ext.simulation.records import (
    from_wire,
    own_copies,
    own_copy,
    sent_array,
    to_wire,
)

ARRAYS = [
    np.array(3.5, np.float32),
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    np.arange(5, dtype=np.int64),
    np.array([True, False]),
    np.arange(3, dtype=">f8"),
    np.zeros((0, 4), np.float32),
    np.zeros(70_000, np.uint8),
    np.array(["a", "bcd"]),
    np.array([1 + 2j]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda x: f"{x.dtype}{x.shape}")
def test_an_array_that_was_sent_reads_as_the_original(array):
    original = ArrayRecord({"x": Array(array)})
    for sent in (own_copy(original), from_wire(to_wire(original))):
        read = sent["x"].numpy()
        assert read.dtype == array.dtype
        assert read.flags.f_contiguous == array.flags.f_contiguous
        assert read.flags.writeable
        np.testing.assert_array_equal(read, array)
        assert sent == original and original == sent


def test_reading_gives_an_array_of_ones_own():
    sent = own_copy(ArrayRecord({"x": Array(np.zeros(3))}))
    sent["x"].numpy()[:] = 9
    np.testing.assert_array_equal(sent["x"].numpy(), np.zeros(3))


def test_a_sent_array_that_is_changed_reads_as_changed():
    sent = own_copy(ArrayRecord({"x": Array(np.zeros(3))}))
    assert sent["x"].numpy().shape == (3,)
    sent["x"].data = Array(np.ones((2, 2))).data
    np.testing.assert_array_equal(sent["x"].numpy(), np.ones((2, 2)))


def test_another_array_of_the_same_type_is_made_as_flowers_is():
    values = np.arange(6.0).reshape(2, 3)
    one = Array(values)
    sent = sent_array(one.dtype, one.shape, one.stype, one.data)
    other = type(sent)(2 * values)
    assert other == Array(2 * values) and sent == one
    assert other.data == Array(2 * values).data


def test_arrays_of_other_making_are_left_to_flower():
    record = ArrayRecord({"x": Array("float32", (2,), "own format", b"abcd")})
    sent = from_wire(to_wire(record))
    assert sent == record
    with pytest.raises(TypeError, match="own format"):
        sent["x"].numpy()


def test_damaged_bytes_are_left_to_numpy():
    whole = Array(np.arange(4.0))
    for data in (whole.data[:-1], whole.data[:20], b"\x93NUMPY\x01\x00\xff\xffx", b""):
        sent = own_copy(ArrayRecord({"x": Array("float64", (4,), whole.stype, data)}))
        with pytest.raises((ValueError, EOFError)):
            sent["x"].numpy()


def test_a_sent_array_is_pickled_as_a_plain_one():
    sent = own_copy(ArrayRecord({"x": Array(np.arange(3.0))}))
    loaded = pickle.loads(pickle.dumps(sent))
    assert type(loaded["x"]) is Array
    assert loaded == sent


def test_bytes_of_arrays_are_shared_and_everything_else_is_copied():
    content = RecordDict(
        {
            "a": ArrayRecord({"x": Array(np.zeros(3))}),
            "c": ConfigRecord({"list": [1, 2]}),
            "m": MetricRecord({"list": [1.0]}),
        }
    )
    own = own_copies(content)
    assert own == content
    assert own["a"]["x"].data is content["a"]["x"].data
    own["a"]["y"] = Array(np.zeros(1))
    own["a"]["x"].data = b""
    own["c"]["list"].append(3)
    own["m"]["list"][0] = 9.0
    own["m"]["new"] = 1
    assert list(content["a"]) == ["x"] and len(content["a"]["x"].data) > 100
    assert content["c"] == {"list": [1, 2]} and content["m"] == {"list": [1.0]}


def test_large_arrays_travel_as_numpy_arrays_and_small_ones_as_bytes():
    wire = to_wire(
        ArrayRecord({"s": Array(np.zeros(3)), "l": Array(np.zeros(100_000))})
    )
    assert [type(carried[-1]) for carried in wire] == [bytes, np.ndarray]
    assert not wire[1][-1].flags.owndata
