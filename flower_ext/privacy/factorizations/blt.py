r"""Buffered linear Toeplitz (BLT): near-optimal noise from a handful of buffers.

    c_0 = 1,  c_j = sum_i omega_i theta_i^{j-1},
    C(x) = prod_i (1 - thetahat_i x) / prod_i (1 - theta_i x).

theta (``buffer_decay``) and omega (``output_scale``) define C and drive the noise;
thetahat and omegahat define C^-1 in the same way. With
1 > theta_1 > thetahat_1 > theta_2 > ... > 0 all omega are positive, c never rises (so
the sensitivity below is exact), and

    B_j = a + sum_i beta_i thetahat_i^j   with  a, beta_i > 0,

a sum of positive terms only: its geometric series lose no digits.
"""

from typing import Self

import numpy as np

from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.blt_optimizer import optimize_buffers
from flower_ext.privacy.factorizations.recurrences import BufferRecurrence, Recurrence
from flower_ext.privacy.factorizations.toeplitz import ToeplitzFactorization
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload


class BufferedToeplitz(ToeplitzFactorization):
    """BLT with given parameters; `optimize` finds good ones.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    buffer_decay : NDArray
        theta in [0, 1], shape ``(buffers,)``.
    output_scale : NDArray
        omega >= 0 with a sum of at most 1, so that c_0 = 1 >= c_1 >= ... >= 0.

    Raises
    ------
    ValueError
        When the coefficients could rise or change sign: the worst pattern would not
        be known.

    References
    ----------
    McMahan, Xu, Zhang, "A hassle-free algorithm for private learning in practice"
    (BLT-DP-FTRL), arXiv 2408.08868; Dvijotham et al. 2024.

    Examples
    --------
    >>> blt = BufferedToeplitz(8, np.array([0.5]), np.array([0.25]))
    >>> blt.coefficients[:4]
    array([1.    , 0.25  , 0.125 , 0.0625])
    """

    def __init__(self, rounds: int, buffer_decay: Floats, output_scale: Floats) -> None:
        super().__init__(rounds)
        decay = np.array(buffer_decay, dtype=np.float64)
        scale = np.array(output_scale, dtype=np.float64)
        if decay.ndim != 1 or decay.shape != scale.shape:
            raise ValueError(
                f"buffer_decay.shape={decay.shape} and output_scale.shape="
                f"{scale.shape} must be the same (buffers,)"
            )
        if not np.all((decay >= 0) & (decay <= 1)):
            raise ValueError(f"buffer_decay={decay} must be in [0, 1]")
        if not (np.all(scale >= 0) and scale.sum() <= 1):
            raise ValueError(
                f"output_scale={scale} must be >= 0 with a sum <= 1: otherwise the "
                "coefficients rise and the sensitivity is unknown"
            )
        # Sensitivity and fingerprint are of these numbers: nobody may change them.
        decay.setflags(write=False)
        scale.setflags(write=False)
        self.buffer_decay = decay
        self.output_scale = scale

    @classmethod
    def optimize(
        cls,
        rounds: int,
        min_separation: int = 1,
        max_participations: int = 1,
        *,
        buffers: int = 4,
        objective: str = "rms",
        workload: Workload = PREFIX_SUMS,
    ) -> Self:
        """Minimise the loss over 1 to ``buffers`` buffers; see `optimize_buffers`."""
        decay, scale = optimize_buffers(
            rounds,
            min_separation,
            max_participations,
            buffers=buffers,
            objective=objective,
            workload=workload,
        )
        return cls(rounds, decay, scale)

    @property
    def buffers(self) -> int:
        """Number of buffers."""
        return len(self.buffer_decay)

    @property
    def name(self) -> str:
        """Name shown in tables."""
        return f"BLT({self.buffers})"

    @property
    def coefficients(self) -> Floats:
        """First column of C, shape ``(rounds,)``."""
        return np.concatenate(
            [[1.0], _power_sum(self.buffer_decay, self.output_scale, self.rounds - 1)]
        )

    def inverse_parameters(self) -> tuple[Floats, Floats]:
        """Return thetahat and omegahat, the BLT parameters of C^-1.

        thetahat are the eigenvalues of diag(theta) - sqrt(omega) sqrt(omega)^T, which
        is symmetric, and -omegahat the squared weights of its eigenvectors. (The noise
        is a linear recursion, whose matrix diag(theta) - 1 omega^T is similar to this
        one; see McMahan and Pillutla 2025, arXiv 2504.21413, for the inversion.)
        """
        # eigh sorts upwards, buffers are from slow to fast decay.
        root = np.sqrt(self.output_scale)
        values, vectors = np.linalg.eigh(
            np.diag(self.buffer_decay) - np.outer(root, root)
        )
        return values[::-1], -((vectors.T @ root) ** 2)[::-1]

    def decoder_coefficients(self) -> Floats:
        """Return the first column of B, shape ``(rounds,)``."""
        return np.asarray(np.cumsum(self.inverse_coefficients()))

    def inverse_coefficients(self) -> Floats:
        """Return the first column of C^-1, shape ``(rounds,)``."""
        decay, scale = self.inverse_parameters()
        return np.concatenate([[1.0], _power_sum(decay, scale, self.rounds - 1)])

    def first(self, rounds: int) -> Self:
        """Return the same parameters for fewer rounds."""
        rounds = self._check_first(rounds)
        return type(self)(rounds, self.buffer_decay, self.output_scale)

    def recurrence(self) -> Recurrence:
        """Return the buffer recurrence."""
        return BufferRecurrence(self.buffer_decay, self.output_scale)

    def _parameters(self) -> tuple[Floats, ...]:
        return (self.buffer_decay, self.output_scale)


def _power_sum(decay: Floats, scale: Floats, count: int) -> Floats:
    """Return sum_i scale_i decay_i^j for j < count, in O(count * buffers)."""
    total = np.zeros(count)
    index = np.arange(count)
    for base, weight in zip(decay, scale, strict=True):
        total += weight * base**index
    return total
