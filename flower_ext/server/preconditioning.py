r"""Changes that are divided, coordinate by coordinate, before they are clipped.

A bound on the l2 norm, and noise that is as large in all coordinates, suit a vector
whose coordinates are of one size. Where they are not, the few large ones take the norm,
and the small ones drown in noise. Divided by :math:`\sqrt{A} + \tau`, with :math:`A` a
second moment of each coordinate, they are of about one size.

A bound on what is clipped holds whatever was done to it before, as long as that is the
same for all clients and made of what is public or was released: sensitivity and epsilon
stay as they are.
"""

from collections.abc import Mapping

import numpy as np

from flower_ext.core.arrays import Arrays, Term, multiply
from flower_ext.core.errors import refuse


def inverse_roots(second_moments: Arrays, tau: float) -> Arrays:
    r"""Return :math:`1 / (\sqrt{A} + \tau)` of every array, in float64.

    Parameters
    ----------
    second_moments : dict[str, ndarray]
        :math:`A \ge 0`.
    tau : float
        :math:`\tau \ge 0`, in the unit of a change; 0 only where all :math:`A > 0`.

    Raises
    ------
    ValueError
        If a factor is infinite.

    Examples
    --------
    >>> inverse_roots({"w": np.array([1.0, 9.0])}, tau=1.0)
    {'w': array([0.5 , 0.25])}
    """
    found: Arrays = {}
    for name, moments in second_moments.items():
        with np.errstate(divide="ignore", over="ignore"):
            found[name] = 1 / (np.sqrt(moments, dtype=np.float64) + tau)
        if not np.isfinite(found[name]).all():
            cause = f"{name!r} has second moments of 0 or nearly so"
            refuse("tau", tau, "so large that 1 / (sqrt(A) + tau) is finite", cause)
    return found


def precondition(
    change: Mapping[str, Term], preconditioner: Arrays
) -> Mapping[str, Term]:
    """Return a change times its factors; arrays without factors as they are."""
    return {
        name: multiply(x, preconditioner[name]) if name in preconditioner else x
        for name, x in change.items()
    }
