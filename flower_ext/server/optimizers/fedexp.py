"""FedExP: a server step that is the longer, the less clients agree."""

import numpy as np
from flwr.common import NDArray

from flower_ext.core.errors import positive
from flower_ext.core.spread import Spread
from flower_ext.server.optimizers.base import Elementwise


class FedExP(Elementwise):
    r"""FedExP (Jhunjhunwala, Wang and Joshi 2023, ICLR, arXiv:2301.09604).

    Where averages of changes are short because the changes point away from each other,
    the server goes further along the average, by the paper's equation for
    :math:`\eta_g`, with K clients in the sum:

    .. math::
       w_{t+1} = w_t + \eta_g \bar\Delta, \qquad
       \eta_g = \max\left(1,
       \frac{\sum_k \|\Delta_k\|^2}{2K(\|\bar\Delta\|^2 + \epsilon)}\right)

    Clients that all move alike, or one client alone, give :math:`\eta_g = 1`, which is
    averaging; K that move as far as each other at right angles, K/2.

    Parameters
    ----------
    epsilon : float (default: 1e-3)
        :math:`\epsilon > 0`, in squares of the change's norm: the larger, the closer to
        averaging. The paper chooses it of 1e-3 to 1e-1; large against
        :math:`\|\bar\Delta\|^2` it gives back averaging.

    Notes
    -----
    The sum of squares is one number a client, which it does not send: the server, or
    the worker, computes it of the decoded change. Norms are of what is trained:
    BatchNorm's statistics and counters are averaged.

    Clients weigh in both sums as in the average, by their examples unless the strategy
    has ``equal_weights``: the quotient is that of :math:`\sum_k w_k\|\Delta_k\|^2 /
    \sum_k w_k` and :math:`2(\|\bar\Delta\|^2 + \epsilon)`, with equal weights the
    paper's. It is always made of the clients' changes, also where the direction of a
    strategy is not their average. In an asynchronous run the damped direction is
    extrapolated by the quotient of the changes that are not damped.

    The paper evaluates the mean of the last two models, since its iterates go to and
    fro: :class:`~flower_ext.AverageLast` keeps it, for any run.

    **Privacy.** A mechanism is refused: norms of single clients are neither in the
    vector that is clipped nor noised. Only for strategies that are sums.

    Examples
    --------
    >>> round(FedExP(1e-9).rate(Spread(mean_square=6.0, square_of_mean=1.0)), 6)
    3.0
    """

    needs_spread = True

    def __init__(self, epsilon: float = 1e-3) -> None:
        super().__init__()
        cause = "changes that cancel would make the step infinite"
        self.epsilon = positive("epsilon", epsilon, cause)

    def rate(self, spread: Spread) -> float:
        r"""Return :math:`\eta_g`."""
        least = 2 * (spread.square_of_mean + self.epsilon)
        return max(1.0, spread.mean_square / least)

    def _move(
        self, name: str, sent: NDArray, delta: NDArray, dtype: type[np.floating]
    ) -> NDArray:
        if self.spread is None:
            raise ValueError("FedExP needs see(spread) before each step")
        rate = self.rate(self.spread)
        return delta if rate == 1 else rate * delta
