"""LAMB: Adam whose step in each layer is as long as the layer's weights ask for."""

from math import inf

import numpy as np
from flwr.common import NDArray

from flower_ext.core.errors import at_least, open_unit, positive, refuse
from flower_ext.server.optimizers.base import Elementwise


class LAMB(Elementwise):
    r"""LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", ICLR).

    Algorithm 2 of arXiv:1904.00962, for each array :math:`w` on its own and with
    :math:`-\Delta_t` as the gradient:

    .. math::
       m_t &= \beta_1 m_{t-1} + (1-\beta_1)\Delta_t, \quad
       v_t = \beta_2 v_{t-1} + (1-\beta_2)\Delta_t^2 \\
       u_t &= \frac{m_t/(1-\beta_1^t)}{\sqrt{v_t/(1-\beta_2^t)} + \tau}
              - \lambda w_t, \qquad
       w_{t+1} = w_t + \eta \frac{\|w_t\|}{\|u_t\|} u_t

    The quotient is the trust ratio. An array one of whose two norms is 0 has the ratio
    1, so that it can begin to move. Next to clipping by layer,
    :class:`~flower_ext.privacy.PerLayerClipping`, it is what made training of large
    speech models with differential privacy work (Pelikan et al. 2023,
    arXiv:2310.00098): noise, too, is taken in steps of the layer's own size.

    Parameters
    ----------
    learning_rate : float (default: 0.01)
        :math:`\eta`: the share of its norm by which a layer moves in a round.
    beta_1, beta_2 : float (default: 0.9, 0.999)
        Decay of the first and the second moment, in [0, 1).
    tau : float (default: 1e-6)
        The paper's epsilon. It is added to the corrected root, as in torch's Adam;
        :class:`Adam` here adds its own to the root that is not corrected.
    weight_decay : float (default: 0.0)
        :math:`\lambda`; 0 for none.
    trust_ratio : tuple of two floats (default: (0, inf))
        Least and largest ratio. ``(1, 1)`` is Adam with bias correction, and with
        ``weight_decay`` AdamW.

    Notes
    -----
    Deviation from the paper: where it bounds the norm of the weights, by
    :math:`\phi`, here the ratio is bounded.
    An array's :math:`t` counts the rounds in which it moved.

    Examples
    --------
    >>> sent = {"w": np.array([3.0, 4.0]), "new": np.zeros(2)}
    >>> new = LAMB(0.1).step(sent, {n: np.array([1.0, -1.0]) for n in sent})
    >>> float(np.linalg.norm(new["w"] - sent["w"]).round(6))  # a tenth of the norm, 5
    0.5
    >>> new["new"].round(6)  # a step of Adam
    array([ 0.1, -0.1])
    """

    def __init__(
        self,
        learning_rate: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        tau: float = 1e-6,
        weight_decay: float = 0.0,
        trust_ratio: tuple[float, float] = (0.0, inf),
    ) -> None:
        super().__init__()
        self.learning_rate = positive("learning_rate", learning_rate)
        self.beta_1 = _decay("beta_1", beta_1)
        self.beta_2 = _decay("beta_2", beta_2)
        cause = "it keeps the step finite where nothing has moved yet"
        self.tau = positive("tau", tau, cause)
        self.weight_decay = at_least("weight_decay", weight_decay, 0)
        self.trust_ratio = _bounds(trust_ratio)

    def _move(
        self, name: str, sent: NDArray, delta: NDArray, dtype: type[np.floating]
    ) -> NDArray:
        first = self._slot("first", name, delta, dtype)
        first *= self.beta_1
        first += (1 - self.beta_1) * delta
        second = self._slot("second", name, delta, dtype)
        second *= self.beta_2
        second += (1 - self.beta_2) * np.square(delta)
        t = self._count(name)
        root = np.sqrt(second / (1 - self.beta_2**t)) + self.tau
        step = first / (1 - self.beta_1**t) / root
        if self.weight_decay:
            step = step - self.weight_decay * sent.astype(dtype)
        return np.asarray(self.learning_rate * self._ratio(sent, step) * step)

    def _ratio(self, sent: NDArray, step: NDArray) -> float:
        """Return how often the step is contained in the weights, within the bounds."""
        weight, length = _norm(sent), _norm(step)
        ratio = weight / length if weight > 0 and length > 0 else 1.0
        low, high = self.trust_ratio
        return min(max(ratio, low), high)

    def __repr__(self) -> str:
        """Name the optimizer and its settings, for ``summary()``."""
        low, high = self.trust_ratio
        return f"{super().__repr__()[:-1]}, trust_ratio=({low:g}, {high:g}))"


def _norm(array: NDArray) -> float:
    return float(np.linalg.norm(array.astype(np.float64)))


def _decay(name: str, value: float) -> float:
    if value == 0 and not isinstance(value, bool):
        return 0.0
    return open_unit(name, value, "0 has no memory; the bias of 1 has no correction")


def _bounds(value: tuple[float, float]) -> tuple[float, float]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        refuse("trust_ratio", value, "two numbers, the least and the largest")
    low, high = value
    at_least("trust_ratio[0]", low, 0)
    at_least("trust_ratio[1]", high, low, "it is the largest", allow_inf=True)
    if high == 0:
        refuse("trust_ratio", value, "with a largest ratio > 0", "nothing would move")
    return float(low), float(high)
