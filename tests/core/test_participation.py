"""The game of taking part, against brute force over all sets and all orders."""

import math
from itertools import chain, combinations, permutations

import numpy as np
import pytest

from flower_ext.core.participation import NetworkGame


def games(number=30, clients=5):
    """Yield games of random thresholds and a benefit that grows."""
    for seed in range(number):
        rng = np.random.default_rng(seed)
        yield NetworkGame(
            np.sort(rng.uniform(0.4, 1, clients)).tolist(),
            rng.uniform(0.3, 0.6, clients).tolist(),
            rng.uniform(0, 0.4, clients).tolist(),
        )


def subsets(clients=5):
    sets = (combinations(range(clients), size) for size in range(clients + 1))
    return [frozenset(x) for x in chain.from_iterable(sets)]


def gains(game, client, inside):
    """Return what a client gains beside others, by the definition."""
    common = game.benefit[len(inside - {client})]
    return common - game.local[client] - game.costs[client]


def equilibria(game, payments=None):
    """Return all sets of which nobody would leave, and which nobody would join."""
    paid = payments or {}
    return [
        inside
        for inside in subsets()
        if all(
            (gains(game, i, inside) + paid.get(i, 0) >= 0) == (i in inside)
            for i in range(5)
        )
    ]


def test_from_nobody_and_from_everybody_it_comes_to_rest_in_n_rounds():
    ends = set()
    for game in games():
        every = equilibria(game)
        for start, least in ((frozenset(), True), (frozenset(range(5)), False)):
            sets = game.play(start)
            assert len(sets) - 1 <= 5
            grows = all(
                (a < b) if least else (a > b)
                for a, b in zip(sets, sets[1:], strict=False)
            )
            assert grows
            # The least of all equilibria, and the largest.
            assert sets[-1] in every
            assert all(sets[-1] <= x if least else sets[-1] >= x for x in every)
            ends.add(len(sets[-1]))
    assert len(ends) > 3


def test_free_for_all_everybody_joins_and_at_infinite_cost_nobody():
    benefit = [0.5, 0.6, 0.9]
    assert NetworkGame(benefit, [0.5] * 3, [0.0] * 3).play()[-1] == {0, 1, 2}
    assert NetworkGame(benefit, [0.0] * 3, [math.inf] * 3).play({0, 1, 2})[-1] == set()


def test_clients_that_change_places_for_ever_are_refused():
    game = NetworkGame([0.0, 1.0], [0.5, 0.5], [0.0, 0.0])
    with pytest.raises(ValueError, match="change places: begin with"):
        game.play({0})


def test_payments_make_a_set_an_equilibrium_and_no_smaller_ones_do():
    paid = 0
    for game in games():
        for target in subsets():
            if game.respond(target) - target:
                with pytest.raises(ValueError, match="no payment keeps them out"):
                    game.payments_to_stay(target)
                continue
            payments = game.payments_to_stay(target)
            enough = {i: p + 1e-12 * (p > 0) for i, p in payments.items()}
            assert target in equilibria(game, enough)
            for client, payment in payments.items():
                if payment > 1e-6:
                    paid += 1
                    less = {**enough, client: payment - 1e-6}
                    assert target not in equilibria(game, less)
    assert paid > 50


def test_the_cheapest_order_of_joining_is_that_of_brute_force():
    def cost(game, order):
        return sum(
            max(0.0, -gains(game, i, frozenset(order[:k]))) for k, i in enumerate(order)
        )

    gained = 0
    for game in games(number=20):
        target = range(5)
        payments = game.payments_to_join(target)
        costs = [cost(game, order) for order in permutations(target)]
        assert sum(payments.values()) == pytest.approx(min(costs), abs=1e-12)
        assert cost(game, tuple(payments)) == pytest.approx(min(costs), abs=1e-12)
        gained += max(costs) > min(costs) + 0.01
    assert gained > 10


def test_payments_in_the_order_of_joining_lead_from_nobody_to_all():
    for game in games():
        inside = frozenset()
        for client, payment in game.payments_to_join(range(5)).items():
            joined = game.respond(inside, {client: payment + 1e-12})
            assert client in joined
            inside |= {client}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (([0.5, 0.4], [0, 0], [0, 0]), "numbers that do not fall"),
        (([0.5], [0, 0], [0]), r"len\(local\)=2 must be 1"),
        (([0.5], [0], [-1]), "costs=-1 must be"),
        (([math.nan], [0], [0]), "must be"),
    ],
)
def test_what_is_no_game_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        NetworkGame(*options)


def test_payments_to_strangers_are_refused():
    with pytest.raises(ValueError, match="clients from 0 to 0"):
        NetworkGame([0.5], [0], [0]).payments_to_stay({3})
