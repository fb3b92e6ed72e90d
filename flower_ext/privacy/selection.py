r"""A private choice of the best of several models: report noisy min.

The score of a model is the sum of its losses on the silo's examples, each clipped to
[0, cap]. A unit's contribution adds between 0 and G cap to every score, G examples of
one user, always upwards. The model of the least score plus Gumbel noise of scale
:math:`\tau` is chosen, which has the probability :math:`\propto e^{-s_i / \tau}`: the
exponential mechanism (McSherry and Talwar 2007). Without the unit all log
probabilities change by :math:`c_i / \tau` less a constant, with
:math:`0 \le c_i \le G\,\mathrm{cap}`, and so their changes are within :math:`\epsilon`
of each other for

.. math:: \tau = G\,\mathrm{cap} / \epsilon.

That is a bounded range of :math:`\epsilon` (Dong, Durfee and Rogers 2020, "Optimal
differential privacy composition for exponential mechanisms", arXiv 1909.13830). Scores
that a unit could move both ways would need twice the scale.
"""

import math
from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from flower_ext.core.errors import positive
from flower_ext.core.typing import Floats

# The noise multiplier for more would be below 0.1, see SiloPrivacy.
MOST_EPSILON = 30.0


def choice_noise_multiplier(epsilon: float) -> float:
    r"""Return the noise multiplier of a Gaussian release that reveals no less.

    Log likelihood ratios of a bounded range lie in :math:`[t - \epsilon, t]` for some
    t. Of all such pairs of distributions the most revealing takes the two ends only,
    the upper one with probabilities q and

    .. math:: p = q e^t, \quad
       q = \frac{e^{-t} - e^{-\epsilon}}{1 - e^{-\epsilon}}.

    Its trade-off curve is two straight lines that meet in :math:`(q, 1 - p)`. That of a
    Gaussian is convex: it is below both where it is not above the corner, for
    :math:`\mu \ge \Phi^{-1}(p) - \Phi^{-1}(q)`.

    That is largest for :math:`t = \epsilon / 2`. The odds of p are :math:`e^\epsilon`
    times those of q, so that it is the gain of :math:`\Phi^{-1}`, as a function of the
    log odds, over a piece of length :math:`\epsilon`. Its slope is
    :math:`N / \varphi` with :math:`N = \Phi (1 - \Phi)`, an even function of
    :math:`z = \Phi^{-1}`, which falls for :math:`z > 0` where
    :math:`k = z N + \varphi (1 - 2 \Phi) \le 0`. Now :math:`k(0) = k(\infty) = 0`,
    :math:`k'(0) = 1/4 - 1/\pi < 0`, and
    :math:`k'' / \varphi = 1 - 2 \Phi + 4 z \varphi`
    rises from 0, falls to -1 and so changes its sign once: :math:`k'` changes its own
    once, and k falls and then rises to 0. The piece that gains most is the one in the
    middle, where :math:`q = 1/(1 + e^{\epsilon/2}) = 1 - p` and
    :math:`\mu = -2 \Phi^{-1}(q)`.

    So a choice composes, also adaptively, as a Gaussian of noise multiplier
    :math:`1/\mu`: for a small epsilon about :math:`1.6 / \epsilon`.

    Examples
    --------
    >>> round(choice_noise_multiplier(1.0), 4)
    1.6028
    >>> choice_noise_multiplier(math.inf)
    0.0
    """
    positive("epsilon", epsilon, allow_inf=True)
    if math.isinf(epsilon):
        return 0.0
    return -0.5 / NormalDist().inv_cdf(1 / (1 + math.exp(epsilon / 2)))


def noisy_least(scores: Sequence[float], scale: float, uniforms: Floats) -> int:
    """Return the index of the least score plus Gumbel noise.

    Parameters
    ----------
    scores : sequence of float
        One for each model.
    scale : float
        Of the noise; 0 is none, and the first of equal scores is returned.
    uniforms : ndarray
        One for each score, independent, in the open interval (0, 1).

    Examples
    --------
    >>> noisy_least([3.0, 1.0, 1.0], 0.0, np.array([0.5, 0.5, 0.5]))
    1
    """
    # The largest of -s/scale + G, with G = -log(-log u) of the standard distribution.
    noise = -np.log(-np.log(uniforms))
    return int(np.argmin(np.asarray(scores) - scale * noise))
