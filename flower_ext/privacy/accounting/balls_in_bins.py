r"""Accounting of rounds that take turns, when nobody knows whose turn is when.

Each client is put into one of b bins, uniformly, independently of all others, and in
secret; round t is of bin t mod b. For a client in bin i the release C X + Z is shifted
by what it sends in the rounds of that bin, and without the client by nothing.

**The worst client sends the same in every round.** With contributions of norm at most 1
the pair that dominates is the mixture, over bins, of Gaussians around

.. math:: m_i = \sum_{t \in bin\ i} |C_{:, t}|,

against the Gaussian around 0 (for C >= 0 Choquette-Choo et al. 2024, who call them
modes). It holds for contributions that depend on what was released before, for a C of
any signs, and in both directions:

1. What others send depends on releases, on their own bins and coins: given these it can
   be subtracted, and divergences are jointly convex. Let x_t be what the client would
   send in round t if that is of its bin, a function of the rows :math:`y_{<t}` that
   were released (and of its coins and state, which are those of that bin). In units of
   the noise, row s has :math:`y_s \sim N(0, I)` without the client, and multiplies the
   likelihood ratio :math:`L_i` of bin i by :math:`\exp(\langle u_i, y_s \rangle -
   \|u_i\|^2 / 2)` with :math:`u_i = \sum_{t \in bin\ i} C_{st} x_t`, known before
   :math:`y_s` since C is lower-triangular. Both divergences are the mean of
   :math:`\varphi(\sum_i p_i L_i)`, for convex functions :math:`\varphi`.
2. Kahane's inequality (1986, "Une inegalite du type de Slepian et Gordon"): for
   centred Gaussians g and a >= 0, :math:`E\, \varphi(\sum_i a_i \exp(g_i -
   Var(g_i)/2))` grows with every covariance and with every variance. Along
   :math:`\sqrt{1 - r}\, g + \sqrt r\, g'` its derivative is half the sum over all i
   and j of :math:`Cov(g'_i, g'_j) - Cov(g_i, g_j)` times the mean of
   :math:`\varphi'' a_i a_j e^{g_i - \ldots} e^{g_j - \ldots} \ge 0` (for smooth
   :math:`\varphi`, and so for their limits).
3. Let :math:`U_s` be the mean of :math:`\varphi(\sum_i p_i L_i e^{w_i - Var(w_i)/2})`
   given :math:`y_{\le s}`, with w of covariance :math:`\sum_{r > s} m_i[r] m_j[r]`.
   Given :math:`y_{<s}` the mean of :math:`U_s` is the same with the covariance
   :math:`\langle u_i, u_j \rangle` added, which is at most :math:`\|u_i\| \|u_j\|
   \le m_i[s] m_j[s]`. So it is at most :math:`U_{s-1}`, by 2, and what is sought, the
   mean of :math:`U_n`, at most :math:`U_0`: the divergence of the pair above.

For C >= 0 the bound is attained. It also grows with the number of rounds. The relation
is that the client's contributions become zero; an exchange of clients is not covered.

Evaluations are further rows, that a client may be in whatever its bin, with what it
measures in it: with mu of all of them, mu^2 is added to every product of two shifts,
which bounds theirs as in 3.

A client that keeps something between rounds is covered: what it keeps may differ from
bin to bin, and what it sends in a round counts in no bin but that of the round.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from flower_ext.core.errors import at_least, open_unit, positive, refuse, whole
from flower_ext.core.typing import Floats
from flower_ext.privacy.accounting.accountants import Evaluations, RoundAccountant
from flower_ext.privacy.accounting.calibration import least_noise_below
from flower_ext.privacy.accounting.gaussian import gaussian_mu
from flower_ext.privacy.accounting.mixtures import GaussianMixtureLoss
from flower_ext.privacy.factorizations.banded import BandedToeplitz
from flower_ext.privacy.factorizations.factorization import Factorization
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload

if TYPE_CHECKING:
    from flwr.serverapp import PrivacyConfig

# Dense matrices beyond would take gigabytes.
_MOST_ROUNDS = 4096
# Share of delta that pays for draws that mislead.
_SHARE = 0.01
# A noise that was found is tried with draws of its own, and raised if they refute it:
# so many may be chosen in the end, the last of them that without amplification.
_NOISES, _STEP = 16, 1.005
_SEARCH, _ACCOUNT = 1, 0


def bin_shifts(factorization: Factorization, num_bins: int) -> tuple[Floats, Floats]:
    """Return the Gram matrix of the shifts m_i, and the probabilities of the bins.

    Parameters
    ----------
    factorization : Factorization
        With a square, lower-triangular C of at most 4096 rounds.
    num_bins : int
        b. Bins whose turn is after the last round are one entry, of no shift.

    Returns
    -------
    tuple of NDArray
        K in units of the squared clipping norm, shape ``(bins, bins)``, and p.

    Raises
    ------
    ValueError
        If C is of another form, or too large.

    Examples
    --------
    >>> from flower_ext.privacy import Identity
    >>> gram, shares = bin_shifts(Identity(3), num_bins=2)
    >>> gram.tolist(), shares.tolist()
    ([[2.0, 0.0], [0.0, 1.0]], [0.5, 0.5])
    """
    rounds = factorization.rounds
    if rounds > _MOST_ROUNDS:
        refuse(
            "rounds",
            rounds,
            f"<= {_MOST_ROUNDS} for balls in bins",
            "the shifts of all bins are computed from a dense matrix",
        )
    matrix = np.abs(factorization.strategy_matrix())
    if matrix.shape != (rounds, rounds) or np.triu(matrix, 1).any():
        refuse(
            "factorization",
            factorization,
            "one whose C is square and lower-triangular",
            "bins are accounted for from its columns, which those of trees are not",
        )
    present = min(whole("num_bins", num_bins, 1), rounds)
    shifts = [matrix[:, turn::num_bins].sum(axis=1) for turn in range(present)]
    if num_bins > present:
        shifts.append(np.zeros(rounds))
    stacked = np.array(shifts)
    shares = np.full(len(shifts), 1 / num_bins)
    shares[-1] = 1 - (len(shifts) - 1) / num_bins
    return stacked @ stacked.T, shares


class BallsInBinsAccountant(RoundAccountant):
    """Privacy amplified by balls in bins, by Monte Carlo with a stated confidence.

    Epsilon counts whole passes of the bins: in a pass it is that of its end. It is an
    upper bound with probability ``confidence``, over the draws of the accounting, for
    all epsilons of a run at one delta and the search for its noise together. The rest,
    1 - ``confidence``, is within delta: draws prove (epsilon, delta - (1 -
    ``confidence``)), so that accounting and run together are (epsilon, delta)-private.
    Draws come from a fixed seed: the same plan has the same epsilon, everywhere. Choose
    a plan before its epsilon is computed: of many that differ by a hair the luckiest
    draws would be picked.

    Parameters
    ----------
    factorization : Factorization
        The mechanism, with a square, lower-triangular C of at most 4096 rounds. Its
        bands may be more than there are bins.
    noise_multiplier : float
        Standard deviation of the noise over (clipping norm x largest column norm of C),
        > 0.
    num_bins : int
        b, at least 1; with 1 it is exact, a Gaussian release of everybody's rounds.
    config : flwr.serverapp.PrivacyConfig
        With sampling method ``no-amplification``: Flower has no word for this one, in
        which no round is sampled by itself.
    confidence : float, optional
        In (0, 1); by default 1 - ``target_delta`` / 100.
    evaluations : Evaluations, optional
        See :class:`~flower_ext.privacy.RoundAccountant`; not amplified.

    References
    ----------
    Choquette-Choo, Ganesh, Haque, Steinke, Thakurta 2024, "Near Exact Privacy
    Amplification for Matrix Mechanisms", arXiv 2410.06266; Chua et al. 2024,
    "Balls-and-Bins Sampling for DP-SGD", arXiv 2412.16802. Both draw from P and Q
    themselves; the importance sampling, and dominance for C of any sign, are ours: see
    `flower_ext.privacy.accounting.mixtures` and above.
    """

    _sampling = "no-amplification"

    def __init__(
        self,
        factorization: Factorization,
        noise_multiplier: float,
        num_bins: int,
        config: PrivacyConfig,
        *,
        confidence: float | None = None,
        evaluations: Evaluations | None = None,
    ) -> None:
        super().__init__(config, factorization.rounds, evaluations)
        self.factorization = factorization
        self.noise_multiplier = positive(
            "noise_multiplier", noise_multiplier, "a run without noise has no privacy"
        )
        self.num_bins = whole("num_bins", num_bins, 1)
        self.confidence = _confidence(confidence, config.target_delta)
        self._column_norm = factorization.sensitivity(1, 1).value
        self._plan = _Plan(factorization, num_bins, self.confidence)
        _shifts(self._plan)  # refuses what cannot be accounted for
        self._method = f"monte-carlo, confidence {self._stated}"

    @property
    def _stated(self) -> str:
        return f"1 - {1 - self.confidence:.3g}"

    @property
    def noise_std(self) -> float:
        """Standard deviation of Z in units of the clipping norm."""
        return self.noise_multiplier * self._column_norm

    @property
    def caveat(self) -> str:
        """How sure it is."""
        return f"by Monte Carlo, confidence {self._stated}"

    def epsilon_after(self, rounds: int, delta: float) -> float:
        """Return an upper bound of epsilon of the first ``rounds`` rounds.

        Raises
        ------
        ValueError
            If ``delta`` is not above 1 - ``confidence``.
        """
        proved = _proved(delta, self.confidence)
        if not (rounds := self._whole_passes(rounds)):
            return 0.0
        beside = self._evaluated(rounds)
        return _epsilon(self._plan.first(rounds), self.noise_std, proved, beside)

    def delta_after(self, rounds: int, epsilon: float) -> float:
        """Return an upper bound of delta of the first ``rounds`` rounds."""
        at_least("epsilon", epsilon, 0)
        if not (rounds := self._whole_passes(rounds)):
            return 0.0
        beside = self._evaluated(rounds)
        loss = _loss(self._plan.first(rounds), self.noise_std, beside)
        return min(1.0, loss.delta(epsilon) + 1 - self.confidence)

    def _whole_passes(self, rounds: int) -> int:
        """Return the end of the pass, of which a bin may have been the first."""
        passes = -(-self._check_rounds(rounds) // self.num_bins)
        return min(self.rounds, passes * self.num_bins)

    def _mechanism(self) -> dict[str, str | int | float]:
        return {
            "factorization": self.factorization.fingerprint(),
            "noise-multiplier": self.noise_multiplier,
            "num-bins": self.num_bins,
            "confidence": self.confidence,
        }


def noise_multiplier_in_bins(
    epsilon: float,
    delta: float,
    *,
    factorization: Factorization,
    num_bins: int,
    confidence: float | None = None,
    beside: float = 0.0,
) -> float:
    """Return a noise multiplier that meets a target, near the least.

    It is about 1% above, and up to 5% with hundreds of bins, for which fewer draws are
    affordable. It is sought with an eighth of the draws, and what is found is bounded
    anew with independent ones, as a `BallsInBinsAccountant` of it does, and raised by
    0.5% until that meets the target; after 15 tries it is the noise without
    amplification. The confidence covers all of them, for a target that these draws had
    no part in.

    Parameters
    ----------
    epsilon, delta : float
        The target.
    factorization, num_bins, confidence
        See `BallsInBinsAccountant`; ``delta`` is its target.
    beside : float
        mu of Gaussian releases beside, such as evaluations, that are not amplified.

    Examples
    --------
    >>> from flower_ext.privacy import Identity
    >>> noise = noise_multiplier_in_bins(
    ...     2.0, 1e-5, factorization=Identity(20), num_bins=20
    ... )
    >>> round(noise, 1)
    0.9
    """
    positive("epsilon", epsilon)
    confidence = _confidence(confidence, open_unit("delta", delta))
    proved = _proved(delta, confidence)
    plan = _Plan(factorization, num_bins, confidence)
    found, high = _sought(plan, epsilon, proved, beside)
    if found == high:  # one bin, that everybody knows
        return high
    column_norm = factorization.sensitivity(1, 1).value
    for tried in range(_NOISES - 1):
        noise = found * _STEP**tried
        if noise < high and _epsilon(plan, noise * column_norm, proved, beside) <= (
            epsilon
        ):
            return noise
    return high


def _sought(
    plan: _Plan, epsilon: float, proved: float, beside: float = 0.0
) -> tuple[float, float]:
    """Return the noise that draws of the search find, and that for known bins."""
    column_norm = plan.factorization.sensitivity(1, 1).value
    gram, shares = _shifts(plan)
    strongest = math.sqrt(float(np.diagonal(gram).max())) / column_norm
    known = gaussian_mu(epsilon, proved)
    if not at_least("beside", beside, 0) < known:
        refuse("beside", beside, f"< {known:.6g}", "nothing is left of the target")
    # A hair more so that rounding cannot break the promise.
    high = strongest / math.sqrt(known**2 - beside**2) * (1 + 1e-9)
    if len(shares) == 1:
        return high, high

    def spent(noise: float) -> float:
        return _epsilon(plan, noise * column_norm, proved, beside, _SEARCH, 8)

    return least_noise_below(high, spent, epsilon, 0.0, tolerance=2e-3), high


def target_in_bins(
    noise_multiplier: float,
    delta: float,
    *,
    factorization: Factorization,
    num_bins: int,
) -> float:
    """Return an epsilon of a whole run that is to be a target for another plan.

    By the draws of the search: a target that is made of those of the account would
    depend on how lucky they are, and so would the noise that these then bound.
    """
    confidence = _confidence(None, open_unit("delta", delta))
    deviation = noise_multiplier * factorization.sensitivity(1, 1).value
    plan = _Plan(factorization, num_bins, confidence)
    return _epsilon(plan, deviation, _proved(delta, confidence), stream=_SEARCH)


def best_in_bins(
    epsilon: float,
    delta: float,
    *,
    first: Factorization,
    num_bins: int,
    memory: int,
    workload: Workload = PREFIX_SUMS,
) -> Factorization:
    """Return what has the least error, root mean square, at the noise of a target.

    More bands cancel more noise, and less is amplified. Compared are bands of as many
    rounds as there are bins, or as fit into memory, of a half and of a quarter of them,
    and a factorization that is given; by draws of the search alone, so that the
    account's are of the one that is chosen, and not of the luckiest.

    Parameters
    ----------
    epsilon, delta : float
        The target.
    first : Factorization
        Of the planned rounds, and the choice where no bands are better.
    num_bins : int
        Bins that take turns.
    memory : int
        Model-sized buffers that the server can spare.
    workload : Workload
        What the error is measured on.
    """
    rounds = first.rounds
    most = min(whole("memory", memory, 0) + 1, whole("num_bins", num_bins, 1), rounds)
    candidates = [first] + [
        BandedToeplitz.optimize(
            rounds, bands, normalize_columns=True, workload=workload
        )
        for bands in sorted({most, most // 2, most // 4} - {0, 1}, reverse=True)
    ]

    positive("epsilon", epsilon)
    confidence = _confidence(None, open_unit("delta", delta))

    def error(factorization: Factorization) -> float:
        plan = _Plan(factorization, num_bins, confidence)
        noise, _ = _sought(plan, epsilon, _proved(delta, confidence))
        column_norm = factorization.sensitivity(1, 1).value
        return noise * column_norm * factorization.rms_error(workload)

    return min(candidates, key=error)


@dataclass(frozen=True)
class _Plan:
    """What epsilon depends on beside the noise: equal plans share what was drawn."""

    factorization: Factorization = field(compare=False)
    num_bins: int
    confidence: float
    planned: int = 0
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", self.factorization.fingerprint())
        object.__setattr__(self, "planned", self.planned or self.factorization.rounds)

    def first(self, rounds: int) -> _Plan:
        """Return the same for what the first rounds released."""
        part = self.factorization.first(rounds)
        return _Plan(part, self.num_bins, self.confidence, self.planned)

    @property
    def failure(self) -> float:
        """Failure probability of one bound, of those of all passes and noises."""
        # The noise is chosen by draws that later bound the passes as well.
        passes = -(-self.planned // self.num_bins)
        return (1 - self.confidence) / (passes * _NOISES)


@lru_cache(maxsize=4)
def _shifts(plan: _Plan) -> tuple[Floats, Floats]:
    return bin_shifts(plan.factorization, plan.num_bins)


def _loss(
    plan: _Plan,
    deviation: float,
    beside: float = 0.0,
    stream: int = _ACCOUNT,
    fewer: int = 1,
) -> GaussianMixtureLoss:
    gram, shares = _shifts(plan)
    return GaussianMixtureLoss(
        gram / deviation**2 + beside**2,
        shares,
        failure=plan.failure,
        stream=stream,
        fewer=fewer,
    )


@lru_cache(maxsize=256)
def _epsilon(
    plan: _Plan,
    deviation: float,
    delta: float,
    beside: float = 0.0,
    stream: int = _ACCOUNT,
    fewer: int = 1,
) -> float:
    return _loss(plan, deviation, beside, stream, fewer).epsilon(delta)


def _confidence(confidence: float | None, delta: float) -> float:
    if confidence is None:
        return 1 - _SHARE * delta
    return open_unit("confidence", confidence)


def _proved(delta: float, confidence: float) -> float:
    """Return the delta that draws must prove."""
    if not open_unit("delta", delta) > 1 - confidence:
        refuse(
            "delta",
            delta,
            f"> 1 - confidence = {1 - confidence:.3g}",
            "draws that mislead are part of it: a higher confidence",
        )
    return delta - (1 - confidence)
