"""How many bands, and how many groups of clients, under secret cohorts.

Clients take turns in groups and are sampled within (cyclic Poisson sampling): more
groups give room for more bands, whose noise cancels better, and rarer turns, but each
with a larger probability, and less amplification. What is best depends on the target,
and is found by accounting for each (Choquette-Choo et al. 2023, "(Amplified) Banded
Matrix Factorization", arXiv 2306.08153, Section 5).
"""

import math
from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from flower_ext.core.errors import one_of, open_unit, positive, refuse, whole
from flower_ext.privacy.accounting.calibration import noise_multiplier_for
from flower_ext.privacy.factorizations.banded import BandedToeplitz
from flower_ext.privacy.factorizations.workload import PREFIX_SUMS, Workload

_CLOSE = 1.001  # within 0.1% the smaller is as good


@dataclass(frozen=True)
class AmplifiedComparison:
    """One line of the comparison.

    Parameters
    ----------
    cycle : int
        Groups of clients, which take turns.
    probability : float
        Of a client in its turn.
    bands : int
        Of the mechanism, whose noise needs one model-sized buffer less.
    noise_multiplier : float
        The least that meets the target, over the largest column norm.
    noise : float
        In the models, in units of the clipping norm: root mean square over the rounds,
        or the worst.
    """

    cycle: int
    probability: float
    bands: int
    noise_multiplier: float
    noise: float


@dataclass(frozen=True)
class AmplifiedChoice:
    """What `best_amplified` chose, from what, and why.

    Parameters
    ----------
    factorization : BandedToeplitz
        The chosen mechanism.
    cycle, probability
        For :class:`~flower_ext.core.sampling.CyclicPoissonSampler`.
    compared : tuple of AmplifiedComparison
        All that were looked at, best first.
    reason : str
        One line.
    """

    factorization: BandedToeplitz
    cycle: int
    probability: float
    compared: tuple[AmplifiedComparison, ...]
    reason: str


def best_bands(
    rounds: int,
    cycle: int,
    *,
    memory: int = 4,
    objective: str = "rms",
    workload: Workload = PREFIX_SUMS,
) -> BandedToeplitz:
    """Return the bands of least error for a given number of groups.

    What is spent depends on the groups and on the probability alone, as long as there
    are no more bands than groups, so that the noise multiplier is the same for all.
    More bands never have more error; within 0.1% fewer are as good.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    cycle : int
        Groups of clients, and most bands.
    memory : int
        Model-sized buffers that the server can spare: bands but one.
    objective : str
        ``"rms"`` or ``"max"``.
    workload : Workload
        The server's momentum and learning rates, unless given plain averaging.

    Examples
    --------
    >>> best_bands(64, cycle=8, memory=4).bands
    5
    """
    widest = min(whole("cycle", cycle, 1), whole("memory", memory, 0) + 1, rounds)
    tuned = _tuned(rounds, objective, workload)
    most, least = tuned(widest), _error(tuned(widest), objective, workload)
    low, high = 0, widest  # ``high`` is good enough, ``low`` is not
    while high - low > 1:
        middle = (low + high) // 2
        if _error(tuned(middle), objective, workload) <= least * _CLOSE:
            high, most = middle, tuned(middle)
        else:
            low = middle
    return most


def best_amplified(
    rounds: int,
    num_sampled_clients: int,
    population_size: int,
    *,
    max_epsilon: float,
    target_delta: float,
    memory: int = 4,
    objective: str = "rms",
    workload: Workload = PREFIX_SUMS,
) -> AmplifiedChoice:
    """Return the groups, bands and probability of least noise for a target.

    For a given cohort the probability is cohort x cycle / population. Of all cycles up
    to population / cohort, whose clients are all in when it is their turn, it looks at
    the smallest and the largest, at some between, and around the best; of those that
    give a client as many turns, at the smallest.

    Parameters
    ----------
    rounds : int
        Planned rounds.
    num_sampled_clients, population_size : int
        Expected cohort, and clients that may ever take part.
    max_epsilon, target_delta : float
        The target; its noise multiplier is sought for each.
    memory : int
        Model-sized buffers that the server can spare: bands but one.
    objective : str
        ``"rms"`` (mean over the run) or ``"max"`` (the worst model).
    workload : Workload
        The server's momentum and learning rates, unless given plain averaging.

    Returns
    -------
    AmplifiedChoice
        Within 0.1% of the best the one with fewest bands, and then groups.

    Notes
    -----
    Guarantee: none by itself; it is that of a :class:`~flower_ext.privacy.Mechanism`
    with ``amplified=True`` and the sampler named, which accounts for itself.

    Examples
    --------
    >>> choice = best_amplified(64, 20, 400, max_epsilon=4.0, target_delta=1e-4)
    >>> choice.cycle, choice.probability, choice.factorization.bands
    (4, 0.2, 4)
    """
    whole("rounds", rounds, 1)
    whole("num_sampled_clients", num_sampled_clients, 1)
    if num_sampled_clients > whole("population_size", population_size, 1):
        refuse("num_sampled_clients", num_sampled_clients, "<= population_size")
    positive("max_epsilon", max_epsilon)
    open_unit("target_delta", target_delta)
    whole("memory", memory, 0)
    workload = workload.over(rounds)
    tuned = _tuned(rounds, objective, workload)

    def compare(cycle: int) -> AmplifiedComparison:
        probability = num_sampled_clients * cycle / population_size
        bands = min(cycle, memory + 1)
        least = _least_noise(max_epsilon, target_delta, rounds, probability, cycle)
        error = _error(tuned(bands), objective, workload)
        return AmplifiedComparison(cycle, probability, bands, least, least * error)

    most = min(population_size // num_sampled_clients, rounds)
    # Of cycles with as many turns the smallest has the smallest probability.
    turns = {-(-rounds // cycle) for cycle in range(1, most + 1)}
    cycles = sorted({-(-rounds // times) for times in turns} | {most})
    lines = _search(compare, cycles, memory + 1)
    close = [line for line in lines if line.noise <= lines[0].noise * _CLOSE]
    chosen = min(close, key=lambda line: (line.bands, line.cycle))
    alone = next(line for line in lines if line.cycle == 1)
    return AmplifiedChoice(
        tuned(chosen.bands),
        chosen.cycle,
        chosen.probability,
        tuple(lines),
        f"cycle={chosen.cycle}, probability={chosen.probability:.4g}, {chosen.bands} "
        f"bands: {objective} noise {chosen.noise:.4g} at noise multiplier "
        f"{chosen.noise_multiplier:.4g}, {alone.noise / chosen.noise:.3g} times below "
        f"independent noise in Poisson cohorts; best of {len(lines)} cycles up to "
        f"{most}",
    )


def _search(
    compare: Callable[[int], AmplifiedComparison], cycles: list[int], widest: int
) -> list[AmplifiedComparison]:
    """Return the lines of some cycles and of those around the best, best first."""
    last = len(cycles) - 1
    grid = {round(2 ** (step / 2)) for step in range(2 * cycles[-1].bit_length())}
    # Few groups, and few turns, are counted one by one: there it goes up and down.
    grid |= {*cycles[:8], *cycles[-8:], widest}
    places = {min(bisect_left(cycles, cycle), last) for cycle in grid}
    lines = {place: compare(cycles[place]) for place in sorted(places)}
    while True:
        known = sorted(lines)
        best = known.index(min(lines, key=lambda place: lines[place].noise))
        around = known[max(0, best - 1) : best + 2]
        middles = {(a + b) // 2 for a, b in pairwise(around) if b - a > 1}
        if not middles:
            return sorted(lines.values(), key=lambda line: (line.noise, line.cycle))
        lines |= {place: compare(cycles[place]) for place in middles}


@lru_cache(maxsize=1024)
def _least_noise(
    epsilon: float, delta: float, rounds: int, probability: float, cycle: int
) -> float:
    """Seek each target's noise once: another server, or memory, asks for the same."""
    return noise_multiplier_for(
        epsilon, delta, rounds=rounds, sampling_probability=probability, cycle=cycle
    )


def _tuned(
    rounds: int, objective: str, workload: Workload
) -> Callable[[int], BandedToeplitz]:
    """Return what tunes a number of bands, each once."""
    one_of("objective", objective, ("rms", "max"))
    steady = workload.is_steady(whole("rounds", rounds, 1))
    made: dict[int, BandedToeplitz] = {}

    def tune(bands: int) -> BandedToeplitz:
        if bands not in made:
            made[bands] = BandedToeplitz.optimize(
                rounds,
                bands,
                objective=objective if steady else "rms",
                normalize_columns=True,
                workload=workload,
            )
        return made[bands]

    return tune


def _error(mechanism: BandedToeplitz, objective: str, workload: Workload) -> float:
    """Return the noise in the models at a noise multiplier of 1."""
    errors = mechanism.row_errors(workload)
    error = float(errors.mean() if objective == "rms" else errors.max())
    # A turn moves the release by a column of C, at most the largest.
    return math.sqrt(error) * mechanism.sensitivity(1, 1).value
