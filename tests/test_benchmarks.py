"""Benchmarks run here in small: the one that waits for a GPU, and of start-up."""

import logging
import re
import sys
import time
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


@pytest.fixture
def run(gpu, monkeypatch, capsys):
    """Run the benchmark in small on the CPU; return what it prints."""
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--device", "cpu", "--small"])
    logger = logging.getLogger("flwr")
    level = logger.level
    filters = [*logger.filters]

    def main():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what it sets is set back
        status = gpu.main()
        printed = capsys.readouterr().out
        assert status == 0, printed
        return printed

    yield main
    logger.setLevel(level)
    logger.filters[:] = filters


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small_without_ray(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    printed = run()
    assert len(re.findall(r"client \d: cpu, process \d+", printed)) >= 3
    timed = r"(\d) clients: bare loop [\d.]+ s, one by one [\d.]+ s, stacked [\d.]+ s"
    assert re.findall(timed, printed) == ["2", "3"]
    equal = r"(\w+), a round here {} against the CPU: {} of the change"
    strategies = ["FedAvg", "FedFish", "FLASC", "MaxFL"]
    alone = equal.format("one by one", r"0\.0e\+00")
    assert re.findall(alone, printed) == strategies
    assert re.findall(equal.format("stacked", r"\d\.\de[+-]\d+"), printed) == strategies
    assert "2 workers with a share of 1/2, one by one" in printed
    assert "2 workers with a share of 1/2, stacked" in printed
    assert len(re.findall(r"s, ratio to the bare loop [\d.]+", printed)) == 2


def test_a_client_on_another_device_is_a_failure(gpu, capsys):
    here = {"devices": "cuda:0", "pid": 1, "visible": "0", "mib": 10.0}
    both = {**here, "devices": "cpu cuda:0"}
    records = [ConfigRecord(here), ConfigRecord(both)]
    assert gpu.check_devices(records, torch.device("cuda")) == [
        "client 1 computed on 'cpu cuda:0', not on cuda:0"
    ]
    assert "client 1: cpu cuda:0, process 1" in capsys.readouterr().out


def test_a_round_that_differs_from_the_cpu_is_a_failure(gpu, monkeypatch, capsys):
    rounds = gpu.rounds_of_all(gpu.SMALL, gpu.app)
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, check: gpu.save_file(rounds, command[5])
    )
    monkeypatch.setattr(gpu, "rounds_of_all", lambda *_: rounds)
    assert gpu.equality(gpu.SMALL, small=True) == []
    wrong = {
        key: value * 1.01 if "FLASC" in key else value for key, value in rounds.items()
    }
    monkeypatch.setattr(gpu, "rounds_of_all", lambda *_: wrong)
    alone, together = gpu.equality(gpu.SMALL, small=True)
    assert alone.startswith("FLASC one by one differs from the CPU by ")
    assert together.startswith("FLASC stacked differs from the CPU by ")


ZYGOTE = "zygote and workers"


@pytest.fixture
def startup(monkeypatch):
    """The benchmark of the first round as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import startup

    return startup


def test_processes_are_told_apart_by_their_command_lines(startup):
    site = "/venv/lib/python3.11/site-packages"
    lines = {
        "python train.py": "server",
        "python /venv/bin/flwr-simulation --token x": "server",
        "python /venv/bin/flower-superlink --insecure": "SuperLink",
        f"python {site}/ray/dashboard/dashboard.py": "processes of Ray's",
        f"{site}/ray/core/src/ray/raylet/raylet --x": "processes of Ray's",
        "ray::DashboardAgent": "agents of Ray's",
        "ray::ClientAppActor.run": "workers of Flower's",
        "ray::Worker.run": "workers of Ray's",
        "python -c from flower_ext.simulation.zygote import serve": ZYGOTE,
    }
    assert {line: startup.kind(line.split()) for line in lines} == lines


def test_medians_of_phases_are_printed_beside_their_sums(startup, capsys):
    rows = [{"grid": x, "model": 1.0, ZYGOTE: 2 * x} for x in (3.0, 5.0, 100.0)]
    startup.print_tables({"script": rows})
    printed = dict(re.findall(r"^(\S.*?) {2,}([\d.]+)$", capsys.readouterr().out, re.M))
    assert printed["grid"] == "5.0" and printed[ZYGOTE] == "10.0"
    assert printed["imports"] == "0.0" and printed["sum"] == "10.0"  # of CPU seconds


@pytest.mark.slow
def test_the_first_round_is_timed_phase_by_phase(startup, monkeypatch):
    begun = time.time()
    monkeypatch.setenv(startup.WAY, "script")
    monkeypatch.setenv(startup.STARTED, str(begun))
    monkeypatch.setattr(startup, "BEGUN", begun + 0.25)
    monkeypatch.setattr(startup, "IMPORTED", begun + 0.75)
    found = startup.measure(None)
    assert found["other processes"] == pytest.approx(0.25, abs=1e-5)
    assert found["imports"] == pytest.approx(0.5, abs=1e-5)
    assert sum(found[phase] for phase in startup.PHASES) < time.time() - begun
    # The zygote imports torch, which takes a second of a CPU at least.
    assert found[ZYGOTE] > 1


def test_rankings_withstand_attackers_that_averages_do_not(monkeypatch):
    """Of ten clients two reverse their ranking, or turn their change round."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import poisoning

    digits = poisoning.Digits(seed=0)
    voted, averaged = (
        poisoning.accuracy(kind, attack, 2, digits=digits, rounds=8)
        for kind, attack in (
            (poisoning.FederatedRankLearning, poisoning.reverse),
            (poisoning.AdditiveStrategy, poisoning.turn_round(10)),
        )
    )
    assert voted > 0.6 and averaged < 0.3
