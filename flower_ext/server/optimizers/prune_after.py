"""PruneAfter: a server that prunes the model after each step of another optimizer."""

import zlib
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, all_finite, is_parameter
from flower_ext.core.errors import fraction, one_of, refuse, whole
from flower_ext.core.schedules import Scheduled, value_in
from flower_ext.server.optimizers.around import Around
from flower_ext.server.optimizers.base import ServerOptimizer
from flower_ext.server.optimizers.pruning import GROWING, Choice, Criterion
from flower_ext.server.optimizers.sparsity import (
    PolynomialSparsity,
    SparsitySchedule,
    checked,
    erk,
    uniform,
)
from flower_ext.wire.masks import Mask, Masks
from flower_ext.wire.pruned import Kept

Distribution = Literal["uniform", "erk"]
_DISTRIBUTIONS = {"uniform": uniform, "erk": erk}
_MASK, _COUNT = "mask", "count"
# Criteria that look at what the clients changed.
_LOOKING = ("saliency", "rigl")


class PruneAfter(Around):
    r"""Prune the model on the server, after each step of another optimizer.

    As JaxPruner does in federated training (Lee et al. 2023, arXiv:2304.14082): clients
    train all weights, and know nothing of masks; the server sets those that are pruned
    to 0 after its step. Masks are made anew in the steps that the schedule names, of
    the model that the step has made.

    Parameters
    ----------
    optimizer : ServerOptimizer
        Moves the model.
    schedule : callable
        ``step -> sparsity or None``: :class:`PolynomialSparsity`,
        :class:`OneShotSparsity`, :class:`PeriodicSparsity`, or any other. Steps are
        rounds in which the model moved, from 1. Sparsity 0 gives back ``optimizer``.
    criterion : {"magnitude", "saliency", "random", "set", "rigl"}
        Which weights are kept: the largest :math:`|w|`; the largest :math:`|w g|`, with
        g the direction of the round; any. Of these three what is pruned stays pruned,
        so that sparsity never falls. SET (Mocanu et al. 2018) and RigL (Evci et al.
        2020) begin with a random mask; from then on they drop the smallest of what is
        kept, and grow as many that start at 0, with moments of 0: at random, or where
        :math:`|g|` is largest.
    distribution : {"uniform", "erk"}
        Whether all arrays are as sparse, or large ones more, see
        :func:`~flower_ext.server.optimizers.sparsity.erk`.
    n_of_m : tuple of two ints, optional
        Keep n in every m weights that follow each other in a row, as ``(2, 4)``, for
        hardware that multiplies such matrices. The sparsity is then 1 - n/m.
    drop_fraction : float or callable (default: 0.3)
        Share of what is kept that SET and RigL drop, or ``step -> share``, such as
        ``Cosine(0.3, rounds)``. 0 keeps the first mask.
    dense : sequence of str
        Arrays with one of these words in their name are not pruned.
    seed : int (default: 0)
        Of all that is random.

    Attributes
    ----------
    masks : dict[str, ndarray of bool]
        What is kept of each array.
    sparsity : float
        Share that is pruned of the arrays that have a mask.
    upload : Codec
        How clients should send their change: see below.

    Notes
    -----
    Pruned are matrices and kernels: parameters with more than one axis, of finite
    numbers. Of n weights ``floor(sparsity * n)`` are.

    **Bytes.** ``PruneAfter(...)`` alone saves none. ``download=Nonzero()`` sends masks
    and the weights that are left; ``upload=optimizer.upload`` their changes only, since
    both ends know the mask. That loses nothing: changes of pruned weights are thrown
    away before the inner optimizer sees them. RigL looks at them in the rounds in which
    it grows weights; in these rounds, and before the first mask, ``upload`` sends all.
    A weight that is 0 and not pruned is written as the negative zero, by which codecs
    tell them apart.

    **Privacy.** Under a mechanism masks are made of the noisy model and direction:
    they are post-processing and cost nothing. What noise moves looks salient, and RigL
    grows at random where noise exceeds the signal.

    Deviations from JaxPruner: scores are of the new weights and not of the ones before
    the step; polynomial schedules reach their sparsity in their last step whatever the
    interval; N:M runs along rows, and what is left over at the end of a row is kept.
    Of a tied tensor each name is scored, and the first name's mask counts.

    Examples
    --------
    >>> from flower_ext.server.optimizers import OneShotSparsity, SGD
    >>> optimizer = PruneAfter(SGD(), OneShotSparsity(0.5))
    >>> sent = {"w": np.array([[1.0, -4.0], [2.0, 3.0]])}
    >>> optimizer.step(sent, {"w": np.zeros((2, 2))})["w"].tolist()
    [[0.0, -4.0], [0.0, 3.0]]
    """

    def __init__(
        self,
        optimizer: ServerOptimizer,
        schedule: SparsitySchedule,
        criterion: Criterion = "magnitude",
        *,
        distribution: Distribution = "uniform",
        n_of_m: tuple[int, int] | None = None,
        drop_fraction: Scheduled = 0.3,
        dense: Sequence[str] = (),
        seed: int = 0,
    ) -> None:
        super().__init__(optimizer, "optimizer")
        if not callable(schedule):
            cause = "OneShotSparsity(0.8, at=1)"
            refuse("schedule", schedule, "a function of the step", cause)
        one_of("criterion", criterion, get_args(Criterion))
        one_of("distribution", distribution, get_args(Distribution))
        if isinstance(dense, str):
            refuse("dense", dense, "a sequence of words", "write ('classifier',)")
        if not callable(drop_fraction):
            fraction("drop_fraction", drop_fraction)
        self.schedule = schedule
        self.criterion: Criterion = criterion
        self.distribution: Distribution = distribution
        self.n_of_m = n_of_m
        self.drop_fraction = drop_fraction
        self.dense = tuple(dense)
        self.seed = whole("seed", seed, 0)
        if n_of_m is not None:
            self._require_pattern(*_pattern(n_of_m))

    def _require_pattern(self, n: int, m: int) -> None:
        """Refuse what has no meaning where n of m are kept."""
        if self.criterion in GROWING:
            cause = "dropping and growing leaves no n of m"
            refuse("criterion", self.criterion, "none that grows with n_of_m", cause)
        if self.distribution != "uniform":
            refuse("distribution", self.distribution, "'uniform' with n_of_m")
        own = getattr(self.schedule, "sparsity", None)
        gradual = isinstance(self.schedule, PolynomialSparsity)
        if gradual or (own is not None and abs(own - (1 - n / m)) > 1e-12):
            bound = f"at once {1 - n / m:g}, which is n_of_m={(n, m)}"
            refuse("schedule", self.schedule, bound)

    @property
    def masks(self) -> Masks:
        """What is kept of each array."""
        return {n: np.asarray(x, np.bool_) for n, x in self._kept.items()}

    @property
    def _kept(self) -> Arrays:
        return self.state.get(_MASK, {})

    @property
    def sparsity(self) -> float:
        """Share that is pruned of the arrays that have a mask; 0 without any."""
        size = sum(x.size for x in self._kept.values())
        kept = sum(int(np.count_nonzero(x)) for x in self._kept.values())
        return 1 - kept / size if size else 0.0

    @property
    def upload(self) -> Kept:
        """The codec by which clients send the change of what is kept."""
        return Kept(self.needs_everything)

    def needs_everything(self, server_round: int = 0) -> bool:
        """Whether the next step looks at the change of weights that are pruned.

        The steps that were taken tell it, not the number of the round: a round whose
        replies do not suffice is no step.
        """
        if self.sparsity == 0:
            return True
        return self.criterion == "rigl" and self.schedule(self._steps + 1) is not None

    @property
    def _steps(self) -> int:
        return int(self.state.get(_COUNT, {}).get("", 0))

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model, see :meth:`ServerOptimizer.step`."""
        step = self._steps + 1
        self.state.setdefault(_COUNT, {})[""] = np.asarray(step, np.int64)
        sparsity = checked(self.schedule(step), step)
        seen: Arrays = {}
        if sparsity is not None and self.criterion in _LOOKING:
            seen = {n: direction[n].copy() for n, x in sent.items() if self._may(n, x)}
        for name in self._kept.keys() & direction.keys():
            direction[name] = np.where(self._kept[name], direction[name], 0.0)
        new = self.inner.step(sent, direction)
        if sparsity is not None:
            self._choose(new, seen, sparsity, step)
        for name in self._kept.keys() & new.keys():
            new[name] = pruned(new[name], self._kept[name])
        return new

    def _may(self, name: str, array: NDArray) -> bool:
        """Whether an array is one that is pruned."""
        return (
            is_parameter(name, array)
            and array.ndim > 1
            and array.size > 0
            and not any(word in name for word in self.dense)
            and all_finite([array])
        )

    def _choose(self, new: Arrays, seen: Arrays, sparsity: float, step: int) -> None:
        """Make the masks of a step, and let the moments of what changed be 0."""
        shapes = {name: x.shape for name, x in new.items() if self._may(name, x)}
        each = _DISTRIBUTIONS[self.distribution](shapes, sparsity)
        drop = fraction("drop_fraction", value_in(self.drop_fraction, step))
        choice = Choice(self.criterion, drop, self.n_of_m)
        masks = self.state.setdefault(_MASK, {})
        stay: Masks = {}
        for name in shapes:
            old = masks.get(name)
            seeds = [self.seed, step, zlib.crc32(name.encode())]
            mask = choice.mask(
                new[name],
                seen.get(name),
                None if old is None else np.asarray(old, np.bool_),
                each[name],
                np.random.default_rng(seeds),
            )
            masks[name] = mask
            stay[name] = mask if old is None else mask & np.asarray(old, np.bool_)
        self._restart(stay)

    def _restart(self, stay: Masks) -> None:
        """Set the inner moments to 0 but where weights stay."""
        if all(mask.all() for mask in stay.values()):
            return
        state = self.inner.state_dict()
        for arrays in state.values():
            for name in arrays.keys() & stay.keys():
                if arrays[name].shape == stay[name].shape:
                    zero = arrays[name].dtype.type(0)
                    arrays[name] = np.where(stay[name], arrays[name], zero)
        self.inner.load_state_dict(state)

    def __repr__(self) -> str:
        """Name the optimizer and its settings, for ``summary()``."""
        others = {
            "distribution": self.distribution,
            "n_of_m": self.n_of_m,
            "drop_fraction": self.drop_fraction,
            "dense": self.dense,
            "seed": self.seed,
        }
        told = "".join(f", {name}={x!r}" for name, x in others.items())
        return (
            f"PruneAfter({self.inner!r}, {self.schedule!r}, {self.criterion!r}{told})"
        )


def pruned(array: NDArray, mask: Mask) -> NDArray:
    """Return an array without what is pruned; kept zeros are negative ones."""
    if mask.all():
        return array
    kept = np.where(array == 0, array.dtype.type(-0.0), array)
    return np.asarray(np.where(mask, kept, array.dtype.type(0)), array.dtype)


def _pattern(value: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(value, tuple | list) or len(value) != 2:
        refuse("n_of_m", value, "two integers, such as (2, 4)")
    n, m = value
    whole("n_of_m[1]", m, 2)
    if whole("n_of_m[0]", n, 1) >= m:
        refuse("n_of_m", value, "fewer of more, such as (2, 4)")
    return n, m
