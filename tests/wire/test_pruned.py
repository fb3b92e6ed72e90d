"""Codecs of pruned models: what travels, in how many bytes, and what both ends know."""

import zlib

import numpy as np
import pytest

from flower_ext.core.arrays import to_record
from flower_ext.core.replies import MalformedReply
from flower_ext.wire import BFloat16, Chain, ErrorFeedback, Kept, Nonzero, Sending
from flower_ext.wire.codec import PAYLOAD, num_values
from flower_ext.wire.mask_codes import entropy_bytes
from flower_ext.wire.messages import Uploads
from flower_ext.wire.pruned import is_pruned, nonzero
from flower_ext.wire.wrappers import upload


def pruned(density, shape=(60, 50), seed=0, dtype=np.float32):
    random = np.random.default_rng(seed)
    x = random.standard_normal(shape).astype(dtype)
    return np.where(random.random(shape) < density, x, 0).astype(dtype)


def change(seed=1, shape=(60, 50)):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_a_negative_zero_is_not_zero(dtype):
    x = np.array([0.0, -0.0, 1.0, -1.0, np.nan, np.inf, 1e-7], dtype)
    assert nonzero(x).tolist() == [False] + [True] * 6
    assert nonzero(np.array([0, 2, -1])).tolist() == [False, True, True]
    assert nonzero(np.array([True, False])).tolist() == [True, False]


@pytest.mark.parametrize("density", [0.0, 0.05, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, np.int64])
def test_a_pruned_model_comes_back_bit_for_bit(density, dtype):
    x = pruned(density, dtype=np.float64) * 100
    model = {"w": x.astype(dtype), "b": np.zeros(3, dtype), "n": np.array(4)}
    if dtype != np.int64:
        model["w"][0, :5] = -0.0
    record = Nonzero().encode(model)
    found = Nonzero().decode(record, model)
    for name, array in model.items():
        assert found[name].tobytes() == array.tobytes()
    assert record.count_bytes() <= 300 + sum(a.nbytes for a in model.values())


@pytest.mark.parametrize("density", [0.05, 0.2, 0.5])
def test_a_pruned_model_takes_its_values_and_about_the_entropy_of_the_mask(density):
    x = pruned(density, (300, 400))
    count = np.count_nonzero(x)
    size = Nonzero().encode({"w": x})[PAYLOAD].numpy().size
    least = 4 * count + entropy_bytes(count, x.size)
    assert least < size < 1.02 * least + 100
    assert num_values(Nonzero().encode({"w": x})) == count


def test_a_change_travels_where_the_model_is_not_zero():
    began = {"w": pruned(0.3), "bias": np.zeros(4, np.float32), "new": np.zeros((2, 2))}
    moved = {"w": change(), "bias": np.ones(4, np.float32), "new": np.ones((2, 2))}
    record = Kept().encode(moved, Sending(began=began))
    found = Kept().decode(record, moved, began)
    expected = np.where(began["w"] != 0, moved["w"], 0)
    assert found["w"].tobytes() == expected.astype(np.float32).tobytes()
    assert found["bias"].tolist() == [1.0] * 4
    assert found["new"].tolist() == [[1.0, 1.0]] * 2
    count = np.count_nonzero(began["w"])
    assert num_values(record) == count + 8
    payload = record[PAYLOAD].numpy().size
    # Head of the payload, a byte for each array, and a checksum of the places.
    assert payload == 4 + 1 + 2 * 2 + 12 + 3 + 4 + 4 * count + 4 * 4 + 8 * 4


def test_everything_travels_where_it_is_to_or_nothing_is_known():
    began, moved = {"w": pruned(0.3)}, {"w": change()}
    for codec, sending in (
        (Kept(everything=True), Sending(began=began)),
        (Kept(lambda n: n == 4).at(4), Sending(began=began)),
        (Kept(), Sending()),
    ):
        found = codec.decode(codec.encode(moved, sending), moved, began)
        assert found["w"].tobytes() == moved["w"].tobytes()
    found = Kept(lambda n: n == 4).at(3)
    assert found == Kept(everything=False)


def test_the_server_reads_it_by_the_model_that_it_sent():
    began, moved = {"w": pruned(0.3)}, {"w": change()}
    record = Kept().encode(moved, Sending(began=began))
    found = Uploads.of([Kept()]).decode(record, began)
    expected = np.where(began["w"] != 0, moved["w"], 0)
    assert np.array_equal(found.arrays["w"].numpy(), expected)
    assert np.array_equal(found.masks["w"], began["w"] != 0)


def test_a_kept_zero_travels_and_a_pruned_one_does_not():
    began = {"w": np.float32([[0.0, -0.0], [2.0, 0.0]])}
    moved = {"w": np.float32([[1, 2], [3, 4]])}
    record = Kept().encode(moved, Sending(began=began))
    assert Kept().decode(record, moved, began)["w"].tolist() == [[0, 2], [3, 0]]


@pytest.mark.parametrize("other", [None, {}, "elsewhere", "another shape"])
def test_other_zeros_than_the_client_s_are_refused(other):
    began, moved = {"w": pruned(0.3)}, {"w": change()}
    record = Kept().encode(moved, Sending(began=began))
    if other == "elsewhere":
        other = {"w": pruned(0.3, seed=5)}
    elif other == "another shape":
        other = {"w": pruned(0.3, (30, 100))}
    with pytest.raises(MalformedReply, match="zeros in other places|began"):
        Kept().decode(record, moved, other)


def test_kinds_that_do_not_exist_are_refused():
    moved = {"w": change()}
    record = Kept().encode(moved)
    data = bytearray(record[PAYLOAD].numpy().tobytes())
    assert data[21] == 1
    data[21] = 7
    data[:4] = zlib.crc32(bytes(data[4:])).to_bytes(4, "little")
    broken = to_record({PAYLOAD: np.frombuffer(bytes(data), np.uint8)})
    with pytest.raises(MalformedReply, match="7 is no kind"):
        Kept().decode(broken, moved)


def test_what_is_not_finite_travels_whole():
    began, moved = {"w": np.float32([[0, 1], [1, 1]])}, {"w": np.ones((2, 2), "f4")}
    moved["w"][0, 0] = np.nan
    record = Kept().encode(moved, Sending(began=began))
    assert np.isnan(Kept().decode(record, moved, began)["w"][0, 0])


def test_silent_arrays_do_not_travel():
    began = {"a": pruned(0.3), "b": pruned(0.3)}
    moved = {"a": change(), "b": np.zeros((60, 50), np.float32)}
    record = Kept().encode(moved, Sending(began=began, silent=("b",)))
    assert not Kept().decode(record, moved, began)["b"].any()
    assert num_values(record) == np.count_nonzero(began["a"])


def test_error_feedback_keeps_what_is_pruned():
    began, moved = {"w": pruned(0.3)}, {"w": change()}
    codec = ErrorFeedback(Chain(Kept(), BFloat16()))
    sent = upload(codec, moved, None, Sending(began=began))
    zeros = began["w"] == 0
    assert np.array_equal(sent.residual["w"][zeros], moved["w"][zeros])
    assert 0 < np.abs(sent.residual["w"][~zeros]).max() < 0.02


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (np.float32([[0, 1]]), True),
        (np.float32([[1, 1]]), False),
        (np.float32([[0, 0]]), False),
        (np.float32([[-0.0, 0]]), True),
        (np.float32([0, 1]), False),
        (np.array([[0, 1]]), False),
        (np.zeros((0, 2), np.float32), False),
    ],
)
def test_what_counts_as_pruned(x, expected):
    assert is_pruned(x) is expected


@pytest.mark.parametrize("bad", [1, "yes", None])
def test_everything_is_yes_or_no(bad):
    with pytest.raises(ValueError, match="^everything=.* must be True or False"):
        Kept(everything=bad)


def test_it_comes_first_in_a_chain():
    with pytest.raises(ValueError, match="with what looks at shapes first"):
        Chain(Nonzero(), Kept(), BFloat16())
