"""Metrics to files and pictures, and back."""

import json
import logging
import math
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from flwr.app import MetricRecord
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

from flower_ext.server import tracking
from flower_ext.server.finished import FinishedRound, RunInfo
from flower_ext.server.tracking import (
    METRICS_FILE,
    RUN_FILE,
    Tracker,
    plot,
    read_metrics,
)
from flower_ext.wire.traffic import Traffic


def round_of(number, **train):
    return FinishedRound(
        number, train=MetricRecord(train), seconds_train=0.5, up=Traffic(10, 8, 2, 1)
    )


def lines(folder):
    return (Path(folder) / METRICS_FILE).read_text("utf-8").splitlines()


@pytest.fixture
def tracker(tmp_path):
    """A tracker that has begun a run of five rounds."""
    tracker = Tracker(tmp_path / "run", tensorboard=False)
    tracker.begin(RunInfo(5))
    return tracker


# Rows -----------------------------------------------------------------------------


def test_a_row_is_flat_with_a_prefix_for_each_phase():
    this = FinishedRound(
        3,
        train=MetricRecord({"loss": 0.5, "list": [1.0, 2.0]}),
        evaluate=MetricRecord({"loss": 0.25}),
        central=MetricRecord({"acc": 1}),
        seconds_train=1.23456,
        seconds_evaluate=2.0,
        down=Traffic(300, 200, 50, 2),
        up=Traffic(200, 100, 25, 1),
    )
    assert this.row() == {
        "round": 3,
        "train/loss": 0.5,
        "train/list": [1.0, 2.0],
        "evaluate/loss": 0.25,
        "central/acc": 1,
        "seconds/train": 1.2346,
        "seconds/evaluate": 2.0,
        "bytes/down": 300,
        "bytes/up": 200,
        "encoded-bytes/down": 200,
        "encoded-bytes/up": 100,
        "parameters/down": 50,
        "parameters/up": 25,
        "messages/down": 2,
        "messages/up": 1,
    }


def test_a_phase_without_metrics_has_no_columns():
    assert [
        k for k in FinishedRound(1).row() if k.startswith(("train", "eval", "cent"))
    ] == []


def test_rows_are_json_that_any_reader_takes(tracker):
    tracker.round(round_of(1, a=math.nan, b=math.inf, c=[-math.inf, 1.0]))

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    [row] = [json.loads(line, parse_constant=refuse) for line in lines(tracker.folder)]
    assert (row["train/a"], row["train/b"], row["train/c"]) == (
        "nan",
        "inf",
        ["-inf", 1],
    )


def test_metrics_that_are_not_finite_are_numbers_again_when_read(tracker):
    tracker.round(round_of(1, a=math.nan, b=math.inf, c=[-math.inf, 1.0]))
    again = Tracker(tracker.folder, tensorboard=False)
    again.begin(RunInfo(5, 1))  # the row is written a second time
    [row] = read_metrics(tracker.folder)
    assert math.isnan(row["train/a"])
    assert (row["train/b"], row["train/c"]) == (math.inf, [-math.inf, 1.0])


def test_bare_names_of_other_writers_are_read(tmp_path):
    (tmp_path / METRICS_FILE).write_text('{"round": 1, "train/loss": NaN}\n')
    [row] = read_metrics(tmp_path)
    assert math.isnan(row["train/loss"])


def test_what_is_told_about_a_run_is_strict_json(tracker):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    tracker.begin(RunInfo(5, settings={"budget": math.inf, "norms": (1.0, math.nan)}))
    text = (tracker.folder / RUN_FILE).read_text("utf-8")
    settings = json.loads(text, parse_constant=refuse)["settings"]
    assert settings == {"budget": "inf", "norms": [1.0, "nan"]}


def test_each_round_is_one_line_that_is_there_at_once(tracker):
    for number in (1, 2, 3):
        tracker.round(round_of(number, loss=1 / number))
        assert len(lines(tracker.folder)) == number
    rows = read_metrics(tracker.folder)
    assert [row["train/loss"] for row in rows] == [1, 1 / 2, 1 / 3]


def test_floats_are_written_with_all_digits(tracker):
    tracker.round(round_of(1, loss=0.1 + 0.2))
    assert read_metrics(tracker.folder)[0]["train/loss"] == 0.1 + 0.2


def test_the_file_or_its_folder_can_be_read(tracker):
    tracker.round(round_of(1))
    rows = read_metrics(tracker.folder)
    assert len(rows) == 1
    assert read_metrics(str(tracker.path)) == rows


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_metrics(tmp_path) == []
    assert read_metrics(tmp_path / "nothing.jsonl") == []


# New, continued and interrupted runs ------------------------------------------------


def test_a_new_run_starts_the_file_anew(tracker):
    tracker.round(round_of(1, loss=1.0))
    again = Tracker(tracker.folder, tensorboard=False)
    again.begin(RunInfo(5))
    assert read_metrics(tracker.folder) == []


def test_a_continued_run_keeps_the_rounds_before_and_drops_the_rest(tracker):
    for number in (1, 2, 3):
        tracker.round(round_of(number, loss=float(number)))
    before = lines(tracker.folder)
    again = Tracker(tracker.folder, tensorboard=False)
    again.begin(RunInfo(5, 2))
    assert lines(tracker.folder) == before[:2]
    again.round(round_of(3, loss=33.0))
    rows = read_metrics(tracker.folder)
    assert [row["train/loss"] for row in rows] == [1, 2, 33]


def test_a_last_line_that_was_cut_off_is_left_out(tracker):
    tracker.round(round_of(1, loss=1.0))
    tracker.round(round_of(2, loss=2.0))
    text = tracker.path.read_text()
    tracker.path.write_text(text[:-20])
    assert [row["round"] for row in read_metrics(tracker.folder)] == [1]


def test_a_run_continues_after_a_line_that_was_cut_off(tracker):
    tracker.round(round_of(1, loss=1.0))
    tracker.path.write_text(tracker.path.read_text() + '{"round": 2, "tra')
    again = Tracker(tracker.folder, tensorboard=False)
    again.begin(RunInfo(5, 1))
    again.round(round_of(2, loss=2.0))
    assert [row["round"] for row in read_metrics(tracker.folder)] == [1, 2]


def test_nothing_else_is_left_in_the_folder(tracker):
    tracker.round(round_of(1))
    left = {path.name for path in tracker.folder.iterdir()}
    assert left == {METRICS_FILE, RUN_FILE}


# A full disk ------------------------------------------------------------------------


def test_a_full_disk_is_logged_and_the_run_goes_on(tracker, caplog):
    tracker.round(round_of(1))
    tracker.path.unlink()
    tracker.path.symlink_to("/dev/full")  # every write fails: no space left
    tracker.round(round_of(2))
    [error] = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert "round 2 is not in" in error
    assert "No space left on device" in error


def test_half_a_line_on_a_full_disk_does_not_spoil_the_next_rounds(
    tracker, monkeypatch
):
    tracker.round(round_of(1))
    opened = Path.open

    def fill(self, *args, **kwargs):
        file = opened(self, *args, **kwargs)

        def half(text):
            type(file).write(file, text[: len(text) // 2])
            raise OSError(28, "No space left on device")

        return Half(file, half)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", fill)
        tracker.round(round_of(2))
    tracker.round(round_of(3))
    tracker.round(round_of(4))
    assert [row["round"] for row in read_metrics(tracker.folder)] == [1, 3, 4]


class Half:
    """A file that writes half of what it is given and fails."""

    def __init__(self, file, write):
        self._file, self.write = file, write

    def __getattr__(self, name):
        return getattr(self._file, name)

    def __enter__(self):
        return self

    def __exit__(self, *args):
        self._file.close()


def test_tensorboards_full_disk_costs_only_that_rounds_events(
    tmp_path, monkeypatch, caplog
):
    written = []

    class Writer:
        made = 0

        def __init__(self, folder, purge_step):
            type(self).made += 1
            self.works = self.made > 1

        def add_scalar(self, name, value, step):
            if not self.works:
                raise OSError(28, "No space left on device")
            written.append(step)

        def flush(self):
            pass

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter", Writer)
    tracker = Tracker(tmp_path, tensorboard=True)
    tracker.begin(RunInfo(3))
    for number in (1, 2, 3):
        tracker.round(round_of(number))
    errors = [r.message for r in caplog.records if r.levelno == logging.ERROR]
    assert errors == [
        "round 1 is not in TensorBoard: [Errno 28] No space left on device"
    ]
    assert set(written) == {2, 3}
    assert Writer.made == 2
    assert [row["round"] for row in read_metrics(tmp_path)] == [1, 2, 3]


# Progress -------------------------------------------------------------------------


def test_progress_names_round_losses_and_the_time_left(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "flwr")
    now = SimpleNamespace(seconds=100.0)
    monkeypatch.setattr(
        tracking, "time", SimpleNamespace(monotonic=lambda: now.seconds)
    )
    tracker = Tracker(tmp_path / "fedfish", tensorboard=False)
    tracker.begin(RunInfo(12, 2))
    now.seconds += 40  # two rounds, 20 s each; 8 are left
    tracker.round(
        FinishedRound(
            4,
            train=MetricRecord({"train-loss": 0.123456, "other": 9.0}),
            evaluate=MetricRecord({"accuracy": 0.5}),
        )
    )
    assert caplog.records[-1].message == (
        "fedfish: round 4/12 | train/train-loss 0.1235 | evaluate/accuracy 0.5 | "
        "40 s, 160 s left"
    )


# TensorBoard ----------------------------------------------------------------------


def events(folder):
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return {
        tag: [(event.step, event.value) for event in accumulator.Scalars(tag)]
        for tag in accumulator.Tags()["scalars"]
    }


def test_tensorboard_holds_the_numbers_of_every_round(tmp_path):
    tracker = Tracker(tmp_path, tensorboard=True)
    tracker.begin(RunInfo(2))
    tracker.round(round_of(1, loss=0.5, many=[1.0, 2.0], bad=math.nan))
    tracker.round(round_of(2, loss=0.25))
    found = events(tmp_path)
    [(step, bad)] = found.pop("train/bad")
    assert step == 1 and math.isnan(bad)
    assert found == {
        "train/loss": [(1, 0.5), (2, 0.25)],
        "seconds/train": [(1, 0.5), (2, 0.5)],
        "seconds/evaluate": [(1, 0), (2, 0)],
        "bytes/down": [(1, 0), (2, 0)],
        "bytes/up": [(1, 10), (2, 10)],
        "encoded-bytes/down": [(1, 0), (2, 0)],
        "encoded-bytes/up": [(1, 8), (2, 8)],
        "parameters/down": [(1, 0), (2, 0)],
        "parameters/up": [(1, 2), (2, 2)],
        "messages/down": [(1, 0), (2, 0)],
        "messages/up": [(1, 1), (2, 1)],
    }


def test_tensorboard_shows_the_rounds_of_a_new_run_alone(tmp_path):
    for losses in ([3.0, 2.0, 1.0], [5.0]):
        tracker = Tracker(tmp_path, tensorboard=True)
        tracker.begin(RunInfo(len(losses)))
        for number, loss in enumerate(losses, 1):
            tracker.round(round_of(number, loss=loss))
    assert events(tmp_path)["train/loss"] == [(1, 5)]
    # And a run that ends before its first round.
    Tracker(tmp_path, tensorboard=True).begin(RunInfo(3))
    assert events(tmp_path)["train/loss"] == []


def test_tensorboard_shows_the_last_of_many_runs_within_a_second(tmp_path):
    for run in range(3):  # whose files differ in a counter: 9 comes after 10
        for _ in range(4):
            SummaryWriter(str(tmp_path / "elsewhere"))
        tracker = Tracker(tmp_path / "run", tensorboard=True)
        tracker.begin(RunInfo(1))
        tracker.round(round_of(1, loss=float(run)))
    assert events(tmp_path / "run")["train/loss"] == [(1, 2)]


def test_tensorboard_of_a_continued_run_has_each_round_once(tmp_path):
    for done, losses in [(0, [3.0, 2.0, 1.0]), (2, [0.5, 0.25])]:
        tracker = Tracker(tmp_path, tensorboard=True)
        tracker.begin(RunInfo(4, done))
        for number, loss in enumerate(losses, done + 1):
            tracker.round(round_of(number, loss=loss))
    assert events(tmp_path)["train/loss"] == [(1, 3), (2, 2), (3, 0.5), (4, 0.25)]


def test_tensorboard_is_written_if_it_is_installed(tmp_path, monkeypatch):
    for installed in (True, False):
        folder = tmp_path / str(installed)
        spec = SimpleNamespace() if installed else None
        monkeypatch.setattr(tracking, "find_spec", lambda name, spec=spec: spec)
        tracker = Tracker(folder)
        tracker.begin(RunInfo(1))
        tracker.round(round_of(1))
        assert bool(list(folder.glob("events.out.tfevents*"))) is installed


def test_tensorboard_cannot_be_asked_for_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="tensorboard=True must be False: the package"):
        Tracker(tmp_path, tensorboard=True)


def test_without_tensorboard_no_events_are_written(tracker):
    tracker.round(round_of(1))
    assert list(tracker.folder.glob("events*")) == []


# Plots ----------------------------------------------------------------------------

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture
def runs(tmp_path):
    """Three results folders; the last one has no evaluation."""
    folders = {}
    for i, label in enumerate(["alpha", "beta", "gamma"]):
        tracker = Tracker(tmp_path / label, tensorboard=False)
        tracker.begin(RunInfo(3))
        for number in (1, 2, 3):
            evaluate = MetricRecord({"loss": (i + 1) / number})
            tracker.round(
                FinishedRound(
                    number,
                    train=MetricRecord({"loss": 1 / number}),
                    evaluate=evaluate if label != "gamma" else None,
                    up=Traffic(100, 80, 20, 1),
                    seconds_train=2.0,
                )
            )
        folders[label] = tracker.folder
    return folders


@pytest.fixture
def drawn(monkeypatch):
    """Catch the figure that is saved."""
    from matplotlib.figure import Figure

    figures = []
    savefig = Figure.savefig

    def keep(self, *args, **kwargs):
        figures.append(self)
        return savefig(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def curves(axes):
    """Labels and points of the lines of a panel."""
    return {
        line.get_label(): list(zip(line.get_xdata(), line.get_ydata(), strict=True))
        for line in axes.get_lines()
    }


def test_a_plot_draws_every_run_in_every_panel_that_it_has_the_metric_of(
    runs, drawn, tmp_path
):
    plot(runs, ["train/loss", "evaluate/loss"], tmp_path / "p.png", title="T")
    [figure] = drawn
    train, evaluate = figure.axes
    assert list(curves(train)) == ["alpha", "beta", "gamma"]
    assert curves(evaluate) == {
        "alpha": [(1, 1), (2, 1 / 2), (3, 1 / 3)],
        "beta": [(1, 2), (2, 1), (3, 2 / 3)],
    }
    assert (train.get_ylabel(), evaluate.get_ylabel()) == (
        "train/loss",
        "evaluate/loss",
    )
    assert evaluate.get_xlabel() == "round"
    legend = [text.get_text() for text in evaluate.get_legend().get_texts()]
    assert legend == ["alpha", "beta"]
    assert figure.get_suptitle() == "T"


@pytest.mark.parametrize("column", ["bytes/up", "seconds/train", "parameters/up"])
def test_bytes_and_seconds_are_added_up_along_the_axis(runs, drawn, tmp_path, column):
    plot(runs, ["train/loss"], tmp_path / "p.png", x=column)
    step = {"bytes/up": 100, "seconds/train": 2, "parameters/up": 20}[column]
    assert [x for x, _ in curves(drawn[0].axes[0])["alpha"]] == [
        step,
        2 * step,
        3 * step,
    ]


@pytest.mark.parametrize(
    ("suffix", "begins"), [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml")]
)
def test_the_suffix_says_the_format(runs, tmp_path, suffix, begins):
    path = plot(runs, ["train/loss"], tmp_path / "deep" / "er" / f"p.{suffix}")
    assert path == tmp_path / "deep" / "er" / f"p.{suffix}"
    assert path.read_bytes().startswith(begins)


def test_a_metric_of_no_run_beside_one_of_some_is_an_empty_panel(
    runs, drawn, tmp_path, recwarn
):
    plot(runs, ["train/loss", "train/f1"], tmp_path / "p.png")
    assert [len(curves(axes)) for axes in drawn[0].axes] == [3, 0]
    assert list(recwarn) == []


def test_any_number_of_runs_can_be_drawn(runs, drawn, tmp_path):
    many = {f"run {i}": runs["alpha"] for i in range(25)}
    plot(many, ["train/loss"], tmp_path / "p.svg")
    assert len(curves(drawn[0].axes[0])) == 25
    assert ElementTree.parse(tmp_path / "p.svg").getroot().tag == f"{SVG}svg"


def test_a_curve_is_broken_where_it_is_not_finite_and_a_cross_says_so(
    tracker, drawn, tmp_path, recwarn
):
    for number, loss in [(1, 1.0), (2, math.nan), (3, 0.5), (4, math.inf)]:
        tracker.round(round_of(number, loss=loss))
    plot({"a": tracker.path}, ["train/loss"], tmp_path / "p.png")
    curve, crosses = drawn[0].axes[0].get_lines()
    assert [str(y) for y in curve.get_ydata()] == ["1.0", "nan", "0.5", "inf"]
    assert (list(crosses.get_xdata()), crosses.get_marker()) == ([2, 4], "x")
    assert crosses.get_color() == curve.get_color()
    legend = drawn[0].axes[0].get_legend().get_texts()
    assert [text.get_text() for text in legend] == ["a"]
    assert list(recwarn) == []


def test_a_metric_of_no_run_is_an_error_that_names_it_and_the_runs(runs, tmp_path):
    with pytest.raises(ValueError, match=r"\['train/f1'\] must be .*'alpha', 'beta'"):
        plot(runs, ["train/f1"], tmp_path / "p.png")
    assert not (tmp_path / "p.png").exists()


def test_an_axis_of_no_run_is_an_error(runs, tmp_path):
    with pytest.raises(ValueError, match="x='bytes/sent' must be"):
        plot(runs, ["train/loss"], tmp_path / "p.png", x="bytes/sent")


def test_runs_that_wrote_nothing_are_an_error(tmp_path):
    with pytest.raises(ValueError, match="the runs have written nothing"):
        plot({"a": tmp_path}, ["train/loss"], tmp_path / "p.png")


def test_a_plot_leaves_matplotlibs_backend_and_figures_alone(runs, tmp_path):
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    with mpl.rc_context():
        mpl.use("svg")
        plt.figure()
        open_figures = plt.get_fignums()
        plot(runs, ["train/loss"], tmp_path / "p.png")
        assert mpl.get_backend().lower() == "svg"
        assert plt.get_fignums() == open_figures
        plt.close("all")
        mpl.use("agg")
