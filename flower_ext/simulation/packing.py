"""Dealing virtual clients out to workers: longest first, in packs worth sending."""

import heapq
import math
from collections.abc import Sequence

from flower_ext.simulation.jobs import Job

# A pack costs about a millisecond to send and fetch; what it holds should take longer.
# What a worker idles at the end of a round is at most what a pack takes.
_PACK_SECONDS = 0.05
_FIRST_PACKS = 4  # a worker, before any client was timed
_SUMMED_PACKS = 2  # a worker; each is a sum to send
_MEMORY = 0.5  # of the estimated pace


class Workload:
    """What is known of how long clients take, and packs made by it.

    Parameters
    ----------
    num_examples : sequence of float, optional
        Size of every client's data. Without it, sizes are those that clients reported
        as ``num-examples``; a client that has not replied yet counts as the mean.
    """

    def __init__(self, num_examples: Sequence[float] | None = None) -> None:
        self._sizes = dict(enumerate(map(float, num_examples or ())))
        self._sum = math.fsum(self._sizes.values())
        self._pace: dict[str, float] = {}  # seconds per example

    def learn_size(self, client: int, num_examples: float) -> None:
        """Take note of a client's size."""
        if 0 <= num_examples < math.inf:
            self._sum += num_examples - self._sizes.get(client, 0.0)
            self._sizes[client] = num_examples

    def learn_pace(self, kind: str, done: Sequence[tuple[int, float]]) -> None:
        """Take note of the seconds that clients took."""
        size = sum(self.size(client) for client, _ in done)
        if size > 0:
            pace = sum(seconds for _, seconds in done) / size
            old = self._pace.get(kind, pace)
            self._pace[kind] = _MEMORY * old + (1 - _MEMORY) * pace

    def size(self, client: int) -> float:
        """Return a client's size, as far as it is known."""
        # A client costs something even without data.
        mean = self._sum / len(self._sizes) if self._sizes else 1.0
        return max(self._sizes.get(client, mean), 0.1 * mean, 1e-9)

    def packs(
        self, jobs: Sequence[Job], workers: int, *, summed: bool = False
    ) -> list[list[Job]]:
        """Make packs of jobs of one kind, the heaviest first.

        Each holds about the same amount of work, and all workers get as many. Packs to
        be ``summed`` do not depend on times, so that equal runs have equal sums.
        """
        if not jobs:
            return []
        sizes = [self.size(job.client) for job in jobs]
        pace = self._pace.get(jobs[0].kind)
        if summed:
            each = _SUMMED_PACKS
        elif pace is None:
            each = _FIRST_PACKS
        else:
            each = math.ceil(pace * sum(sizes) / (_PACK_SECONDS * workers))
        count = min(len(jobs), max(each, 1) * workers)
        dealt = deal(sizes, [0.0] * count)
        return [[jobs[i] for i in sorted(pack)] for pack in dealt]


def deal(sizes: Sequence[float], taken: Sequence[float]) -> list[list[int]]:
    """Deal items out into packs of about the same total, the longest item first.

    Parameters
    ----------
    sizes : sequence of float
        Of the items.
    taken : sequence of float
        What is in each pack already.

    Returns
    -------
    list of list of int
        The items of each pack, by their places.

    Examples
    --------
    >>> deal([1, 5, 2, 3], [0, 0])
    [[1, 0], [3, 2]]
    """
    heap = [(total, pack) for pack, total in enumerate(taken)]
    heapq.heapify(heap)
    dealt: list[list[int]] = [[] for _ in taken]
    if not heap:
        return dealt
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, pack = heap[0]
        dealt[pack].append(item)
        heapq.heapreplace(heap, (total + sizes[item], pack))
    return dealt
