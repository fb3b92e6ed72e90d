"""Masks of weights: which are kept, by what they are worth, or at random."""

from dataclasses import dataclass
from typing import Literal

import numpy as np
from flwr.common import NDArray

from flower_ext.wire.masks import Mask, largest

Criterion = Literal["magnitude", "saliency", "random", "set", "rigl"]
# Those that drop weights and grow others, from a mask that is random at first.
GROWING = ("set", "rigl")


def best(worth: NDArray, count: int, among: Mask) -> Mask:
    """Return the ``count`` places of most worth, which is not negative, among some.

    Of equals the first. If there are fewer places, all.
    """
    mask = np.zeros(among.shape, np.bool_)
    mask[among] = largest(worth[among], count)
    return mask


def n_of_m_mask(worth: NDArray, n: int, m: int, among: Mask) -> Mask:
    """Return the n places of most worth in every m that follow each other in a row.

    Rows are along the first axis; what is left over at the end of one is kept.

    Examples
    --------
    >>> worth = np.array([[1.0, 4.0, 2.0, 3.0, 0.5, 9.0]])
    >>> n_of_m_mask(worth, 2, 4, np.ones((1, 6), bool)).astype(int)
    array([[0, 1, 0, 1, 1, 1]])
    """
    rows = np.where(among, worth, -1.0).reshape(len(worth), -1)
    columns = rows.shape[1] // m * m
    groups = rows[:, :columns].reshape(len(worth), -1, m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    kept = np.zeros(groups.shape, np.bool_)
    np.put_along_axis(kept, order[..., :n], True, axis=-1)
    mask = np.ones(rows.shape, np.bool_)
    mask[:, :columns] = kept.reshape(len(worth), columns)
    return np.asarray(mask.reshape(worth.shape))


@dataclass(frozen=True)
class Choice:
    """How a mask is chosen for an array.

    Parameters
    ----------
    criterion : str
        See :class:`~flower_ext.server.optimizers.PruneAfter`.
    drop_fraction : float
        Share of the kept weights that is dropped, of those that grow others.
    n_of_m : tuple of int, optional
        Kept in every so many.
    """

    criterion: Criterion = "magnitude"
    drop_fraction: float = 0.3
    n_of_m: tuple[int, int] | None = None

    def mask(
        self,
        weights: NDArray,
        change: NDArray | None,
        old: Mask | None,
        sparsity: float,
        generator: np.random.Generator,
    ) -> Mask:
        """Return the new mask of an array.

        Parameters
        ----------
        weights : ndarray
            The model's, those that are pruned 0.
        change : ndarray or None
            What the clients changed in the mean, where the criterion looks at it.
        old : ndarray of bool or None
            The mask so far.
        sparsity : float
            Of this array: ``floor(sparsity * size)`` are pruned.
        generator : numpy.random.Generator
            Of all that is random.
        """
        count = weights.size - int(sparsity * weights.size)
        every = np.ones(weights.shape, np.bool_)
        if self.criterion in GROWING:
            if old is None:
                return best(generator.random(weights.shape), count, every)
            return self._regrown(weights, change, old, count, generator)
        among = every if old is None else old
        worth = self._worth(weights, change, generator)
        if self.n_of_m:
            return n_of_m_mask(worth, *self.n_of_m, among)
        return best(worth, count, among)

    def _worth(
        self, weights: NDArray, change: NDArray | None, generator: np.random.Generator
    ) -> NDArray:
        if self.criterion == "random":
            return generator.random(weights.shape)
        size = np.abs(weights.astype(np.float64))
        return size if change is None else size * np.abs(change)

    def _regrown(
        self,
        weights: NDArray,
        change: NDArray | None,
        old: Mask,
        count: int,
        generator: np.random.Generator,
    ) -> Mask:
        """Drop the smallest of what is kept, and grow as many elsewhere."""
        size = np.abs(weights.astype(np.float64))
        kept = best(size, count - int(self.drop_fraction * count), old)
        worth = generator.random(weights.shape) if change is None else np.abs(change)
        return kept | best(worth, count - int(kept.sum()), ~kept)
