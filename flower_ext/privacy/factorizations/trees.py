"""Tree aggregation: noise on dyadic intervals of rounds.

    height 2            [0 1 2 3]                  prefix of 7 rounds =
    height 1       [0 1]         [2 3]      [4 5]      [0 1 2 3] + [4 5] + [6]
    height 0     [0]   [1]     [2]   [3]   [4] [5] [6]

C has one row of zeros and ones per node; nodes are released as soon as they are
complete, so n rounds leave a forest of complete binary trees.
"""

from functools import lru_cache
from typing import Self

import numpy as np

from flower_ext.core.errors import one_of, whole
from flower_ext.core.typing import Floats
from flower_ext.privacy.factorizations.factorization import Factorization
from flower_ext.privacy.factorizations.participation import (
    Sensitivity,
    effective_participations,
    gram_sensitivity,
    heaviest_pattern,
)
from flower_ext.privacy.factorizations.recurrences import Recurrence, TreeRecurrence
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload

# Of a Gram matrix: a tenth of a second.
_MOST_ROUNDS = 1024


class TreeAggregation(Factorization):
    r"""DP-FTRL's tree of noise, with restarts.

    A prefix of t rounds is the sum of the nodes in the binary expansion of t. How noisy
    it is depends on the estimator:

    * ``"online"`` reads the noise of each of these nodes alone: err = number of set
      bits.
    * ``"honaker"`` refines each node by its children,
      y_h = v_h z + (1 - v_h)(y_left + y_right) with v_h = 1 / (2 - 2^-h):
      err = sum of v_h over the set bits. It streams with one buffer per level.
    * ``"full"`` is the least-squares estimate B = A pinv(C), a bound on what any
      reading of the tree can reach. It reads nodes that are complete only later, and
      cannot stream.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    estimator : str
        ``"honaker"``, ``"online"`` or ``"full"``.
    restart_every : int, optional
        Rounds of one tree; None for a single tree. 1 is independent noise. Errors of
        finished trees add up, but a client that waits at least as long as one tree
        meets every tree once.

    Notes
    -----
    As published, the sensitivity counts every node of the forest. Only the estimator
    ``full`` reads all that the nodes tell. For the others, and up to 1024 rounds, it is
    that of what is released: of the prefix sums with the covariance of their noise.

    References
    ----------
    Kairouz et al., "Practical and private (deep) learning without sampling or
    shuffling", arXiv 2103.00039; Honaker, "Efficient use of differentially private
    binary trees", 2015.

    Examples
    --------
    >>> TreeAggregation(7, estimator="online").row_errors()
    array([1., 1., 2., 1., 2., 2., 3.])
    """

    def __init__(
        self,
        rounds: int,
        *,
        estimator: str = "honaker",
        restart_every: int | None = None,
    ) -> None:
        super().__init__(rounds)
        one_of("estimator", estimator, ("honaker", "online", "full"))
        period = self.rounds
        if restart_every is not None:
            period = min(whole("restart_every", restart_every, 1), self.rounds)
        self.estimator = estimator
        self.restart_every = period

    @property
    def name(self) -> str:
        """Name shown in tables."""
        restarts = f", every {self.restart_every}" * (self.restart_every < self.rounds)
        return f"tree({self.estimator}{restarts})"

    @property
    def levels(self) -> int:
        """Heights in the tallest tree."""
        return self.restart_every.bit_length()

    def sensitivity(self, min_separation: int, max_participations: int) -> Sensitivity:
        r"""Return the sensitivity of what is released, or of the forest, if less.

        With :math:`K` the covariance of the noise of all rounds, which is block
        diagonal by trees, a release is that of :math:`K^{-1/2}`, and its Gram matrix
        :math:`K^{-1}`: exact where a client meets every tree once at the most, else a
        bound. Beyond 1024 rounds, and for the estimator ``full``, it is that of all
        nodes, which is up to about a tenth larger where not all of them are released.

        A client is in a node with at most ``min_separation`` rounds once at the most,
        and it does not matter in which of them. So a pattern is a choice of such nodes,
        met as early as allowed. A dynamic programme over the taller nodes keeps, for
        every number of participations and earliest next round, the largest sum of
        squared counts. With more than 32 participations in one tree it would be slow.
        Then a node of height h counts at most m_h = min(k, ceil(2^h / b)) of them, and
        sens^2 <= k * sum_h m_h.
        """
        forest = self._of_all_nodes(min_separation, max_participations)
        if forest.exact or self.rounds > _MOST_ROUNDS:
            return forest
        gram = _released_gram(self.rounds, self.estimator, self.restart_every)
        released = gram_sensitivity(gram, min_separation, max_participations)
        return released if released.value <= forest.value else forest

    def _of_all_nodes(
        self, min_separation: int, max_participations: int
    ) -> Sensitivity:
        """Return the sensitivity of the forest: exact for a few participations."""
        count = effective_participations(
            self.rounds, min_separation, max_participations
        )
        # m_h of the docstring.
        crowd = [min(count, -(-(1 << h) // min_separation)) for h in range(self.levels)]
        if crowd[-1] > 32:
            how = "upper bound: the fullest nodes of every height"
            return Sensitivity(float(np.sqrt(count * sum(crowd))), False, how)
        exact = self.estimator == "full" or self.restart_every == 1
        how = "dynamic programme on the tree"
        if not exact:
            how = f"upper bound: {how}, of which not all is released"
        if 1 << (self.levels - 1) <= min_separation:  # at most once in every tree
            sizes = [(height + 1, 1 << height) for _, height in self._trees()]
            nodes = np.repeat(*np.array(sizes).T).astype(np.float64)
            total = heaviest_pattern(nodes, min_separation, count)
            return Sensitivity(float(np.sqrt(float(total))), exact, how)
        # (participations so far, earliest next round) -> largest sum of squared counts.
        reach = {(0, 0): 0}
        for start, height in self._trees():
            joined: dict[tuple[int, int], int] = {}
            for (used, ready), value in reach.items():
                options = _tree_options(
                    height, min_separation, count - used, max(0, ready - start)
                )
                for more, leave, gain in options:
                    later = start + leave if more else ready
                    _keep(joined, (used + more, later), value + gain)
            reach = _front(joined)
        return Sensitivity(float(np.sqrt(max(reach.values()))), exact, how)

    def row_errors(self, workload: Workload = PREFIX_SUMS) -> Floats:
        """Return the errors of all prefixes, or models."""
        if not workload.is_prefix_sum(self.rounds):
            return self._errors_of_models(workload)
        if self.estimator == "full":
            matrix = self.strategy_matrix()
            return _diagonal_of_inverse(matrix.T @ matrix)
        within = np.arange(self.rounds) % self.restart_every + 1
        shares = self._own_share()
        errors = np.zeros(self.rounds)
        for height in range(self.levels):
            errors += ((within >> height) & 1) * shares[height]
        # Every finished tree before adds the error of its last prefix.
        finished = np.arange(self.rounds) // self.restart_every
        last = min(self.restart_every, self.rounds) - 1
        return np.asarray(errors + finished * errors[last])

    def _errors_of_models(self, workload: Workload) -> Floats:
        if self.estimator != "full":
            return workload.streamed_errors(self.recurrence(), self.rounds)
        noise = np.diff(self.decoder_matrix(), axis=0, prepend=0.0)
        return np.asarray((workload.models(noise) ** 2).sum(axis=1))

    def noise_variances(self) -> Floats:
        """Return the variances; they depend on the height h of the node completed.

        The round emits y_h - sum_{l<h} y_left(l). Height l enters y_h with the weight
        w_l = prod_{l<m<=h} (1 - v_m), so that the left nodes, of variance v_l, count
        (1 - w_l)^2 v_l and the own noises (w_l v_l)^2.
        """
        if self.estimator == "full":
            matrix = self.strategy_matrix()
            return np.diagonal(np.linalg.inv(matrix.T @ matrix)).copy()
        # The node's noise takes the place of that of its left descendants, which were
        # in the prefix before: what they share cancels.
        shares = self._own_share()
        by_height = np.empty(self.levels)
        for height in range(self.levels):
            above = np.append(1 - shares[1 : height + 1], 1.0)
            weight = np.cumprod(above[::-1])[::-1]
            lefts = ((1 - weight[:-1]) ** 2 * shares[:height]).sum()
            own = ((weight * shares[: height + 1]) ** 2).sum()
            by_height[height] = own + lefts
        stop = np.arange(self.rounds) % self.restart_every + 1
        return np.asarray(by_height[np.log2(stop & -stop).astype(int)])

    def strategy_matrix(self) -> Floats:
        """Return C, shape ``(nodes, rounds)``, nodes in the order of completion."""
        rows = []
        for stop, height in self._nodes():
            row = np.zeros(self.rounds)
            row[stop - (1 << height) : stop] = 1
            rows.append(row)
        return np.array(rows)

    def decoder_matrix(self) -> Floats:
        """Return B, shape ``(rounds, nodes)``."""
        if self.estimator == "full":
            return np.asarray(
                np.tri(self.rounds) @ np.linalg.pinv(self.strategy_matrix())
            )
        nodes = self._nodes()
        shares = self._own_share()
        # How the estimate of a node weighs all nodes: itself, and through its children.
        index = {node: position for position, node in enumerate(nodes)}
        estimates = np.zeros((len(nodes), len(nodes)))
        for position, (stop, height) in enumerate(nodes):
            share = shares[height]
            if height:
                left = index[stop - (1 << (height - 1)), height - 1]
                right = index[stop, height - 1]
                children = estimates[left] + estimates[right]
                estimates[position] = (1 - share) * children
            estimates[position, position] = share
        decoder = np.zeros((self.rounds, len(nodes)))
        for step in range(self.rounds):
            # The last prefix of the tree before, and the nodes of this one.
            begin = step - step % self.restart_every
            if begin:
                decoder[step] = decoder[begin - 1]
            stop = begin
            for height in reversed(range(self.levels)):
                if (step + 1 - begin) >> height & 1:
                    stop += 1 << height
                    decoder[step] += estimates[index[stop, height]]
        return decoder

    def first(self, rounds: int) -> Self:
        """Return the forest that is complete after ``rounds`` rounds."""
        rounds = self._check_first(rounds)
        return type(self)(
            rounds, estimator=self.estimator, restart_every=self.restart_every
        )

    def recurrence(self) -> Recurrence:
        """Return the binary counter."""
        if self.estimator == "full":
            raise ValueError(
                "estimator='full' must be 'honaker' or 'online' to stream noise: it "
                "reads nodes that are complete only later"
            )
        return TreeRecurrence(self.levels, self._own_share(), self.restart_every)

    @property
    def memory(self) -> int:
        """One buffer per level."""
        return self.levels

    def restarts_at(self, step: int) -> bool:
        """Return whether round ``step`` opens a new tree."""
        return step % self.restart_every == 0

    def _own_share(self) -> Floats:
        """Return v_h of every height."""
        if self.estimator == "online":
            return np.ones(self.levels)
        return 1 / (2 - 0.5 ** np.arange(self.levels))

    def _nodes(self) -> list[tuple[int, int]]:
        """Return (stop, height) of every node in the order of completion."""
        nodes = []
        for step in range(self.rounds):
            local = step % self.restart_every + 1
            height = 0
            while local % (1 << height) == 0:
                nodes.append((step + 1, height))
                height += 1
        return nodes

    def _trees(self) -> list[tuple[int, int]]:
        """Return (first round, height) of every complete tree in the forest."""
        trees = []
        for begin in range(0, self.rounds, self.restart_every):
            left = min(self.restart_every, self.rounds - begin)
            start = begin
            for height in reversed(range(self.levels)):
                if left >> height & 1:
                    trees.append((start, height))
                    start += 1 << height
        return trees

    def _parameters(self) -> tuple[Floats, ...]:
        return (np.array([self.restart_every], dtype=np.float64), self._own_share())


@lru_cache(maxsize=4)
def _noise_covariance(rounds: int, estimator: str) -> Floats:
    """Return the covariance of the noise of the first rounds, of one tree."""
    tree = TreeAggregation(rounds, estimator=estimator)
    steps = np.diff(tree.decoder_matrix(), axis=0, prepend=0.0)
    return np.asarray(steps @ steps.T)


@lru_cache(maxsize=4)
def _released_gram(rounds: int, estimator: str, period: int) -> Floats:
    """Return the inverse of the covariance of all rounds' noise, tree by tree."""
    # That of a power of two, so that runs of all lengths share it.
    longest = 1 << (min(period, rounds) - 1).bit_length()
    covariance = _noise_covariance(longest, estimator)
    gram = np.zeros((rounds, rounds))
    for begin in range(0, rounds, period):
        size = min(period, rounds - begin)
        stop = begin + size
        gram[begin:stop, begin:stop] = np.linalg.inv(covariance[:size, :size])
    return gram


def _keep(table: dict[tuple[int, int], int], key: tuple[int, int], value: int) -> None:
    """Store the larger value."""
    if value > table.get(key, -1):
        table[key] = value


def _front(table: dict[tuple[int, int], int]) -> dict[tuple[int, int], int]:
    """Drop what is no better and leaves no earlier with as many participations."""
    front: dict[tuple[int, int], int] = {}
    best: dict[int, int] = {}
    for (used, ready), value in sorted(table.items()):
        if value > best.get(used, -1):
            best[used] = value
            front[used, ready] = value
    return front


@lru_cache(maxsize=200_000)
def _tree_options(
    height: int, separation: int, limit: int, entry: int
) -> tuple[tuple[int, int, int], ...]:
    """Return (participations, earliest next round, sum of squared counts).

    Rounds are counted from the first leaf; ``entry`` is the earliest round allowed.
    The sum runs over the nodes of this subtree.
    """
    size = 1 << height
    # Nobody here, or one participation: it counts once in each node up to this one.
    none = (0, entry, 0)
    if limit == 0 or entry >= size:
        return (none,)
    if size <= separation:
        return (none, (1, entry + separation, height + 1))
    # Every way through the left half, followed by every way through the right one.
    half = size // 2
    joined: dict[tuple[int, int], int] = {}
    for few, ready, value in _tree_options(height - 1, separation, limit, entry):
        rest = max(0, ready - half)
        options = _tree_options(height - 1, separation, limit - few, rest)
        for more, leave, gain in options:
            total = few + more
            later = half + leave if more else ready
            _keep(joined, (total, later), value + gain + total * total)
    return tuple((*key, value) for key, value in _front(joined).items())


def _diagonal_of_inverse(gram: Floats) -> Floats:
    """Return the diagonal of A G^-1 A^T."""
    root = np.linalg.cholesky(gram)
    half = np.linalg.solve(root, np.tri(len(gram)).T)
    return np.asarray((half**2).sum(axis=0))
