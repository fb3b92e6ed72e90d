"""Differential privacy for federated strategies.

*Factorizations* say how noise is correlated over rounds and what that costs; *noise
streams* produce it; *clipping* bounds a contribution; *accountants* turn noise into
(epsilon, delta) and back. A :class:`Mechanism` is all of it for one run, and what a
strategy takes as an argument. :class:`ExampleLevelDP` is privacy inside every silo.
"""

from flower_ext.privacy.accounting import GaussianAccountant, RoundAccountant
from flower_ext.privacy.banded import BandedToeplitz
from flower_ext.privacy.blt import BufferedToeplitz
from flower_ext.privacy.calibration import epsilon_for, noise_multiplier_for
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
from flower_ext.privacy.dense import DenseFactorization
from flower_ext.privacy.example_level import ExampleLevelDP, keep_per_user, worst_silo
from flower_ext.privacy.factorizations import Factorization, Identity
from flower_ext.privacy.gaussian import (
    gaussian_delta,
    gaussian_epsilon,
    gaussian_mu,
    rdp_epsilon,
    zcdp_epsilon,
    zcdp_rho,
)
from flower_ext.privacy.mechanism import Mechanism
from flower_ext.privacy.noise import NoiseStream
from flower_ext.privacy.participation import Sensitivity
from flower_ext.privacy.release import PrivateSum
from flower_ext.privacy.sampled import (
    SampledGaussianAccountant,
    WithoutReplacementAccountant,
)
from flower_ext.privacy.selection import Choice, Comparison, best_mechanism
from flower_ext.privacy.silo import SiloBudgetExhausted, SiloPrivacy, StepLedger
from flower_ext.privacy.toeplitz import SquareRootToeplitz, Toeplitz
from flower_ext.privacy.trees import TreeAggregation

__all__ = [
    "AdaptiveClipping",
    "BandedToeplitz",
    "BufferedToeplitz",
    "Choice",
    "Comparison",
    "Clipping",
    "DenseFactorization",
    "ExampleLevelDP",
    "Factorization",
    "FlatClipping",
    "GaussianAccountant",
    "Identity",
    "Mechanism",
    "NoiseStream",
    "PerLayerClipping",
    "PrivateSum",
    "RoundAccountant",
    "SampledGaussianAccountant",
    "Sensitivity",
    "SiloBudgetExhausted",
    "SiloPrivacy",
    "SquareRootToeplitz",
    "StepLedger",
    "Toeplitz",
    "TreeAggregation",
    "WithoutReplacementAccountant",
    "best_mechanism",
    "clipping_factor",
    "epsilon_for",
    "gaussian_delta",
    "gaussian_epsilon",
    "gaussian_mu",
    "keep_per_user",
    "noise_multiplier_for",
    "rdp_epsilon",
    "split_clipping_norm",
    "split_noise_multiplier",
    "update_clipping_norm",
    "worst_silo",
    "zcdp_epsilon",
    "zcdp_rho",
]
