"""Muon: momentum of matrices, made orthogonal."""

from collections.abc import Sequence

import numpy as np
from flwr.common import NDArray

from flower_ext.core.arrays import Arrays, is_parameter
from flower_ext.core.errors import (
    at_least,
    fraction,
    positive,
    refuse,
    whole,
    yes_or_no,
)
from flower_ext.core.typing import Floats
from flower_ext.server.optimizers.around import Around
from flower_ext.server.optimizers.base import ServerOptimizer, apply_direction, working
from flower_ext.server.optimizers.sgd import SGD

# Jordan et al. 2024: of the odd polynomials of degree 5 one whose slope at 0 is large,
# so that few steps bring singular values above 0.01 or so to between 0.7 and 1.2.
_COEFFICIENTS = (3.4445, -4.775, 2.0315)


def orthogonalized(matrix: Floats, steps: int = 5) -> Floats:
    r"""Return about :math:`UV^\top` of a matrix :math:`U \Sigma V^\top`.

    Steps :math:`X \leftarrow aX + b(XX^\top)X + c(XX^\top)^2X` of Newton and Schulz,
    from :math:`X / \|X\|_F` (Jordan et al. 2024, "Muon: an optimizer for hidden layers
    in neural networks").

    Parameters
    ----------
    matrix : ndarray
        Two axes. One of zeros stays.
    steps : int (default: 5)
        The more, the smaller the singular values that come near 1: each multiplies
        small ones by 3.4.

    Examples
    --------
    >>> np.diag(orthogonalized(np.diag([5.0, 1.0, 0.5]))).round(1)
    array([0.7, 0.8, 0.7])
    """
    size = np.linalg.norm(matrix)
    if size == 0:
        return matrix
    wide = matrix.shape[0] <= matrix.shape[1]
    x = (matrix if wide else matrix.T) / size  # the smaller square is cheaper
    a, b, c = _COEFFICIENTS
    for _ in range(steps):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return np.asarray(x if wide else x.T)


class Muon(Around):
    r"""Muon on matrices, and another optimizer on the rest.

    With :math:`\Delta_t` as the direction of a matrix, and NS for
    :func:`orthogonalized`,

    .. math::
       m_t = \mu m_{t-1} + \Delta_t, \quad
       w_{t+1} = (1 - \eta\lambda) w_t + \eta \sqrt{\max(1, r/c)}\,
                 \mathrm{NS}(\Delta_t + \mu m_t)

    for a matrix of :math:`r` rows and :math:`c` columns: all directions that the
    clients moved in count about the same, however far they moved (Jordan et al. 2024;
    :class:`torch.optim.Muon`, in which NS is computed in bfloat16, and here in the
    precision of the moments). Kernels of convolutions are matrices too: their first
    axis is the rows, all others are flattened to columns. Everything else that is
    trained, with fewer than two axes or excluded, is moved by ``otherwise``.

    Parameters
    ----------
    learning_rate : float (default: 0.02)
        :math:`\eta`: about the singular values of a step.
    momentum : float (default: 0.95)
        :math:`\mu` in [0, 1]; 0 keeps no state.
    nesterov : bool (default: True)
        Without, NS is of :math:`m_t`. With momentum 0 it is the same.
    weight_decay : float (default: 0.0)
        :math:`\lambda`; 0 for none.
    num_steps : int (default: 5)
        Of Newton and Schulz.
    excluded : sequence of str
        Matrices with one of these words in their name are moved by ``otherwise``, as
        Jordan et al. advise for embeddings and the last layer.
    otherwise : ServerOptimizer, optional
        By default plain averaging, ``SGD(1.0)``. One that treats each array on its own.

    Notes
    -----
    A LoRA pair is two matrices, and each factor is orthogonalised.

    Examples
    --------
    >>> sent = {"w": np.zeros((2, 2)), "b": np.zeros(2)}
    >>> new = Muon(0.1).step(sent, {"w": np.eye(2) * 9, "b": np.ones(2)})
    >>> np.linalg.svd(new["w"])[1].round(2), new["b"]
    (array([0.11, 0.11]), array([1., 1.]))
    """

    slot = "otherwise"

    def __init__(
        self,
        learning_rate: float = 0.02,
        momentum: float = 0.95,
        nesterov: bool = True,
        weight_decay: float = 0.0,
        num_steps: int = 5,
        excluded: Sequence[str] = (),
        otherwise: ServerOptimizer | None = None,
    ) -> None:
        super().__init__(SGD() if otherwise is None else otherwise, "otherwise")
        self.learning_rate = positive("learning_rate", learning_rate)
        self.momentum = fraction("momentum", momentum)
        self.nesterov = yes_or_no("nesterov", nesterov)
        self.weight_decay = at_least("weight_decay", weight_decay, 0)
        self.num_steps = whole("num_steps", num_steps, 1)
        if isinstance(excluded, str):
            refuse("excluded", excluded, "a sequence of words", "write ('embed',)")
        self.excluded = tuple(excluded)

    def step(self, sent: Arrays, direction: Arrays) -> Arrays:
        """Return the next model, see :meth:`ServerOptimizer.step`."""
        matrices = {n: x for n, x in sent.items() if self._is_matrix(n, x)}
        moved = {n: self._moved(n, x, direction.pop(n)) for n, x in matrices.items()}
        rest = {name: x for name, x in sent.items() if name not in matrices}
        if rest:
            moved |= self.inner.step(rest, direction)
        return {name: moved[name] for name in sent}

    def _is_matrix(self, name: str, array: NDArray) -> bool:
        return (
            is_parameter(name, array)
            and array.ndim > 1
            and array.size > 0
            and not any(word in name for word in self.excluded)
        )

    def _moved(self, name: str, sent: NDArray, delta: NDArray) -> NDArray:
        dtype = working(sent)
        update = delta
        if self.momentum:
            velocities = self.state.setdefault("momentum", {})
            velocity = velocities.setdefault(name, np.zeros(sent.shape, dtype))
            velocity *= self.momentum
            velocity += delta
            update = delta + self.momentum * velocity if self.nesterov else velocity
        matrix = update.reshape(len(sent), -1).astype(dtype)
        rows, columns = matrix.shape
        step = orthogonalized(matrix, self.num_steps).reshape(sent.shape)
        move = self.learning_rate * max(1.0, rows / columns) ** 0.5 * step
        if self.weight_decay:
            move -= self.learning_rate * self.weight_decay * sent.astype(dtype)
        return apply_direction(sent, move)

    def __repr__(self) -> str:
        """Name the optimizer and its settings, for ``summary()``."""
        excluded = f", excluded={self.excluded}" if self.excluded else ""
        own = super().__repr__()[:-1]
        return f"{own}{excluded}, otherwise={self.inner!r})"
