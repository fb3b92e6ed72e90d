r"""Taking part in a federation as a game: who joins, and which payments change it.

What a client gains by joining grows with the others who have: the model is better. What
it pays, in energy or in trust, does not. So there may be several equilibria, an empty
federation among them, and a payment for a while may lead from one to another (Hu,
Ngo, Zheng, Smith and Wu 2023, "Federated learning as a network effects game", arXiv
2302.08533).

The abstract of that paper says that a client's benefit depends on who else has joined,
that myopic moves lead to an equilibrium, and that payments can reach a desired one
from an empty network. The utility, the payments and the proofs here are our own.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from flower_ext.core.errors import at_least, finite, refuse


@dataclass(frozen=True)
class NetworkGame:
    r"""Clients that join where the model of all is worth more to them than its price.

    Client i gains, with k others inside and a payment :math:`p_i`,

    .. math:: u_i = A(k + 1) - L_i - c_i + p_i

    by being inside: the metric of the common model, less that of its own one, less its
    cost. It is inside if that is at least 0.

    Parameters
    ----------
    benefit : sequence of float
        :math:`A(1), \dots, A(n)`: the metric of the common model, such as accuracy,
        that so many clients train. Larger is better, and it must not fall.
    local : sequence of float
        :math:`L_i`: what each of the n clients reaches alone.
    costs : sequence of float
        :math:`c_i \ge 0`, in units of the metric; infinity never joins.

    Examples
    --------
    Nobody begins, although all would stay; one payment starts them off:

    >>> game = NetworkGame([0.5, 0.7, 0.8], local=[0.5] * 3, costs=[0.1, 0.15, 0.2])
    >>> game.play()
    [frozenset()]
    >>> sorted(game.play(inside=range(3))[-1])
    [0, 1, 2]
    >>> {i: round(p, 6) for i, p in game.payments_to_join(range(3)).items()}
    {0: 0.1, 1: 0.0, 2: 0.0}
    """

    benefit: Sequence[float]
    local: Sequence[float]
    costs: Sequence[float]

    def __post_init__(self) -> None:
        number = len(self.benefit)
        for name in ("local", "costs"):
            if len(getattr(self, name)) != number:
                bound = f"{number}, one for each number of participants in benefit"
                refuse(f"len({name})", len(getattr(self, name)), bound)
        for x in (*self.benefit, *self.local):
            finite("benefit, local", x)
        for cost in self.costs:
            at_least("costs", cost, 0, allow_inf=True)
        if list(self.benefit) != sorted(self.benefit):
            cause = "the theory is of clients who do not harm each other"
            refuse("benefit", self.benefit, "numbers that do not fall", cause)

    def threshold(self, client: int) -> float:
        """Return the metric from which on a client is inside without a payment."""
        return self.local[client] + self.costs[client]

    def respond(
        self, inside: Collection[int], payments: Mapping[int, float] | None = None
    ) -> frozenset[int]:
        """Return who is inside after all have answered at once to who was."""
        paid = payments or {}
        return frozenset(
            client
            for client in range(len(self.benefit))
            if self.benefit[len(set(inside) - {client})] + paid.get(client, 0.0)
            >= self.threshold(client)
        )

    def play(
        self,
        inside: Collection[int] = (),
        payments: Mapping[int, float] | None = None,
    ) -> list[frozenset[int]]:
        """Return who is inside, round after round, until nobody moves any more.

        From nobody sets only grow, and from everybody they only shrink: after at most n
        rounds they stay.

        Raises
        ------
        ValueError
            If, from another start, the same sets come again and again.
        """
        seen = [frozenset(inside)]
        while (after := self.respond(seen[-1], payments)) != seen[-1]:
            if after in seen:
                cause = (
                    "clients that answer at once change places: begin with () or all"
                )
                refuse("inside", sorted(seen[0]), "a start that comes to rest", cause)
            seen.append(after)
        return seen

    def payments_to_stay(self, target: Collection[int]) -> dict[int, float]:
        r"""Return the smallest payments for which a set is an equilibrium.

        They are :math:`\max(0, L_i + c_i - A(|T|))` to each of the set T, for good.

        Raises
        ------
        ValueError
            If somebody else would join without a payment.
        """
        members = self._require_closed(target)
        reached = self.benefit[len(members) - 1] if members else 0.0
        return {i: max(0.0, self.threshold(i) - reached) for i in sorted(members)}

    def payments_to_join(self, target: Collection[int]) -> dict[int, float]:
        r"""Return the smallest payments that lead from nobody to a set, one by one.

        The k-th to join needs :math:`\max(0, L_i + c_i - A(k))`. The sum is least if
        those with the least thresholds come first: the payment is convex in the
        difference, so that the sorted pairing is the cheapest. Once inside, payments
        may fall to those of :meth:`payments_to_stay`.

        Returns
        -------
        dict[int, float]
            In the order of joining.

        Raises
        ------
        ValueError
            If somebody else would join without a payment.
        """
        order = sorted(
            self._require_closed(target), key=lambda i: (self.threshold(i), i)
        )
        return {
            client: max(0.0, self.threshold(client) - self.benefit[k])
            for k, client in enumerate(order)
        }

    def _require_closed(self, target: Collection[int]) -> frozenset[int]:
        members, number = frozenset(target), len(self.benefit)
        if not members <= set(range(number)):
            refuse("target", sorted(members), f"clients from 0 to {number - 1}")
        if uninvited := sorted(self.respond(members) - members):
            cause = (
                f"clients {uninvited} gain by joining, and no payment keeps them out"
            )
            refuse("target", sorted(members), "a set that nobody else joins", cause)
        return members


def gain(
    common: float, local: float, cost: float, payment: float, *, sign: float = 1.0
) -> float:
    """Return what a client gains by being inside; ``sign`` is -1 for a loss."""
    return -math.inf if cost == math.inf else sign * (common - local) - cost + payment
