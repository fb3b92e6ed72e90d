"""The benchmark that waits for a GPU runs here in small, with Ray and without."""

import logging
import re
import sys
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

    def main():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # what it sets is set back
        status = gpu.main()
        printed = capsys.readouterr().out
        assert status == 0, printed
        return printed

    yield main
    logger.setLevel(level)


def require_everything_but_workers(printed):
    assert len(re.findall(r"client \d: cpu, process \d+", printed)) >= 3
    assert re.search(r"bare loop [\d.]+ s, ours [\d.]+ s, ratio [\d.]+", printed)
    equal = r"(\w+), a round here against the CPU: 0\.0e\+00 of the change"
    assert re.findall(equal, printed) == ["FedAvg", "FedFish", "FLASC", "MaxFL"]


def test_without_ray_the_gpu_benchmark_does_the_rest(gpu, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    # Its second process runs in the test with Ray.
    rounds = gpu.rounds_of_all(gpu.SMALL)
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, check: gpu.save_file(rounds, command[5])
    )
    printed = run()
    require_everything_but_workers(printed)
    assert "Ray is not installed: no workers" in printed


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small(run, cluster):
    cluster()
    printed = run()
    require_everything_but_workers(printed)
    assert "2 workers with a share of 1/2" in printed
    assert len(re.findall(r"s, ratio to the bare loop [\d.]+", printed)) == 1


def test_a_client_on_another_device_is_a_failure(gpu, capsys):
    here = {"devices": "cuda:0", "pid": 1, "visible": "0", "mib": 10.0}
    both = {**here, "devices": "cpu cuda:0"}
    records = [ConfigRecord(here), ConfigRecord(both)]
    assert gpu.check_devices(records, torch.device("cuda")) == [
        "client 1 computed on 'cpu cuda:0', not on cuda:0"
    ]
    assert "client 1: cpu cuda:0, process 1" in capsys.readouterr().out


def test_a_round_that_differs_from_the_cpu_is_a_failure(gpu, monkeypatch, capsys):
    rounds = gpu.rounds_of_all(gpu.SMALL)
    monkeypatch.setattr(
        gpu.subprocess, "run", lambda command, check: gpu.save_file(rounds, command[5])
    )
    monkeypatch.setattr(gpu, "rounds_of_all", lambda size: rounds)
    assert gpu.equality(gpu.SMALL, small=True) == []
    wrong = {
        key: value * 1.01 if "FLASC" in key else value for key, value in rounds.items()
    }
    monkeypatch.setattr(gpu, "rounds_of_all", lambda size: wrong)
    [problem] = gpu.equality(gpu.SMALL, small=True)
    assert problem.startswith("FLASC differs from the CPU by ")
