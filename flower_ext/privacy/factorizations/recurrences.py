"""Row t of C^-1 Z from row t of Z and a few model-sized buffers.

A recurrence is pure linear algebra on a slice of the parameters; it draws nothing
and stores nothing. `flower_ext.privacy.noise` feeds it slice after slice.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np

from flower_ext.core.typing import AnyFloats, Floats


class Recurrence(ABC):
    """One step of the noise of a factorization.

    Parameters
    ----------
    buffers : int
        Number of model-sized vectors that live from one round to the next.
    """

    def __init__(self, buffers: int) -> None:
        self.buffers = buffers

    def draws(self, step: int) -> int:
        """Return how many fresh Gaussian vectors round ``step`` needs."""
        del step
        return 1

    @abstractmethod
    def advance(self, step: int, fresh: Floats, state: AnyFloats) -> AnyFloats:
        """Return the noise of round ``step`` and update ``state`` in place.

        Parameters
        ----------
        step : int
            Round, counted from 0.
        fresh : NDArray
            Shape ``(draws, slice)``, standard normal; may be overwritten.
        state : NDArray
            Shape ``(buffers, slice)``; zeros before round 0.

        Notes
        -----
        Only elementwise operations: a matrix product may round differently at the end
        of a slice, and noise would depend on how the model is cut.
        """


class IndependentRecurrence(Recurrence):
    """C = I: every round gets its own noise."""

    def __init__(self) -> None:
        super().__init__(0)

    def advance(self, step: int, fresh: Floats, state: AnyFloats) -> AnyFloats:
        """Return the fresh noise itself."""
        del step, state
        return np.asarray(fresh[0])


class HistoryRecurrence(Recurrence):
    """Forward substitution with the last rows of C.

        zhat_t = (z_t - sum_{j=1}^{m} C[t, t-j] zhat_{t-j}) / C[t, t]

    Parameters
    ----------
    history : int
        m, the number of past outputs that a row of C can reach.
    row : Callable
        ``row(t)`` returns ``C[t, t], C[t, t-1], ...``, at most ``m + 1`` numbers.
    """

    def __init__(self, history: int, row: Callable[[int], Floats]) -> None:
        super().__init__(history)
        self._row = row

    def advance(self, step: int, fresh: Floats, state: AnyFloats) -> AnyFloats:
        """Solve one row of C zhat = z; a ring buffer holds the past outputs."""
        row = self._row(step)
        out: Floats = fresh[0]
        past = min(step, self.buffers, len(row) - 1)
        product = np.empty_like(out)
        for lag in range(1, past + 1):
            if row[lag]:
                # In float64, whatever the buffers are kept in.
                old = state[(step - lag) % self.buffers]
                np.multiply(old, float(row[lag]), out=product, dtype=np.float64)
                out -= product
        out /= row[0]
        if self.buffers:
            state[step % self.buffers] = out
        return out


class BufferRecurrence(Recurrence):
    """The buffered linear Toeplitz recurrence.

        zhat_t = z_t - omega^T S_t,     S_{t+1} = diag(theta) S_t + 1 zhat_t^T

    (McMahan, Xu, Zhang 2024, arXiv 2408.08868, Algorithm 3).

    Parameters
    ----------
    decay, scale : NDArray
        theta and omega, shape ``(buffers,)``.

    Notes
    -----
    The arithmetic is that of the storage. In float32 the update S += zhat - (1 - theta)
    S rounds once, and rounding errors decay with thetahat like everything else.

    References
    ----------
    Dvijotham et al., "Efficient and near-optimal noise generation for streaming
    differential privacy", 2024; McMahan, Xu, Zhang, arXiv 2408.08868.
    """

    def __init__(self, decay: Floats, scale: Floats) -> None:
        super().__init__(len(decay))
        # 1 - theta, because theta itself would lose its digits in float32.
        self._gap = [float(1 - value) for value in decay]
        self._scale = [float(value) for value in scale]

    def advance(self, step: int, fresh: Floats, state: AnyFloats) -> AnyFloats:
        """Subtract the buffers' prediction, then let them decay."""
        del step
        out: AnyFloats = fresh[0].astype(state.dtype, copy=False)
        change = np.empty_like(out)
        for buffer, scale in zip(state, self._scale, strict=True):
            np.multiply(buffer, scale, out=change)
            out -= change
        for buffer, gap in zip(state, self._gap, strict=True):
            np.multiply(buffer, gap, out=change)
            np.subtract(out, change, out=change)
            buffer += change
        return out


class TreeRecurrence(Recurrence):
    """Noise of prefix sums held in a binary counter, emitted as differences.

    A node of height h joins its own noise z and its children as
    y_h = v_h z + (1 - v_h)(y_left + y_right). The noise of prefix t + 1 is the sum over
    the set bits of t + 1, which are complete nodes. A round emits its difference to the
    prefix before, so that any optimizer can follow.

    Parameters
    ----------
    levels : int
        Heights in the tallest tree.
    own_share : NDArray
        v_h, shape ``(levels,)``: 1 everywhere keeps a node's own noise only.
    period : int
        Rounds between restarts.

    References
    ----------
    Kairouz et al., arXiv 2103.00039, Appendix B; Honaker 2015 ("from below").
    """

    def __init__(self, levels: int, own_share: Floats, period: int) -> None:
        super().__init__(levels)
        self._share = own_share
        self._joins = bool(np.any(own_share < 1))
        self._period = period

    def draws(self, step: int) -> int:
        """Return one vector per node that round ``step`` completes and that is read."""
        return 1 + (_completed(step % self._period) if self._joins else 0)

    def advance(self, step: int, fresh: Floats, state: AnyFloats) -> AnyFloats:
        """Complete the nodes that end in this round."""
        step %= self._period
        height = _completed(step)
        # As in adding 1 to a binary number: the trailing ones, nodes that wait as left
        # children, leave the prefix, and the node that joins them takes their place.
        node: Floats = fresh[0].copy()
        difference: Floats = np.zeros_like(node)
        for level in range(height):
            left = state[level].astype(np.float64, copy=False)
            difference -= left
            if self._joins:
                share = self._share[level + 1]
                node += left
                node *= 1 - share
                node += share * fresh[level + 1]
        state[height] = node
        difference += node
        return difference


def _completed(step: int) -> int:
    """Return the height of the tallest node that ends in round ``step``.

    It is the number of trailing ones of ``step``, counted from 0.
    """
    return (~step & (step + 1)).bit_length() - 1
