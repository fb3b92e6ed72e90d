"""Named arrays: reading records, exact differences, sums in float64, norms."""

from contextlib import suppress
from io import BytesIO

import numpy as np
import pytest
from flwr.app import Array
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flower_ext.core.arrays import (
    Lazy,
    accumulate,
    all_finite,
    can_move,
    from_record,
    is_averaged,
    layout,
    multiply,
    norm,
    subtract,
    to_record,
    view,
)

DTYPES = ["f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "?", ">f4", ">i8"]
any_array = st.sampled_from(DTYPES).flatmap(
    lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0))
)
quick = settings(max_examples=60, deadline=None, derandomize=True)


def saved(array, **options):
    """The bytes of an array as NumPy saves it."""
    stream = BytesIO()
    np.save(stream, array, **options)
    return stream.getvalue()


@quick
@given(any_array, st.booleans())
def test_view_is_what_numpy_reads(array, fortran):
    array = np.asfortranarray(array) if fortran and array.ndim else array
    record = Array(array)
    found = view(record)
    assert found.dtype == record.numpy().dtype
    assert found.shape == array.shape
    assert found.tobytes() == record.numpy().tobytes()


def test_view_copies_nothing():
    record = Array(np.arange(5.0))
    assert np.shares_memory(view(record), np.frombuffer(record.data, np.uint8))


def test_view_cannot_be_written_to():
    with pytest.raises(ValueError, match="read-only"):
        view(Array(np.arange(5.0)))[0] = 1


def test_view_refuses_another_serialisation():
    array = Array("float32", (1,), "torch.save", b"x")
    with pytest.raises(ValueError, match=r"stype='torch.save' must be 'numpy.ndarray'"):
        view(array)


def test_view_never_unpickles():
    data = saved(np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects"):
        view(Array("object", (1,), "numpy.ndarray", data))


@pytest.mark.parametrize("keep", [0, 5, 60, 135])
def test_view_refuses_bytes_cut_off(keep):
    data = saved(np.ones(2))[:keep]
    with pytest.raises(ValueError, match=r".+"):
        view(Array("float64", (2,), "numpy.ndarray", data))


def test_records_keep_order_shapes_and_dtypes():
    arrays = {
        "z": np.float16([[1, 2]]),
        "a": np.array(7),
        "m": np.array([True, False]),
        "e": np.empty((0, 3), np.float32),
    }
    back = from_record(to_record(arrays))
    assert list(back) == ["z", "a", "m", "e"]
    for name, array in arrays.items():
        assert back[name].dtype == array.dtype
        assert back[name].shape == array.shape
        np.testing.assert_array_equal(back[name], array)


def test_to_record_takes_a_numpy_scalar_as_0d():
    assert to_record({"a": np.float32(1.5)})["a"].shape == ()


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_floats_are_averaged(dtype):
    assert is_averaged(np.zeros(1, dtype))


@pytest.mark.parametrize("dtype", ["i8", "u1", "?"])
def test_counters_and_flags_are_not_averaged(dtype):
    assert not is_averaged(np.zeros(1, dtype))


def test_difference_of_float16_does_not_overflow():
    assert subtract(np.float16([60000]), np.float16([-60000])).numpy().tolist() == [
        120000.0
    ]


def test_difference_of_float64_keeps_all_digits():
    new, old = np.array([1 + 2**-40]), np.array([1.0])
    assert subtract(new, old).numpy().tolist() == [2**-40]


def test_difference_of_float64_reply_to_float32_model_is_float64():
    assert subtract(np.array([1 + 2**-40]), np.float32([1])).numpy().tolist() == [
        2**-40
    ]


def test_difference_of_large_integers_is_exact():
    new, old = np.array([2**60 + 1, -(2**62)]), np.array([2**60, -(2**62) + 3])
    assert subtract(new, old).numpy().tolist() == [1, -3]


def test_difference_of_unsigned_integers_has_a_sign():
    assert subtract(np.uint8([3]), np.uint8([5])).numpy().tolist() == [-2]


def test_difference_of_flags_has_a_sign():
    new, old = np.array([True, False, True]), np.array([False, True, True])
    assert subtract(new, old).numpy().tolist() == [1, -1, 0]


def test_difference_of_0d_arrays_is_an_array():
    difference = subtract(np.array(3), np.array(1)).numpy()
    assert isinstance(difference, np.ndarray)
    assert difference.shape == ()


@quick
@given(
    st.sampled_from([(), (1,), (3, 5), (0,), (1 << 15,), ((1 << 15) + 1,), (3, 40000)]),
    st.sampled_from(["f2", "f4", "f8", "i4", "?"]),
    st.floats(-10, 10),
    st.booleans(),
)
def test_accumulate_adds_weight_times_term(shape, dtype, weight, fortran):
    random = np.random.default_rng(0)
    term = (random.normal(size=shape) * 10).astype(dtype)
    term = np.asfortranarray(term) if fortran and shape else np.asarray(term)
    total = np.asarray(random.normal(size=shape))
    expected = total + weight * term.astype(np.float64)
    before = term.copy()
    accumulate(total, [(term, weight)])
    np.testing.assert_array_equal(total, expected)
    np.testing.assert_array_equal(term, before)


def test_terms_are_accumulated_with_their_own_weights_in_order():
    # In another order, or with the sum of small ones first, 1 would be lost or kept.
    terms = [(np.array([1e16]), 1.0), (np.array([1.0]), 1.0), (np.array([-1e16]), 1.0)]
    total = np.zeros(1)
    accumulate(total, terms)
    assert total.tolist() == [(1e16 + 1.0) - 1e16]
    total = np.zeros(1)
    accumulate(total, [terms[0], terms[2], (np.array([1.0]), 3.0)])
    assert total.tolist() == [3.0]


@pytest.mark.parametrize("size", [1, 1 << 14, (1 << 14) + 1, 40_000])
def test_a_lazy_term_is_accumulated_as_what_it_stands_for(size):
    random = np.random.default_rng(0)
    new, old, factor = random.normal(size=(3, size)).astype(np.float32)
    lazy = multiply(factor, subtract(new, old))
    eager = factor.astype(np.float64) * (new - old)
    np.testing.assert_array_equal(lazy.numpy(), eager)
    total, expected = np.zeros(size), np.zeros(size)
    accumulate(total, [(lazy, 0.3)])
    accumulate(expected, [(eager, 0.3)])
    np.testing.assert_array_equal(total, expected)


def test_a_lazy_term_keeps_shape_and_order():
    new = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    lazy = subtract(new, np.ones((2, 3)))
    assert lazy.shape == (2, 3)
    assert lazy.numpy().tolist() == (new - 1).tolist()
    assert lazy.block(slice(1, 3)).tolist() == [0, 1]


def test_a_product_does_not_underflow():
    tiny = np.float32([1e-30])
    assert multiply(tiny, tiny).numpy().tolist() == [float(tiny[0]) ** 2]
    assert float(tiny[0]) ** 2 > 0


@pytest.mark.parametrize("at", [0, 20_000, 39_999])
def test_finiteness_and_norm_look_into_lazy_terms(at):
    new = np.zeros(40_000, np.float32)
    new[at] = 3
    lazy = subtract(new, np.zeros(40_000, np.float32))
    assert all_finite([lazy])
    assert norm([lazy, np.array(4.0)]) == 5
    new[at] = np.inf
    assert not all_finite([np.ones(1), lazy])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["f2", "f4", "f8"])
def test_one_bad_value_is_not_finite(bad, dtype):
    array = np.zeros((50, 7), dtype)
    array[33, 4] = bad
    assert not all_finite([np.ones(3), array])


def test_infinities_of_both_signs_do_not_cancel():
    assert not all_finite([np.array([np.inf, -np.inf])])


@pytest.mark.parametrize(
    "largest",
    [
        np.finfo(np.float16).max,
        np.finfo(np.float32).max,
        np.iinfo(np.int64).max,
        np.iinfo(np.uint64).max,
        np.True_,
    ],
)
def test_the_largest_value_of_a_dtype_is_finite_a_thousand_times(largest):
    assert all_finite([np.full(1000, largest), np.asarray(largest)])


def test_no_arrays_are_finite():
    assert all_finite([])


def test_norm_is_that_of_one_long_vector():
    random = np.random.default_rng(0)
    arrays = [random.normal(size=(300, 151)), random.normal(size=7), np.array(2.0)]
    flat = np.concatenate([x.reshape(-1) for x in arrays])
    assert norm(arrays) == pytest.approx(np.linalg.norm(flat), rel=1e-14)


def test_norm_of_3_and_4_is_5():
    assert norm([np.float32([3]), np.array(4)]) == 5


def test_norm_does_not_overflow_in_the_arrays_dtype():
    assert norm([np.full(4, 60000, np.float16)]) == 120000
    assert norm([np.array([3 * 2**40, 4 * 2**40])]) == 5 * 2**40


def test_norm_of_nothing_is_0():
    assert norm([]) == 0
    assert norm([np.empty((0, 3))]) == 0


def test_layout_names_dtype_and_shape():
    assert layout({"w": np.zeros((2, 3), np.float16), "n": np.array(1)}) == {
        "w": "float16[2, 3]",
        "n": "int64[]",
    }


def npy(header, version=1):
    """Write the bytes of an array with any header; its values are 12 zeros."""
    text = header.encode("latin1")
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return b"\x93NUMPY" + bytes([version, 0]) + length + text + bytes(48)


PLAIN_HEADER = "{'descr': '<f4', 'fortran_order': False, 'shape': (3, 4), }\n"


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize(
    "header",
    [
        "(" * 4000,
        "-" * 4000 + "1",
        "'''",
        "\0",
        "  x\n y",
        "{[]: 1}",
        "{'descr': '<f4', 'fortran_order': False, 'shape': (3,",
        PLAIN_HEADER.replace("'<f4'", "[('a',)]"),
        PLAIN_HEADER.replace("(3, 4)", "(3, 10**30)"),
        PLAIN_HEADER.replace("(3, 4)", "(0, 1000000000000000000000000000)"),
        PLAIN_HEADER.ljust(60_000),
    ],
)
def test_header_that_cannot_be_read(header, version):
    array = Array("float32", (3, 4), "numpy.ndarray", npy(header, version))
    with pytest.raises(ValueError):
        view(array)


@settings(derandomize=True, deadline=None, max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 70), st.integers(0, 255)), min_size=1))
def test_altered_header_is_read_or_refused(changes):
    data = bytearray(npy(PLAIN_HEADER))
    for at, byte in changes:
        data[at] = byte
    with suppress(ValueError, TypeError):
        assert view(Array("float32", (3, 4), "numpy.ndarray", bytes(data))).size <= 48


def test_a_function_that_is_not_elementwise_is_refused():
    """Its one value would count once in the norm, and in every place of the sum."""
    term = Lazy(lambda x: x.max(keepdims=True), np.ones((3, 4)))
    with pytest.raises(ValueError, match="must be elementwise"):
        norm([term])
    with pytest.raises(ValueError, match="must be elementwise"):
        Lazy(np.negative, term).numpy()


def test_a_norm_beyond_all_numbers_is_infinite_without_a_word(recwarn):
    assert norm([np.full(3, 1e200)]) == np.inf
    assert not recwarn.list


@pytest.mark.parametrize(("size", "fits"), [(100.0, True), (30000.0, False)])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_change_of_a_smaller_model_is_held_against_the_largest_number(
    size, fits, sign
):
    """The largest float16 is 65504."""
    sent = {"w": np.float16([[0, 0, 1], [2, -50000, 3]])}
    assert can_move(sent, {"w": np.array([[0.0, sign * size]])}) == fits
    assert not can_move(sent, {"w": np.array([[np.nan, size]])})
