r"""LoRA pairs among named arrays: what each rank is worth, and the same product anew.

A pair is a factor :math:`A`, ``(rank, in)``, and a factor :math:`B`, ``(out, rank)``,
whose product :math:`BA = \sum_i b_i a_i^\top` is added to a weight. They are named as
peft does, ``....lora_A.<adapter>.weight`` and ``....lora_B.<adapter>.weight``;
convolutions have further axes, embeddings' factors are ``lora_embedding_A`` and
``lora_embedding_B``.

What is added is :math:`s\,BA` with the scaling :math:`s = \alpha / r`, or
:math:`\alpha / \sqrt r` of rank-stabilized LoRA. Sums of such products are kept in
factors, see :class:`Product`: side by side they are exact, and their decomposition
needs no matrix of the weight's size but one of the factors' ranks.
"""

import math
import zlib
from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, all_finite, is_averaged
from flower_ext.core.errors import refuse
from flower_ext.core.typing import Floats

#: Keys of a message's configuration: the rank of the client's adapter, which its model
#: is also made with (``run_config["lora-rank"]``), and what its products are scaled by.
RANK_KEY = "lora-rank"
SCALING_KEY = "lora-scaling"

T = TypeVar("T")

# Ends of the names of a layer's change: two factors, or the matrix.
_LEFT, _RIGHT, _DENSE = ".base_left", ".base_right", ".base_change"
_CHANGE = (_LEFT, _RIGHT, _DENSE)

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


# Adapters as a whole -----------------------------------------------------------------


class Pair(NamedTuple):
    """The adapter of one layer: the layer's name, and those of both factors."""

    layer: str
    a: str
    b: str


def scaling(lora_alpha: float, rank: int, *, use_rslora: bool = False) -> float:
    """Return what a product of a rank is scaled by, as peft does it.

    Examples
    --------
    >>> scaling(16, 4), scaling(16, 4, use_rslora=True)
    (4.0, 8.0)
    """
    return lora_alpha / (math.sqrt(rank) if use_rslora else rank)


def require_adapter(arrays: Mapping[str, NDArray]) -> tuple[list[Pair], int]:
    """Return the pairs of a model whose products can be summed, and their rank.

    Raises
    ------
    ValueError
        If there is none, or if the model has more of LoRA than whole pairs of matrices
        of one rank: a factor without its partner, the magnitudes of DoRA, a bias of a
        factor, embeddings or convolutions; or if the weights that it adapts are sent.
    """
    found = [
        Pair(a[: a.index(".lora_A.")], a, b)
        for a, b in pairs(arrays)
        if ".lora_A." in a and arrays[a].ndim == arrays[b].ndim == 2
    ]
    if not found:
        _refuse_adapter(list(arrays)[:4], "is it an AdapterModel with LoRA?")
    whole = {name for pair in found for name in (pair.a, pair.b)}
    others = [n for n in arrays if ".lora_" in n and n not in whole]
    if others:
        cause = (
            "a frozen factor (FFA-LoRA, whose plain average is exact), DoRA, a bias of "
            "LoRA, convolutions and embeddings are not supported"
        )
        _refuse_adapter(others[:4], cause)
    bases = [f"{pair.layer}.base_layer.weight" for pair in found]
    if sent := [name for name in bases if name in arrays]:
        cause = "the frozen weights must not be sent, as AdapterModel does not"
        _refuse_adapter(sent[:4], cause)
    ranks = {len(arrays[pair.a]) for pair in found}
    if len(ranks) > 1:
        refuse("ranks of the layers", sorted(ranks), "one", "without a rank_pattern")
    return found, ranks.pop()


def _refuse_adapter(names: list[str], cause: str) -> None:
    bound = "whole pairs ....lora_A.<adapter>.weight, ....lora_B.<adapter>.weight"
    refuse("initial_arrays", names, bound, cause)


def fresh_factor(name: str, shape: tuple[int, ...], *key: int) -> NDArray:
    r"""Return a factor of a new adapter: A as peft draws it by default, B zero.

    That is :math:`U(-1/\sqrt{in}, 1/\sqrt{in})`; the draws depend on the name and the
    key, such as a seed and a round.
    """
    if rank_axis(name, np.zeros(shape)) != 0:
        return np.zeros(shape, np.float32)
    rng = np.random.default_rng([*key, zlib.crc32(name.encode())])
    bound = 1 / math.sqrt(shape[1])
    return rng.uniform(-bound, bound, shape).astype(np.float32)


# Sums of products --------------------------------------------------------------------


class Product(NamedTuple):
    """A matrix in factors, ``left @ right``, of shapes (out, rank) and (rank, in)."""

    left: Floats
    right: Floats

    @property
    def norm(self) -> float:
        """The Frobenius norm of the matrix, which is not made."""
        square = np.sum((self.left.T @ self.left) * (self.right @ self.right.T))
        return math.sqrt(max(float(square), 0.0))

    def matrix(self) -> Floats:
        """Return the matrix."""
        return np.asarray(self.left @ self.right)

    def svd(self) -> tuple[Floats, Floats, Floats]:
        """Return U, the singular values and V', of the rank of the factors at most.

        By thin QR decompositions of both factors, of which only the small triangles
        are multiplied.
        """
        left, left_triangle = np.linalg.qr(self.left)
        right, right_triangle = np.linalg.qr(self.right.T)
        inner = left_triangle @ right_triangle.T
        u, s, v = np.linalg.svd(inner, full_matrices=False)
        return left @ u, s, v @ right.T


def sum_of_products(terms: Iterable[tuple[float, NDArray, NDArray]]) -> Product:
    r"""Return :math:`\sum_k c_k B_k A_k` exactly, its factors side by side.

    Examples
    --------
    >>> one, two = np.eye(2), np.array([[0.0, 1.0], [1.0, 0.0]])
    >>> sum_of_products([(2.0, one, one), (1.0, one, two)]).matrix()
    array([[2., 1.],
           [1., 2.]])
    """
    terms = list(terms)
    left = [c * b.astype(np.float64) for c, b, _ in terms]
    right = [a.astype(np.float64) for _, _, a in terms]
    return Product(np.concatenate(left, axis=1), np.concatenate(right))


# The change of a frozen base ---------------------------------------------------------


def add_to_base(
    base: Mapping[str, NDArray], layer: str, more: Product, dtype: np.typing.DTypeLike
) -> Arrays:
    """Return the change of a layer's weight with a product added to it.

    It is two factors of its rank, singular values below the rounding of ``dtype`` left
    out; or the matrix, once that is fewer numbers.

    Parameters
    ----------
    base : Mapping[str, ndarray]
        The changes of layers so far.
    layer : str
        Which one.
    more : Product
        What is added.
    dtype : dtype
        Of the result.

    Returns
    -------
    dict[str, ndarray]
        The layer's new change: ``<layer>.base_left`` and ``<layer>.base_right``, or
        ``<layer>.base_change``; none if nothing has changed.
    """
    rows, columns = len(more.left), more.right.shape[1]
    if layer + _DENSE in base:
        return {layer + _DENSE: (base[layer + _DENSE] + more.matrix()).astype(dtype)}
    if layer + _LEFT in base:
        before = (1.0, base[layer + _LEFT], base[layer + _RIGHT])
        more = sum_of_products([before, (1.0, *more)])
    u, s, v = more.svd()
    # Below the rounding of the result, or of this computation where terms cancel.
    largest = np.linalg.norm(more.left) * np.linalg.norm(more.right)
    least = max(np.finfo(dtype).eps * s[:1].sum(), 1e-14 * largest)
    rank = int(np.sum(s > least))
    if not rank:
        return {}
    if rank * (rows + columns) >= rows * columns:
        return {layer + _DENSE: more.matrix().astype(dtype)}
    # Both as large, so that codes of few bits round both alike.
    root = np.sqrt(s[:rank])
    return {
        layer + _LEFT: (u[:, :rank] * root).astype(dtype),
        layer + _RIGHT: (root[:, None] * v[:rank]).astype(dtype),
    }


def split_base(arrays: Mapping[str, T]) -> tuple[dict[str, T], dict[str, T]]:
    """Return the arrays of a model, and those of the changes of its base."""
    base = {name: x for name, x in arrays.items() if name.endswith(_CHANGE)}
    return {name: x for name, x in arrays.items() if name not in base}, base


def layers_of(base: Iterable[str]) -> list[str]:
    """Return the layers of which there is a change, from the names of arrays."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in base))


def change_of(base: Mapping[str, T], layer: str) -> tuple[T, ...]:
    """Return a layer's change: its two factors, or the matrix alone."""
    return tuple(base[layer + end] for end in _CHANGE if layer + end in base)
