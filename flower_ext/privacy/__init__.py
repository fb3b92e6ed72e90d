"""Differential privacy for federated strategies.

*Factorizations* say how noise is correlated over rounds and what that costs; *noise
streams* produce it; *clipping* bounds a contribution; *accountants* turn noise into
(epsilon, delta) and back. A :class:`Mechanism` is all of it for one run, and what a
strategy takes as an argument. Privacy inside every silo is the trainer
:class:`~flower_ext.client.dp_sgd.DPSGD` of its ClientApp.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from flower_ext.privacy.accounting.accountants import (
    Evaluations,
    GaussianAccountant,
    RoundAccountant,
)
from flower_ext.privacy.accounting.balls_in_bins import (
    BallsInBinsAccountant,
    best_in_bins,
    noise_multiplier_in_bins,
)
from flower_ext.privacy.accounting.calibration import epsilon_for, noise_multiplier_for
from flower_ext.privacy.accounting.flower_events import EventAccountant
from flower_ext.privacy.accounting.gaussian import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
)
from flower_ext.privacy.accounting.sampled import (
    SampledGaussianAccountant,
    WithoutReplacementAccountant,
)
from flower_ext.privacy.amplified_bands import (
    AmplifiedChoice,
    AmplifiedComparison,
    best_amplified,
    best_bands,
)
from flower_ext.privacy.clipping import (
    AdaptiveClipping,
    Clipping,
    FlatClipping,
    PerLayerClipping,
    clipping_factor,
    split_clipping_norm,
    split_noise_multiplier,
    update_clipping_norm,
)
from flower_ext.privacy.factorizations.banded import BandedToeplitz
from flower_ext.privacy.factorizations.banded_inverse import BISR
from flower_ext.privacy.factorizations.blt import BufferedToeplitz
from flower_ext.privacy.factorizations.dense import DenseFactorization
from flower_ext.privacy.factorizations.factorization import Factorization, Identity
from flower_ext.privacy.factorizations.participation import Sensitivity
from flower_ext.privacy.factorizations.selection import (
    Choice,
    Comparison,
    best_mechanism,
)
from flower_ext.privacy.factorizations.toeplitz import SquareRootToeplitz, Toeplitz
from flower_ext.privacy.factorizations.trees import TreeAggregation
from flower_ext.privacy.factorizations.workload import Workload
from flower_ext.privacy.noise import NoiseStream

if TYPE_CHECKING:
    from flower_ext.privacy.bounded import BoundedGaussian as BoundedGaussian
    from flower_ext.privacy.instances import InstanceAccount as InstanceAccount
    from flower_ext.privacy.instances import InstanceReport as InstanceReport
    from flower_ext.privacy.mechanism import Mechanism as Mechanism
    from flower_ext.privacy.private_evaluation import (
        PrivateEvaluation as PrivateEvaluation,
    )
    from flower_ext.privacy.private_sum import PrivateSum as PrivateSum
    from flower_ext.privacy.silo_budget import (
        SiloBudgetExhausted as SiloBudgetExhausted,
    )
    from flower_ext.privacy.silo_budget import SiloPrivacy as SiloPrivacy
    from flower_ext.privacy.silo_budget import StepLedger as StepLedger

# They need torch or Flower, the numbers above do not: imported when first used.
_HOME = {
    "BoundedGaussian": "bounded",
    "InstanceAccount": "instances",
    "InstanceReport": "instances",
    "Mechanism": "mechanism",
    "PrivateEvaluation": "private_evaluation",
    "PrivateSum": "private_sum",
    "SiloBudgetExhausted": "silo_budget",
    "SiloPrivacy": "silo_budget",
    "StepLedger": "silo_budget",
}

__all__ = [
    *_HOME,
    "AdaptiveClipping",
    "AmplifiedChoice",
    "AmplifiedComparison",
    "BISR",
    "BallsInBinsAccountant",
    "BandedToeplitz",
    "BufferedToeplitz",
    "Choice",
    "Comparison",
    "Clipping",
    "DenseFactorization",
    "Evaluations",
    "EventAccountant",
    "Factorization",
    "FlatClipping",
    "GaussianAccountant",
    "Identity",
    "NoiseStream",
    "PerLayerClipping",
    "RoundAccountant",
    "SampledGaussianAccountant",
    "Sensitivity",
    "SquareRootToeplitz",
    "Toeplitz",
    "TreeAggregation",
    "WithoutReplacementAccountant",
    "Workload",
    "best_amplified",
    "best_bands",
    "best_in_bins",
    "best_mechanism",
    "clipping_factor",
    "epsilon_for",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "noise_multiplier_for",
    "noise_multiplier_in_bins",
    "split_clipping_norm",
    "split_noise_multiplier",
    "update_clipping_norm",
]


def __getattr__(name: str) -> object:
    """Import a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
