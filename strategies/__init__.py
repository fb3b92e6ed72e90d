"""Federated strategies, one paper a file: the server class and its client half."""

from flower_ext.strategies.adadps import AdaDPS
from flower_ext.strategies.agnostic_fl import AgnosticFL, AgnosticFLClient
from flower_ext.strategies.bounded_group_loss import (
    BoundedGroupLoss,
    BoundedGroupLossClient,
)
from flower_ext.strategies.diloco import DiLoCo, DiLoCoClient
from flower_ext.strategies.ditto import Ditto, DittoClient
from flower_ext.strategies.dp2 import DP2
from flower_ext.strategies.dpftrl import DPFTRL
from flower_ext.strategies.ensemble import Ensemble, EnsembleClient
from flower_ext.strategies.fedbabu import FedBABU, FedBABUClient
from flower_ext.strategies.fedbn import FedBN, FedBNClient
from flower_ext.strategies.fedconv import FedConv, FedConvClient
from flower_ext.strategies.fedcurv import FedCurv, FedCurvClient
from flower_ext.strategies.feddyn import FedDyn, FedDynClient
from flower_ext.strategies.federated_rank_learning import (
    FederatedRankLearning,
    FederatedRankLearningClient,
)
from flower_ext.strategies.fedex_lora import FedExLoRA, FedExLoRAClient
from flower_ext.strategies.fedfish import FedFish, FedFishClient
from flower_ext.strategies.fedmgda import FedMGDA
from flower_ext.strategies.fednova import FedNova, FedNovaClient
from flower_ext.strategies.fedper import FedPer, FedPerClient
from flower_ext.strategies.fedprox import FedProx, FedProxClient
from flower_ext.strategies.fedrep import FedRep, FedRepClient
from flower_ext.strategies.fine_tuned import FineTuned, FineTunedClient
from flower_ext.strategies.flasc import FLASC, FLASCClient
from flower_ext.strategies.flex_lora import FlexLoRA, FlexLoRAClient
from flower_ext.strategies.heterofl import HeteroFL, HeteroFLClient
from flower_ext.strategies.hypcluster import HypCluster, HypClusterClient
from flower_ext.strategies.knnper import KNNPer, KNNPerClient
from flower_ext.strategies.local_only import LocalOnly, LocalOnlyClient
from flower_ext.strategies.maxfl import MaxFL, MaxFLClient
from flower_ext.strategies.most import MosT, MosTClient
from flower_ext.strategies.mrmtl import MRMTL, MRMTLClient
from flower_ext.strategies.public_representations import (
    PublicRepresentations,
    PublicRepresentationsClient,
)
from flower_ext.strategies.scaffold import Scaffold, ScaffoldClient
from flower_ext.strategies.stacked_lora import StackedLoRA, StackedLoRAClient
from flower_ext.strategies.term import TERM, TERMClient

__all__ = [
    "DP2",
    "DPFTRL",
    "FLASC",
    "MRMTL",
    "TERM",
    "AdaDPS",
    "AgnosticFL",
    "AgnosticFLClient",
    "BoundedGroupLoss",
    "BoundedGroupLossClient",
    "DiLoCo",
    "DiLoCoClient",
    "Ditto",
    "DittoClient",
    "Ensemble",
    "EnsembleClient",
    "FLASCClient",
    "FedBABU",
    "FedBABUClient",
    "FedBN",
    "FedBNClient",
    "FedConv",
    "FedConvClient",
    "FedCurv",
    "FedCurvClient",
    "FedDyn",
    "FedDynClient",
    "FedMGDA",
    "FedNova",
    "FedNovaClient",
    "FedProx",
    "FedProxClient",
    "FedExLoRA",
    "FedExLoRAClient",
    "FedFish",
    "FedFishClient",
    "FedPer",
    "FedPerClient",
    "FedRep",
    "FedRepClient",
    "FederatedRankLearning",
    "FederatedRankLearningClient",
    "FineTuned",
    "FineTunedClient",
    "FlexLoRA",
    "FlexLoRAClient",
    "HeteroFL",
    "HeteroFLClient",
    "HypCluster",
    "HypClusterClient",
    "KNNPer",
    "KNNPerClient",
    "LocalOnly",
    "LocalOnlyClient",
    "MRMTLClient",
    "MaxFL",
    "MaxFLClient",
    "MosT",
    "MosTClient",
    "PublicRepresentations",
    "PublicRepresentationsClient",
    "Scaffold",
    "ScaffoldClient",
    "StackedLoRA",
    "StackedLoRAClient",
    "TERMClient",
]
