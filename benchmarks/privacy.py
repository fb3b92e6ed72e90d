"""Planning a mechanism, drawing its noise, and what each mechanism costs.

Limits: optimising BLT(4) for 2,048 rounds at most a tenth of jax_privacy's time, and
for 100,000 rounds within a minute; one round of BLT(4) noise for 10 million parameters
at most 2.5 times the drawing of that many Gaussians, in memory of at most the buffers
and 2 model copies.

jax_privacy is compared where an environment of its own has it:

    python benchmarks/privacy.py --jax-python PATH/TO/ENVIRONMENT/bin/python

``--part calibration`` prints the processor seconds in which the noise of every
mechanism is found for a target over 10,000 rounds, the first time in a process and
again: at most 10 and 1.
``--part workloads`` prints what noise gains that is chosen for the server's momentum,
in half a minute. The default run takes about two and a half; jax_privacy adds three,
``--dense`` some more.
On a busy machine set OPENBLAS_NUM_THREADS=1: threads of a BLAS that wait for a core
would be most of what is measured in the search for BLT parameters.
"""

import argparse
import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
from _timing import Peak, medians, report

from flower_ext.core.sampling import (
    CyclicPoissonSampler,
    MinSeparationSampler,
    PoissonSampler,
    Sampler,
    UniformSampler,
)
from flower_ext.core.schedules import Cosine
from flower_ext.privacy import (
    BISR,
    BandedToeplitz,
    BufferedToeplitz,
    DenseFactorization,
    Factorization,
    Identity,
    Mechanism,
    NoiseStream,
    SquareRootToeplitz,
    TreeAggregation,
    Workload,
    best_amplified,
    best_mechanism,
    noise_multiplier_for,
)

PATTERNS = ((1, 1), (512, 4))  # (min_separation, max_participations) of 2,048 rounds
PARTS = ("noise", "search", "workloads", "calibration", "table")
LONG = ((2048, 512, 4), (10_000, 500, 20))
SLICE = 16_384  # parameters that a stream handles at a time
JAX_SCRIPT = """
import json, sys, time
import jax
from jax_privacy.matrix_factorization import buffered_toeplitz as blt

def optimise(n, separation, participations, error):
    if participations == 1 and error == "max":
        loss = blt.LossFn.build_closed_form_single_participation(n=n)
    else:
        loss = blt.LossFn.build_min_sep(
            n=n, error=error, min_sep=separation, max_participations=participations
        )
    begun = time.perf_counter()
    value = float(blt.optimize_loss(loss, num_buffers=4)[1])
    return time.perf_counter() - begun, value ** 0.5

results = []
for case in json.loads(sys.argv[1]):
    with jax.enable_x64(True):
        first, value = optimise(*case)
        again, value = optimise(*case)
    results.append((first, again, value))
print(json.dumps(results))
"""


def seconds_of(function: Callable[[], object]) -> float:
    """Return the seconds of one call."""
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def optimisation(jax_python: str | None) -> None:
    """Time the search for BLT parameters."""
    print("Optimising BLT(4)")
    cases = [(b, k, what) for b, k in PATTERNS for what in ("max", "rms")]
    theirs = jax_times(jax_python, cases) if jax_python else None
    if theirs is None:
        print("  jax_privacy is not compared: give --jax-python")
    for index, (separation, participations, objective) in enumerate(cases):
        problem = (2048, separation, participations)
        plan = partial(BufferedToeplitz.optimize, *problem, objective=objective)
        (ours,) = medians(plan, repeats=3)
        blt = plan()
        loss = blt.max_loss if objective == "max" else blt.rms_loss
        what = f"  n=2,048, b={separation}, k={participations}, {objective} loss"
        print(f"{what} {loss(separation, participations):.6f}: {ours:.3g} s")
        if theirs:
            first, again, value = theirs[index]
            print(f"    jax_privacy reaches {value:.6f}")
            report("    its first call, compilation included", ours, first, 0.1)
            report("    its second call", ours, again, 0.1)
    for _, participations, objective in cases:
        b = 1 if participations == 1 else 25_000
        problem = (100_000, b, participations)
        taken = seconds_of(
            partial(BufferedToeplitz.optimize, *problem, objective=objective)
        )
        report(f"  n=100,000, b={b}, k={participations}, {objective}", taken, 60, 1)


def jax_times(
    python: str, cases: list[tuple[int, int, str]]
) -> list[tuple[float, float, float]] | None:
    """Return (first seconds, second seconds, loss) of each case, by jax_privacy."""
    problems = [(2048, b, k, "max" if o == "max" else "mean") for b, k, o in cases]
    try:
        done = subprocess.run(
            [python, "-c", JAX_SCRIPT, json.dumps(problems)],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError) as error:
        print(textwrap.indent(str(getattr(error, "stderr", error))[-400:], "  "))
        return None
    found: list[tuple[float, float, float]] = json.loads(done.stdout.splitlines()[-1])
    return found


def noise() -> None:
    """Time and weigh one round of BLT(4) noise."""
    print("One round of BLT(4) noise")
    blt = BufferedToeplitz.optimize(2048, 512, 4)
    size = 10_000_000
    with Peak() as peak:
        stream = NoiseStream(blt, {"w": (size,)}, seed=0)
        for _ in range(3):
            stream.next()
    mebibytes = 4 * size * (blt.memory + 2) / 2**20
    report(
        f"  {size:,} parameters, peak memory against {blt.memory} buffers + 2 models",
        peak.bytes / 2**20,
        mebibytes,
        1,
        "MiB",
    )
    # The same generator as the stream's, so that only the recurrence differs.
    generator = np.random.Generator(np.random.SFC64(0))
    model = np.empty(size)
    ours, draw = medians(stream.next, partial(generator.standard_normal, out=model))
    report(f"  {size:,} parameters, against drawing them", ours, draw, 2.5)
    del stream, model
    size = 100_000_000
    needed = 4 * size * (blt.memory + 2)
    if psutil.virtual_memory().available < 1.2 * needed:
        print(f"  {size:,} parameters: skipped, needs {needed / 2**30:.1f} GiB")
        return
    with Peak() as peak:
        stream = NoiseStream(blt, {"w": (size,)}, seed=0)
        taken = [seconds_of(stream.next) for _ in range(2)][-1]
    print(f"  {size:,} parameters: {taken:.3g} s, {peak.bytes / 2**30:.2f} GiB")


def mechanisms(
    rounds: int, separation: int, participations: int, dense: bool
) -> Iterator[Callable[[], Factorization]]:
    """Yield what plans every mechanism of the table."""
    yield partial(Identity, rounds)
    for estimator in ("online", "honaker"):
        yield partial(TreeAggregation, rounds, estimator=estimator)
    if participations > 1:
        yield partial(TreeAggregation, rounds, restart_every=separation)
    for bands in (8, 32, 128):
        yield partial(BandedToeplitz.optimize, rounds, bands, normalize_columns=True)
    problem = (rounds, separation, participations)
    for buffers in (1, 2, 4):
        yield partial(BufferedToeplitz.optimize, *problem, buffers=buffers)
    yield partial(SquareRootToeplitz, rounds)
    if dense and rounds <= 512:
        yield partial(DenseFactorization.optimize, *problem)


def round_cost(factorization: Factorization) -> float:
    """Return the time of a round's noise over that of one draw, a mean over the run."""
    recurrence = factorization.recurrence()
    generator = np.random.Generator(np.random.SFC64(0))
    state = np.zeros((recurrence.buffers, SLICE), np.float32)
    # A tree needs more draws in some rounds than in others: a sample of all rounds.
    steps = generator.integers(0, factorization.rounds, 64)

    def run() -> None:
        for step in map(int, steps):
            fresh = generator.standard_normal((recurrence.draws(step), SLICE))
            recurrence.advance(step, fresh, state)

    def draw() -> None:
        for _ in steps:
            generator.standard_normal((1, SLICE))

    ours, peer = medians(run, draw, repeats=3)
    return ours / peer


def table(rounds: int, separation: int, participations: int, dense: bool) -> None:
    """Print error against memory and time."""
    print(f"\nn={rounds:,}, b={separation}, k={participations}; tuned for the rms loss")
    print("                                     sensi-                  plan    noise")
    print("mechanism                     memory tivity  max loss rms loss s     draws")
    for plan in mechanisms(rounds, separation, participations, dense):
        begun = time.perf_counter()
        mechanism = plan()
        planned = time.perf_counter() - begun
        sensitivity = mechanism.sensitivity(separation, participations)
        bound = " " if sensitivity.exact else "<"
        print(
            f"{mechanism.name:30}{mechanism.memory:5} {bound}{sensitivity.value:7.3f}"
            f"{sensitivity.value * mechanism.max_error():9.3f}"
            f"{sensitivity.value * mechanism.rms_error():9.3f}"
            f"{planned:9.3g}{round_cost(mechanism):8.2f}",
            flush=True,
        )


def workloads() -> None:
    """Print what noise for plain averaging costs under another server's SGD."""
    print("Root-mean-square noise in the models at mu = 1, tuned for")
    print("momentum 0.9                      prefix sums  the server  costs more")
    for rounds, separation, participations in ((64, 16, 4), (512, 128, 4), *LONG):
        problem = (rounds, separation, participations)
        print(f"n={rounds:,}, b={separation}, k={participations}")
        heavy_ball = Workload(momentum=0.9)
        cooldown = Workload(0.9, learning_rates=Cosine(1.0, rounds=rounds))
        plans: dict[str, tuple[Workload, Callable[[Workload], Factorization]]] = {
            "best of 4 buffers": (heavy_ball, partial(best_of, problem)),
            "best of 4 buffers, cosine": (cooldown, partial(best_of, problem)),
            "BISR of 32 bands": (
                heavy_ball,
                lambda w, p=problem: BISR.optimize(p[0], 32, *p[1:], workload=w),
            ),
        }
        if rounds <= 64:
            plans["dense"] = (
                heavy_ball,
                lambda w, p=problem: DenseFactorization.optimize(*p, workload=w),
            )
        for name, (workload, plan) in plans.items():
            pattern = (separation, participations, workload)
            before = plan(Workload()).rms_loss(*pattern)
            after = plan(workload).rms_loss(*pattern)
            print(
                f"  {name:30}{before:13.4g}{after:12.4g}{before / after - 1:12.1%}",
                flush=True,
            )


def calibration() -> None:
    """Time every mechanism's noise for a target over 10,000 rounds."""
    print("Noise for epsilon 2 over 10,000 rounds: processor seconds of a new process,")
    print("but for the import of flower_ext, and of the same again")
    for name in planned():
        code = f"import privacy; privacy.calibrate({name!r})"
        here = Path(__file__).parent
        # Threads of a BLAS that wait for a core would be most of what is measured.
        alone = {**os.environ, "OMP_NUM_THREADS": "1"}
        subprocess.run([sys.executable, "-c", code], cwd=here, env=alone, check=True)


def calibrate(name: str) -> None:
    """Print the seconds of one mechanism, the first time and the second."""
    logging.getLogger("flwr").setLevel(logging.WARNING)
    plan = planned()[name]
    seconds = []
    for _ in range(2):
        begun = time.process_time()
        plan()
        seconds.append(time.process_time() - begun)
    cold, warm = seconds
    verdict = "ok" if cold <= 10 and warm <= 1 else "MISSED"
    print(f"  {name:44}{cold:7.2f}{warm:7.2f}  {verdict}", flush=True)


def planned() -> dict[str, Callable[[], object]]:
    """Return what finds the noise of every mechanism."""
    rounds, b, k = 10_000, 500, 20

    def run(sampler: Sampler, factorization: object = "best", **more: object) -> object:
        options = {"max_epsilon": 2.0, "num_sampled_clients": 100, **more}
        if callable(factorization):
            factorization = factorization()
        mechanism = Mechanism(
            num_rounds=rounds,
            population_size=100_000,
            factorization=factorization,  # type: ignore[arg-type]
            **options,  # type: ignore[arg-type]
        )
        accountant = mechanism.account(mechanism.choose(sampler), sampler)
        assert accountant is not None
        return accountant.noise_std

    apart, momentum = MinSeparationSampler(b), Workload(0.9)
    secret = {"amplified": True}
    plans: dict[str, Callable[[], object]] = {
        "independent": partial(run, apart, "identity"),
        "independent, Poisson": partial(
            run, PoissonSampler(probability=1e-3), **secret
        ),
        "independent, fixed cohorts": partial(run, UniformSampler(), **secret),
        "bands, cyclic Poisson": partial(run, CyclicPoissonSampler(5e-3, 5), **secret),
        "bands and cycle chosen": partial(
            best_amplified, rounds, 100, 100_000, max_epsilon=2.0, target_delta=1e-6
        ),
        "tree": partial(run, apart, "tree"),
        "tree, restarts": partial(
            run, apart, partial(TreeAggregation, rounds, restart_every=b)
        ),
        "banded(32)": partial(run, apart, partial(BandedToeplitz.optimize, rounds, 32)),
        "BLT": partial(run, apart, partial(BufferedToeplitz.optimize, rounds, b, k)),
        "BISR(32)": partial(run, apart, partial(BISR.optimize, rounds, 32, b, k)),
        "square root": partial(run, apart, partial(SquareRootToeplitz, rounds)),
        "best": partial(run, apart),
        "best, clients in every round": partial(run, UniformSampler()),
        "best, momentum": partial(run, apart, workload=momentum),
        "best, momentum, in every round": partial(
            run, UniformSampler(), workload=momentum
        ),
        "best, momentum and cooldown": partial(
            run, apart, workload=Workload(0.9, learning_rates=Cosine(1.0, rounds))
        ),
    }
    for group in (2, 4, 16, 64):
        plans[f"examples, {group} of a user"] = partial(
            noise_multiplier_for,
            2.0,
            1e-6,
            rounds=rounds,
            sampling_probability=1e-3,
            group_size=group,
        )
    return plans


def best_of(problem: tuple[int, int, int], workload: Workload) -> Factorization:
    """Return the mechanism that is chosen for a server."""
    return best_mechanism(*problem, workload=workload).factorization


def main() -> None:
    """Run the parts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--jax-python", help="a Python interpreter that can import jax_privacy"
    )
    parser.add_argument(
        "--dense", action="store_true", help="also plan dense(512): minutes each"
    )
    parser.add_argument("--part", choices=PARTS)
    options = parser.parse_args()
    BandedToeplitz.optimize(8, 2)  # imports what it needs
    parts = {
        "noise": noise,
        "search": partial(optimisation, options.jax_python),
        "workloads": workloads,
        "calibration": calibration,
        "table": partial(tables, options.dense),
    }
    for name, part in parts.items():
        if options.part in (None, name):
            part()


def tables(dense: bool) -> None:
    """Print the tables of all mechanisms."""
    print("\nMemory: model-sized buffers. Sensitivity: < marks an upper bound.")
    print("Noise: time of a round, in drawings of one model of Gaussians.")
    for rounds in (512, 2048):
        table(rounds, 1, 1, dense)
        table(rounds, rounds // 4, 4, dense)


if __name__ == "__main__":
    main()
