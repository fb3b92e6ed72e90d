r"""Server optimizers: what the server does with the aggregated direction.

A strategy's ``update`` gives a direction :math:`\Delta_t` that points from the model
that was sent to where the clients want it. Plain averaging adds it. The optimizers
here treat :math:`-\Delta_t` as a gradient (Reddi et al. 2021, "Adaptive Federated
Optimization", ICLR, Algorithm 2).

Integers and BatchNorm's running statistics are not parameters: they are averaged
whatever the optimizer is, since momentum can drive a variance below zero.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, is_averaged, is_parameter
from flower_ext.core.errors import at_least, fraction, positive, refuse
from flower_ext.core.lora import by_singular_value

if TYPE_CHECKING:
    import torch

_VARIANCES = ("running_var", "moving_variance")

State = dict[str, dict[str, NDArray]]


def apply_direction(sent: NDArray, direction: NDArray) -> NDArray:
    """Return ``sent + direction`` in the dtype of ``sent``.

    Integers are rounded, and clipped to their range.
    """
    if is_averaged(sent):
        # In float64, so that the only rounding is the last one, to the model's dtype.
        with np.errstate(over="ignore"):
            return np.asarray(np.add(sent, direction, dtype=np.float64), sent.dtype)
    # Casting a larger float to int64 is undefined; 2^62 is beyond every range but the
    # widest, and leaves room for the addition.
    step = np.clip(np.rint(direction), -(2.0**62), 2.0**62)
    moved = np.asarray(sent.astype(np.int64) + step.astype(np.int64), sent.dtype)
    # The sum in int64 wraps around in narrower types. In float64 it is inexact, but
    # says on which side of the range it is.
    if sent.dtype.kind in "iu":
        ends, about = np.iinfo(sent.dtype), np.add(sent, step, dtype=np.float64)
        moved = np.where(about > float(ends.max), ends.max, moved)
        moved = np.where(about < float(ends.min), ends.min, moved)
    return np.asarray(moved, sent.dtype)


def keep_variances(new: Arrays, sent: Arrays, share: float) -> Arrays:
    """Return a model whose BatchNorm variances are at least a share of what was sent.

    They are recognised by their names, ``running_var`` (torch) or ``moving_variance``
    (Keras), if no entry was negative when they were sent.
    """
    return {
        name: np.asarray(np.maximum(x, share * sent[name]), x.dtype)
        if name.endswith(_VARIANCES) and np.all(sent[name] >= 0)
        else x
        for name, x in new.items()
    }


class ServerOptimizer(ABC):
    """Moves the model along a direction; its state is kept per slot and array."""

    #: Whether a coordinate means the same after a step: what is left over from earlier
    #: rounds, such as residuals of error feedback or fixed masks, then still fits.
    keeps_coordinates: ClassVar[bool] = True

    def __init__(self) -> None:
        self.state: State = {}

    @abstractmethod
    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model.

        Parameters
        ----------
        sent : dict[str, ndarray]
            The model that the cohort received; not changed.
        direction : dict[str, ndarray]
            What to add to it, float64, same names and shapes; consumed, array by
            array, so that no second model is held in memory. Arrays of other rounds
            that are not among them keep their state.

        Returns
        -------
        dict[str, ndarray]
            New arrays with the names, dtypes and shapes of ``sent``.
        """

    @property
    def kind(self) -> str:
        """Which optimizer the moments belong to: another one cannot continue them."""
        return type(self).__name__

    def state_dict(self) -> State:
        """Return the moments, by slot and array name."""
        return {slot: dict(arrays) for slot, arrays in self.state.items()}

    def load_state_dict(self, state: State) -> None:
        """Take over the moments of a saved run."""
        self.state = {
            slot: {name: np.array(x) for name, x in arrays.items()}
            for slot, arrays in state.items()
        }

    def __repr__(self) -> str:
        """Name the optimizer and its settings, for ``summary()``."""
        settings = ", ".join(
            f"{k}={v:g}" for k, v in vars(self).items() if isinstance(v, int | float)
        )
        return f"{type(self).__name__}({settings})"


def _working(array: NDArray) -> type[np.floating]:
    # Moments of a float16 array are float32: squares of small changes would vanish.
    return np.float64 if array.dtype == np.float64 else np.float32


class _Elementwise(ServerOptimizer):
    """An optimizer that treats every array on its own."""

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model, see :meth:`ServerOptimizer.step`."""
        new: Arrays = {}
        for name, array in sent.items():
            move = direction.pop(name)
            if is_parameter(name, array):
                move = self._move(name, move, _working(array))
            new[name] = apply_direction(array, move)
        return new

    @abstractmethod
    def _move(self, name: str, delta: NDArray, dtype: type[np.floating]) -> NDArray:
        """Return the step to take for one array, with state of the given dtype."""

    def _slot(
        self,
        slot: str,
        name: str,
        like: NDArray,
        dtype: type[np.floating],
        value: float = 0.0,
    ) -> NDArray:
        arrays = self.state.setdefault(slot, {})
        if name not in arrays:
            arrays[name] = np.full(like.shape, value, dtype)
        return arrays[name]


class SGD(_Elementwise):
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

    def _move(self, name: str, delta: NDArray, dtype: type[np.floating]) -> NDArray:
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


class _Adaptive(_Elementwise):
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

    def _move(self, name: str, delta: NDArray, dtype: type[np.floating]) -> NDArray:
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


class Adagrad(_Adaptive):
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


class Adam(_Adaptive):
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
        # Of each array its own: in a round in which it does not move its moments stay.
        steps = self.state.setdefault("steps", {})
        t = int(steps.get(name, 0)) + 1
        steps[name] = np.asarray(t, np.int64)
        return float(
            self.learning_rate * np.sqrt(1 - self.beta_2**t) / (1 - self.beta_1**t)
        )

    def _accumulate(self, second: NDArray, square: NDArray) -> None:
        second *= self.beta_2
        second += (1 - self.beta_2) * square


class Yogi(_Adaptive):
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


class TorchOptimizer(ServerOptimizer):
    """Any optimizer of ``torch.optim`` on the server.

    Parameters
    ----------
    factory : callable
        ``parameters -> torch.optim.Optimizer``, for example
        ``functools.partial(torch.optim.AdamW, lr=1e-3)``. An optimizer that needs a
        closure (LBFGS) does not fit. A factory that is picklable (no lambda) keeps
        the strategy picklable.

    Examples
    --------
    >>> import functools, numpy as np, torch
    >>> optimizer = TorchOptimizer(functools.partial(torch.optim.SGD, lr=0.5))
    >>> optimizer.step({"w": np.ones(2)}, {"w": np.array([1.0, -1.0])})
    {'w': array([1.5, 0.5])}
    """

    def __init__(
        self,
        factory: "Callable[[Iterable[torch.nn.Parameter]], torch.optim.Optimizer]",
    ) -> None:
        super().__init__()
        if not callable(factory):
            refuse("factory", factory, "callable: parameters -> torch.optim.Optimizer")
        self.factory = factory

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model, see :meth:`ServerOptimizer.step`."""
        import torch

        parameters = {}
        for name, array in sent.items():
            if is_parameter(name, array):
                work = _working(array)
                parameter = torch.nn.Parameter(torch.tensor(array.astype(work)))
                # The optimizer minimises: the direction is the negative gradient.
                parameter.grad = -torch.tensor(direction.pop(name).astype(work))
                parameters[name] = parameter
        # A new optimizer each round, which continues from the state kept by name:
        # between rounds no parameters are held, and checkpoints look like those of the
        # others.
        optimizer = self.factory(parameters.values())
        self._restore(optimizer, parameters)
        optimizer.step()
        # The moments of arrays that do not move in this round stay as they are.
        for name, parameter in parameters.items():
            for slot, value in optimizer.state[parameter].items():
                if isinstance(value, torch.Tensor):
                    self.state.setdefault(slot, {})[name] = value.numpy()
        return {
            name: parameters[name].detach().numpy().astype(array.dtype)
            if name in parameters
            else apply_direction(array, direction.pop(name))
            for name, array in sent.items()
        }

    def _restore(
        self,
        optimizer: "torch.optim.Optimizer",
        parameters: "dict[str, torch.nn.Parameter]",
    ) -> None:
        import torch

        for slot, arrays in self.state.items():
            for name in arrays.keys() & parameters.keys():
                kept = torch.from_numpy(np.array(arrays[name]))
                optimizer.state[parameters[name]][slot] = kept

    @property
    def kind(self) -> str:
        """Which optimizer the moments belong to, see :attr:`ServerOptimizer.kind`."""
        factory = getattr(self.factory, "func", self.factory)
        name = getattr(factory, "__name__", type(factory).__name__)
        return f"{type(self).__name__}({name})"

    def __repr__(self) -> str:
        """Name the optimizer and its settings, for ``summary()``."""
        import torch

        # Only an optimizer that has been made knows its defaults.
        optimizer = self.factory([torch.nn.Parameter(torch.zeros(1))])
        settings = "".join(
            f", {k}={v}"
            for k, v in optimizer.defaults.items()
            if isinstance(v, int | float | tuple)
        )
        kind = type(optimizer)
        return f"TorchOptimizer({kind.__module__}.{kind.__qualname__}{settings})"
