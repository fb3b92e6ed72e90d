"""Cohort samplers: which of the available clients take part in a round.

Flower's own options say how many clients take part (``fraction_train``,
``min_train_nodes``); the sampler decides how they are drawn. It draws from a generator
that is derived from its seed, the round and the purpose, so that a cohort depends on
nothing else: not on earlier rounds, not on the global random state, not on whether the
run was resumed. Samplers that limit how often a client takes part also remember who
did. Under a mechanism the round is the number of the release, which is not counted anew
when a strategy is started again.

For privacy accounting a sampler states what it guarantees of every client, see
:class:`Guarantee`. What it states, it enforces.
"""

from flower_ext.core.sampling.base import (
    LEAST_SECRET,
    AllClients,
    Guarantee,
    HeldOutSampler,
    Purpose,
    Sampler,
    SamplingKind,
    TooFewClients,
    UniformSampler,
    WhenShort,
)
from flower_ext.core.sampling.choosing import ConvergedClients, ParticipationGame
from flower_ext.core.sampling.random_cohorts import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    PoissonSampler,
)
from flower_ext.core.sampling.separated import MinSeparationSampler

__all__ = [
    "LEAST_SECRET",
    "AllClients",
    "BallsInBinsSampler",
    "ConvergedClients",
    "CyclicPoissonSampler",
    "Guarantee",
    "HeldOutSampler",
    "MinSeparationSampler",
    "ParticipationGame",
    "PoissonSampler",
    "Purpose",
    "Sampler",
    "SamplingKind",
    "TooFewClients",
    "UniformSampler",
    "WhenShort",
]
