"""SGD with momentum, and SGD after which LoRA pairs are sorted."""

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays
from flower_ext.core.errors import fraction, positive, refuse
from flower_ext.core.lora import by_singular_value
from flower_ext.server.optimizers.base import Elementwise


class SGD(Elementwise):
    r"""SGD with momentum, as :class:`torch.optim.SGD` does it.

    With momentum it is FedAvgM (Hsu et al. 2019, arXiv:1909.06335), with Nesterov's
    the outer optimizer of DiLoCo (Douillard et al. 2023, arXiv:2311.08105).

    .. math:: m_t = \mu m_{t-1} + \Delta_t, \quad w_{t+1} = w_t + \eta m_t

    and with Nesterov :math:`w_{t+1} = w_t + \eta(\Delta_t + \mu m_t)`.

    Parameters
    ----------
    learning_rate : float (default: 1.0)
        With 1 and no momentum the model becomes the clients' average.
    momentum : float (default: 0.0)
        In [0, 1]; 0 keeps no state.
    nesterov : bool (default: False)
        Look ahead by one momentum step; needs momentum.
    """

    def __init__(
        self, learning_rate: float = 1.0, momentum: float = 0.0, nesterov: bool = False
    ) -> None:
        super().__init__()
        positive("learning_rate", learning_rate)
        fraction("momentum", momentum)
        if nesterov and momentum == 0:
            refuse("momentum", momentum, "> 0 with nesterov=True")
        self.learning_rate = learning_rate
        self.momentum = momentum
        self.nesterov = nesterov

    def _move(
        self, name: str, sent: NDArray, delta: NDArray, dtype: type[np.floating]
    ) -> NDArray:
        if self.momentum:
            velocity = self._slot("momentum", name, delta, dtype)
            velocity *= self.momentum
            velocity += delta
            delta = delta + self.momentum * velocity if self.nesterov else velocity
        return delta if self.learning_rate == 1 else self.learning_rate * delta


class RefactoredSGD(SGD):
    """SGD without momentum, after which LoRA pairs are sorted by singular value.

    The model is that of :class:`SGD`, since the product of every pair stays; but the
    first ranks of a pair are then those that matter most, and clients that hold fewer
    ranks, as the tiers of :class:`~flower_ext.strategies.flasc.FLASC` do, hold the best
    approximation of the adapter that their rank allows; see
    :func:`~flower_ext.core.lora.by_singular_value`. A pair of which one factor is
    frozen stays as it is.

    Parameters
    ----------
    learning_rate : float (default: 1.0)
        With 1 the model, before it is sorted, becomes the clients' average.

    Notes
    -----
    The coordinates of the factors are others after each step. What belongs to the old
    ones is refused where it is known: momentum, error feedback, fixed masks,
    asynchronous runs. It is for strategies whose clients keep nothing of their own
    about the factors; and under a mechanism whose noise is correlated over rounds that
    noise no longer cancels, so take ``factorization="identity"``. The first round
    trains the model as it was given.

    Examples
    --------
    >>> a, b = "q.lora_A.weight", "q.lora_B.weight"
    >>> sent = {a: np.float32([[1, 0], [0, 1]]), b: np.float32([[1, 0], [0, 2]])}
    >>> direction = {a: np.zeros((2, 2)), b: np.array([[0.0, 0.0], [0.0, 1.0]])}
    >>> new = RefactoredSGD().step(sent, direction)
    >>> np.abs(new[b])  # 3 is now the first, 1 the second
    array([[0., 1.],
           [3., 0.]], dtype=float32)
    """

    keeps_coordinates = False

    def __init__(self, learning_rate: float = 1.0) -> None:
        super().__init__(learning_rate)

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model, see :meth:`ServerOptimizer.step`."""
        new = super().step(sent, direction)
        anew = by_singular_value(new)
        return new | {name: x.astype(new[name].dtype) for name, x in anew.items()}
