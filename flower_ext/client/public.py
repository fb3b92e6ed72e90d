"""Public data's directions: a projection of features that needs no privacy.

Noise of differential privacy has the same size in every coordinate. Of d features a
linear layer for c classes learns ``c d`` numbers; of their coordinates in a subspace of
k dimensions, ``c k``, under noise whose norm is smaller by the root of k / d.
"""

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from flower_ext.core.errors import refuse, whole
from flower_ext.core.typing import Floats

# How far the products of columns may be from 0 and 1: those of float32 are nearer.
_ORTHONORMAL = 1e-4
# Singular values below this share of the largest are rounding, not directions.
_RANK = 1e-6


def public_subspace(public_rows: ArrayLike, dimensions: int) -> Floats:
    r"""Return the directions in which public vectors are largest.

    The first right singular vectors of the rows, which are not centred: the subspace of
    that dimension with the least squared distance to them.

    Parameters
    ----------
    public_rows : array_like
        Features of public examples, of shape ``(examples, d)``; or the rows of a head's
        gradients on them, of shape ``(examples * classes, d)``. What is found is
        released without noise: rows of private examples would be a leak that no epsilon
        counts.
    dimensions : int
        k, at most the rank of the rows.

    Returns
    -------
    ndarray
        Orthonormal columns, of shape ``(d, k)``, the largest direction first; the
        largest entry of each is positive.

    Raises
    ------
    ValueError
        If rows are no finite matrix, or have fewer directions than asked for.

    Examples
    --------
    >>> public_subspace([[3.0, 4.0, 0.0], [6.0, 8.0, 0.0]], 1).round(3).tolist()
    [[0.6], [0.8], [0.0]]
    """
    rows = np.asarray(public_rows, np.float64)
    if rows.ndim != 2 or not rows.size or not np.isfinite(rows).all():
        refuse("public_rows", rows.shape, "a matrix of finite numbers, not empty")
    whole("dimensions", dimensions, 1)
    # Of the Gram matrix, which is as small as d by d, whatever the number of rows.
    squares, vectors = np.linalg.eigh(rows.T @ rows)
    rank = int(np.sum(squares > _RANK**2 * squares[-1]))
    if dimensions > rank:
        cause = "beyond it any direction is as good as any other: take more public rows"
        refuse("dimensions", dimensions, f"<= {rank}, the rank of public_rows", cause)
    found = vectors[:, ::-1][:, :dimensions]
    largest = np.abs(found).argmax(axis=0)
    return np.asarray(found * np.sign(found[largest, np.arange(dimensions)]))


class PublicProjection(nn.Module):
    r"""A fixed layer between a public encoder and a head: coordinates in a subspace.

    .. math:: x \mapsto P^\top x, \qquad P^\top P = I .

    A head :math:`Z` behind it is the head :math:`W = Z P^\top` on all features; its
    gradient is that of :math:`W`, projected: :math:`\nabla_Z = \nabla_W P`. So an
    example's gradient and a client's change are projected before they are clipped, and
    the noise on them has k coordinates for each class, whoever adds it. With k = d the
    clipped and noised training is that without the layer, in other coordinates:
    lengths and the law of Gaussian noise do not depend on these. ::

        projection = PublicProjection(public_subspace(public_features, 32))
        model = nn.Sequential(encoder, projection, nn.Linear(32, num_classes))

    Parameters
    ----------
    public_projection : array_like
        P, of shape ``(d, k)``, with orthonormal columns. It must come of public data,
        as of :func:`public_subspace`: it is used and sent without noise.

    Raises
    ------
    ValueError
        If its columns are not finite and orthonormal: lengths would not be kept, and
        clipping bounds them.

    Examples
    --------
    >>> layer = PublicProjection([[0.6], [0.8]])
    >>> layer(torch.tensor([[1.0, 2.0]])).round(decimals=4)
    tensor([[2.2000]])
    """

    matrix: Tensor

    def __init__(self, public_projection: ArrayLike) -> None:
        super().__init__()
        matrix = np.asarray(public_projection, np.float64)
        if matrix.ndim != 2 or not 0 < matrix.shape[1] <= matrix.shape[0]:
            bound = "(features, k) with 1 <= k <= features"
            refuse("public_projection's shape", matrix.shape, bound)
        if not np.isfinite(matrix).all():
            refuse("public_projection", "an array with NaN or infinity", "finite")
        gap = float(np.abs(matrix.T @ matrix - np.eye(matrix.shape[1])).max())
        if gap > _ORTHONORMAL:
            cause = "take Q of numpy.linalg.qr(P), or public_subspace(...)"
            shown = f"columns whose products are off by {gap:.3g}"
            refuse("public_projection", shown, "orthonormal", cause)
        self.register_buffer("matrix", torch.tensor(matrix, dtype=torch.float32))

    def forward(self, features: Tensor) -> Tensor:
        """Return the coordinates of features, of shape ``(..., k)``."""
        return features @ self.matrix
