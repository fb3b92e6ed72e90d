"""Smaller models inside of a large one: the first units of every layer.

An array of a small model is the leading block of the array of that name in the large
model: of a layer of 64 channels a model of half the width has the first 32, which see
the first half of the channels before them. Where an axis is as long in both, as the
classes of an output layer or the channels of an image, it is whole::

    hidden.weight (64, 784)        out.weight (10, 64)
    +------------------+           +--------+--------+
    | small: (32, 784) |           | small: |        |
    +------------------+           | (10,   |        |
    |                  |           |    32) |        |
    +------------------+           +--------+--------+
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, Term, numpy_of
from flower_ext.core.errors import refuse

Shapes = Mapping[str, tuple[int, ...]]
# The share of the units that a client's model has, in what it is told.
WIDTH = "width"


class Shaped(Protocol):
    """An array, or a tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""


def shapes_of(model: object) -> dict[str, tuple[int, ...]]:
    """Return the shapes of a model's arrays.

    Parameters
    ----------
    model : Module or Mapping
        A torch module, or named arrays.

    Examples
    --------
    >>> shapes_of({"w": np.zeros((2, 3))})
    {'w': (2, 3)}
    """
    make = getattr(model, "state_dict", None)
    arrays: object = make() if callable(make) else model
    if not isinstance(arrays, Mapping) or not all(
        hasattr(x, "shape") for x in arrays.values()
    ):
        refuse("model(width)", model, "a torch module, or arrays by name")
    return {name: tuple(x.shape) for name, x in arrays.items()}


def require_slices(shapes: Shapes, sent: Mapping[str, Shaped], width: float) -> Shapes:
    """Return the shapes of the arrays that travel; refuse those of no slice.

    Raises
    ------
    ValueError
        If an array of the large model is missing, has other axes, is larger than there
        or is empty.
    """
    for name, x in sent.items():
        if name not in shapes:
            cause = "the model of every width has the layers of the large one"
            refuse(f"model({width})", list(shapes)[:5], f"with array {name!r}", cause)
        small, large = shapes[name], tuple(x.shape)
        fits = len(small) == len(large) and all(
            0 < a <= b or a == b for a, b in zip(small, large, strict=True)
        )
        if not fits:
            refuse(
                f"shape of {name!r} in model({width})",
                small,
                f"a slice of {large}, the shape in the initial arrays",
                "a smaller width must make no layer larger, empty or of other axes",
            )
    return {name: shapes[name] for name in sent}


def narrow(arrays: Arrays, shapes: Shapes) -> Arrays:
    """Return the leading blocks of these shapes; they are views.

    Examples
    --------
    >>> narrow({"w": np.arange(6).reshape(2, 3)}, {"w": (2, 2)})["w"].tolist()
    [[0, 1], [3, 4]]
    """
    return {name: arrays[name][block(shape)] for name, shape in shapes.items()}


def widen(arrays: Mapping[str, Term], shapes: Shapes) -> dict[str, Term]:
    """Return arrays of these shapes that hold the given ones first, and else zeros.

    Examples
    --------
    >>> widen({"w": np.ones((2, 2))}, {"w": (2, 3)})["w"].tolist()
    [[1.0, 1.0, 0.0], [1.0, 1.0, 0.0]]
    """
    return {name: _widened(x, shapes[name]) for name, x in arrays.items()}


class SubmodelMap(Protocol):
    """The way from a large model to a small one, and of a small change back."""

    def down(self, arrays: Arrays) -> Arrays:
        """Return the small model that a client is sent."""

    def up(self, change: Mapping[str, Term]) -> dict[str, Term]:
        """Return the change of the large model, from that of the small one."""


@dataclass(frozen=True)
class SliceMap:
    """Leading blocks: what is outside of them does not change.

    Parameters
    ----------
    small, large : dict[str, tuple of int]
        The shapes of both models.
    """

    small: Shapes
    large: Shapes

    def down(self, arrays: Arrays) -> Arrays:
        """Return the blocks; of a whole model the very arrays."""
        return arrays if self.small == self.large else narrow(arrays, self.small)

    def up(self, change: Mapping[str, Term]) -> dict[str, Term]:
        """Return zeros around the blocks."""
        return widen(change, self.large)


def block(shape: tuple[int, ...]) -> tuple[slice, ...]:
    """Return where a leading block of this shape is."""
    return tuple(slice(size) for size in shape)


def _widened(term: Term, shape: tuple[int, ...]) -> Term:
    if term.shape == shape:
        return term
    small = numpy_of(term)
    large: NDArray = np.zeros(shape, small.dtype)
    large[block(small.shape)] = small
    return large
