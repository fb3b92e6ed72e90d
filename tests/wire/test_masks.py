"""Masks: exactly k, the first of equals, NaN, and the ranks of an adapter."""

import doctest

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from flower_ext.wire import masks
from flower_ext.wire.masks import largest, rank_masks, top_k

shapes = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6)
floats = hnp.arrays(
    st.sampled_from([np.float16, np.float32, np.float64]),
    shapes,
    # Few values, so that there are ties.
    elements=st.sampled_from([0.0, -0.0, 0.5, -0.5, 1.0, 3.0, -3.0, np.inf, np.nan]),
)


def by_sorting(values, k):
    """Stable sort by decreasing magnitude, NaN first."""
    magnitude = np.abs(values.reshape(-1).astype(np.float64))
    magnitude = np.where(np.isnan(magnitude), np.finfo(np.float64).max, magnitude)
    rank = np.where(np.isinf(magnitude), 1e300, magnitude)
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-rank, kind="stable")[:k]] = True
    return mask.reshape(values.shape)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(floats, st.integers(0, 30))
def test_largest_is_the_stable_sort(values, k):
    mask = largest(values, k)
    assert mask.sum() == min(k, values.size)
    assert mask.shape == values.shape
    assert np.array_equal(mask, by_sorting(values, k))


@settings(derandomize=True, deadline=None)
@given(floats, st.integers(0, 30))
def test_choosing_again_from_what_was_kept_changes_nothing(values, k):
    mask = largest(values, k)
    kept = np.where(mask, values, np.zeros((), values.dtype))
    assert np.array_equal(largest(kept, k), mask)


def test_signs_and_zero_do_not_matter():
    assert largest(np.array([-0.0, 0.0, -1e-40], np.float32), 1).tolist() == [0, 0, 1]
    assert largest(np.array([-0.0, 0.0]), 1).tolist() == [True, False]


def test_global_and_per_tensor():
    arrays = {"a": np.array([[5.0, 4.0], [3.0, 1.0]]), "b": np.array([0.5, -2.0])}
    both = top_k(arrays, 0.5)
    assert both["a"].tolist() == [[True, True], [True, False]]
    assert not both["b"].any()
    each = top_k(arrays, 0.5, "tensor")
    assert each["a"].tolist() == [[True, True], [False, False]]
    assert each["b"].tolist() == [False, True]


def test_ties_over_arrays_go_to_the_first():
    arrays = {"b": np.ones(3, np.float32), "a": np.ones(3, np.float16)}
    found = top_k(arrays, 0.67)
    assert found["b"].tolist() == [True] * 3
    assert found["a"].tolist() == [True, False, False]


def test_within_takes_no_more_than_is_there():
    arrays = {"w": np.array([9.0, 8.0, 7.0, 6.0])}
    within = {"w": np.array([False, True, False, True])}
    for scope in ("global", "tensor"):
        assert top_k(arrays, 0.25, scope, within)["w"].tolist() == [0, 1, 0, 0]
        assert top_k(arrays, 0.75, scope, within)["w"].tolist() == [0, 1, 0, 1]
        assert not top_k(arrays, 0.0, scope, within)["w"].any()


def test_no_arrays_and_empty_ones():
    assert top_k({}, 0.5) == {}
    assert top_k({"a": np.zeros(0, np.float32)}, 1.0)["a"].shape == (0,)


@settings(derandomize=True, deadline=None)
@given(st.lists(floats, max_size=4), st.floats(1e-12, 1))
def test_every_density_above_0_keeps_something(arrays, density):
    named = {str(i): x for i, x in enumerate(arrays)}
    for name, mask in top_k(named, density, "tensor").items():
        size = named[name].size
        assert mask.sum() == min(size, max(1, int(density * size)))
    size = sum(x.size for x in arrays)
    kept = sum(int(mask.sum()) for mask in top_k(named, density).values())
    assert kept == min(size, max(1, int(density * size)))


@pytest.mark.parametrize("density", [-0.1, 1.1, float("nan"), True])
def test_density_out_of_range(density):
    with pytest.raises(ValueError, match="density="):
        top_k({"a": np.zeros(2)}, density)


def test_scope_that_is_not_known():
    with pytest.raises(ValueError, match="scope='layer'"):
        top_k({"a": np.zeros(2)}, 0.5, "layer")


def test_ranks_are_the_product_of_the_truncated_factors():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((4, 6)), rng.standard_normal((5, 4))
    names = "q.lora_A.default.weight", "q.lora_B.default.weight"
    arrays = dict(zip(names, (a, b), strict=True)) | {"head.weight": np.ones((2, 3))}
    found = rank_masks(arrays, 2)
    product = (b * found[names[1]]) @ (a * found[names[0]])
    assert product == pytest.approx(b[:, :2] @ a[:2])
    assert found["head.weight"].all()
    assert all(mask.all() for mask in rank_masks(arrays, 9).values())
    none = rank_masks(arrays, 0)
    assert not none[names[0]].any() and not none[names[1]].any()


@pytest.mark.parametrize("rank", [0, 1, 2, 3, 4, 9])
def test_ranks_by_what_they_are_worth(rank):
    rng = np.random.default_rng(1)
    a, b = rng.standard_normal((4, 6)), rng.standard_normal((5, 4))
    names = "q.lora_A.default.weight", "q.lora_B.default.weight"
    arrays = dict(zip(names, (a, b), strict=True)) | {"head.weight": np.ones((2, 3))}
    of_a = [float(np.sqrt((a[i] ** 2).sum())) for i in range(4)]
    of_b = [float(np.sqrt((b[:, i] ** 2).sum())) for i in range(4)]
    both = [x * y for x, y in zip(of_a, of_b, strict=True)]
    assert np.argsort(of_a).tolist() != np.argsort(both).tolist()
    for choice, values in (("pair", (both, both)), ("factor", (of_a, of_b))):
        found = rank_masks(arrays, rank, choice)
        for name, worth in zip(names, values, strict=True):
            kept = sorted(range(4), key=lambda i: -worth[i])[:rank]
            mask = np.isin(range(4), kept)
            whole = np.outer(mask, np.ones(6)) if "A" in name else [mask] * 5
            assert np.array_equal(found[name], np.array(whole, bool))
        assert found["head.weight"].all()
    with pytest.raises(ValueError, match="choice='svd'"):
        rank_masks(arrays, rank, "svd")


def test_doctests():
    assert doctest.testmod(masks).failed == 0
