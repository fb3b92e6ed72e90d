"""Packing virtual clients: longest first, in packs worth sending."""

import heapq
import math
from collections.abc import Mapping, Sequence
from typing import cast

import numpy as np
from flwr.app import MetricRecord
from flwr.common import NDArray

from flower_ext.simulation.jobs import Job, Outcome

# A pack costs about a millisecond to send and fetch; what it holds should take longer.
_PACK_SECONDS = 0.05
_FIRST_PACKS = 4  # a worker, before any client was timed
_SUMMED_PACKS = 2  # a worker
_MEMORY = 0.5  # of the estimated pace


class Workload:
    """What is known of how long clients take, and packs made by it.

    Parameters
    ----------
    num_examples : sequence of float, optional
        Size of every client's data. Without it, sizes are those that clients reported
        as ``num-examples``; a client that has not replied yet counts as the mean.

    Attributes
    ----------
    at_once : int
        How many clients of a pack can be trained together, as far as it is known.
    """

    def __init__(self, num_examples: Sequence[float] | None = None) -> None:
        self.at_once = 1
        self._sizes = dict(enumerate(map(float, num_examples or ())))
        self._sum = math.fsum(self._sizes.values())
        self._pace: dict[str, float] = {}  # seconds per example

    def learn(self, kind: str, done: Sequence[tuple[int, Outcome]]) -> None:
        """Take note of what clients reported, and of how long they took."""
        for client, outcome in done:
            for record in (outcome.content or {}).values():
                size = record.get("num-examples")
                if isinstance(record, MetricRecord) and isinstance(size, int | float):
                    self.learn_size(client, size)
        self.learn_pace(kind, [(client, outcome.seconds) for client, outcome in done])

    def learn_size(self, client: int, num_examples: float) -> None:
        """Take note of a client's size."""
        # The sum goes along: a mean over 100,000 clients for each reply takes too long.
        if 0 <= num_examples < math.inf:
            self._sum += num_examples - self._sizes.get(client, 0.0)
            self._sizes[client] = num_examples

    def learn_pace(self, kind: str, done: Sequence[tuple[int, float]]) -> None:
        """Take note of the seconds that clients took."""
        size = sum(self.size(client) for client, _ in done)
        if size > 0:
            pace = sum(seconds for _, seconds in done) / size
            # Old times fade: the first of them hold imports and cold caches.
            old = self._pace.get(kind, pace)
            self._pace[kind] = _MEMORY * old + (1 - _MEMORY) * pace

    def state_dict(self) -> dict[str, object]:
        """Return the sizes that decide the packs of later rounds, and so their sums."""
        if not self._sizes:
            return {}
        clients = np.array(list(self._sizes), np.int64)
        sizes = np.array(list(self._sizes.values()), np.float64)
        # The sum, too: added up in another order it may be another.
        return {
            "clients": clients,
            "sizes": sizes,
            "sum": self._sum,
            "at-once": self.at_once,
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Take over the sizes of a saved run."""
        clients = cast("NDArray", state["clients"]).tolist()
        sizes = cast("NDArray", state["sizes"]).tolist()
        self._sizes = dict(zip(clients, sizes, strict=True))
        self._sum = cast(float, state["sum"])
        self.at_once = cast(int, state.get("at-once", 1))

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
        # Every sum is a model to send, so there are few. Other packs are as short as is
        # worth sending: what a worker idles in the end is at most one of them.
        if summed:
            each = _SUMMED_PACKS
        elif pace is None:
            each = _FIRST_PACKS
        else:
            each = math.ceil(pace * sum(sizes) / (_PACK_SECONDS * workers))
        count = min(len(jobs), max(each, 1) * workers)
        if self.at_once > 1:  # the more of them in a pack, up to these, the better
            count = min(count, max(workers, len(jobs) // self.at_once))
        packs = pack_evenly(sizes, [0.0] * count)
        # In the order of the jobs again, so that a sum of them is added up in it.
        return [[jobs[i] for i in sorted(pack)] for pack in packs]


def pack_evenly(sizes: Sequence[float], taken: Sequence[float]) -> list[list[int]]:
    """Put items into packs of about the same total, the longest item first.

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
    >>> pack_evenly([1, 5, 2, 3], [0, 0])
    [[1, 0], [3, 2]]
    """
    # Longest processing time first: at most 4/3 of the best (Graham, "Bounds on
    # multiprocessing timing anomalies", 1969).
    heap = [(total, pack) for pack, total in enumerate(taken)]
    heapq.heapify(heap)
    packs: list[list[int]] = [[] for _ in taken]
    if not heap:
        return packs
    for item in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        total, pack = heap[0]
        packs[pack].append(item)
        heapq.heapreplace(heap, (total + sizes[item], pack))
    return packs
