"""The global generators: seeded all, and left as they were."""

import random

import numpy as np
import pytest
import torch

from flower_ext.client.seeds import same_globals, seed_all


def draws(normals=1):
    """Draw from every global generator; a Gaussian of NumPy's may be left waiting."""
    return [
        np.random.normal(size=normals).tolist(),  # noqa: NPY002
        np.random.random(3).tolist(),  # noqa: NPY002
        random.random(),
        torch.rand(2).tolist(),
    ]


@pytest.mark.parametrize("before", [None, 0, 1, 2])
@pytest.mark.parametrize("inside", ["nothing", "draw", "odd", "seed", "nested"])
def test_generators_go_on_as_if_nothing_had_been_drawn(before, inside):
    def begin():
        seed_all(5)
        if before is not None:
            np.random.normal(size=before)  # noqa: NPY002
            np.random.random(before)  # noqa: NPY002

    begin()
    expected = draws(3)
    begin()
    for _ in range(3):  # again, from what it has put back itself
        with same_globals():
            if inside == "seed":
                seed_all(7)
            if inside == "nested":
                draws(1)
                with same_globals():
                    draws(2)
            if inside != "nothing":
                draws(1 if inside == "odd" else 2)
    assert draws(3) == expected


def test_a_seed_forgets_a_gaussian_that_waits():
    seed_all(3)
    first = draws()
    np.random.normal()  # noqa: NPY002
    seed_all(3)
    assert draws() == first


def test_a_generator_of_the_users_own_choice_is_left_as_it_was():
    own, usual = np.random.PCG64(1), np.random.get_bit_generator()
    np.random.set_bit_generator(own)
    try:
        expected = np.random.Generator(np.random.PCG64(1)).random()
        with same_globals():
            np.random.random(4)  # noqa: NPY002
        assert np.random.Generator(own).random() == expected
    finally:
        np.random.set_bit_generator(usual)
