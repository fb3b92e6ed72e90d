r"""Lower bounds on epsilon: what the right guesses of an attack prove.

An attack gives every canary a score, high when it believes that the canary was in the
run. *Seen* canaries were, *unseen* ones were held out. If the run is
(epsilon, delta)-private, then for every threshold

    TPR <= e^eps FPR + delta   and   TNR <= e^eps FNR + delta,

so that rates measured with confidence bound epsilon from below. A mechanism that claims
to be Gaussian claims more, Phi^-1(TPR) - Phi^-1(FPR) <= mu, and can be held to it.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from flower_ext.core.errors import at_least, one_of, open_unit, refuse, whole
from flower_ext.core.typing import Floats

# An expectation over a distribution is a mean over so many of its quantiles.
_GRID = 1000
_THRESHOLDS = 100  # candidates, at quantiles of all scores


@dataclass(frozen=True)
class Counts:
    """How often an attack was right, for seen and for unseen canaries.

    Parameters
    ----------
    true_positives, false_negatives : int
        Seen canaries that were called seen, and unseen.
    false_positives, true_negatives : int
        Unseen canaries that were called seen, and unseen.
    """

    true_positives: int
    false_negatives: int
    false_positives: int
    true_negatives: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole(name, value, 0)
        if self.true_positives + self.false_negatives == 0:
            raise ValueError("there must be at least one seen canary")
        if self.false_positives + self.true_negatives == 0:
            raise ValueError("there must be at least one unseen canary")

    @classmethod
    def at(cls, seen: Floats, unseen: Floats, threshold: float) -> Self:
        """Count the scores at or above a threshold."""
        right, wrong = int((seen >= threshold).sum()), int((unseen >= threshold).sum())
        return cls(right, len(seen) - right, wrong, len(unseen) - wrong)

    def rates(self, confidence: float = 0.95) -> tuple[float, float]:
        """Return (least TPR, greatest FPR), both true with the confidence.

        Clopper-Pearson, exact for any number of canaries; each of the two may fail
        with half of 1 - confidence.
        """
        from scipy.special import betaincinv  # type: ignore[import-untyped]

        # The bounds are quantiles of beta distributions; with no success, or no
        # failure, nothing better than 0 or 1 can be said.
        half = (1 - open_unit("confidence", confidence)) / 2
        least, greatest = 0.0, 1.0
        if self.true_positives:
            least = betaincinv(self.true_positives, self.false_negatives + 1, half)
        if self.true_negatives:
            greatest = betaincinv(
                self.false_positives + 1, self.true_negatives, 1 - half
            )
        return float(least), float(greatest)

    def epsilon(
        self, delta: float, confidence: float = 0.95, *, method: str = "clopper-pearson"
    ) -> float:
        r"""Return a lower bound on epsilon, 0 if nothing is shown.

            eps >= max(log((TPR - delta) / FPR), log((TNR - delta) / FNR))

        Parameters
        ----------
        delta : float
            In [0, 1).
        confidence : float
            The bound holds with at least this probability. The canaries' scores must be
            independent.
        method : str
            ``clopper-pearson`` is a confidence bound. ``bayesian`` is the quantile of
            the posterior of that maximum under Jeffreys priors: it is higher, and a
            belief rather than a guarantee.

        References
        ----------
        Jagielski, Ullman, Oprea 2020, arXiv 2006.07709; Zanella-Beguelin et al. 2023,
        arXiv 2206.05199 (Bayesian).

        Examples
        --------
        >>> round(Counts(95, 5, 5, 95).epsilon(1e-5), 3)
        2.062
        >>> Counts(50, 50, 50, 50).epsilon(1e-5)
        0.0
        """
        at_least("delta", delta, 0)
        one_of("method", method, ("clopper-pearson", "bayesian"))
        if method == "bayesian":
            return self._posterior_epsilon(delta, confidence)
        least, greatest = self.rates(confidence)
        return max(
            0.0,
            _log(least - delta) - _log(greatest),
            _log(1 - greatest - delta) - _log(1 - least),
        )

    def _posterior_epsilon(self, delta: float, confidence: float) -> float:
        """Return the epsilon that the posterior exceeds with the confidence."""
        from scipy.special import betainc, betaincinv

        # Under Jeffreys' prior the rates are Beta(1/2 + right, 1/2 + wrong), the false
        # positive rate apart from the false negative rate.
        half = 0.5
        middle = (np.arange(_GRID) + 0.5) / _GRID
        wrong = betaincinv(
            half + self.false_positives, half + self.true_negatives, middle
        )

        def below(epsilon: float) -> float:
            """Return the probability that epsilon allows the rates."""
            # For each false positive rate, the least false negative rate that both
            # inequalities of (epsilon, delta) allow.
            missed = np.maximum(
                1 - delta - math.exp(epsilon) * wrong,
                (1 - delta - wrong) * math.exp(-epsilon),
            )
            shape = half + self.false_negatives, half + self.true_positives
            return float(1 - betainc(*shape, np.clip(missed, 0, 1)).mean())

        return _largest(lambda epsilon: below(epsilon) <= 1 - confidence)

    def mu(self, confidence: float = 0.95) -> float:
        """Return a lower bound on mu of a mechanism that claims to be Gaussian.

            mu >= Phi^-1(TPR) - Phi^-1(FPR)

        It is far tighter than `epsilon`, because the claim of a Gaussian trade-off
        binds at every threshold, also where canaries are many.

        References
        ----------
        Nasr et al. 2023, arXiv 2302.07956, section 5.
        """
        from scipy.special import ndtri

        least, greatest = self.rates(confidence)
        bound = float(ndtri(least) - ndtri(greatest))
        return max(0.0, bound)

    def refutes(
        self, epsilons: Floats, deltas: Floats, confidence: float = 0.95
    ) -> bool:
        """Return whether the counts contradict a whole privacy profile.

        Parameters
        ----------
        epsilons, deltas : NDArray
            The claim: (epsilon, delta)-private for every pair.
        confidence : float
            A true claim is refuted with at most the remaining probability.
        """
        # At every epsilon: TPR <= e^eps FPR + delta, and TNR <= e^eps FNR + delta.
        least, greatest = self.rates(confidence)
        allowed = np.minimum(1, np.exp(epsilons) * greatest + deltas)
        kept = np.minimum(1, np.exp(epsilons) * (1 - least) + deltas)
        return bool(np.any(allowed < least) or np.any(kept < 1 - greatest))


def refuted_noise(
    counts: Counts,
    profile: Callable[[float, Floats], Floats],
    claimed: float,
    confidence: float = 0.95,
) -> float:
    """Return the least noise that a family of mechanisms cannot have had.

    This is `Counts.mu` for mechanisms that are not Gaussian, such as those amplified by
    sampling: the counts are held against all of delta(epsilon), not one point of it.

    Parameters
    ----------
    counts : Counts
        How often the attack was right and wrong.
    profile : Callable
        Given a noise multiplier and epsilons, their deltas; less noise, larger deltas.
    claimed : float
        The noise multiplier that is claimed; sought within a factor of 16 around it.
    confidence : float
        Probability with which the true noise is below the result.

    Returns
    -------
    float
        Within 2% above the least noise multiplier refuted; infinity if 16 times the
        claim is not.
    """
    # One set of rates serves all epsilons: the confidence is not shared among them.
    epsilons = np.linspace(0, 12, 25)

    def refuted(noise: float) -> bool:
        return counts.refutes(epsilons, profile(noise, epsilons), confidence)

    low, high = claimed / 16, 16 * claimed
    # Less noise is easier to refute, so that bisection finds where it ends.
    if not refuted(high):
        return math.inf
    while high / low > 1.02:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if refuted(middle) else (middle, high)
    return high


def _log(value: float) -> float:
    return math.log(value) if value > 0 else -math.inf


def _largest(holds: Callable[[float], bool], limit: float = 1e6) -> float:
    """Return where a property of numbers >= 0 ends, rounded down; 0 if it never holds.

    The property must be true up to some number and false above.
    """
    if not holds(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while holds(high):
        low, high = high, 2 * high
        if high > limit:
            return low
    while high - low > 1e-7 * max(1.0, high):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def choose_threshold(
    seen: Floats, unseen: Floats, value: Callable[[Counts], float]
) -> float:
    """Return the threshold with the greatest ``value``.

    Counts at it must be taken on other scores, see :func:`split_counts`.
    """
    # Scores themselves: between two neighbours all thresholds count the same.
    scores = np.concatenate([seen, unseen])
    levels = np.linspace(0, 1, _THRESHOLDS + 1)
    candidates = np.unique(np.quantile(scores, levels, method="nearest"))
    return float(max(candidates, key=lambda t: value(Counts.at(seen, unseen, t))))


def split_counts(
    seen: Floats, unseen: Floats, value: Callable[[Counts], float], *, seed: int = 0
) -> Counts:
    """Choose a threshold on one half of the canaries and count on the other.

    A threshold chosen on the scores that it is judged by would make chance look like
    leakage.

    Parameters
    ----------
    seen, unseen : NDArray
        Scores, at least two each.
    value : Callable
        What the threshold is chosen to maximise: ``lambda counts: counts.mu()``.
    seed : int
        Seed of the split.
    """
    for name, scores in (("seen", seen), ("unseen", unseen)):
        if len(scores) < 2:
            refuse(f"len({name})", len(scores), "at least 2", "one half chooses")
    generator = np.random.default_rng([seed, 2])
    seen, unseen = generator.permutation(seen), generator.permutation(unseen)
    first, other = len(seen) // 2, len(unseen) // 2
    threshold = choose_threshold(seen[:first], unseen[:other], value)
    return Counts.at(seen[first:], unseen[other:], threshold)


def epsilon_at_thresholds(
    seen: Floats,
    unseen: Floats,
    thresholds: Sequence[float],
    delta: float,
    confidence: float = 0.95,
) -> float:
    """Return the best of the bounds at thresholds fixed beforehand.

    All scores are used; 1 - confidence is shared by the thresholds (Bonferroni).

    Parameters
    ----------
    seen, unseen : NDArray
        Scores.
    thresholds : Sequence[float]
        Chosen without looking at the scores.
    delta, confidence : float
        See `Counts.epsilon`.
    """
    if not len(thresholds):
        raise ValueError("thresholds=[] must have at least one")
    each = 1 - (1 - open_unit("confidence", confidence)) / len(thresholds)
    return max(Counts.at(seen, unseen, t).epsilon(delta, each) for t in thresholds)


def epsilon_one_run(
    correct: int, guesses: int, canaries: int, delta: float, confidence: float = 0.95
) -> float:
    r"""Return a lower bound on epsilon from the guesses of a single run.

    Every canary was in the run on the toss of a fair coin of its own, and the attacker
    guessed some of the coins from the release. If the run is private, then with
    q = e^eps / (1 + e^eps) and B ~ Binomial(guesses, q)

        P(correct >= v) <= P(B >= v) + 2 m delta max_{i=1..v} P(v - i <= B < v) / i

    for m canaries. No independence of the scores is needed, and nothing is assumed of
    the mechanism; for a Gaussian mechanism the bound stays well below its epsilon.

    Parameters
    ----------
    correct, guesses, canaries : int
        ``correct <= guesses <= canaries``; the canaries that are not guessed count in m
        only.
    delta, confidence : float
        Delta in [0, 1).

    References
    ----------
    Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, Theorem 5.2.

    Examples
    --------
    >>> round(epsilon_one_run(1000, 1000, 1000, delta=0.0), 2)
    5.81
    """
    whole("correct", correct, 0)
    whole("canaries", canaries, 1)
    at_least("delta", delta, 0)
    open_unit("confidence", confidence)
    if not correct <= whole("guesses", guesses, 1) <= canaries:
        raise ValueError(
            f"correct={correct} must be <= guesses={guesses} <= canaries={canaries}"
        )

    def impossible(epsilon: float) -> bool:
        return _one_run_p_value(correct, guesses, canaries, epsilon, delta) <= (
            1 - confidence
        )

    return _largest(impossible, limit=1000.0)


def _one_run_p_value(
    correct: int, guesses: int, canaries: int, epsilon: float, delta: float
) -> float:
    """Bound the probability of so many correct guesses under (epsilon, delta)."""
    from scipy.special import bdtr, bdtrc

    # Theorem 5.2: the tail of Binomial(guesses, right), and what delta adds to it.
    right = 1 / (1 + math.exp(-epsilon))
    if not correct:
        return 1.0
    tail = float(bdtrc(correct - 1, guesses, right))
    # P(B < v - i) for i = 1, ..., v; the last is 0.
    under = np.append(bdtr(np.arange(correct - 2, -1, -1), guesses, right), 0.0)
    between = bdtr(correct - 1, guesses, right) - under
    worst = float((between / np.arange(1, correct + 1)).max())
    return min(1.0, tail + 2 * canaries * delta * worst)


def one_run_guesses(scores: Floats, included: NDArray[np.bool_], guesses: int) -> int:
    """Return how many of the surest guesses are right.

    The half with the highest scores is guessed to be in the run, the half with the
    lowest not to be.

    Parameters
    ----------
    scores : NDArray
        Shape ``(canaries,)``; they may depend on each other in any way.
    included : NDArray
        Whether the coin put each canary into the run.
    guesses : int
        At most the number of canaries. The fewer, the surer each guess.
    """
    if whole("guesses", guesses, 1) > len(scores):
        refuse("guesses", guesses, f"<= {len(scores)} canaries")
    order = np.argsort(scores, kind="stable")
    # Guesses may be left out: the scores in the middle are hardly better than coins.
    low, high = guesses // 2, guesses - guesses // 2
    chosen = included[order]
    return int((~chosen[:low]).sum() + chosen[len(chosen) - high :].sum())


def shift_ratio(scores: Floats, strengths: Floats, confidence: float = 0.95) -> float:
    r"""Return a lower bound on the signal of canaries over the noise of their scores.

    Scores are strength x signal + Gaussian noise of the same unknown deviation; the
    strengths are known, 0 for the unseen. With the least-squares signal a and the
    deviation s of what is left,

        t = a ||strengths|| / s   is noncentral t(canaries - 1, signal / noise),

    so that the bound is exact for Gaussian noise, with the null estimated from the
    unseen canaries. This is the one-shot estimate with its uncertainty; nothing
    needs to be guessed and no threshold chosen.

    Parameters
    ----------
    scores, strengths : NDArray
        Shape ``(canaries,)``, of one run or of several.
    confidence : float
        Probability that the bound holds.

    Returns
    -------
    float
        0 if nothing is shown, infinity without noise.

    References
    ----------
    Andrew et al. 2023, arXiv 2302.03098 (one-shot estimation; there without a bound).
    """
    from scipy.special import gammaincinv, ndtr

    freedom = len(scores) - 1
    energy = float(strengths @ strengths)
    if freedom < 2 or energy == 0:
        raise ValueError(
            f"scores: {len(scores)}, with {np.count_nonzero(strengths)} seen, must be "
            "at least 3 with at least one seen"
        )
    signal = float(scores @ strengths) / energy
    noise = math.sqrt(float(np.sum((scores - signal * strengths) ** 2)) / freedom)
    open_unit("confidence", confidence)
    if signal <= 0:
        return 0.0
    if noise <= 1e-12 * signal:
        return math.inf
    # P(T >= t) = E Phi(shift - t sqrt(V / f)), V chi-squared with f degrees of freedom,
    # of which ``spread`` has the quantiles of sqrt(V / f).
    statistic = signal * math.sqrt(energy) / noise
    middle = (np.arange(_GRID) + 0.5) / _GRID
    spread = np.sqrt(gammaincinv(freedom / 2, middle) * 2 / freedom)

    def too_weak(shift: float) -> bool:
        """Whether so large a statistic is too unlikely with this shift."""
        return float(ndtr(shift - statistic * spread).mean()) <= 1 - confidence

    return _largest(too_weak) / math.sqrt(energy)
