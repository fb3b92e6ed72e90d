r"""LoRA pairs among named arrays: what each rank is worth, and the same product anew.

A pair is a factor :math:`A`, ``(rank, in)``, and a factor :math:`B`, ``(out, rank)``,
whose product :math:`BA = \sum_i b_i a_i^\top` is added to a weight. They are named as
peft does, ``....lora_A.<adapter>.weight`` and ``....lora_B.<adapter>.weight``;
convolutions have further axes, embeddings' factors are ``lora_embedding_A`` and
``lora_embedding_B``.
"""

from collections.abc import Mapping

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, all_finite, is_averaged
from flower_ext.core.typing import Floats

_RANK_AXIS = {"lora_A": 0, "lora_B": 1, "lora_embedding_A": 0, "lora_embedding_B": 1}
_PARTNER = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}


def rank_axis(name: str, array: NDArray) -> int | None:
    """Return the axis of the ranks in a factor of LoRA; None for any other array."""
    axis = next((_RANK_AXIS[p] for p in name.split(".") if p in _RANK_AXIS), None)
    fits = axis is not None and array.ndim > axis and is_averaged(array)
    return axis if fits else None


def pairs(arrays: Mapping[str, NDArray]) -> list[tuple[str, str]]:
    """Return the names of both factors of every pair that is whole.

    Examples
    --------
    >>> pairs({"q.lora_A.weight": np.zeros((1, 3)), "q.lora_B.weight": np.eye(1)})
    [('q.lora_A.weight', 'q.lora_B.weight')]
    """
    found = []
    for name, a in arrays.items():
        if rank_axis(name, a) == 0:
            partner = ".".join(_PARTNER.get(part, part) for part in name.split("."))
            b = arrays.get(partner)
            if b is not None and rank_axis(partner, b) and b.shape[1] == a.shape[0]:
                found.append((name, partner))
    return found


def rank_norms(arrays: Mapping[str, NDArray]) -> dict[str, Floats]:
    """Return of each factor the Euclidean norms of its ranks, rows of A, columns of B.

    Examples
    --------
    >>> rank_norms({"q.lora_A.weight": np.float32([[3, 4], [0, 1]])})
    {'q.lora_A.weight': array([5., 1.])}
    """
    found = {}
    for name, x in arrays.items():
        axis = rank_axis(name, x)
        if axis is not None:
            ranks = np.moveaxis(x, axis, 0).reshape(x.shape[axis], -1)
            found[name] = np.linalg.norm(ranks.astype(np.float64), axis=1)
    return found


def term_values(arrays: Mapping[str, NDArray]) -> dict[str, Floats]:
    r"""Return of each factor what its ranks are worth to the product of the pair.

    That is the one singular value of the rank's term :math:`b_i a_i^\top`,
    :math:`\|b_i\| \|a_i\|`, the same in both factors. Without its partner, as where A
    is frozen, a factor has the norms of its own.
    """
    found = rank_norms(arrays)
    for a, b in pairs(arrays):
        found[a] = found[b] = found[a] * found[b]
    return found


def by_singular_value(arrays: Mapping[str, NDArray]) -> Arrays:
    r"""Return the factors of every pair with the same product, sorted by its spectrum.

    Of the singular value decomposition :math:`BA = U S V^\top` they are
    :math:`A' = c V^\top` and :math:`B' = U S / c`, where c is the root mean square norm
    of the rows of A. The first r ranks are then the best approximation of rank r of the
    product (Eckart and Young 1936), for every r. A new adapter stays one that learns:
    where B is zero, A' spans what A did. Ranks beyond the input's width become zero.

    Parameters
    ----------
    arrays : Mapping[str, ndarray]
        What is not of a whole pair of finite numbers is left out of the result.

    Returns
    -------
    dict[str, ndarray]
        In float64.

    Examples
    --------
    >>> a, b = "q.lora_A.weight", "q.lora_B.weight"
    >>> new = by_singular_value({a: np.eye(2), b: np.float32([[1, 0], [0, -3]])})
    >>> np.abs(new[b])
    array([[0., 1.],
           [3., 0.]])
    """
    found: Arrays = {}
    for a, b in pairs(arrays):
        if all_finite([arrays[a], arrays[b]]):
            found[a], found[b] = _anew(arrays[a], arrays[b])
    return found


def _anew(a: NDArray, b: NDArray) -> tuple[NDArray, NDArray]:
    """Return A' and B', in the shapes of A and B, see :func:`by_singular_value`."""
    rank = a.shape[0]
    rows = a.reshape(rank, -1).astype(np.float64)
    turned = np.moveaxis(b, 1, -1)
    columns = turned.reshape(-1, rank).astype(np.float64)
    scale = float(np.linalg.norm(rows)) / np.sqrt(rank) or 1.0
    # Of small matrices only: rows = left.T @ basis.T, and inner has V of the product.
    basis, left = np.linalg.qr(rows.T)
    inner = columns @ left.T
    turn = np.linalg.svd(np.linalg.qr(inner, mode="r"))[2]
    new_rows, new_columns = np.zeros_like(rows), np.zeros_like(columns)
    new_rows[: len(turn)] = scale * turn @ basis.T
    new_columns[:, : len(turn)] = inner @ turn.T / scale
    back = np.moveaxis(new_columns.reshape(turned.shape), -1, 1)
    return new_rows.reshape(a.shape), back
