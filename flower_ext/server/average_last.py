"""The mean of the last models of a run."""

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np
from flwr.app import ArrayRecord, MetricRecord

from flower_ext.core.arrays import Arrays, from_record, to_record
from flower_ext.core.errors import refuse, whole
from flower_ext.server.callbacks import Callback
from flower_ext.server.finished import FinishedRound, RunInfo
from flower_ext.server.optimizers import apply_direction

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class AverageLast(Callback):
    """Keeps the mean of the last models, where a run goes to and fro at its end.

    The run itself goes on from its last model. Of two, the result of FedExP's paper
    (Jhunjhunwala et al. 2023, section 4.3).

    Parameters
    ----------
    num_models : int (default: 2)
        Models of the mean, of as many rounds; 1 is the last model. They are held in
        memory, and in the checkpoint. Of a run with fewer rounds, all.

    Examples
    --------
    >>> average = AverageLast()
    >>> for number, w in enumerate([1.0, 2.0, 6.0], 1):
    ...     record = to_record({"w": np.float32(w)})
    ...     average.round(FinishedRound(number, arrays=record))
    >>> float(average.arrays["w"].numpy())
    4.0
    """

    def __init__(self, num_models: int = 2) -> None:
        self.num_models = whole("num_models", num_models, 1)
        self._kept: list[Arrays] = []

    @property
    def arrays(self) -> ArrayRecord:
        """The mean.

        Raises
        ------
        ValueError
            If no round was finished yet.
        """
        if not self._kept:
            raise ValueError("no round was finished yet")
        return to_record(_mean(self._kept))

    def evaluated(self, evaluate_fn: EvaluateFn) -> EvaluateFn:
        """Return the function that measures the mean, for ``start(evaluate_fn=...)``.

        Parameters
        ----------
        evaluate_fn : callable
            ``(server_round, arrays) -> metrics`` of a model.
        """
        if not callable(evaluate_fn):
            refuse("evaluate_fn", evaluate_fn, "a function (server_round, arrays)")

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            # A round is measured before callbacks see it.
            before = self._kept[max(0, len(self._kept) - self.num_models + 1) :]
            mean = _mean([*before, from_record(arrays)])
            return evaluate_fn(server_round, to_record(mean))

        return evaluate

    def begin(self, run: RunInfo) -> str | None:
        """Start anew, unless the run is continued."""
        if not run.restored:
            self._kept = []
        return None

    def round(self, this: FinishedRound) -> str | None:
        """Keep the round's model, and let the oldest go."""
        self._kept = [*self._kept, from_record(this.arrays)][-self.num_models :]
        return None

    def state_dict(self) -> dict[str, object]:
        """Return the models."""
        return {str(i): dict(model) for i, model in enumerate(self._kept)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue with the models of a saved run."""
        saved = cast("Mapping[str, Arrays]", state)
        models = [dict(saved[key]) for key in sorted(saved, key=int)]
        self._kept = models[-self.num_models :]


def _mean(models: list[Arrays]) -> Arrays:
    """Return the mean of models, each array in its own dtype."""
    last = models[-1]
    mean = {
        name: sum(np.asarray(m[name], np.float64) for m in models) / len(models)
        for name in last
    }
    return {name: apply_direction(x, mean[name] - x) for name, x in last.items()}
