"""How sparse a model is to be: in which rounds, and how that is spread over arrays."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod

from flower_ext.core.errors import open_unit, positive, refuse, whole

#: The sparsity of the masks that are made in a step, None where they stay. Steps are
#: rounds in which the model moved, counted from 1.
SparsitySchedule = Callable[[int], float | None]
Shapes = Mapping[str, tuple[int, ...]]

_ONE = "0 prunes nothing, and of 1 nothing would be left"


@dataclass(frozen=True)
class OneShotSparsity:
    """Masks are made once.

    Parameters
    ----------
    sparsity : float
        Share of the weights that is pruned, in [0, 1).
    at : int (default: 1)
        The step.

    Examples
    --------
    >>> [OneShotSparsity(0.5, at=2)(step) for step in (1, 2, 3)]
    [None, 0.5, None]
    """

    sparsity: float
    at: int = 1

    def __post_init__(self) -> None:
        below_one("sparsity", self.sparsity)
        whole("at", self.at, 1)

    def __call__(self, step: int) -> float | None:
        """Return the sparsity of the masks that are made in a step."""
        return self.sparsity if step == self.at else None


@dataclass(frozen=True)
class PeriodicSparsity:
    """Masks of one sparsity are made anew every few steps, as SET and RigL do.

    Parameters
    ----------
    sparsity : float
        Share of the weights that is pruned, in [0, 1).
    every : int
        Steps from one update to the next.
    start : int (default: 1)
        First step with masks.
    end : int, optional
        No update after it; by default they never end.

    Examples
    --------
    >>> [PeriodicSparsity(0.5, every=2, end=4)(step) for step in (1, 2, 3, 4, 5)]
    [0.5, None, 0.5, None, None]
    """

    sparsity: float
    every: int
    start: int = 1
    end: int | None = None

    def __post_init__(self) -> None:
        below_one("sparsity", self.sparsity)
        whole("every", self.every, 1)
        whole("start", self.start, 1)
        if self.end is not None:
            whole("end", self.end, self.start, "it comes after start")

    def __call__(self, step: int) -> float | None:
        """Return the sparsity of the masks that are made in a step."""
        past = self.end is not None and step > self.end
        return None if past else _on(self.sparsity, step - self.start, self.every)


@dataclass(frozen=True)
class PolynomialSparsity:
    r"""Sparsity that grows fast at first and then slowly (Zhu and Gupta 2017).

    In step t from ``start`` to ``end`` it is :math:`s_f (1 - (1 - p)^3)` with
    :math:`p = (t - \text{start} + 1) / (\text{end} - \text{start} + 1)`.

    Parameters
    ----------
    sparsity : float
        :math:`s_f`, reached in step ``end``, in [0, 1).
    start, end : int
        First and last step in which masks are made.
    every : int (default: 1)
        Steps from one update to the next; the last step has one in any case.
    power : float (default: 3.0)
        In the place of 3; 1 is a straight line.

    Examples
    --------
    >>> schedule = PolynomialSparsity(0.8, start=2, end=5, every=2)
    >>> [schedule(step) for step in (1, 2, 3, 5, 6)]
    [None, 0.4625, None, 0.8, None]
    """

    sparsity: float
    start: int
    end: int
    every: int = 1
    power: float = 3.0

    def __post_init__(self) -> None:
        below_one("sparsity", self.sparsity)
        whole("start", self.start, 1)
        whole("end", self.end, self.start, "it comes after start")
        whole("every", self.every, 1)
        positive("power", self.power)

    def __call__(self, step: int) -> float | None:
        """Return the sparsity of the masks that are made in a step."""
        if step >= self.end:
            return self.sparsity if step == self.end else None
        share = (step - self.start + 1) / (self.end - self.start + 1)
        target = self.sparsity * (1 - (1 - share) ** self.power)
        return _on(target, step - self.start, self.every)


def _on(value: float, since: int, every: int) -> float | None:
    return value if since >= 0 and since % every == 0 else None


def below_one(name: str, value: float) -> float:
    """Require a sparsity, in [0, 1)."""
    if value == 0 and not isinstance(value, bool):
        return 0.0
    return open_unit(name, value, _ONE)


def uniform(shapes: Shapes, sparsity: float) -> dict[str, float]:
    """Return the same sparsity for all arrays."""
    return dict.fromkeys(shapes, sparsity)


def erk(shapes: Shapes, sparsity: float) -> dict[str, float]:
    r"""Return the sparsities of Erdős, Rényi and kernels, as sparse in total.

    The density of an array is proportional to the sum of its shape over the product:
    large layers are sparser than small ones (Evci et al. 2020, "Rigging the lottery",
    section 3; Mocanu et al. 2018). An array that would be denser than 1 is left whole,
    and the others are solved for again.

    Parameters
    ----------
    shapes : Mapping[str, tuple of int]
        Of the arrays that are pruned.
    sparsity : float
        Of all of them together.

    Examples
    --------
    >>> found = erk({"small": (4, 5), "large": (40, 50)}, 0.9)
    >>> {name: round(x, 3) for name, x in found.items()}
    {'small': 0.082, 'large': 0.908}
    """
    sizes = {name: prod(shape) for name, shape in shapes.items()}
    whole_: set[str] = set()
    while rest := [name for name in shapes if name not in whole_]:
        kept = (1 - sparsity) * sum(sizes.values()) - sum(sizes[n] for n in whole_)
        factor = kept / sum(sum(shapes[name]) for name in rest)
        density = {name: factor * sum(shapes[name]) / sizes[name] for name in rest}
        over = {name for name, x in density.items() if x > 1}
        if not over:
            return {name: 1 - density.get(name, 1.0) for name in shapes}
        whole_ |= over
    return uniform(shapes, 0.0)


def checked(value: object, step: int) -> float | None:
    """Return what a schedule said, checked."""
    if value is None:
        return None
    if not isinstance(value, int | float):
        refuse(f"schedule({step})", value, "a sparsity, or None")
    return below_one(f"schedule({step})", value)
