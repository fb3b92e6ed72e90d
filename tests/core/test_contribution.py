"""One client's term and the sum of terms."""

import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flower_ext.core.arrays import largest, subtract, within
from flower_ext.core.contribution import DELTA, Contribution, Total


def two_terms():
    total = Total()
    total.add(
        Contribution(
            {DELTA: {"w": np.float32([1, 2]), "b": np.array(3.0)}},
            weight=2.0,
            scalars={"loss": 5.0, "count": np.array([1, 2])},
        )
    )
    total.add(
        Contribution(
            {DELTA: {"w": np.float32([10, 20]), "b": np.array(-1.0)}},
            weight=3.0,
            scalars={"loss": 7.0, "count": np.array([10, 20])},
        )
    )
    return total


def test_arrays_are_summed_with_their_weights():
    arrays = two_terms().arrays[DELTA]
    assert arrays["w"].tolist() == [2 * 1 + 3 * 10, 2 * 2 + 3 * 20]
    assert arrays["b"].tolist() == 2 * 3 - 3 * 1


def test_scalars_are_summed_without_weights():
    scalars = two_terms().scalars
    assert scalars["loss"].tolist() == 12
    assert scalars["count"].tolist() == [11, 22]


def test_weights_and_terms_are_counted():
    total = two_terms()
    assert total.weight == 5
    assert total.count == 2


def test_mean_divides_by_the_sum_of_weights():
    mean = two_terms().mean()
    assert mean["w"].tolist() == [32 / 5, 64 / 5]
    assert mean["b"].tolist() == 3 / 5
    assert isinstance(mean["b"], np.ndarray)


def test_taking_a_part_hands_it_over():
    total = two_terms()
    total.take()
    assert DELTA not in total.arrays


def test_each_part_has_its_own_sum():
    total = Total()
    total.add(Contribution({"a": {"w": np.ones(1)}, "b": {"w": np.ones(1)}}, 2.0))
    total.add(Contribution({"a": {"w": np.ones(1)}}, 3.0))
    assert total.take("a")["w"].tolist() == [5]
    assert total.take("b")["w"].tolist() == [2]


def test_an_array_that_a_term_lacks_counts_as_zero():
    total = Total()
    total.add(Contribution({DELTA: {"x": np.ones(2)}}, 2.0))
    total.add(Contribution({DELTA: {"y": np.ones(3)}}, 3.0))
    assert {k: x.tolist() for k, x in total.arrays[DELTA].items()} == {
        "x": [2, 2],
        "y": [3, 3, 3],
    }


def test_sums_are_float64():
    total, terms = Total(), np.float32([1.0] + [2**-30] * 100)
    for term in terms:
        total.add(Contribution({DELTA: {"w": np.array([term])}}, 1.0))
    assert total.arrays[DELTA]["w"][0] == 1 + 100 * 2**-30


def test_adding_changes_neither_arrays_nor_scalars_of_a_term():
    term = Contribution({DELTA: {"w": np.ones(2)}}, 2.0, {"n": np.ones(2)})
    total = Total()
    total.add(term)
    total.add(term)
    assert term.arrays[DELTA]["w"].tolist() == [1, 1]
    assert term.scalars["n"].tolist() == [1, 1]
    assert total.scalars["n"].tolist() == [2, 2]


def test_terms_added_together_are_as_added_one_by_one():
    random = np.random.default_rng(0)
    terms = [
        Contribution(
            {"a": {"w": random.normal(size=40_000)}, f"b{i % 2}": {"v": np.ones(2)}},
            random.random(),
            {"n": random.normal(size=3)},
        )
        for i in range(5)
    ]
    together, one_by_one = Total(), Total()
    together.add(*terms)
    for term in terms:
        one_by_one.add(term)
    assert pickle.dumps(together) == pickle.dumps(one_by_one)


def test_adding_nothing_changes_nothing():
    total = Total()
    total.add()
    assert total == Total()


def test_a_total_is_finite_until_it_overflows():
    total, term = Total(), Contribution({DELTA: {"w": np.array([1e308])}})
    total.add(term)
    assert total.is_finite()
    total.add(term)
    assert not total.is_finite()


def test_a_finite_term_is_finite():
    assert Contribution({"a": {"w": np.ones(2)}}, 2.0, {"n": np.ones(2)}).is_finite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_value_in_an_array_is_not_finite(bad):
    parts = {"a": {"w": np.ones(2)}, "b": {"w": np.ones(2), "v": np.array([0, bad])}}
    assert not Contribution(parts).is_finite()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_bad_weight_is_not_finite(bad):
    assert not Contribution({"a": {"w": np.ones(2)}}, bad).is_finite()


@pytest.mark.parametrize("bad", [math.nan, np.array([1.0, math.inf])])
def test_a_bad_scalar_is_not_finite(bad):
    assert not Contribution({"a": {"w": np.ones(2)}}, 1.0, {"n": bad}).is_finite()


def counting(x, count):
    return Contribution({"delta": {"w": x}}, 1.0, counts={"delta": {"w": count}})


def test_counts_of_a_whole_array_and_of_its_coordinates_add_up():
    x = np.array([2.0, 4.0])
    whole, one = counting(x, np.array(1.0)), counting(x, np.array([1.0, 0.0]))
    for terms in ([whole, one, one], [one, whole, one], [one, one, whole]):
        together = Total()
        together.add(*terms)
        merged = Total()
        for term in terms:
            single = Total()
            single.add(term)
            merged.merge(single)
        for total in (together, merged):
            assert total.counts["delta"]["w"].tolist() == [3, 1]
            assert total.mean()["w"].tolist() == [2, 12]


# Around every bound: that of a change, of float16 and float32, and what squares to inf.
_NUMBERS = [0, 1.5, 6e4, -7e4, 9e16, 2e17, -9e17, 1.1e18, 3e38, -3e38]
_NUMBERS += [math.inf, -math.inf, math.nan]


@given(
    old=st.lists(st.sampled_from(_NUMBERS), min_size=3, max_size=3),
    new=st.lists(st.sampled_from(_NUMBERS), min_size=3, max_size=3),
    weight=st.sampled_from([0.0, 1.0, 50.0, 1e17, 1e200, math.inf, math.nan]),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_a_term_is_refused_exactly_if_the_model_cannot_take_it(old, new, weight, dtype):
    with np.errstate(all="ignore"):
        sent, came = np.array(old, dtype), np.array(new, dtype)
        wide = np.result_type(dtype, np.float32)
        change = came.astype(wide) - sent.astype(wide)
        same = (came == sent) | (np.isnan(came) & np.isnan(sent))
        change[same] = 0
        good = (
            math.isfinite(weight) and np.isfinite(change.astype(float) * weight).all()
        )
        if good and weight != 0:
            moved = (sent.astype(float) + change).astype(dtype)
            lost = ~np.isfinite(moved) & np.isfinite(sent)
            good = (np.abs(change) <= 1e18).all() and not lost.any()
    for size in (largest(sent), math.inf):
        term = Contribution({DELTA: {"w": subtract(came, sent, largest=size)}}, weight)
        assert term.can_move({"w": sent}) == good


def test_the_size_of_an_array_is_that_of_its_largest_number():
    assert largest(np.float32([1, -3, 2])) == 3
    assert largest(np.float32([1, math.nan])) == math.inf
    assert largest(np.float32([[-math.inf]])) == math.inf
    assert largest(np.empty((0, 2))) == 0
    assert within(np.float32([1, -3]), 3)
    assert not within(np.float32([1, -3]), 2.9)
    assert not within(np.float32([math.nan]), 3)
    assert not within(np.array([1, 2]), 3)  # integers are looked at exactly
    assert within(subtract(np.float32([1]), np.float32([-2]), largest=2), 3)
    assert not within(subtract(np.float32([1]), np.float32([-2]), largest=2), 2.9)
    assert not within(subtract(np.float32([1]), np.float32([-2])), 9)
