"""What server optimizers are, and how a model takes a direction."""

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, is_averaged, is_parameter
from flower_ext.core.spread import Spread

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
    #: Whether it must be told, before each step, how far the clients' changes are
    #: apart: strategies that are sums add up what that takes, and not under a
    #: mechanism.
    needs_spread: bool = False

    def __init__(self) -> None:
        self.state: State = {}
        self.spread: Spread | None = None

    def see(self, spread: Spread | None) -> None:
        """Take note, before a step, of how far the clients' changes are apart."""
        self.spread = spread

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


def working(array: NDArray) -> type[np.floating]:
    """Return the precision of an array's moments: float32, or the array's if wider."""
    # Squares of small changes would vanish in float16.
    return np.float64 if array.dtype == np.float64 else np.float32


class Elementwise(ServerOptimizer):
    """An optimizer that treats every array on its own."""

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model, see :meth:`ServerOptimizer.step`."""
        new: Arrays = {}
        for name, array in sent.items():
            move = direction.pop(name)
            if is_parameter(name, array):
                move = self._move(name, array, move, working(array))
            new[name] = apply_direction(array, move)
        return new

    @abstractmethod
    def _move(
        self, name: str, sent: NDArray, delta: NDArray, dtype: type[np.floating]
    ) -> NDArray:
        """Return the step of an array that was sent, with state of the given dtype."""

    def _count(self, name: str) -> int:
        """Count a step of an array, and return its number, from 1.

        Each has its own: in a round in which it does not move its moments stay.
        """
        steps = self.state.setdefault("steps", {})
        steps[name] = np.asarray(int(steps.get(name, 0)) + 1, np.int64)
        return int(steps[name])

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
