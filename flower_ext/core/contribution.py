"""One client's term, and the sum of the terms."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, Term, accumulate, all_finite, can_move, scale

DELTA = "delta"


@dataclass
class Contribution:
    """One client's term of the sum.

    Parameters
    ----------
    arrays : dict[str, dict[str, ndarray or Lazy]]
        Named parts, each of named arrays: ``{"delta": {"conv.weight": ...}}``.
    weight : float (default: 1.0)
        Multiplies every array, and is itself added up.
    scalars : dict[str, float | ndarray]
        Added up as they are: sums and counts of shape ``()`` or ``(groups,)``.
    """

    arrays: Mapping[str, Mapping[str, Term]]
    weight: float = 1.0
    scalars: Mapping[str, float | NDArray] = field(default_factory=dict)

    def is_finite(self) -> bool:
        """Whether no weighted array, weight or scalar is NaN or infinite."""
        return _are_finite(self) and all(
            all_finite(scale(x, self.weight) for x in arrays.values())
            for arrays in self.arrays.values()
        )

    def can_move(self, sent: Arrays) -> bool:
        """Whether all is finite, and the model can take the change alone."""
        return self.is_finite() and can_move(sent, self.arrays.get(DELTA, {}))

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of arrays, as ``part/name``, and of scalars, by name."""
        return {
            f"{part}/{name}": x.shape
            for part, arrays in self.arrays.items()
            for name, x in arrays.items()
        } | {name: np.shape(x) for name, x in self.scalars.items()}


@dataclass
class Total:
    """The sum of contributions, in float64.

    Attributes
    ----------
    arrays : dict[str, dict[str, ndarray]]
        ``sum(weight * array)`` for every array of every part.
    weight : float
        ``sum(weight)``.
    scalars : dict[str, ndarray]
        Plain sums.
    count : int
        Number of terms.
    noise : dict[str, float]
        Under a mechanism, standard deviation of the noise in each coordinate of a part
        or scalar; what is smaller tells nothing.
    """

    arrays: dict[str, dict[str, npt.NDArray[np.float64]]] = field(default_factory=dict)
    weight: float = 0.0
    scalars: dict[str, npt.NDArray[np.float64]] = field(default_factory=dict)
    count: int = 0
    noise: dict[str, float] = field(default_factory=dict)

    def add(self, *terms: Contribution) -> None:
        """Add terms in place, in their order: the result is that of one at a time."""
        added: dict[tuple[str, str], list[tuple[Term, float]]] = {}
        for term in terms:
            for part, arrays in term.arrays.items():
                for name, array in arrays.items():
                    added.setdefault((part, name), []).append((array, term.weight))
            for name, value in term.scalars.items():
                self.scalars[name] = np.asarray(
                    self.scalars.get(name, 0.0) + np.asarray(value, np.float64)
                )
            self.weight += term.weight
            self.count += 1
        for (part, name), weighted in added.items():
            sums = self.arrays.setdefault(part, {})
            if name not in sums:
                sums[name] = np.zeros(weighted[0][0].shape)
            accumulate(sums[name], weighted)

    def merge(self, other: "Total") -> None:
        """Add another sum in place; ``other`` stays as it is."""
        for part, arrays in other.arrays.items():
            sums = self.arrays.setdefault(part, {})
            for name, array in arrays.items():
                if name in sums:
                    sums[name] += array
                else:
                    sums[name] = array.copy()
        for name, value in other.scalars.items():
            self.scalars[name] = np.asarray(self.scalars.get(name, 0.0) + value)
        self.weight += other.weight
        self.count += other.count

    def is_finite(self) -> bool:
        """Whether no sum has overflowed."""
        return _are_finite(self) and all(
            all_finite(arrays.values()) for arrays in self.arrays.values()
        )

    def can_move(self, sent: Arrays) -> bool:
        """Whether all is finite, and the model can take the mean change."""
        mean = 1 / self.weight if self.weight > 0 else 1.0
        return self.is_finite() and can_move(sent, self.arrays.get(DELTA, {}), mean)

    def take(self, part: str = DELTA) -> Arrays:
        """Hand over the sums of a part, which the caller may change."""
        return dict(self.arrays.pop(part))

    def mean(self, part: str = DELTA) -> Arrays:
        """Hand over ``sum(weight * arrays) / sum(weight)`` of a part."""
        arrays = self.take(part)
        return {name: np.divide(x, self.weight, out=x) for name, x in arrays.items()}


def _are_finite(term: Contribution | Total) -> bool:
    """Whether weight and scalars are."""
    values = (np.asarray(x, np.float64) for x in (term.weight, *term.scalars.values()))
    return all_finite(values)
