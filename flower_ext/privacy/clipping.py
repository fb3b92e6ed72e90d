"""Bounding what one client can add, and adapting the bound in private.

A contribution is one vector: named arrays and named scalars together. Its l2 norm is
taken over all of them in float64. All functions are pure; nothing is changed in place.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flower_ext.errors import (
    at_least,
    open_unit,
    positive,
    whole,
)

Array = NDArray[np.float32] | NDArray[np.float64]


@dataclass(frozen=True)
class Clipped:
    """A clipped contribution.

    Parameters
    ----------
    arrays : dict[str, NDArray]
        Clipped arrays, in the dtype they came in.
    scalars : dict[str, float]
        Clipped scalars.
    norm : float
        l2 norm before clipping.
    unclipped : bool
        Whether the contribution was within its bound, the bit of adaptive clipping.
    """

    arrays: dict[str, Array]
    scalars: dict[str, float]
    norm: float
    unclipped: bool


def l2_norm(
    arrays: Mapping[str, Array], scalars: Mapping[str, float] | None = None
) -> float:
    """Return the l2 norm of all arrays and scalars together, without overflow.

    Raises
    ------
    TypeError
        For arrays that are not floating point: a counter is not an update.
    ValueError
        For NaN or infinity, naming the entry.
    """
    norms = [_array_norm(name, array) for name, array in arrays.items()]
    for name, value in (scalars or {}).items():
        if not math.isfinite(value):
            raise ValueError(f"{name}={value} must be finite: local training diverged")
        norms.append(abs(float(value)))
    return math.hypot(*norms)


def _array_norm(name: str, array: Array) -> float:
    """Return the l2 norm of one array in float64."""
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(
            f"{name} has dtype {array.dtype}, must be floating point: leave integer "
            "buffers out of the contribution"
        )
    flat = array.reshape(-1)
    total, peak = 0.0, 0.0
    for low in range(0, flat.size, 1 << 16):
        part = flat[low : low + (1 << 16)].astype(np.float64)
        with np.errstate(over="ignore"):
            total += float(part @ part)
        peak = max(peak, float(np.abs(part).max()))
        if math.isnan(total):
            break
    if math.isfinite(total) and (total > 1e-280 or peak == 0):
        return math.sqrt(total)
    if not np.all(np.isfinite(flat)):
        raise ValueError(f"{name} must be finite: local training diverged")
    scaled = flat.astype(np.float64) / peak  # squares over- or underflow
    return peak * float(np.sqrt(scaled @ scaled))


def clip_flat(
    arrays: Mapping[str, Array],
    clipping_norm: float,
    scalars: Mapping[str, float] | None = None,
) -> Clipped:
    """Scale the whole contribution to norm at most ``clipping_norm``.

        x <- x * min(1, clipping_norm / ||x||)

    Parameters
    ----------
    arrays : Mapping[str, NDArray]
        Floating-point arrays of any shape.
    clipping_norm : float
        > 0; infinity leaves every contribution as it is (and allows no noise).
    scalars : Mapping[str, float], optional
        Scalars that count into the same norm.

    Notes
    -----
    Where a contribution is scaled, the factor is a few units in the last place
    smaller, so that rounding to float32 cannot exceed the bound. A norm of exactly
    ``clipping_norm`` counts as not clipped.

    Examples
    --------
    >>> import numpy as np
    >>> clipped = clip_flat({"w": np.array([3.0, 4.0])}, clipping_norm=1.0)
    >>> clipped.norm, clipped.unclipped, clipped.arrays["w"].round(3)
    (5.0, False, array([0.6, 0.8]))
    """
    bound = positive(
        "clipping_norm", clipping_norm, "a diverged adaptive norm", allow_inf=True
    )
    scalars = dict(scalars or {})
    norm = l2_norm(arrays, scalars)
    if norm <= bound:
        return Clipped(
            {name: array.copy() for name, array in arrays.items()}, scalars, norm, True
        )
    factor = bound / norm
    return Clipped(
        {name: _scaled(array, factor) for name, array in arrays.items()},
        {name: value * factor * (1 - 1e-15) for name, value in scalars.items()},
        norm,
        False,
    )


def _scaled(array: Array, factor: float) -> Array:
    """Return the array times the factor, rounded towards a smaller norm."""
    margin = 1 - 4 * float(np.finfo(array.dtype).eps)
    product = array.astype(np.float64) * (factor * margin)
    return np.asarray(product.astype(array.dtype))


def clip_per_layer(
    arrays: Mapping[str, Array],
    clipping_norms: Mapping[str, float],
    scalars: Mapping[str, float] | None = None,
) -> Clipped:
    """Scale every array and every scalar to its own bound.

    The sensitivity of the sum is `total_clipping_norm` of the bounds.

    Parameters
    ----------
    arrays, scalars : Mapping
        The contribution.
    clipping_norms : Mapping[str, float]
        One bound per array and scalar, no more and no less.
    """
    scalars = dict(scalars or {})
    if set(clipping_norms) != set(arrays) | set(scalars):
        difference = sorted(set(clipping_norms) ^ (set(arrays) | set(scalars)))
        raise ValueError(
            f"clipping_norms must name every array and scalar once, not {difference}: "
            "what has no bound has no privacy"
        )
    pieces = [
        clip_flat({name: array}, clipping_norms[name]) for name, array in arrays.items()
    ]
    pieces += [
        clip_flat({}, clipping_norms[name], {name: value})
        for name, value in scalars.items()
    ]
    return Clipped(
        {name: array for piece in pieces for name, array in piece.arrays.items()},
        {name: value for piece in pieces for name, value in piece.scalars.items()},
        math.hypot(*(piece.norm for piece in pieces)),
        all(piece.unclipped for piece in pieces),
    )


def total_clipping_norm(clipping_norms: Mapping[str, float]) -> float:
    """Return sqrt(sum of squared bounds), the norm of a per-layer contribution."""
    return math.hypot(
        *(
            positive(f"clipping_norms[{name!r}]", bound, allow_inf=True)
            for name, bound in clipping_norms.items()
        )
    )


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
    total = total_clipping_norm(weights)
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
        b, from `noisy_unclipped_fraction`; noise may take it outside [0, 1].
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
    exponent = max(-50.0, min(50.0, -rate * (unclipped_fraction - target)))
    return positive("clipping_norm", norm * math.exp(exponent), "adaptation diverged")


def noisy_unclipped_fraction(
    unclipped: int,
    clients: int,
    planned_clients: int,
    count_noise: float,
) -> float:
    """Return the private fraction of clients that were not clipped.

        b = (sum_i (b_i - 1/2) + noise) / m + 1/2

    Every bit is shifted by 1/2, so that one client changes the sum by 1/2 only.

    Parameters
    ----------
    unclipped : int
        Clients within their bound.
    clients : int
        Clients that replied.
    planned_clients : int
        m, the planned cohort; a divisor that reveals nothing.
    count_noise : float
        A draw of N(0, sigma_b^2), from a seeded or secure generator of the caller.
    """
    whole("planned_clients", planned_clients, 1)
    if not 0 <= unclipped <= clients:
        raise ValueError(f"unclipped={unclipped} must be in [0, clients={clients}]")
    if not math.isfinite(count_noise):
        raise ValueError(f"count_noise={count_noise} must be finite")
    return (unclipped - clients / 2 + count_noise) / planned_clients + 0.5


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
    if 2 * count <= total:
        raise ValueError(
            f"count_noise_std={count} must be > noise_multiplier / 2 = {total / 2}: "
            "the count alone would spend the whole budget"
        )
    return 1 / math.sqrt(total**-2 - (2 * count) ** -2)
