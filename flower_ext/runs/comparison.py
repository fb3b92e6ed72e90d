"""The same run once per strategy, side by side in one results folder."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

from flwr.app import ArrayRecord, MetricRecord, UserConfig
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from safetensors.torch import save_file

from flower_ext.client.task import Batch, Task, evaluate
from flower_ext.runs.report import write_summary
from flower_ext.server.callbacks import Callback
from flower_ext.server.rounds import run_rounds
from flower_ext.server.tracking import Tracker, plot

COMPARISON_FILE = "comparison.png"
MODEL_FILE = "model.safetensors"

Evaluate = Callable[[int, ArrayRecord], MetricRecord | None]


def central_evaluation(task: Task, data: Batch, run_config: UserConfig) -> Evaluate:
    """Return an ``evaluate_fn`` for a server that has test data.

    Parameters
    ----------
    task : Task
        Model, loss and metrics: the clients' own task.
    data : Mapping[str, Tensor]
        All test examples, as the task's losses take them.
    run_config : UserConfig
        The app's configuration, from which the task makes its model.
    """
    model = task.model(run_config)

    def evaluate_centrally(_: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(dict(evaluate(task, model, data)))

    return evaluate_centrally


def compare(
    grid: Grid,
    strategies: Mapping[str, Strategy],
    initial_arrays: ArrayRecord | Mapping[str, ArrayRecord],
    *,
    num_rounds: int,
    results: Path | str,
    columns: Mapping[str, str],
    panels: Iterable[str],
    config: Mapping[str, object] | None = None,
    evaluate_fn: Evaluate | None = None,
    callbacks: Callable[[str], Sequence[Callback]] | None = None,
) -> None:
    """Run all strategies from the same model; keep metrics, models, table and plot.

    Every run begins with clients that keep nothing of those before.

    Parameters
    ----------
    grid : Grid
        The ServerApp's.
    strategies : Mapping[str, Strategy]
        The runs by name, ours or Flower's own, in the order of the table.
    initial_arrays : ArrayRecord or Mapping[str, ArrayRecord]
        The model that all start from, or that of each by name, for those that start
        from several.
    num_rounds : int
        Rounds of each.
    results : path
        Folder for ``<name>/metrics.jsonl``, ``<name>/model.safetensors`` (the last
        round's arrays), ``summary.json`` and ``comparison.png``.
    columns, config
        See :func:`~flower_ext.runs.report.write_summary`.
    panels : iterable of str
        Metrics to draw, see :func:`~flower_ext.server.tracking.plot`.
    evaluate_fn : callable, optional
        See :meth:`flwr.serverapp.strategy.Strategy.start`, and
        :func:`central_evaluation`.
    callbacks : callable, optional
        ``name -> callbacks`` of the run of that name: each has its own.
    """
    results = Path(results).expanduser()
    if isinstance(initial_arrays, ArrayRecord):
        initial_arrays = dict.fromkeys(strategies, initial_arrays)
    for name, strategy in strategies.items():
        result = run_rounds(
            strategy,
            grid,
            initial_arrays[name],
            num_rounds=num_rounds,
            evaluate_fn=evaluate_fn,
            tracker=Tracker(results / name),
            callbacks=callbacks(name) if callbacks else (),
            new_clients=True,
        )
        save_file(result.arrays.to_torch_state_dict(), results / name / MODEL_FILE)
    write_summary(results, strategies, columns, config=config)
    folders = {name: results / name for name in strategies}
    plot(folders, panels, results / COMPARISON_FILE)
