"""Optimizers with a second moment: Adagrad, Adam and Yogi (Reddi et al. 2021)."""

from abc import abstractmethod

import numpy as np
from flwr.common import NDArray

from flower_ext.core.errors import at_least, fraction, positive, refuse
from flower_ext.server.optimizers.base import Elementwise


class Adaptive(Elementwise):
    """What Adagrad, Adam and Yogi share: Algorithm 2 of Reddi et al. 2021."""

    def __init__(
        self,
        learning_rate: float,
        beta_1: float,
        tau: float,
        initial_accumulator: float | None,
    ) -> None:
        super().__init__()
        positive("learning_rate", learning_rate)
        fraction("beta_1", beta_1)
        positive("tau", tau, "it keeps the step finite where nothing has moved yet")
        self.learning_rate = learning_rate
        self.beta_1 = beta_1
        self.tau = tau
        self.initial_accumulator = (
            tau**2 if initial_accumulator is None else initial_accumulator
        )
        at_least("initial_accumulator", self.initial_accumulator, 0)

    def _move(
        self, name: str, sent: NDArray, delta: NDArray, dtype: type[np.floating]
    ) -> NDArray:
        # The last three steps of Algorithm 2: m_t, v_t and x_{t+1}, without the model.
        first = self._slot("first", name, delta, dtype)
        first *= self.beta_1
        first += (1 - self.beta_1) * delta
        second = self._slot("second", name, delta, dtype, self.initial_accumulator)
        self._accumulate(second, np.square(delta))
        return self._rate(name) * first / (np.sqrt(second) + self.tau)

    def _rate(self, name: str) -> float:
        return self.learning_rate

    @abstractmethod
    def _accumulate(self, second: NDArray, square: NDArray) -> None:
        """Update the second moment in place."""


class Adagrad(Adaptive):
    r"""FedAdagrad: :math:`v_t = v_{t-1} + \Delta_t^2`.

    Parameters
    ----------
    learning_rate : float (default: 0.1)
        :math:`\eta`.
    beta_1 : float (default: 0.0)
        Decay of the first moment.
    tau : float (default: 1e-3)
        Degree of adaptivity, added to :math:`\sqrt{v_t}`.
    initial_accumulator : float, optional
        :math:`v_{-1}`; by default ``tau**2``, the smallest that the paper allows. With
        0 it is Flower's ``FedAdagrad``.
    """

    def __init__(
        self,
        learning_rate: float = 0.1,
        beta_1: float = 0.0,
        tau: float = 1e-3,
        initial_accumulator: float | None = None,
    ) -> None:
        super().__init__(learning_rate, beta_1, tau, initial_accumulator)

    def _accumulate(self, second: NDArray, square: NDArray) -> None:
        second += square


class Adam(Adaptive):
    r"""FedAdam: :math:`v_t = \beta_2 v_{t-1} + (1-\beta_2)\Delta_t^2`.

    Parameters
    ----------
    learning_rate : float (default: 0.1)
        :math:`\eta`.
    beta_1, beta_2 : float (default: 0.9, 0.99)
        Decay of the first and the second moment.
    tau : float (default: 1e-3)
        Degree of adaptivity, added to :math:`\sqrt{v_t}`.
    initial_accumulator : float, optional
        :math:`v_{-1}`; by default ``tau**2``, the smallest that the paper allows.
    bias_correction : bool (default: False)
        Scale the rate by :math:`\sqrt{1-\beta_2^t}/(1-\beta_1^t)` in an array's step
        :math:`t = 1, 2, \dots` (Kingma and Ba 2015), meant for
        ``initial_accumulator=0``. Reddi et al. do without. Flower's ``FedAdam``
        corrects too, but with :math:`t + 1` in round :math:`t`. All add ``tau`` to the
        uncorrected root; torch's Adam, ``TorchOptimizer(torch.optim.Adam)``, adds it to
        the corrected one, and takes larger steps where changes are not far above it.
    """

    def __init__(
        self,
        learning_rate: float = 0.1,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        initial_accumulator: float | None = None,
        bias_correction: bool = False,
    ) -> None:
        super().__init__(learning_rate, beta_1, tau, initial_accumulator)
        fraction("beta_2", beta_2)
        if bias_correction and 1 in (beta_1, beta_2):
            refuse("bias_correction", True, "used with beta_1 and beta_2 below 1")
        self.beta_2 = beta_2
        self.bias_correction = bias_correction

    def _rate(self, name: str) -> float:
        if not self.bias_correction:
            return self.learning_rate
        t = self._count(name)
        return float(
            self.learning_rate * np.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        )

    def _accumulate(self, second: NDArray, square: NDArray) -> None:
        second *= self.beta_2
        second += (1 - self.beta_2) * square


class Yogi(Adaptive):
    r"""FedYogi: a second moment that also shrinks additively.

    .. math::
       v_t = v_{t-1} - (1-\beta_2)\Delta_t^2\,
             \mathrm{sign}(v_{t-1}-\Delta_t^2)

    Parameters
    ----------
    learning_rate : float (default: 0.01)
        :math:`\eta`.
    beta_1, beta_2 : float (default: 0.9, 0.99)
        Decay of the first moment, pace of the second.
    tau : float (default: 1e-3)
        Degree of adaptivity, added to :math:`\sqrt{v_t}`.
    initial_accumulator : float, optional
        :math:`v_{-1}`; by default ``tau**2``, the smallest that the paper allows. With
        0 it is Flower's ``FedYogi``.
    """

    def __init__(
        self,
        learning_rate: float = 0.01,
        beta_1: float = 0.9,
        beta_2: float = 0.99,
        tau: float = 1e-3,
        initial_accumulator: float | None = None,
    ) -> None:
        super().__init__(learning_rate, beta_1, tau, initial_accumulator)
        fraction("beta_2", beta_2)
        self.beta_2 = beta_2

    def _accumulate(self, second: NDArray, square: NDArray) -> None:
        second -= (1 - self.beta_2) * square * np.sign(second - square)
