"""The benchmark that waits for a GPU runs here in small, with Ray and without."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from flwr.app import ConfigRecord

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
WITHOUT_RAY = (
    "import runpy, sys; sys.modules['ray'] = None; sys.argv[0] = 'gpu.py'; "
    f"sys.path.insert(0, {str(BENCHMARKS)!r}); "
    f"runpy.run_path({str(BENCHMARKS / 'gpu.py')!r}, run_name='__main__')"
)


def run(*command):
    done = subprocess.run(
        [sys.executable, *command, "--device", "cpu", "--small"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def require_everything_but_workers(printed):
    assert len(re.findall(r"client \d: cpu, process \d+", printed)) >= 3
    assert re.search(r"bare loop [\d.]+ s, ours [\d.]+ s, ratio [\d.]+", printed)
    equal = r"(\w+), a round here against the CPU: 0\.0e\+00 of the change"
    assert re.findall(equal, printed) == ["FedAvg", "FedFish", "FLASC", "MaxFL"]


def test_without_ray_the_gpu_benchmark_does_the_rest():
    printed = run("-c", WITHOUT_RAY)
    require_everything_but_workers(printed)
    assert "Ray is not installed: no workers" in printed


@pytest.mark.slow
def test_the_gpu_benchmark_runs_in_small():
    printed = run(str(BENCHMARKS / "gpu.py"))
    require_everything_but_workers(printed)
    for number in (1, 2):
        assert f"{number} workers with a share of 1/{number}" in printed
    assert len(re.findall(r"s, ratio to the bare loop [\d.]+", printed)) == 2


@pytest.fixture
def gpu(monkeypatch):
    """The benchmark as a module."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


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
