"""Callbacks that report a run to Weights & Biases, or to MLflow.

Both are thin, and neither library is needed by anything else: it is imported when the
callback is made. Every number of a round is logged under its column in
``metrics.jsonl``, such as ``train/loss``, at the number of the round. Their id of the
run is in the checkpoint, so that a run that is continued goes on there, too.
"""

import re
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any, cast

from flower_ext.core.errors import refuse
from flower_ext.server.callbacks import Callback
from flower_ext.server.finished import FinishedRound, RunInfo

# The length that every release of MLflow takes.
_LONGEST = 250


def _imported(package: str, needed_by: str) -> Any:
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        raise ModuleNotFoundError(
            f"{needed_by} needs the package {package}: pip install {package}"
        ) from error


def _about(run: RunInfo) -> dict[str, object]:
    """Return the settings of a run as plain values, by name."""
    about = {"strategy": run.strategy, "num-rounds": run.num_rounds, **run.settings}
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in about.items()
    }


class _Reporting(Callback):
    """Knows a run by the id that a service has given it."""

    def __init__(self, run_id: str | None) -> None:
        self._given = run_id
        self.run_id = run_id

    def _forget_unless(self, restored: bool) -> None:
        """Start a run of its own, unless this one is continued."""
        if not restored:
            self.run_id = self._given

    def state_dict(self) -> dict[str, object]:
        """Return the id of the run."""
        return {"run-id": self.run_id}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Continue the run of that id."""
        self.run_id = cast("str | None", state["run-id"])


class WandB(_Reporting):
    """Reports the run to Weights & Biases.

    A round that had been logged before an interruption is logged once: W&B leaves out
    steps that it has.

    Parameters
    ----------
    project : str
        Where the run is shown.
    name : str, optional
        Of the run; W&B makes one up.
    run_id : str, optional
        Of a run to go on with, also without a checkpoint; by default a new one.
    **options
        Further arguments of ``wandb.init``, such as ``entity``, ``group``, ``tags`` or
        ``mode="offline"``. Where a mechanism counts on secret cohorts, W&B takes
        neither the console, with what clients print, nor the load of the machine, and
        ``settings`` are refused, which might say otherwise.

    Attributes
    ----------
    run_id : str or None
        The run's, once it has begun.
    """

    def __init__(
        self,
        project: str,
        *,
        name: str | None = None,
        run_id: str | None = None,
        **options: object,
    ) -> None:
        super().__init__(run_id)
        self._wandb = _imported("wandb", type(self).__name__)
        self._options = {"project": project, "name": name, **options}
        self._run: Any = None

    def begin(self, run: RunInfo) -> str | None:
        """Begin a run, or go on with one."""
        self._forget_unless(run.restored)
        options = dict(self._options)
        if run.hidden:
            if "settings" in options:
                cause = "cohorts are secret, and console and load tell of them"
                refuse("settings", options["settings"], "left out", cause)
            options["settings"] = {"console": "off", "x_disable_stats": True}
        self._run = self._wandb.init(
            id=self.run_id,
            resume="allow" if self.run_id else None,
            config=_about(run),
            allow_val_change=True,  # a run may be continued for more rounds
            **options,
        )
        self.run_id = self._run.id
        return None

    def round(self, this: FinishedRound) -> str | None:
        """Log the numbers of a round."""
        self._run.log(this.numbers(), step=this.number)
        return None

    def end(self, error: BaseException | None) -> None:
        """Finish the run, as a failed one after an error."""
        self._run.finish(exit_code=1 if error else 0)


class MLflow(_Reporting):
    """Reports the run to MLflow.

    It touches no active run of ``mlflow.start_run``. Characters that MLflow does not
    allow in names become ``_``.

    Parameters
    ----------
    experiment : str
        Its name; made if missing.
    tracking_uri : str, optional
        Of the server, or of a local store; by default MLflow's own.
    name : str, optional
        Of the run; MLflow makes one up.
    run_id : str, optional
        Of a run to go on with, also without a checkpoint; by default a new one.
    tags : Mapping[str, str], optional
        Of a new run.

    Attributes
    ----------
    run_id : str or None
        The run's, once it has begun.
    """

    def __init__(
        self,
        experiment: str,
        *,
        tracking_uri: str | None = None,
        name: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(run_id)
        self._mlflow = _imported("mlflow", type(self).__name__)
        self._metric = _imported("mlflow.entities", type(self).__name__).Metric
        self._experiment = experiment
        self._client = self._mlflow.MlflowClient(tracking_uri=tracking_uri)
        self._name = name
        self._tags = dict(tags or {})

    def begin(self, run: RunInfo) -> str | None:
        """Begin a run with its settings, or go on with one that has them."""
        self._forget_unless(run.restored)
        client = self._client
        if self.run_id:
            client.update_run(self.run_id, status="RUNNING")
            return None
        experiment = client.get_experiment_by_name(self._experiment)
        number = (
            client.create_experiment(self._experiment)
            if experiment is None
            else experiment.experiment_id
        )
        begun = client.create_run(number, tags=self._tags, run_name=self._name)
        self.run_id = begun.info.run_id
        for name, value in _about(run).items():
            client.log_param(self.run_id, _allowed(name), str(value)[:_LONGEST])
        return None

    def round(self, this: FinishedRound) -> str | None:
        """Log the numbers of a round."""
        now = int(time.time() * 1000)
        metrics = [
            self._metric(_allowed(name), float(value), now, this.number)
            for name, value in this.numbers().items()
        ]
        self._client.log_batch(self.run_id, metrics=metrics)
        return None

    def end(self, error: BaseException | None) -> None:
        """Finish the run, as a failed one after an error."""
        status = "FAILED" if error else "FINISHED"
        self._client.set_terminated(self.run_id, status=status)


def _allowed(name: str) -> str:
    """Return a name of characters that MLflow allows."""
    return re.sub(r"[^/\w.\- ]", "_", name)[:_LONGEST]
