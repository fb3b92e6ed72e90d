"""One client's term, and the sum of the terms."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import (
    Arrays,
    Lazy,
    Term,
    accumulate,
    all_finite,
    can_move,
    lazy,
    numpy_of,
    scale,
    within,
    zeros_like,
)
from flower_ext.core.typing import Floats

# The change of the model. Parts "delta-..." are changes too, each of arrays of its own,
# such as those of one of several models.
DELTA = "delta"
# Under a mechanism weights and counts are pieces of the clipped vector, with these
# names, under which ``Mechanism(scales=...)`` may scale them too.
WEIGHT = "weight"
WEIGHT_OF = "weight-of-"
COUNT_OF = "count-of-"

# Products of two numbers of this size are finite, and any model of float32 or wider can
# be moved by it.
_SMALL = 1e17


@dataclass
class Contribution:
    """One client's term of the sum.

    A part, an array of a part or a scalar that is absent counts as zero.

    Parameters
    ----------
    arrays : dict[str, dict[str, ndarray or Lazy]]
        Named parts, each of named arrays: ``{"delta": {"conv.weight": ...}}``.
    weight : float, optional
        Multiplies every array, and is added up itself. By default the client's number
        of examples, or 1 under a mechanism, where all clients weigh the same. A weight
        that is given depends on data: under a mechanism it is clipped and noised with
        the rest, and the strategy must say ``declares_weight = True``.
    scalars : dict[str, float | ndarray]
        Sums and counts of shape ``()`` or ``(groups,)``, added up without a weight.
    weights : dict[str, float]
        Weights of single parts, which replace ``weight`` for these.
    counts : dict[str, dict[str, ndarray or Lazy]]
        For single parts, how much each coordinate of an array counts: of the array's
        shape, or of shape ``()`` for all of it, and never negative. The mean of such a
        part divides every coordinate by the weighted sum of its counts.
    """

    arrays: Mapping[str, Mapping[str, Term]]
    weight: float | None = None
    scalars: Mapping[str, float | NDArray] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, Mapping[str, Term]] = field(default_factory=dict)

    def weight_of(self, part: str) -> float:
        """Return the factor of a part."""
        weight = 1.0 if self.weight is None else self.weight
        return self.weights.get(part, weight)

    def weighed(self, plain: float) -> "Contribution":
        """Return the term with the weight ``plain``, unless it has one of its own."""
        return replace(self, weight=plain) if self.weight is None else self

    def times(self, factor: float) -> "Contribution":
        """Return what counts as ``factor`` of the client, weights and scalars too."""
        if factor == 1.0:
            return self
        return replace(
            self,
            weight=factor * (1.0 if self.weight is None else self.weight),
            weights={part: factor * w for part, w in self.weights.items()},
            scalars={name: factor * x for name, x in self.scalars.items()},
        )

    def carried(self) -> "Contribution":
        """Return the term with all weights multiplied in.

        Weights become scalars of the term, and counts become arrays of it, so that one
        norm bounds everything that a client can move.
        """
        # A weight outside of the clipped vector would not be bounded: one client could
        # outweigh all others, and the mean would tell that it was there.
        scalars = dict(self.scalars)
        if self.weight is not None:
            scalars[WEIGHT] = self.weight
        scalars |= {WEIGHT_OF + part: w for part, w in self.weights.items()}
        arrays = {
            part: {n: scale(x, self.weight_of(part)) for n, x in named.items()}
            for part, named in self.arrays.items()
        } | {
            COUNT_OF + part: {n: scale(x, self.weight_of(part)) for n, x in c.items()}
            for part, c in self.counts.items()
        }
        return Contribution(arrays, scalars=scalars)

    def layout(self) -> dict[str, Term]:
        """Return the pieces of :meth:`carried`, not multiplied by their weights."""
        one = None if self.weight is None else 1.0
        ones = replace(self, weight=one, weights=dict.fromkeys(self.weights, 1.0))
        return dict(ones.carried().pieces())

    def is_finite(self) -> bool:
        """Whether no weighted array, weight or scalar is NaN or infinite."""
        numbers = (self.weight or 0.0, *self.weights.values(), *self.scalars.values())
        return all_finite(np.asarray(x, np.float64) for x in numbers) and all(
            all_finite(scale(x, self.weight_of(part)) for x in arrays.values())
            for group in (self.arrays, self.counts)
            for part, arrays in group.items()
        )

    def can_move(self, sent: Arrays) -> bool:
        """Whether all is finite, and the model can take the change alone.

        A change of no weight moves nothing, however large it is. One of a tiny count
        may move a coordinate far, which nobody else has.
        """
        return self._is_small(sent) or (self.is_finite() and self._moves(sent))

    def _is_small(self, sent: Arrays) -> bool:
        """Whether all is so small that the model can surely take it.

        That is so of nearly all terms, and seen without computing them.
        """
        numbers = (self.weight or 0.0, *self.weights.values(), *self.scalars.values())
        return (
            not self.counts
            and all(np.all(np.abs(x) <= _SMALL) for x in numbers)
            and all(
                within(x, _SMALL) and (name not in sent or _has_room(sent[name]))
                for arrays in self.arrays.values()
                for name, x in arrays.items()
            )
        )

    def _moves(self, sent: Arrays) -> bool:
        return all(
            can_move(sent, _per_count(change, self.counts.get(part, {})))
            for part, change in self.arrays.items()
            if is_change(part) and self.weight_of(part) != 0
        )

    def pieces(self) -> Iterator[tuple[str, Term]]:
        """Yield arrays as ``part/name``, counts likewise, and scalars by name."""
        for part, arrays in self.arrays.items():
            for name, x in arrays.items():
                yield f"{part}/{name}", x
        for part, arrays in self.counts.items():
            for name, x in arrays.items():
                yield f"{COUNT_OF}{part}/{name}", x
        for name, value in self.scalars.items():
            yield name, np.asarray(value, np.float64)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all pieces."""
        return {key: piece.shape for key, piece in self.pieces()}


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
        Under a mechanism, the standard deviation of the noise in each coordinate of a
        part or scalar. A sum that is smaller says nothing.
    weights : dict[str, float]
        ``sum(weight)`` of parts with a weight of their own.
    counts : dict[str, dict[str, ndarray]]
        ``sum(weight * count)`` of parts with counts.
    """

    arrays: dict[str, dict[str, Floats]] = field(default_factory=dict)
    weight: float = 0.0
    scalars: dict[str, Floats] = field(default_factory=dict)
    count: int = 0
    noise: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, Floats]] = field(default_factory=dict)
    _means: dict[str, Arrays] = field(default_factory=dict, repr=False)

    def add(self, *terms: Contribution) -> None:
        """Add terms in place, in their order: the result is that of one at a time."""
        # By array and not by term, so that a sum is read and written once for all
        # terms.
        added: dict[tuple[bool, str, str], list[tuple[Term, float]]] = {}
        for term in terms:
            for is_count, group in ((False, term.arrays), (True, term.counts)):
                for part, arrays in group.items():
                    for name, array in arrays.items():
                        key = is_count, part, name
                        added.setdefault(key, []).append((array, term.weight_of(part)))
            for name, value in term.scalars.items():
                self.scalars[name] = np.asarray(
                    self.scalars.get(name, 0.0) + np.asarray(value, np.float64)
                )
            for part, weight in term.weights.items():
                self.weights[part] = self.weights.get(part, 0.0) + weight
            self.weight += 1.0 if term.weight is None else term.weight
            self.count += 1
        for (is_count, part, name), weighted in added.items():
            sums = (self.counts if is_count else self.arrays).setdefault(part, {})
            if is_count:
                weighted = _of_one_shape(sums, name, weighted)
            if name not in sums:
                sums[name] = np.zeros(weighted[0][0].shape)
            accumulate(sums[name], weighted)

    def merge(self, other: "Total") -> None:
        """Add another sum in place; ``other`` stays as it is."""
        for mine, others in (
            (self.arrays, other.arrays),
            (self.counts, other.counts),
        ):
            for part, arrays in others.items():
                sums = mine.setdefault(part, {})
                for name, array in arrays.items():
                    if name in sums and sums[name].ndim >= array.ndim:
                        sums[name] += array
                    elif name in sums:  # a count of all of it, with one of each
                        sums[name] = sums[name] + array
                    else:
                        sums[name] = array.copy()
        for name, value in other.scalars.items():
            self.scalars[name] = np.asarray(self.scalars.get(name, 0.0) + value)
        for part, weight in other.weights.items():
            self.weights[part] = self.weights.get(part, 0.0) + weight
        self.weight += other.weight
        self.count += other.count

    def fill(self, zero: Contribution) -> None:
        """Let what nobody contributed be the zeros of the strategy's ``zero``.

        These are parts and scalars, and arrays of the change. In another part an array
        that nobody has stays absent: nothing known of it is not the same as a sum of 0.
        """
        for mine, theirs in (
            (self.arrays, zero.arrays),
            (self.counts, zero.counts),
        ):
            for part, arrays in theirs.items():
                if part not in mine or part == DELTA:
                    sums = mine.setdefault(part, {})
                    for name, x in arrays.items():
                        if name not in sums:
                            sums[name] = np.zeros(x.shape)
        for name, value in zero.scalars.items():
            if name not in self.scalars:
                self.scalars[name] = np.zeros(np.shape(value))
        for part in zero.weights:
            self.weights.setdefault(part, 0.0)

    def uncarried(self) -> "Total":
        """Undo :meth:`Contribution.carried` on the noisy sum.

        Noise may make a sum of weights or counts tiny or negative, and such a sum must
        not become a divisor: it counts as at least the noise's standard deviation.
        """
        if WEIGHT in self.scalars:
            least = self.noise.get(WEIGHT, 0.0)
            self.weight = max(float(self.scalars.pop(WEIGHT)), least)
        for key in [k for k in self.scalars if k.startswith(WEIGHT_OF)]:
            found = max(float(self.scalars.pop(key)), self.noise.get(key, 0.0))
            self.weights[key.removeprefix(WEIGHT_OF)] = found
        for key in [k for k in self.arrays if k.startswith(COUNT_OF)]:
            least = self.noise.get(key, 0.0)
            self.counts[key.removeprefix(COUNT_OF)] = {
                name: np.maximum(x, least, out=x)
                for name, x in self.arrays.pop(key).items()
            }
        return self

    def is_finite(self) -> bool:
        """Whether no sum has overflowed."""
        numbers = (self.weight, *self.weights.values(), *self.scalars.values())
        return all_finite(np.asarray(x, np.float64) for x in numbers) and all(
            all_finite(arrays.values())
            for group in (self.arrays, self.counts)
            for arrays in group.values()
        )

    def can_move(self, sent: Arrays) -> bool:
        """Whether all is finite, and the model can take the mean change."""
        return self.is_finite() and all(
            self._can_move(sent, part) for part in self.arrays if is_change(part)
        )

    def _can_move(self, sent: Arrays, part: str) -> bool:
        weight = self.weights.get(part, self.weight)
        mean = 1 / weight if weight > 0 else 1.0
        change, counts = self.arrays[part], self.counts.get(part, {})
        plain = {name: x for name, x in change.items() if name not in counts}
        counted = {name: x for name, x in change.items() if name in counts}
        return can_move(sent, plain, mean) and can_move(
            sent, _per_count(counted, counts)
        )

    def take(self, part: str = DELTA) -> Arrays:
        """Remove the sums of a part and return them; the caller may change them."""
        return dict(self.arrays.pop(part))

    def mean(self, part: str = DELTA, *, plus: float = 0.0) -> Arrays:
        r"""Return ``sum(weight * arrays) / (sum(weight) + plus)`` of a part.

        With counts each coordinate is divided by its own. Where the divisor is 0 the
        mean is 0. Every call returns the same arrays: a change of them is seen by all.
        """
        # Divided in place, since the sum of a large model is not held twice.
        if part not in self._means:
            counts = self.counts.get(part, {})
            weight = self.weights.get(part, self.weight) + plus
            self._means[part] = {
                name: _divide(x, counts[name] + plus if name in counts else weight)
                for name, x in self.take(part).items()
            }
        return dict(self._means[part])


def is_change(part: str) -> bool:
    """Whether a part is a change of the model, or of one of several."""
    return part == DELTA or part.startswith(f"{DELTA}-")


def _has_room(array: NDArray) -> bool:
    """Whether an array can be moved far: half precision overflows soon."""
    return array.dtype.kind != "f" or array.dtype.itemsize >= 4


def _per_count(
    change: Mapping[str, Term], counts: Mapping[str, Term]
) -> dict[str, Term]:
    """Return a change with every coordinate divided by its own count, if it has one."""
    return {
        name: Lazy(_quotient, lazy(x), np.broadcast_to(numpy_of(counts[name]), x.shape))
        if name in counts
        else x
        for name, x in change.items()
    }


def _quotient(x: NDArray, count: NDArray) -> NDArray:
    with np.errstate(over="ignore", invalid="ignore"):
        zeros = np.zeros(x.shape)
        return np.divide(x, count, out=zeros, where=count > 0, dtype=np.float64)


def _of_one_shape(
    sums: dict[str, Floats], name: str, counts: list[tuple[Term, float]]
) -> list[tuple[Term, float]]:
    """Return counts in one shape, that of the array if any of them has it.

    Some clients may count for a whole array, ``()``, and others by coordinates.
    """
    shapes = {x.shape for x, _ in counts}
    if name in sums:
        shapes.add(sums[name].shape)
    if len(shapes) == 1:
        return counts
    shape = max(shapes, key=len)
    if name in sums:
        sums[name] = np.broadcast_to(sums[name], shape).copy()
    return [
        (x if x.shape == shape else np.broadcast_to(numpy_of(x), shape), weight)
        for x, weight in counts
    ]


def _divide(x: Floats, by: float | Floats) -> Floats:
    """Divide in place; the result is 0 where the divisor is."""
    if isinstance(by, float):
        by = np.asarray(by)
    known = np.broadcast_to(by > 0, x.shape)
    np.divide(x, by, out=x, where=known)
    x[~known] = 0.0
    return x


def no_change(
    sent: Arrays, scalars: Mapping[str, tuple[int, ...]], *, weighs: bool
) -> Contribution:
    """Return the contribution of a client that changes nothing: its layout."""
    return Contribution(
        {DELTA: zeros_like(sent)},
        0.0 if weighs else None,
        {name: np.zeros(shape) for name, shape in scalars.items()},
    )
