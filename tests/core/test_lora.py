"""LoRA pairs: what ranks are worth, and the product in the order of its spectrum."""

import doctest

import numpy as np
import peft
import pytest
import torch

from flower_ext.core import lora
from flower_ext.core.lora import (
    add_to_base,
    by_singular_value,
    fresh_factor,
    pairs,
    rank_norms,
    split_base,
    sum_of_products,
    term_values,
)

A, B = "layer.q.lora_A.default.weight", "layer.q.lora_B.default.weight"
SHAPES = [((4, 6), (5, 4)), ((4, 9), (2, 4)), ((4, 4), (4, 4)), ((1, 3), (2, 1))]
CONVOLUTION = ((3, 2, 3, 3), (5, 3, 1, 1))


def pair(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {n: rng.standard_normal(s) for n, s in zip((A, B), shapes, strict=True)}


def product(arrays, rank=None):
    """The update of the weight, as a matrix, of the first ranks."""
    a, b = arrays[A], np.moveaxis(arrays[B], 1, -1)
    rows, columns = a.reshape(len(a), -1), b.reshape(-1, len(a))
    return columns[:, :rank] @ rows[:rank]


@pytest.mark.parametrize("shapes", [*SHAPES, CONVOLUTION, ((5, 3), (4, 5))])
def test_the_first_ranks_are_the_best_approximation(shapes):
    old = pair(shapes)
    new = by_singular_value(old)
    assert {n: x.shape for n, x in new.items()} == {n: x.shape for n, x in old.items()}
    u, s, v = np.linalg.svd(product(old))
    for rank in range(len(old[A]) + 1):
        best = (u[:, : len(s)] * s)[:, :rank] @ v[: len(s)][:rank]
        assert product(new, rank) == pytest.approx(best, abs=1e-12)
    assert product(new) == pytest.approx(product(old), abs=1e-12)


@pytest.mark.parametrize("shapes", [*SHAPES, CONVOLUTION])
def test_terms_are_then_worth_the_singular_values(shapes):
    old = pair(shapes)
    new = by_singular_value(old)
    found = np.zeros(len(old[A]))
    values = np.linalg.svd(product(old), compute_uv=False)[: len(found)]
    found[: len(values)] = values
    assert term_values(new)[A] == pytest.approx(found, abs=1e-12)
    # All rows of A' are as long, and together as long as those of A.
    lengths = np.linalg.norm(new[A].reshape(len(new[A]), -1), axis=1)
    assert lengths == pytest.approx(np.linalg.norm(old[A]) / np.sqrt(len(old[A])))


def test_a_new_adapter_still_learns():
    old = pair(SHAPES[0])
    old[B] *= 0
    new = by_singular_value(old)
    assert not new[B].any()
    both = np.concatenate([old[A], new[A]])
    assert np.linalg.matrix_rank(new[A]) == np.linalg.matrix_rank(both) == 4


def test_what_is_no_pair_stays():
    whole = pair(SHAPES[0])
    grouped = {A: np.zeros((4, 6)), B: np.zeros((5, 2))}
    for arrays in ({A: whole[A]}, {B: whole[B]}, {"w": np.eye(2)}, grouped):
        assert pairs(arrays) == [] and by_singular_value(arrays) == {}
    assert by_singular_value(whole | {A: np.full((4, 6), np.inf)}) == {}
    embedding = {"e.lora_embedding_A.x": whole[A], "e.lora_embedding_B.x": whole[B]}
    assert pairs(whole | embedding) == [(A, B), tuple(embedding)]


def test_a_term_is_worth_its_singular_value():
    arrays = pair(SHAPES[0])
    for i in range(4):
        term = np.outer(arrays[B][:, i], arrays[A][i])
        first, *rest = np.linalg.svd(term, compute_uv=False)
        assert term_values(arrays)[A][i] == pytest.approx(first)
        assert rest == pytest.approx([0] * len(rest), abs=1e-12)
    alone = {B: arrays[B]}
    assert term_values(alone)[B].tolist() == rank_norms(alone)[B].tolist()


def test_doctests():
    assert doctest.testmod(lora).failed == 0


# Sums of products ------------------------------------------------------------------


def terms(ranks, rows=7, columns=9, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (
            rng.random(),
            rng.standard_normal((rows, r)),
            rng.standard_normal((r, columns)),
        )
        for r in ranks
    ]


@pytest.mark.parametrize("ranks", [(1,), (2, 1), (3, 4, 2), (5, 5, 5)])
def test_factors_side_by_side_are_the_sum(ranks):
    parts = terms(ranks)
    dense = sum(c * b @ a for c, b, a in parts)
    product = sum_of_products(parts)
    assert product.left.shape == (7, sum(ranks))
    np.testing.assert_allclose(product.matrix(), dense, atol=1e-13)
    assert product.norm == pytest.approx(np.linalg.norm(dense))
    u, s, v = product.svd()
    theirs = torch.linalg.svdvals(torch.from_numpy(dense)).numpy()
    np.testing.assert_allclose(s, theirs[: len(s)], atol=1e-12)
    np.testing.assert_allclose((u * s) @ v, dense, atol=1e-12)
    assert len(s) == min(sum(ranks), 7)


def test_a_base_is_kept_in_what_is_less():
    """Factors of the rank that there is, until the matrix is fewer numbers."""
    first, again, more = terms((1, 1, 2))
    base = add_to_base({}, "q", sum_of_products([first]), np.float32)
    assert {n: x.shape for n, x in base.items()} == {
        "q.base_left": (7, 1),
        "q.base_right": (1, 9),
    }
    # What is in the span already adds no rank, and what cancels leaves none.
    scaled = (3.0, first[1], first[2])
    same = add_to_base(base, "q", sum_of_products([scaled]), np.float32)
    assert same["q.base_left"].shape == (7, 1)
    undone = (-first[0], first[1], first[2])
    nothing = sum_of_products([first, undone])
    assert add_to_base({}, "q", nothing, np.float32) == {}
    two = add_to_base(base, "q", sum_of_products([again]), np.float32)
    assert two["q.base_left"].shape == (7, 2)
    # Rank 4 of 7 x 9 would be 64 numbers, the matrix is 63.
    dense = add_to_base(two, "q", sum_of_products([more]), np.float32)
    assert {n: x.shape for n, x in dense.items()} == {"q.base_change": (7, 9)}
    expected = sum(c * b @ a for c, b, a in (first, again, more))
    np.testing.assert_allclose(dense["q.base_change"], expected, atol=2e-6)
    further = add_to_base(dense, "q", sum_of_products([more]), np.float32)
    expected = expected + more[0] * more[1] @ more[2]
    np.testing.assert_allclose(further["q.base_change"], expected, atol=2e-6)
    own, found = split_base({"head": 1, "q.base_left": 2, "base_model.x": 3})
    assert (own, found) == ({"head": 1, "base_model.x": 3}, {"q.base_left": 2})


def test_a_new_factor_is_drawn_as_peft_draws_it():
    layer = peft.tuners.lora.Linear(
        torch.nn.Linear(50, 30), "default", peft.LoraConfig(), r=16, lora_alpha=1
    )
    theirs = layer.lora_A["default"].weight.detach().numpy()
    name = "q.lora_A.default.weight"
    ours = fresh_factor(name, (16, 50), 3, 1)
    for x in (ours, theirs):
        assert np.abs(x).max() <= 1 / np.sqrt(50) and x.dtype == np.float32
        assert x.std() == pytest.approx(1 / np.sqrt(3 * 50), rel=0.05)
    assert np.array_equal(ours, fresh_factor(name, (16, 50), 3, 1))
    for other in ((name, 3, 2), (name, 4, 1), ("k" + name, 3, 1)):
        assert not np.array_equal(ours, fresh_factor(other[0], (16, 50), *other[1:]))
    assert not fresh_factor("q.lora_B.default.weight", (30, 16), 3, 1).any()
