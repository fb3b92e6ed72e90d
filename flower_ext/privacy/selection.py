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
    t. Of all such pairs of distributions the most revealing takes the two ends only;
    its trade-off curve has one corner, on or above that of a Gaussian with

    .. math:: \mu(t) = \Phi^{-1}(q e^t) - \Phi^{-1}(q), \quad
       q = \frac{e^{-t} - e^{-\epsilon}}{1 - e^{-\epsilon}},

    largest for :math:`t = \epsilon / 2`, about which it is symmetric; the tests look at
    a grid. There :math:`q = 1/(1 + e^{\epsilon/2})` and
    :math:`\mu = -2 \Phi^{-1}(q)`. So a choice composes, also adaptively, as a Gaussian
    of noise multiplier :math:`1/\mu`: for a small epsilon about :math:`1.6 / \epsilon`.

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
