"""The models of a run that outlive it: their average, and the best by some rank."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from flwr.app import ArrayRecord

from flower_ext.core.arrays import Arrays, accumulate, to_record
from flower_ext.core.errors import yes_or_no
from flower_ext.core.typing import Floats
from flower_ext.server.optimizers import apply_direction

Rank = tuple[float, ...]


class Iterates:
    """Keeps the average of all models that it is shown, and the one of least rank.

    Parameters
    ----------
    average : bool (default: True)
        Whether the average is kept: one more model in memory, in float64.

    Examples
    --------
    >>> iterates = Iterates()
    >>> for w in (1.0, 2.0, 6.0):
    ...     iterates.add({"w": np.float32(w)}, rank=(abs(w - 2),))
    >>> float(iterates.average["w"]), float(iterates.best["w"]), iterates.rank
    (3.0, 2.0, (0.0,))
    """

    def __init__(self, average: bool = True) -> None:
        self.keeps_average = yes_or_no("average_iterates", average)
        self.rank: Rank = ()
        self.best: Arrays = {}
        self._sums: dict[str, Floats] = {}
        self._count = 0

    def add(self, model: Arrays, rank: Rank) -> None:
        """Take in a model; of two with the same rank the earlier one is kept."""
        if not self.best or rank < self.rank:
            self.rank, self.best = rank, model
        if self.keeps_average:
            for name, array in model.items():
                sums = self._sums.setdefault(name, np.zeros(array.shape))
                accumulate(sums, [(array, 1.0)])
        self._count += 1

    @property
    def average(self) -> Arrays:
        """The mean of all models in their own dtypes; empty without one."""
        # As a direction from one of them, so that counters are rounded as elsewhere.
        return {
            name: apply_direction(self.best[name], x / self._count - self.best[name])
            for name, x in self._sums.items()
        }

    def records(self, best: str = "best") -> dict[str, ArrayRecord]:
        """Return best model and average as records, as far as there are any."""
        found = {best: self.best, "average": self.average}
        return {name: to_record(model) for name, model in found.items() if model}

    def state_dict(self) -> dict[str, object]:
        """Return the models, and how many there were."""
        return {
            "rank": list(self.rank),
            "best": dict(self.best),
            "sums": dict(self._sums),
            "count": self._count,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a saved state."""
        self.rank, self.best = tuple(state["rank"]), dict(state["best"])
        self._sums = {name: np.array(x) for name, x in state["sums"].items()}
        self._count = state["count"]
