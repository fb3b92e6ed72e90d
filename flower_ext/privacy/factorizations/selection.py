"""One call that compares the mechanisms and takes the best that fits."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from flower_ext.core.errors import one_of, whole
from flower_ext.privacy.factorizations.banded import BandedToeplitz
from flower_ext.privacy.factorizations.banded_inverse import BISR
from flower_ext.privacy.factorizations.blt import BufferedToeplitz
from flower_ext.privacy.factorizations.blt_optimizer import grow_buffers
from flower_ext.privacy.factorizations.dense import DenseFactorization
from flower_ext.privacy.factorizations.factorization import Factorization, Identity
from flower_ext.privacy.factorizations.participation import effective_participations
from flower_ext.privacy.factorizations.toeplitz import SquareRootToeplitz
from flower_ext.privacy.factorizations.trees import TreeAggregation
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload

# Beyond these a search takes seconds and gains little: a dense matrix costs rounds^3 in
# every step, and a BLT of 3 or 4 buffers is within a fraction of a percent of more.
_DENSE_ROUNDS = 128
_BUFFERS = 5
_BAND_WORK = 50_000_000


@dataclass(frozen=True)
class Comparison:
    """One line of the comparison.

    Parameters
    ----------
    name : str
        The mechanism.
    memory : int
        Model-sized buffers of its noise stream.
    sensitivity : float
        In units of the clipping norm.
    exact : bool
        Whether the sensitivity is exact or an upper bound.
    max_loss, rms_loss : float
        Noise of the worst and of the root-mean-square model at mu = 1.
    """

    name: str
    memory: int
    sensitivity: float
    exact: bool
    max_loss: float
    rms_loss: float


@dataclass(frozen=True)
class Choice:
    """What `best_mechanism` chose, from what, and why.

    Parameters
    ----------
    factorization : Factorization
        The chosen mechanism.
    compared : tuple of Comparison
        All candidates, best first.
    reason : str
        One line.
    """

    factorization: Factorization
    compared: tuple[Comparison, ...]
    reason: str


def best_mechanism(
    rounds: int,
    min_separation: int,
    max_participations: int,
    *,
    memory: int = 4,
    objective: str = "rms",
    workload: Workload = PREFIX_SUMS,
) -> Choice:
    """Return the mechanism of least loss whose noise fits into memory.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    min_separation : int
        Least difference of two rounds with the same client; 1 allows every round.
    max_participations : int
        Most rounds of one client.
    memory : int
        Model-sized buffers that the server can spare; 0 leaves independent noise.
    objective : str
        ``"rms"`` (mean over the run) or ``"max"`` (the last model).
    workload : Workload
        The server's momentum and learning rates; unless given prefix sums, which is
        plain averaging.

    Returns
    -------
    Choice
        Among candidates within 0.1% of the best the one with fewest buffers.

    Notes
    -----
    Bands are at most ``min_separation``, so that participations do not overlap. Dense
    matrices take part up to 128 rounds and for "rms" only. With learning rates that
    change bands of C are tuned for "rms", those of its inverse and BLTs for the same
    momentum at a constant rate; all are compared on the workload itself.

    Examples
    --------
    >>> choice = best_mechanism(64, min_separation=16, max_participations=4)
    >>> choice.factorization.name
    'BLT(1)'
    """
    whole("rounds", rounds, 1)
    whole("memory", memory, 0)
    one_of("objective", objective, ("rms", "max"))
    workload = workload.over(rounds)
    candidates = _candidates(
        rounds, min_separation, max_participations, memory, objective, workload
    )
    table: dict[str, tuple[float, Factorization, Comparison]] = {}
    for candidate in candidates:
        line = _compare(candidate, min_separation, max_participations, workload)
        loss = line.rms_loss if objective == "rms" else line.max_loss
        # Two periods may be the same tree, two sizes the same bands.
        table.setdefault(line.name, (loss, candidate, line))
    ranked = sorted(table.values(), key=lambda item: item[0])
    best = ranked[0][0]
    close = [item for item in ranked if item[0] <= best * 1.001]
    loss, chosen, line = min(close, key=lambda item: item[2].memory)
    independent = next(item[0] for item in ranked if item[1].name == "identity")
    return Choice(
        chosen,
        tuple(item[2] for item in ranked),
        f"{chosen.name}: {objective} loss {loss:.4g} with {line.memory} buffers, "
        f"{independent / loss:.3g} times below independent noise; "
        f"best of {len(ranked)} that fit {memory} buffers (ties within 0.1% go to "
        "the smaller)",
    )


def _candidates(
    rounds: int,
    min_separation: int,
    max_participations: int,
    memory: int,
    objective: str,
    workload: Workload,
) -> Iterator[Factorization]:
    """Yield the tuned mechanisms that fit."""
    steady = workload.steady()
    count = effective_participations(rounds, min_separation, max_participations)
    yield Identity(rounds)
    # One tree for the whole run, or one that a client meets at most once.
    for period in sorted({rounds, min(min_separation, rounds)} - {1}):
        if memory >= period.bit_length():
            yield TreeAggregation(rounds, restart_every=period)
    if memory >= rounds - 1:
        yield SquareRootToeplitz(rounds)
    # With more bands than separation a client's columns overlap and sensitivity grows.
    widest = rounds if count == 1 else min(min_separation, rounds)
    bands = min(memory + 1, widest)
    if bands > 1 and bands * rounds <= _BAND_WORK:
        yield BandedToeplitz.optimize(
            rounds,
            bands,
            objective=objective if workload == steady else "rms",
            normalize_columns=True,
            workload=workload,
        )
    if min(memory, rounds - 1) >= 1 and (memory + 1) * rounds <= _BAND_WORK:
        yield BISR.optimize(
            rounds,
            min(memory + 1, rounds),
            min_separation,
            max_participations,
            objective=objective,
            workload=steady,
        )
    separation = min(min_separation, rounds)
    sizes = grow_buffers(rounds, separation, count, objective, steady)
    for decay, scale in itertools.islice(sizes, min(memory, _BUFFERS)):
        yield BufferedToeplitz(rounds, decay, scale)
    if objective == "rms" and rounds <= _DENSE_ROUNDS and memory >= widest - 1:
        yield DenseFactorization.optimize(
            rounds, min_separation, max_participations, workload=workload
        )


def _compare(
    candidate: Factorization,
    min_separation: int,
    max_participations: int,
    workload: Workload,
) -> Comparison:
    """Return the line of one candidate."""
    sensitivity = candidate.sensitivity(min_separation, max_participations)
    errors = candidate.row_errors(workload)
    return Comparison(
        candidate.name,
        candidate.memory,
        sensitivity.value,
        sensitivity.exact,
        sensitivity.value * float(np.sqrt(errors.max())),
        sensitivity.value * float(np.sqrt(errors.mean())),
    )
