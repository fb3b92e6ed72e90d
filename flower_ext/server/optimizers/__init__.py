r"""Server optimizers: what the server does with the aggregated direction.

A strategy's ``update`` gives a direction :math:`\Delta_t` that points from the model
that was sent to where the clients want it. Plain averaging adds it. The optimizers
here treat :math:`-\Delta_t` as a gradient (Reddi et al. 2021, "Adaptive Federated
Optimization", ICLR, Algorithm 2).

Integers and BatchNorm's running statistics are not parameters: they are averaged
whatever the optimizer is, since momentum can drive a variance below zero.
"""

from flower_ext.server.optimizers.adaptive import Adagrad, Adam, Yogi
from flower_ext.server.optimizers.around import Around
from flower_ext.server.optimizers.base import (
    Elementwise,
    ServerOptimizer,
    State,
    apply_direction,
    keep_variances,
)
from flower_ext.server.optimizers.fedexp import FedExP
from flower_ext.server.optimizers.from_torch import TorchOptimizer
from flower_ext.server.optimizers.lamb import LAMB
from flower_ext.server.optimizers.muon import Muon, orthogonalized
from flower_ext.server.optimizers.prune_after import PruneAfter
from flower_ext.server.optimizers.sgd import SGD, RefactoredSGD
from flower_ext.server.optimizers.sparsity import (
    OneShotSparsity,
    PeriodicSparsity,
    PolynomialSparsity,
)

__all__ = [
    "LAMB",
    "SGD",
    "Adagrad",
    "Adam",
    "Around",
    "Elementwise",
    "FedExP",
    "Muon",
    "OneShotSparsity",
    "PeriodicSparsity",
    "PolynomialSparsity",
    "PruneAfter",
    "RefactoredSGD",
    "ServerOptimizer",
    "State",
    "TorchOptimizer",
    "Yogi",
    "apply_direction",
    "keep_variances",
    "orthogonalized",
]
