"""Summaries, and the page that shows results: contents, escaping, a telephone."""

import json
import math
import os
import re
import shutil
import subprocess
from html import escape
from html.parser import HTMLParser

import numpy as np
import pytest
from flwr.app import MetricRecord

from flower_ext.client.app import client_app
from flower_ext.core.sampling import UniformSampler
from flower_ext.privacy import Mechanism
from flower_ext.runs import report
from flower_ext.runs.report import (
    SUMMARY_FILE,
    pool,
    read_summary,
    table,
    write_page,
    write_summary,
)
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.finished import FinishedRound, RunInfo
from flower_ext.server.tracking import METRICS_FILE, RUN_FILE, Tracker
from flower_ext.simulation.local import LocalGrid

HOSTILE = "<img src=x onerror=alert(1)><script>&\"'"
CHROMIUM = next(
    filter(
        None,
        map(
            shutil.which,
            (
                "chromium-headless-shell",
                "chromium",
                "chromium-browser",
                "google-chrome",
            ),
        ),
    ),
    None,
)


class Page(HTMLParser):
    """What a page holds: its text, its tags and their attributes."""

    def __init__(self, path):
        super().__init__()
        self.texts, self.tags, self.open = [], [], []
        self.source = path.read_text("utf-8")
        self.feed(self.source)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert not self.open or tag == self.open.pop()

    def handle_data(self, data):
        if data.strip():
            self.texts.append(data.strip())


@pytest.fixture(scope="module")
def results(tmp_path_factory, task, initial):
    """Results of two short runs, one of them private; both have hostile names."""
    folder = tmp_path_factory.mktemp("results") / "comparison <i>"
    mechanism = Mechanism(
        num_rounds=3,
        num_sampled_clients=3,
        population_size=6,
        noise_multiplier=2.0,
        target_delta=1e-3,
    )
    strategies = {
        "plain": AdditiveStrategy(min_replies=2),
        HOSTILE: AdditiveStrategy(mechanism=mechanism),
    }
    for name, strategy in strategies.items():
        grid = LocalGrid(client_app(task), 6, {"batch-size": 4, "lr": 0.1})
        tracker = Tracker(folder / name, tensorboard=False)
        strategy.start(grid, initial, num_rounds=3, tracker=tracker)
    write_summary(
        folder,
        strategies,
        {"evaluate/loss": "loss <b>", "bytes/up": "up"},
        config={"lr": 0.1, "results": "/home/somebody", HOSTILE: HOSTILE},
        last=2,
    )
    return folder


@pytest.fixture(scope="module")
def page(results):
    return Page(write_page([results.parent], results.parent / "report.html"))


def rows(results, name="plain"):
    return [
        json.loads(line)
        for line in (results / name / METRICS_FILE).read_text("utf-8").splitlines()
    ]


def test_summary_is_the_mean_of_the_last_rounds(results):
    summary = json.loads((results / SUMMARY_FILE).read_text("utf-8"))
    losses = [row["evaluate/loss"] for row in rows(results)[1:]]
    assert summary["runs"]["plain"]["evaluate/loss"] == sum(losses) / 2
    lines = table(results).splitlines()
    assert lines[0].split() == ["loss", "<b>", "up"]
    assert f"{sum(losses) / 2:.4f}" in lines[1] and "MB" in lines[1]
    assert lines[-1] == "means over the last 2 rounds"
    # A private run withholds what its clients measured.
    assert " - " in lines[2]


LOSSES = {
    "steady": [2.0, 1.9, 1.8, 1.7, 1.6],
    "diverged": [2.0, 1.0, 0.5, math.nan, 0.1],
    "overflowed": [2.0, 1.0, 0.9, math.inf, math.inf],
    "never": [math.nan, -math.inf],
}


@pytest.fixture
def diverged(tmp_path):
    """Results of runs, most of which end in numbers that are not finite."""
    for name, losses in LOSSES.items():
        tracker = Tracker(tmp_path / name, tensorboard=False)
        tracker.begin(RunInfo(len(losses)))
        for number, loss in enumerate(losses, 1):
            tracker.round(FinishedRound(number, central=MetricRecord({"loss": loss})))
    write_summary(tmp_path, LOSSES, {"central/loss": "loss"}, config={"lr": math.inf})
    return tmp_path


def test_a_run_that_diverged_has_no_finite_mean(diverged):
    shown = dict(line.split() for line in table(diverged).splitlines()[1:-1])
    assert shown == {
        "steady": "1.7000",
        "diverged": "nan",
        "overflowed": "inf",
        "never": "nan",
    }
    means = read_summary(diverged)["runs"]
    assert math.isnan(means["diverged"]["central/loss"])
    assert means["overflowed"]["central/loss"] == math.inf


def test_rounds_of_which_no_reply_was_usable_are_not_passed_over(
    tmp_path, aggregate, reply
):
    sent = {"w": np.zeros(2, np.float32)}
    for name, last in {"sound": 1.0, "lost": np.inf}.items():
        tracker = Tracker(tmp_path / name, tensorboard=False)
        tracker.begin(RunInfo(2))
        for number, value in enumerate([1.0, last], 1):
            arrays = {"w": np.full(2, value, np.float32)}
            contents = [reply(arrays, loss=0.5)] * 2
            _, metrics = aggregate(AdditiveStrategy(), sent, contents, number)
            tracker.round(FinishedRound(number, train=metrics))
    write_summary(tmp_path, ["sound", "lost"], {"train/loss": "loss"})
    shown = dict(line.split() for line in table(tmp_path).splitlines()[1:-1])
    assert shown == {"sound": "0.5000", "lost": "nan"}


def test_a_seed_that_diverged_is_in_mean_and_spread(diverged, tmp_path_factory):
    good = tmp_path_factory.mktemp("good")
    for name in LOSSES:
        tracker = Tracker(good / name, tensorboard=False)
        tracker.begin(RunInfo(1))
        tracker.round(FinishedRound(1, central=MetricRecord({"loss": 1.0})))
    write_summary(good, LOSSES, {"central/loss": "loss"})
    pool([good, diverged], diverged)
    shown = {line.split()[0]: line.split()[1:] for line in table(diverged).split("\n")}
    assert shown["steady"] == ["1.3500", "±", "0.4950"]
    assert shown["diverged"] == shown["never"] == ["nan", "±", "nan"]
    assert shown["overflowed"] == ["inf", "±", "nan"]


def test_a_summary_is_strict_json_and_old_ones_are_read(diverged):
    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    path = diverged / SUMMARY_FILE
    for _ in range(2):
        summary = json.loads(path.read_text("utf-8"), parse_constant=refuse)
        assert summary["runs"]["diverged"] == {"central/loss": "nan"}
        assert summary["config"] == {"lr": "inf"}
        pool([diverged, diverged], diverged)
    path.write_text(json.dumps(read_summary(diverged)))  # with bare NaN
    assert "NaN" in path.read_text()
    assert "nan" in table(diverged)
    page = Page(write_page([diverged], diverged / "page.html"))
    assert "nan" in page.texts


def test_the_page_breaks_a_curve_and_marks_what_is_not_finite(diverged):
    page = Page(write_page([diverged], diverged / "page.html"))
    text = page.source[: page.source.index("against MB up")]
    curves = re.findall(r'<polyline class="(s\d)" points="([\d., ]*)"', text)
    points = [(run, line.count(",")) for run, line in curves if line != "0,4 24,4"]
    assert points == [("s0", 5), ("s1", 3), ("s1", 1), ("s2", 3)]
    crosses = re.findall(r'<path class="(s\d)" d="M[\d.]+ 5.0[^"]*">', text)
    assert crosses == ["s1", "s2", "s2", "s3", "s3"]
    assert "diverged: nan at 4" in page.texts


def test_page_shows_means_and_what_was_spent(page, results):
    found = rows(results)
    texts = page.texts
    assert f"{sum(r['evaluate/loss'] for r in found[1:]) / 2:.4g}" in texts
    up = sum(row["bytes/up"] for row in found)
    assert texts[texts.index("up", texts.index("Spent")) + 1] == f"{up / 1e6:.2f} MB"
    seconds = sum(row["seconds/train"] for row in found)
    after = texts.index("seconds of training")
    assert texts[after + 1] == f"{seconds:.4g}"
    private = rows(results, HOSTILE)
    after = texts.index("epsilon")
    assert texts[after + 1 : after + 3] == ["-", f"{private[-1]['train/epsilon']:.4g}"]


def test_page_shows_settings_and_versions(page, results):
    texts = page.texts
    about = json.loads((results / "plain" / RUN_FILE).read_text("utf-8"))
    assert about["strategy"] == "AdditiveStrategy"
    assert texts[texts.index("plain: Minimum replies") + 1] == "2"
    assert texts[texts.index("lr") + 1] == "0.1"
    for package in ("python", "flower-ext", "flwr", "torch"):
        assert (
            texts[texts.index(f"version of {package}") + 1]
            == (about["versions"][package])
        )
    assert "/home/somebody" not in page.source


def test_secret_cohorts_stay_secret(tmp_path, grid, initial):
    mechanism = Mechanism(
        num_rounds=1,
        num_sampled_clients=3,
        population_size=6,
        noise_multiplier=2.0,
        target_delta=1e-3,
        amplified=True,
    )
    strategy = AdditiveStrategy(
        mechanism=mechanism, sampler=UniformSampler(2**127 + 987654)
    )
    tracker = Tracker(tmp_path, tensorboard=False)
    strategy.start(grid, initial, num_rounds=1, tracker=tracker)
    text = (tmp_path / RUN_FILE).read_text("utf-8")
    assert "UniformSampler(seed=secret)" in text
    assert str(2**127 + 987654) not in text


def test_page_plots_every_loss_and_epsilon(page):
    plots = [a["aria-label"] for t, a in page.tags if t == "svg" and "aria-label" in a]
    assert plots[:2] == ["evaluate/loss", "evaluate/loss against MB up"]
    assert "train/epsilon" in plots
    lines = [a["points"] for t, a in page.tags if t == "polyline"]
    curves = [line for line in lines if line.count(",") == 3]
    assert len(curves) >= len(plots)
    for line in curves:
        for x, y in (point.split(",") for point in line.split()):
            assert 48 <= float(x) <= 344 and 8 <= float(y) <= 170


def test_page_is_alone_and_its_names_are_text(page):
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "link", "iframe", "i", "b", "object", "base"}
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value.startswith("data:")
    assert not re.search(r"https?://|url\(", page.source)
    assert not page.open
    assert HOSTILE in page.texts
    assert escape(HOSTILE) in page.source
    assert ("meta", "viewport") in [(t, a.get("name")) for t, a in page.tags]


SEEDS = {1: [2.0, 1.0], 2: [2.0, 3.0], 3: [5.0, math.nan]}


@pytest.fixture(scope="module")
def seeds(tmp_path_factory):
    """Results of one run with three seeds, the last of which diverged."""
    folder = tmp_path_factory.mktemp("seeds")
    for seed, losses in SEEDS.items():
        tracker = Tracker(folder / f"seed-{seed}" / "ours", tensorboard=False)
        tracker.begin(RunInfo(2))
        for number, loss in enumerate(losses, 1):
            quantiles = {f"accuracy-p{p}": p / 100 - loss / 50 for p in (10, 50, 90)}
            told = MetricRecord({"loss": loss} | quantiles)
            tracker.round(FinishedRound(number, central=told))
        columns = {"central/loss": "loss"}
        config = {"seed": seed, "rate": 0.1}
        write_summary(folder / f"seed-{seed}", ["ours"], columns, config=config, last=1)
    pool([folder / f"seed-{seed}" for seed in SEEDS], folder)
    return folder


def bands(source, title):
    """Return the bands of a chart, as (x, y) of their corners."""
    chart = re.search(f'aria-label="{re.escape(title)}">(.*?)</svg>', source)[1]
    found = re.findall(r'<polygon class="s0" points="([^"]+)"', chart)
    return [[tuple(map(float, c.split(","))) for c in x.split()] for x in found]


def test_page_shows_the_spread_over_seeds(seeds):
    source = Page(write_page([seeds], seeds / "report.html")).source
    assert "Means of the last 1 rounds and 3 seeds" in source
    titles = re.findall(r'<h2 id="s(\d)">(.+?)</h2>', source)
    assert titles[:2] == [("0", seeds.name), ("1", "seed-1")]
    assert re.findall(r'<a href="#s(\d)">(.+?)</a>', source) == titles
    assert "<td>rate</td>" in source.split('<h2 id="s1">')[0]
    assert "<td>seed</td>" not in source.split('<h2 id="s1">')[0]
    # Only round 1 has a finite mean: 3, and a standard deviation of sqrt(3). The scale
    # goes from 1 to 5, from 170 up to 8.
    [corners] = bands(source, "central/loss")
    heights = sorted(5 - (y - 8) / (170 - 8) * 4 for _, y in corners)
    assert heights == pytest.approx([3 - 3**0.5, 3 + 3**0.5], abs=0.01)


def test_page_shows_the_spread_over_clients(seeds):
    source = Page(write_page([seeds / "seed-1"], seeds / "one.html")).source
    [corners] = bands(source, "central/accuracy: clients, median, p10 to p90")
    upper, lower = corners[:2], corners[:1:-1]
    assert [x for x, _ in upper] == [x for x, _ in lower]
    # 0.8 of the scale, which goes from 0 to 1.
    gaps = [below - above for (_, above), (_, below) in zip(upper, lower, strict=True)]
    assert gaps == pytest.approx([0.8 * (170 - 8)] * 2, abs=0.2)


def test_page_takes_what_is_there(tmp_path, capsys):
    with pytest.raises(ValueError, match="no metrics.jsonl"):
        write_page([tmp_path], tmp_path / "page.html")
    assert report.main([str(tmp_path)]) == 2
    assert "error: no metrics.jsonl" in capsys.readouterr().err
    # A run alone, interrupted in a line; no run.json, half a summary; odd values.
    run = tmp_path / "run"
    run.mkdir()
    lines = [{"round": 1, "train/loss": "nan"}, {"round": 2, "train/loss": 1e300}]
    text = "\n".join(map(json.dumps, lines)) + '\n{"round": 3, "tra'
    (run / METRICS_FILE).write_text(text)
    (tmp_path / SUMMARY_FILE).write_text('{"runs": {')
    (run / "drawn.png").write_bytes(b"\x89PNG")
    assert report.main([str(run), "-o", str(tmp_path / "page.html")]) == 0
    page = Page(tmp_path / "page.html")
    assert {"nan", "1e+300"} <= set(page.texts)
    assert [a["alt"] for t, a in page.tags if t == "img"] == ["drawn"]
    assert "polyline" in [tag for tag, _ in page.tags]


def chromium(*options):
    assert CHROMIUM, "install chromium-headless-shell"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu"]
    command += ["--disable-background-networking", "--no-first-run", *options]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.slow
@pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("CI"),
    reason="there is no Chromium on this machine",
)
def test_page_fits_a_telephone(page, tmp_path):
    # In a frame, since some Chromiums have no window as narrow as a telephone.
    frame = tmp_path / "telephone.html"
    frame.write_text(
        f'<body style="margin:0"><iframe id="f" style="border:0" width="390" '
        f'height="2400" srcdoc="{escape(page.source)}"></iframe><p id="measured"></p>'
        "<script>onload = () => { const page = f.contentDocument.documentElement;"
        "measured.textContent = [page.scrollWidth, page.clientWidth, "
        "[...f.contentDocument.querySelectorAll('polyline')].filter("
        "x => getComputedStyle(x).fill == 'none').length, "
        "f.contentDocument.querySelectorAll('script').length].join(' '); }</script>",
        "utf-8",
    )
    measured = re.search(
        r'<p id="measured">([\d ]+)</p>', chromium("--dump-dom", frame.as_uri())
    )
    width, room, lines, scripts = map(int, measured[1].split())
    assert width <= room <= 390
    assert lines > 4 and scripts == 0

    from matplotlib.image import imread

    shot = tmp_path / "telephone.png"
    chromium(f"--screenshot={shot}", "--window-size=500,2400", frame.as_uri())
    pixels = imread(shot)[:, :390, :3]
    blue, orange = [59 / 255, 130 / 255, 246 / 255], [232 / 255, 113 / 255, 10 / 255]
    assert pixels.shape[:2] == (2400, 390)
    for colour in (blue, orange):
        assert (abs(pixels - colour).max(axis=2) < 0.02).sum() > 10
