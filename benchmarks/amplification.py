"""Noise at equal epsilon: secret cohorts of each kind, and clients that only wait.

Each line is a mechanism that spends the same epsilon on the same plan: a number of
rounds, of clients in a round, of clients in all. What counts is the noise of a prefix
sum of the rounds, root mean square over the run and in clipping norms, which is the
noise in the model before the learning rate. Limit: balls in bins, with the best of
their bands, have less of it than every other way.

It takes a few minutes; ``--plan ROUNDS COHORT POPULATION EPSILON`` is one of your own.
"""

import argparse
from collections.abc import Iterator

from _timing import report

from flower_ext.core.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    MinSeparationSampler,
    PoissonSampler,
    Sampler,
)
from flower_ext.privacy import BandedToeplitz, Factorization, Mechanism, PrivateSum

PLANS = [(128, 100, 800, 8.0), (200, 100, 2000, 4.0), (200, 100, 10_000, 2.0)]
DELTA = 1e-5
BANDS = (2, 4, 8, 16, 32, 64)
BINS, APART, POISSON, CYCLIC = "balls in bins", "waiting", "Poisson", "cyclic Poisson"


def ways(
    rounds: int, cohort: int, population: int
) -> Iterator[tuple[str, Sampler, Factorization | str]]:
    """Yield samplers with noise that goes with them; 'best' has all the memory."""
    turns = population // cohort
    yield APART, MinSeparationSampler(turns), "best"
    yield POISSON, PoissonSampler(probability=cohort / population), "identity"
    for bands in BANDS:
        plan = BandedToeplitz.optimize(rounds, bands, normalize_columns=True)
        if bands <= turns:
            rate = bands * cohort / population
            yield CYCLIC, CyclicPoissonSampler(rate, bands), plan
        yield BINS, BallsInBinsSampler(turns), plan


def compare(rounds: int, cohort: int, population: int, epsilon: float) -> None:
    """Print the table of one plan, and whether the limit holds."""
    print(
        f"{rounds} rounds, {cohort} of {population} clients, epsilon {epsilon:g} at "
        f"delta {DELTA:g}\n\n| cohorts | noise | std / clipping norm | rms error |\n"
        "|---|---|---|---|"
    )
    best: dict[str, float] = {}
    for name, sampler, factorization in ways(rounds, cohort, population):
        mechanism = Mechanism(
            num_rounds=rounds,
            num_sampled_clients=cohort,
            population_size=population,
            max_epsilon=epsilon,
            target_delta=DELTA,
            factorization=factorization,
            memory=rounds,
            amplified=name != APART,
        )
        private = PrivateSum(mechanism, sampler, {})
        error = private.noise_std * private.factorization.rms_error()
        best[name] = min(error, best.get(name, error))
        print(
            f"| {name} | {private.factorization.name} | {private.noise_std:.3f} | "
            f"{error:.2f} |",
            flush=True,
        )
    print()
    for name in (APART, POISSON, CYCLIC):
        report(f"{BINS} against {name}", best[BINS], best[name], 1.0, "clipping norms")
    print()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", nargs=4, type=float, action="append")
    for plan in parser.parse_args().plan or PLANS:
        compare(*map(int, plan[:3]), float(plan[3]))
