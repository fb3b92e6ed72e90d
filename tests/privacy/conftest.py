"""Shared oracles: reference numbers and a brute-force sensitivity."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest


def _enumerate(matrix: np.ndarray, separation: int, participations: int) -> float:
    """Largest || sum of columns || over every allowed pattern, one after another."""
    rounds = matrix.shape[1]
    best = 0.0

    def visit(start: int, total: np.ndarray, used: int) -> None:
        nonlocal best
        best = max(best, float(total @ total))
        if used < participations:
            for column in range(start, rounds):
                visit(column + separation, total + matrix[:, column], used + 1)

    visit(0, np.zeros(matrix.shape[0]), 0)
    return best**0.5


@pytest.fixture(scope="session")
def enumerate_sensitivity() -> Callable[[np.ndarray, int, int], float]:
    return _enumerate


@pytest.fixture(scope="session")
def reference() -> dict:
    return json.loads(Path(__file__).with_name("reference_numbers.json").read_text())
