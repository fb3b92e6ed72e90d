"""Masks on named arrays: the largest coordinates, or some ranks of an adapter."""

from collections.abc import Iterable, Mapping
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from flwr.common import NDArray

from flower_ext.core.errors import fraction, one_of, whole
from flower_ext.core.lora import rank_axis, rank_norms, term_values

Mask = npt.NDArray[np.bool_]
Masks = dict[str, Mask]
Scope = Literal["global", "tensor"]
Ranks = Literal["first", "pair", "factor"]


def largest(values: NDArray, k: int) -> Mask:
    """Return the mask of exactly ``min(k, size)`` coordinates largest in magnitude.

    Among equal magnitudes those that come first win, so that the mask depends on the
    values only and choosing again from what was kept changes nothing. NaN counts as
    larger than infinity.

    Parameters
    ----------
    values : ndarray of floats
        Any shape.
    k : int
        At least 0.

    Examples
    --------
    >>> largest(np.array([0.0, -2.0, 1.0, 1.0]), 2)
    array([False,  True,  True, False])
    """
    whole("k", k, 0)
    size = values.size
    if k >= size or k == 0:
        return np.full(values.shape, k > 0)
    # Without their sign bit floats are ordered as the integers of the same bits.
    bits = np.dtype(f"u{values.dtype.itemsize}")
    flat = np.ascontiguousarray(values).reshape(-1).view(bits)
    magnitude = flat & bits.type(np.iinfo(bits).max >> 1)
    smallest = np.partition(magnitude, size - k)[size - k]
    mask: Mask = magnitude > smallest
    ties = np.flatnonzero(magnitude == smallest)
    mask[ties[: k - np.count_nonzero(mask)]] = True
    return mask.reshape(values.shape)


def top_k(
    arrays: Mapping[str, NDArray],
    density: float,
    scope: Scope = "global",
    within: Mapping[str, Mask] | None = None,
) -> Masks:
    """Return masks of the largest coordinates of named arrays.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        Floats. Mixed precisions are compared in the widest.
    density : float
        Share of coordinates to keep, from 0 to 1: ``k = int(density * size)``, but at
        least 1, so that small arrays have a part, too. 0 keeps nothing.
    scope : {"global", "tensor"}
        Whether ``k`` is that of all arrays taken as one vector, in their order (large
        arrays or large values can then leave nothing for the others), or of each.
    within : Mapping[str, ndarray of bool], optional
        Coordinates to choose among. They do not change ``k``, of which less is kept
        if there are fewer of them.

    Examples
    --------
    >>> top_k({"a": np.array([3.0, 1.0]), "b": np.array([2.0, 0.5])}, 0.5)["b"]
    array([ True, False])
    """
    fraction("density", density)
    one_of("scope", scope, get_args(Scope))
    if scope == "tensor":
        return {
            name: _largest_within(
                x, _kept(density, x.size), None if within is None else within[name]
            )
            for name, x in arrays.items()
        }
    vector = _joined(arrays.values())
    allowed = None if within is None else _joined(within[name] for name in arrays)
    mask = _largest_within(vector, _kept(density, vector.size), allowed)
    masks, start = {}, 0
    for name, x in arrays.items():
        masks[name] = mask[start : start + x.size].reshape(x.shape)
        start += x.size
    return masks


def _kept(density: float, size: int) -> int:
    return max(int(density * size), 1) if density > 0 else 0


def _joined(arrays: Iterable[NDArray]) -> NDArray:
    flat = [x.reshape(-1) for x in arrays]
    return np.concatenate(flat) if flat else np.empty(0, np.float32)


def _largest_within(values: NDArray, k: int, within: Mask | None) -> Mask:
    if within is None:
        return largest(values, k)
    mask = np.zeros(values.shape, np.bool_)
    mask[within] = largest(values[within], k)
    return mask


def rank_masks(
    arrays: Mapping[str, NDArray], rank: int, choice: Ranks = "first"
) -> Masks:
    r"""Return masks of ``rank`` ranks of every LoRA pair, of all else True.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        Factors are known by peft's names, see :mod:`~flower_ext.core.lora`.
    rank : int
        At least 0; a rank larger than an adapter's keeps all of it.
    choice : {"first", "pair", "factor"}
        Which ranks: the first; those whose term :math:`b_i a_i^\top` has the largest
        singular value, :math:`\|b_i\| \|a_i\|`; or in each factor those largest in
        Euclidean norm, which need not be the same in both. Of equals the first.

    Notes
    -----
    Where both factors have the same ranks, the product of what is kept is the sum of
    the terms kept: with ``first``, ``B[:, :rank] @ A[:rank]``.
    """
    whole("rank", rank, 0)
    one_of("choice", choice, get_args(Ranks))
    worth = (term_values if choice == "pair" else rank_norms)(arrays)
    masks: Masks = {}
    for name, x in arrays.items():
        masks[name] = np.ones(x.shape, np.bool_)
        axis = rank_axis(name, x)
        if axis is not None:
            first = np.arange(x.shape[axis]) < rank
            kept = first if choice == "first" else largest(worth[name], rank)
            masks[name][(slice(None),) * axis + (~kept,)] = False
    return masks
