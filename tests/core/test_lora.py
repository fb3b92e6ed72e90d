"""LoRA pairs: what ranks are worth, and the product in the order of its spectrum."""

import doctest

import numpy as np
import pytest

from flower_ext.core import lora
from flower_ext.core.lora import by_singular_value, pairs, rank_norms, term_values

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
