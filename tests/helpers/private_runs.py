"""Runs of a few rounds under mechanisms of every kind, the same each time."""

from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import MinSeparationSampler, PoissonSampler
from flower_ext.privacy import (
    BufferedToeplitz,
    Mechanism,
    PerLayerClipping,
    TreeAggregation,
)
from flower_ext.simulation.local import LocalGrid

ROUNDS, CLIENTS = 4, 4
# Such that it cannot be found by trying.
_SEED = 2**100

KINDS = {
    "identity": {"factorization": "identity"},
    "tree": {"factorization": TreeAggregation(ROUNDS)},
    "blt": {"factorization": BufferedToeplitz(ROUNDS, [0.9, 0.5], [0.2, 0.3])},
    "layers": {"clipping": PerLayerClipping(0.5)},
    "amplified": {"factorization": "identity", "amplified": True},
    "no-noise": {"noise_multiplier": 0.0},
}


def private(make, kind, **plan):
    """Return a strategy under a mechanism of a kind."""
    plan = {
        "num_rounds": ROUNDS,
        "num_sampled_clients": 2,
        "population_size": CLIENTS,
        "clipping": 0.5,
        "noise_multiplier": 0.7,
        "target_delta": 1e-2,
        "seed": _SEED,
        **KINDS[kind],
        **plan,
    }
    amplified = plan.get("amplified")
    sampler = PoissonSampler(_SEED, probability=0.5) if amplified else None
    return make(
        mechanism=Mechanism(**plan), sampler=sampler or MinSeparationSampler(1, seed=2)
    )


def run(strategy, app, start, rounds=ROUNDS, config=None, **how):
    """Run a strategy; return the last model, and epsilon after each round."""
    grid = LocalGrid(app, CLIENTS, config)
    result = strategy.start(grid, to_record(start), num_rounds=rounds, **how)
    metrics = result.train_metrics_clientapp
    epsilons = [metrics[n].get("epsilon") for n in metrics]
    return from_record(result.arrays), epsilons
