"""How far the changes of clients are apart, from two sums."""

from collections.abc import Collection
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from flower_ext.core.arrays import norm
from flower_ext.core.contribution import Contribution, Total, is_change
from flower_ext.core.typing import Floats

SQUARE_OF = "squared-norm-of-"


class Spread(NamedTuple):
    r"""What a server optimizer may ask to know of a round beside the direction.

    Of several models each has a mean of its own, and both numbers are sums over them.

    Attributes
    ----------
    mean_square : float
        :math:`\sum_k w_k \|\Delta_k\|^2 / \sum_k w_k`, with the clients' weights.
    square_of_mean : float
        :math:`\|\sum_k w_k \Delta_k / \sum_k w_k\|^2`, never larger.
    """

    mean_square: float
    square_of_mean: float


def with_squares(term: Contribution, left_out: Collection[str]) -> Contribution:
    """Return a term with the weighted squared norm of each change as a scalar.

    Parameters
    ----------
    term : Contribution
        Its weights are as they will be in the sum.
    left_out : collection of str
        Arrays that do not count, such as counters.
    """
    scalars = dict(term.scalars)
    for part, arrays in term.arrays.items():
        weight = term.weight_of(part)
        if is_change(part):
            counted = [x for name, x in arrays.items() if name not in left_out]
            # What has no weight may be of any size.
            square = weight * norm(counted) ** 2 if weight else 0.0
            scalars[SQUARE_OF + part] = square
    return replace(term, scalars=scalars)


def take_spread(total: Total, left_out: Collection[str]) -> Spread:
    """Remove the sums of squared norms, and return what they tell.

    Parameters
    ----------
    total : Total
        Of terms by :func:`with_squares`, of which no mean has been taken.
    left_out : collection of str
        As there.
    """
    mean_square = square_of_mean = 0.0
    for part in [key for key in total.arrays if SQUARE_OF + key in total.scalars]:
        square = float(total.scalars.pop(SQUARE_OF + part))
        weight = total.weights.get(part, total.weight)
        if weight > 0:
            mean_square += square / weight
            counts = total.counts.get(part, {})
            square_of_mean += sum(
                norm([_mean(x, counts.get(name), weight)]) ** 2
                for name, x in total.arrays[part].items()
                if name not in left_out
            )
    return Spread(mean_square, square_of_mean)


def _mean(total: Floats, count: Floats | None, weight: float) -> Floats:
    if count is None:
        return np.asarray(total / weight)
    by = np.broadcast_to(count, total.shape)
    return np.divide(total, by, out=np.zeros(total.shape), where=by > 0)
