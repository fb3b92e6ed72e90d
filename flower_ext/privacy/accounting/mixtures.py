r"""(epsilon, delta) of a Gaussian release whose shift is secret, by Monte Carlo.

A client's contributions shift a Gaussian release by one of several known vectors, drawn
with known probabilities. Without them there is no shift:

.. math:: P = \sum_i p_i N(m_i, I), \qquad Q = N(0, I), \qquad
          L = \frac{dP}{dQ} = \sum_i p_i e^{v_i}, \quad v_i = \langle m_i, y \rangle
          - \|m_i\|^2 / 2.

Only :math:`K_{ij} = \langle m_i, m_j \rangle` matters: under Q the :math:`v_i` are
jointly Gaussian with covariance K. Sought are the two hockey-stick divergences

.. math:: \delta_{remove}(\epsilon) = E_Q[(L - e^\epsilon)_+], \qquad
          \delta_{add}(\epsilon) = E_Q[(1 - e^\epsilon L)_+].

**Importance sampling.** Naive samples of P or Q see a delta of 1e-6 once in a million
draws. Draws here are tilted towards the event, with an order :math:`t \ge 0`:

* remove: :math:`L^{t+1}` is a sum over sequences of t + 1 indices, each the likelihood
  ratio of a shift by the sum of their vectors. A sequence is drawn one index after the
  other, like the balls of Polya's urn, with probabilities proportional to
  :math:`p_j \exp \sum_a K_{i_a j}` over those before;
* add: :math:`\log L \ge \sum p_i v_i` by Jensen, and the release is shifted by
  :math:`-t \sum p_i m_i`.

Both give a loss :math:`\ell` (:math:`\log L`, or :math:`-\log L`) and a weight w with
:math:`\delta(\epsilon) = E[w (1 - e^{\epsilon - \ell})_+]` and
:math:`w \le Z e^{-t \ell}` for a number Z that is known. So every draw is at most

.. math:: B = Z \frac{t^t}{(t + 1)^{t + 1}} e^{-t \epsilon},

which bounds delta without any draw, as Renyi's divergence does, and turns the mean of n
draws into a bound by Chernoff's inequality for bounded variables (Hoeffding 1963,
Theorem 1): delta > d with probability at most :math:`\exp(-n\, kl(mean/B, d/B))`.
The bound falls with epsilon whatever was drawn, so that the smallest epsilon at which
it is below a delta is wrong no more often than the bound itself at the true one.

For a release by independent or correlated noise the vectors come from
`flower_ext.privacy.accounting.balls_in_bins`.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from flower_ext.core.errors import at_least, open_unit
from flower_ext.core.typing import Floats
from flower_ext.privacy.accounting.gaussian import gaussian_delta, gaussian_epsilon

_MOST_DRAWS, _LEAST_DRAWS = 2**18, 2**15
# Numbers that the draws of one bound work on: seconds.
_WORK = 2**30
_AT_A_TIME = 2**16  # of them together: what fits a processor's cache
_MOST_INDICES = 100
# Exponents up to here are far from what a float overflows at.
_LARGEST_EXPONENT = 300.0
_TINY = 1e-200  # a delta that is not worth a draw
# Streams of random numbers: of the draws that choose an order, and of those that count.
_CHOOSE, _COUNT = 0, 1


class _Direction(ABC):
    """Orders, the logarithms of their Z, and draws, of one of the two divergences."""

    orders: Floats
    norms: Floats

    def __init__(self, gram: Floats, shares: Floats) -> None:
        self.gram, self.shares = gram, shares
        self.half = np.diagonal(gram) / 2

    @abstractmethod
    def draw(
        self, place: int, root: Floats, count: int, generator: np.random.Generator
    ) -> tuple[Floats, Floats]:
        """Return losses and log weights of ``count`` draws with ``orders[place]``."""

    @abstractmethod
    def work(self, place: int) -> int:
        """Return on how many numbers one draw works."""

    def bounds(self, epsilon: float) -> Floats:
        """Return log B of every order."""
        return np.asarray(self.norms + _peak(self.orders) - self.orders * epsilon)

    def certain_epsilon(self, delta: float) -> tuple[float, int]:
        """Return the epsilon that needs no draws, and the place of its order."""
        orders = self.orders[1:]
        epsilons = (self.norms[1:] + _peak(orders) - math.log(delta)) / orders
        if not len(epsilons):
            return math.inf, 0
        place = int(np.argmin(epsilons))
        return max(0.0, float(epsilons[place])), place + 1

    def log_ratios(self, exponents: Floats) -> Floats:
        """Return log L for v."""
        largest = exponents.max(axis=1, keepdims=True)
        total = np.exp(exponents - largest) @ self.shares
        return np.asarray(np.log(total) + largest[:, 0])


class _Remove(_Direction):
    """P against Q: draws from an urn of shifts, of t + 1 indices."""

    def __init__(self, gram: Floats, shares: Floats) -> None:
        super().__init__(gram, shares)
        most = _LARGEST_EXPONENT / max(float(gram.max()), 1e-300)
        steps = np.arange(max(1, math.floor(min(most, _MOST_INDICES))))
        # The urn's sum of weights is convex in how often each index was drawn: it is
        # largest where all were the same.
        largest, powers = [], np.ones_like(gram)
        factors = np.exp(gram) if len(steps) > 1 else powers
        for _ in steps:
            largest.append(float((powers @ shares).max()))
            powers *= factors
        self.orders = steps.astype(np.float64)
        self.norms = np.cumsum(np.log(largest))

    def draw(
        self, place: int, root: Floats, count: int, generator: np.random.Generator
    ) -> tuple[Floats, Floats]:
        urn = np.repeat(self.shares[None], count, axis=0)
        logs = np.zeros(count)
        factors = np.exp(self.gram) if place else self.gram
        for step in range(place + 1):
            below = np.cumsum(urn, axis=1)
            total = below[:, -1]
            logs += np.log(total)
            index = (below < (generator.random(count) * total)[:, None]).sum(axis=1)
            if step < place:
                urn *= factors[index]
        shift = np.log(urn / self.shares) + self.gram[index]
        noise = generator.standard_normal((count, len(root))) @ root
        losses = self.log_ratios(shift + noise - self.half)
        return losses, logs - place * losses

    def work(self, place: int) -> int:
        return len(self.shares) * (5 * (place + 1) + len(self.shares) // 8)


class _Add(_Direction):
    """Q against P: draws that are shifted away from the mean of the shifts."""

    def __init__(self, gram: Floats, shares: Floats) -> None:
        super().__init__(gram, shares)
        self.orders = np.concatenate([[0.0], np.geomspace(0.05, 1e4, 500)])
        self._towards = gram @ shares
        self._variance = float(shares @ self._towards)
        mean = float(shares @ self.half)
        self.norms = self.orders * mean + self.orders**2 * self._variance / 2

    def draw(
        self, place: int, root: Floats, count: int, generator: np.random.Generator
    ) -> tuple[Floats, Floats]:
        order = float(self.orders[place])
        noise = generator.standard_normal((count, len(root))) @ root
        exponents = noise - order * self._towards
        logs = order * (exponents @ self.shares) + order**2 * self._variance / 2
        return -self.log_ratios(exponents - self.half), logs

    def work(self, place: int) -> int:
        del place
        return len(self.shares) * (5 + len(self.shares) // 8)


class GaussianMixtureLoss:
    """Bounds of (epsilon, delta), each true with probability 1 - ``failure``.

    Parameters
    ----------
    gram : NDArray
        K, shape ``(shifts, shifts)``, all entries >= 0, in units of the noise's
        variance.
    shares : NDArray
        p, the probabilities of the shifts; they add up to 1.
    failure : float
        Probability, over the draws, that one bound is wrong.
    stream : int (default: 0)
        Different numbers draw independently. The draws are otherwise the same every
        time, and with them the bounds.
    fewer : int (default: 1)
        Draw this many times fewer, and bound as if there were all: for a search,
        whose result is bounded again with all.
    """

    def __init__(
        self,
        gram: Floats,
        shares: Floats,
        *,
        failure: float,
        stream: int = 0,
        fewer: int = 1,
    ) -> None:
        self._strongest = math.sqrt(float(np.diagonal(gram).max()))
        self._is_single = len(shares) == 1
        self._directions: tuple[_Direction, ...] = (
            _Remove(gram, shares),
            _Add(gram, shares),
        )
        # Half for each direction.
        self._log_failure = math.log(open_unit("failure", failure) / 2)
        self._stream, self._fewer = stream, fewer
        values, vectors = np.linalg.eigh(gram)
        self._root = (vectors * np.sqrt(np.maximum(values, 0.0))).T

    def epsilon(self, delta: float) -> float:
        """Return an upper bound of epsilon at ``delta``."""
        # If the shift were known, it would be a Gaussian release.
        known = gaussian_epsilon(self._strongest, open_unit("delta", delta))
        if self._is_single:
            return known
        found = 0.0
        for direction in self._directions:
            if direction.certain_epsilon(delta)[0] > found:
                found = max(found, self._epsilon(direction, delta, known))
        return min(known, found)

    def delta(self, epsilon: float) -> float:
        """Return an upper bound of delta at ``epsilon``."""
        known = gaussian_delta(self._strongest, at_least("epsilon", epsilon, 0))
        if self._is_single:
            return known
        found = max(self._delta(each, epsilon) for each in self._directions)
        return min(known, found)

    def _epsilon(self, direction: _Direction, delta: float, known: float) -> float:
        certain, place = direction.certain_epsilon(delta)
        certain = min(certain, known)
        # A first look says where epsilon is, the order that is best there counts.
        draws = self._draw(direction, place, _CHOOSE)
        rough = _bisect(lambda e: draws.mean(e) <= delta, certain)
        place = int(np.argmin(direction.bounds(rough)))
        draws = self._draw(direction, place, _COUNT)

        def is_proved(epsilon: float) -> bool:
            bound = math.exp(min(direction.bounds(epsilon)[place], 700.0))
            return self._is_below(draws, epsilon, bound, delta)

        return _bisect(is_proved, certain)

    def _delta(self, direction: _Direction, epsilon: float) -> float:
        bounds = direction.bounds(epsilon)
        place = int(np.argmin(bounds))
        bound = math.exp(bounds[place])
        if bound < _TINY:
            return bound
        draws = self._draw(direction, place, _COUNT)

        def is_proved(log_ratio: float) -> bool:
            return self._is_below(draws, epsilon, bound, bound * math.exp(log_ratio))

        # Between a thousandth of the mean and the bound, in logarithms.
        least = math.log(max(draws.mean(epsilon) / bound, 1e-30)) - 7.0
        return bound * math.exp(least + _bisect(lambda x: is_proved(least + x), -least))

    def _is_below(
        self, draws: "_Draws", epsilon: float, bound: float, delta: float
    ) -> bool:
        """Return whether draws of at most ``bound`` prove that delta is below."""
        if delta >= bound:
            return True
        mean, limit = draws.mean(epsilon) / bound, delta / bound
        if mean >= limit:
            return False
        distance = (1 - mean) * (math.log1p(-mean) - math.log1p(-limit))
        if mean > 0:
            distance += mean * math.log(mean / limit)
        return draws.counted * distance >= -self._log_failure

    def _draw(self, direction: _Direction, place: int, purpose: int) -> "_Draws":
        work = direction.work(place)
        counted = min(_MOST_DRAWS, max(_LEAST_DRAWS, _WORK // work))
        fewer = 16 if purpose == _CHOOSE else self._fewer
        generator = np.random.default_rng([self._stream, purpose])
        parts, left = [], -(-counted // fewer)
        while left:
            count = min(left, max(1, _AT_A_TIME // len(direction.shares)))
            parts.append(direction.draw(place, self._root, count, generator))
            left -= count
        losses, logs = map(np.concatenate, zip(*parts, strict=True))
        return _Draws(losses, logs, counted)


class _Draws:
    """Losses and weights that were drawn, and how many they are counted as."""

    def __init__(self, losses: Floats, logs: Floats, counted: int) -> None:
        order = np.argsort(losses)
        self._losses, self._logs, self.counted = losses[order], logs[order], counted

    def mean(self, epsilon: float) -> float:
        """Return the mean of w (1 - e^(epsilon - loss))_+."""
        start = int(np.searchsorted(self._losses, epsilon, side="right"))
        losses, logs = self._losses[start:], self._logs[start:]
        terms = np.exp(logs) * -np.expm1(epsilon - losses)
        return float(terms.sum()) / len(self._losses)


def _peak(orders: Floats) -> Floats:
    """Return the log of max over x in (0, 1) of x^t (1 - x): t^t / (t + 1)^(t + 1)."""
    more = orders + 1
    return np.asarray(orders * np.log(np.maximum(orders, 1e-300)) - more * np.log(more))


def _bisect(is_true: Callable[[float], bool], high: float) -> float:
    """Return where a statement that is true at ``high`` becomes true, from above 0."""
    low, width = 0.0, 1e-4 * max(high, 1e-3)
    if is_true(0.0):
        return 0.0
    while high - low > width:
        middle = (low + high) / 2
        low, high = (low, middle) if is_true(middle) else (middle, high)
    return high
