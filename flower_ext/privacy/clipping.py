"""Bounding what one client can add, and adapting the bound in private.

A contribution is one vector: named arrays and named scalars together. A rule looks at
the l2 norms of these pieces alone and returns one factor per piece, all at most 1. The
pieces are multiplied by their factors while they are added up, so that none is copied.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from flower_ext.core.errors import at_least, open_unit, positive, refuse

# What is clipped is scaled a hair further down, so that rounding in a float64 sum of
# squares cannot bring its norm above the bound.
_MARGIN = 1 - 1e-12


def clipping_factor(norm: float, clipping_norm: float) -> float:
    """Return min(1, clipping_norm / norm), rounded towards the smaller.

    A norm of exactly ``clipping_norm`` is not clipped.

    Examples
    --------
    >>> clipping_factor(0.5, 1.0), round(clipping_factor(4.0, 1.0), 6)
    (1.0, 0.25)
    """
    return 1.0 if norm <= clipping_norm else clipping_norm / norm * _MARGIN


class Clipping(ABC):
    """How a contribution is brought to an l2 norm of at most ``clipping_norm``.

    Parameters
    ----------
    clipping_norm : float
        > 0. Infinity leaves every contribution as it is, and allows no noise.
    """

    clipping_norm: float

    def __post_init__(self) -> None:
        positive("clipping_norm", self.clipping_norm, allow_inf=True)

    @abstractmethod
    def factors(
        self, norms: Mapping[str, float], clipping_norm: float
    ) -> dict[str, float]:
        """Return what to multiply each piece with.

        Parameters
        ----------
        norms : Mapping[str, float]
            l2 norm of every piece, finite.
        clipping_norm : float
            The bound in force; the initial one, or what it was adapted to.
        """


@dataclass(frozen=True)
class FlatClipping(Clipping):
    """Scale the whole contribution: x <- x min(1, clipping_norm / ||x||)."""

    clipping_norm: float

    def factors(
        self, norms: Mapping[str, float], clipping_norm: float
    ) -> dict[str, float]:
        """Return the same factor for every piece."""
        factor = clipping_factor(math.hypot(*norms.values()), clipping_norm)
        return dict.fromkeys(norms, factor)


@dataclass(frozen=True)
class PerLayerClipping(Clipping):
    """Scale every array and scalar to a bound of its own.

    The squares of the bounds add up to the square of ``clipping_norm``, which is what
    the noise is for: epsilon is that of flat clipping, and with one array it is flat
    clipping. By default bounds are equal; :meth:`by_size` has larger ones for larger
    arrays.

    Parameters
    ----------
    clipping_norm : float
        Bound of the whole contribution.
    weights : Mapping[str, float], optional
        Relative bounds, > 0, of all pieces (``"delta/conv.weight"``: part and array;
        scalars by name); by default all are equal, clipping_norm / sqrt(pieces).
    """

    clipping_norm: float
    weights: Mapping[str, float] | None = None

    @classmethod
    def by_size(
        cls,
        clipping_norm: float,
        arrays: Mapping[str, npt.NDArray[np.generic]],
        part: str = "delta",
    ) -> "PerLayerClipping":
        r"""Split the bound by the arrays' sizes: :math:`C \sqrt{d_l / d}` for each.

        With noise of one size in all coordinates the ratio of bound and noise is then
        the same in every array.

        Parameters
        ----------
        clipping_norm : float
            :math:`C`, of the whole contribution.
        arrays : dict[str, ndarray]
            The model, or its shapes: :math:`d_l` is the number of entries. Arrays of
            integers are not clipped, and left out.
        part : str
            Part of the contribution that has them; by default the change.

        References
        ----------
        Pelikan et al. 2023, "Enabling Differentially Private Federated Learning for
        Speech Recognition", arXiv 2310.00098, which calls this split "dim" and equal
        bounds "uniform".

        Examples
        --------
        >>> model = {"w": np.ones((4, 4)), "b": np.ones(9)}
        >>> rule = PerLayerClipping.by_size(5.0, model)
        >>> factors = rule.factors({"delta/w": 8.0, "delta/b": 1.0}, 5.0)
        >>> round(factors["delta/w"], 6), factors["delta/b"]
        (0.5, 1.0)
        """
        sizes = {
            f"{part}/{n}": x.size for n, x in arrays.items() if x.dtype.kind == "f"
        }
        if not sizes or not all(sizes.values()):
            refuse("arrays", sizes, "arrays of real numbers, each with an entry")
        return cls(clipping_norm, {key: math.sqrt(d) for key, d in sizes.items()})

    def factors(
        self, norms: Mapping[str, float], clipping_norm: float
    ) -> dict[str, float]:
        """Return a factor for every piece.

        Raises
        ------
        ValueError
            If ``weights`` do not name exactly these pieces: what has no bound has no
            privacy.
        """
        weights = dict.fromkeys(norms, 1.0) if self.weights is None else self.weights
        if differ := sorted(set(weights) ^ set(norms)):
            refuse("weights", differ, f"all of and only {sorted(norms)}")
        if math.isinf(clipping_norm):  # clips nothing, and has no split
            return dict.fromkeys(norms, 1.0)
        bounds = split_clipping_norm(clipping_norm, weights)
        return {name: clipping_factor(norms[name], bounds[name]) for name in norms}


@dataclass(frozen=True)
class AdaptiveClipping(FlatClipping):
    """Flat clipping whose norm follows a quantile of the contributions' norms.

    Every client adds one bit, which says whether it was within the norm. The noisy
    fraction of such clients moves the norm, see `update_clipping_norm`. The bits are
    noised like everything else; a little more noise on the rest pays for them. The norm
    that clips a round's contributions also scales that round's noise. Where a mechanism
    uses noise again in later rounds, the norm changes only when it restarts.

    Parameters
    ----------
    clipping_norm : float
        The norm of the first round.
    target_quantile : float (default: 0.5)
        gamma in (0, 1); 0.5 is the median.
    clip_norm_lr : float (default: 0.2)
        eta >= 0; 0 keeps the norm.
    clipped_count_stddev : float, optional
        sigma_b, standard deviation of the noise on the count of bits; by default a
        twentieth of the planned cohort, or the noise's own (over the clipping norm)
        where that is more. It must exceed half of that, or the bits alone would spend
        the budget.

    References
    ----------
    Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive
    clipping", NeurIPS 2021, arXiv 1905.03871.
    """

    clipping_norm: float
    target_quantile: float = 0.5
    clip_norm_lr: float = 0.2
    clipped_count_stddev: float | None = None

    def __post_init__(self) -> None:
        # Finite, unlike in the class above: a factor cannot move infinity.
        positive("clipping_norm", self.clipping_norm)
        open_unit("target_quantile", self.target_quantile)
        at_least("clip_norm_lr", self.clip_norm_lr, 0)
        if self.clipped_count_stddev is not None:
            positive("clipped_count_stddev", self.clipped_count_stddev)


def split_clipping_norm(
    clipping_norm: float, weights: Mapping[str, float]
) -> dict[str, float]:
    """Split one norm over layers so that their squares add up to its square.

    Parameters
    ----------
    clipping_norm : float
        Norm of the whole contribution.
    weights : Mapping[str, float]
        Relative bounds, > 0; all 1 gives clipping_norm / sqrt(layers) to each.
    """
    bound = positive("clipping_norm", clipping_norm, "unlimited layers have no split")
    total = math.hypot(*(positive(f"weights[{k!r}]", w) for k, w in weights.items()))
    return {name: bound * weight / total for name, weight in weights.items()}


def update_clipping_norm(
    clipping_norm: float,
    unclipped_fraction: float,
    *,
    target_quantile: float = 0.5,
    learning_rate: float = 0.2,
) -> float:
    """Move the clipping norm towards a quantile of the contributions' norms.

        zeta <- zeta * exp(-eta (b - gamma))

    where b is the noisy fraction of clients that were NOT clipped: with b above gamma
    the norm is too generous and falls (Andrew et al. 2021, Algorithm 1).

    Parameters
    ----------
    clipping_norm : float
        zeta, the norm that this round's contributions were clipped with; their noise
        belongs to it, not to the result.
    unclipped_fraction : float
        b = 1/2 + (sum of b_i - 1/2, with noise) / planned cohort: each bit is shifted,
        so that a client changes the sum by 1/2 only. Noise may take it outside [0, 1].
    target_quantile : float
        gamma in (0, 1); 0.5 is the median.
    learning_rate : float
        eta >= 0; 0 keeps the norm.

    References
    ----------
    Andrew, Thakkar, McMahan, Ramaswamy, "Differentially private learning with adaptive
    clipping", NeurIPS 2021, arXiv 1905.03871.
    """
    norm = positive("clipping_norm", clipping_norm)
    target = open_unit("target_quantile", target_quantile)
    rate = at_least("learning_rate", learning_rate, 0)
    if not math.isfinite(unclipped_fraction):
        raise ValueError(f"unclipped_fraction={unclipped_fraction} must be finite")
    # Far out in the tail of its noise one count must not overflow the exponential.
    exponent = max(-50.0, min(50.0, -rate * (unclipped_fraction - target)))
    return positive("clipping_norm", norm * math.exp(exponent), "adaptation diverged")


def split_noise_multiplier(noise_multiplier: float, count_noise_std: float) -> float:
    """Return the noise multiplier left for the updates beside the noisy count.

        z_Delta = (z^-2 - (2 sigma_b)^-2)^{-1/2}

    so that both releases of a round together are as private as one with multiplier z
    (Andrew et al. 2021, Theorem 1).

    Parameters
    ----------
    noise_multiplier : float
        z of the round.
    count_noise_std : float
        sigma_b, standard deviation of the noise on the count; > z / 2.
    """
    total = positive("noise_multiplier", noise_multiplier)
    count = positive("count_noise_std", count_noise_std)
    # A bit moves its count by 1/2 (see above), so that the count alone is a release
    # with multiplier 2 sigma_b; of two Gaussian releases the z^-2 add up.
    if 2 * count <= total:
        raise ValueError(
            f"count_noise_std={count} must be > noise_multiplier / 2 = {total / 2}: "
            "the count alone would spend the whole budget"
        )
    return 1 / math.sqrt(total**-2 - (2 * count) ** -2)
