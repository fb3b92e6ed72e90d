"""The table: what holds for every method, in one place.

A method is a row of `METHODS`; every test below is a column and runs over the rows. A
new method adds its row here, and a file of its own with what is special to it.
"""

import dataclasses
import math
import zlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import adapted
import numpy as np
import pytest
import torch
from adding_grid import AddingGrid
from flwr.app import ConfigRecord, Message, MetricRecord
from flwr.clientapp import ClientApp
from hypothesis import given, seed, settings
from hypothesis import strategies as st
from tampering import tamper
from torch import nn

from flower_ext import AdditiveStrategy, RoundStrategy, Task, Tracker, client_app
from flower_ext.client import stacked
from flower_ext.client.half import ClientHalf
from flower_ext.client.personal import PERSONAL
from flower_ext.client.stacked import Stacked
from flower_ext.core.arrays import Arrays, Lazy, from_record, is_parameter, to_record
from flower_ext.core.contribution import WEIGHT_OF, Contribution
from flower_ext.core.sampling import MinSeparationSampler
from flower_ext.core.several import stack
from flower_ext.privacy import AdaptiveClipping, Mechanism
from flower_ext.server.optimizers import SGD, Adam
from flower_ext.server.personal import PersonalStrategy
from flower_ext.server.tracking import read_metrics
from flower_ext.simulation import Asynchronous, LocalGrid, PackedGrid, VirtualClock
from flower_ext.strategies import (
    DP2,
    DPFTRL,
    FLASC,
    MRMTL,
    TERM,
    AdaDPS,
    AgnosticFL,
    AgnosticFLClient,
    BoundedGroupLoss,
    BoundedGroupLossClient,
    DiLoCo,
    DiLoCoClient,
    Ditto,
    DittoClient,
    Ensemble,
    EnsembleClient,
    FedBABU,
    FedBABUClient,
    FedBN,
    FedBNClient,
    FedConv,
    FedConvClient,
    FedCurv,
    FedCurvClient,
    FedDyn,
    FedDynClient,
    FederatedRankLearning,
    FederatedRankLearningClient,
    FedFish,
    FedFishClient,
    FedMGDA,
    FedNova,
    FedNovaClient,
    FedPer,
    FedPerClient,
    FedProx,
    FedProxClient,
    FedRep,
    FedRepClient,
    FineTuned,
    FineTunedClient,
    FLASCClient,
    HeteroFL,
    HeteroFLClient,
    HypCluster,
    HypClusterClient,
    KNNPer,
    KNNPerClient,
    LocalOnly,
    LocalOnlyClient,
    MaxFL,
    MaxFLClient,
    MosT,
    MosTClient,
    MRMTLClient,
    PublicRepresentations,
    PublicRepresentationsClient,
    Scaffold,
    ScaffoldClient,
    TERMClient,
)
from flower_ext.strategies.adadps import PublicMoments, PublicStatistics
from flower_ext.strategies.flasc import Tier
from flower_ext.strategies.public_representations import CHECKSUM
from flower_ext.testing import Remembering, check_strategy
from flower_ext.wire import (
    EDEN,
    NF4,
    BFloat16,
    Chain,
    ErrorFeedback,
    Exact,
    Permutation,
    TopK,
)

# What a mechanism is asked for: three clients of three, or as a test says.
PLAN = {
    "num_rounds": 4,
    "num_sampled_clients": 3,
    "population_size": 3,
    "noise_multiplier": 0.5,
    "target_delta": 1e-2,
    "factorization": "tree",
    "seed": 3,
}
Options = Mapping[str, object]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A row.

    Attributes
    ----------
    make : callable
        The strategy.
    half : type, optional
        What its clients do besides training.
    options : dict
        Usual options.
    others : tuple of dict
        Further options that keep the contract.
    fedavg : dict
        Options with which it is FedAvg, for clients with equally many examples; None
        where no setting is.
    private : tuple of dict
        Options under a mechanism; each is looked at. Empty where there is none.
    refuses : tuple of (dict, str)
        Options that a mechanism refuses, and the words; all if there is none.
    takes_plan : bool
        Whether what a mechanism is asked for are options of the method itself.
    has_codecs : bool
        Whether it has codecs of its own.
    moves : bool
        Whether the server's model moves; if not, only clients' own models do.
    start : callable
        ``(arrays of one model, strategy) -> arrays`` that the strategy starts from.
    sends_kept : bool
        Whether clients send the very model that they keep.
    """

    make: Callable[..., RoundStrategy]
    half: type[ClientHalf] | None = None
    options: Options = field(default_factory=dict)
    others: tuple[Options, ...] = ()
    fedavg: Options | None = None
    private: tuple[Options, ...] = ({},)
    refuses: tuple[tuple[Options, str], ...] = ()
    takes_plan: bool = False
    has_codecs: bool = False
    moves: bool = True
    sends_kept: bool = False
    start: Callable[[Arrays, AdditiveStrategy], Arrays] = lambda model, _: model

    def initial(self, record, strategy):
        """Return what a strategy starts from, of a model's record."""
        return to_record(self.start(from_record(record), strategy))

    def plain(self, **options: object) -> AdditiveStrategy:
        """Make the strategy with its usual options and others."""
        return self.make(**{**self.options, **options})

    def under(self, plan: Options, **options: object) -> AdditiveStrategy:
        """Make the strategy under a mechanism."""
        plan = {**PLAN, **plan}
        if self.takes_plan:
            return self.make(**{**plan, **options})
        return self.plain(mechanism=Mechanism(**plan), **options)


def apart(model, strategy):
    """Return several models that start from different points, the first from this."""
    return stack(
        {
            name: (x + 0.05 * j * np.cos(np.arange(x.size)).reshape(x.shape)).astype(
                x.dtype
            )
            if is_parameter(name, x)
            else x
            for name, x in model.items()
        }
        for j in range(strategy.num_models)
    )


class OnAnyEncoder(PublicRepresentations):
    """Starts from models whose encoder need not be the clients'."""

    def tell(self, round):
        return {**super().tell(round), CHECKSUM: ""}


class OffsetNorm(nn.Module):
    """A layer whose only array has a name that all models here know.

    They are a net with BatchNorm, and two without: a line, which has a bias, and that
    of the contract's tests, which has one in a linear layer.
    """

    def __init__(self):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1))
        self.norm = nn.BatchNorm1d(4)
        self.linear = nn.LayerNorm(2)


def of_width(width):
    """Return arrays with the names and shapes of all models here, of a width.

    Only the net has units to leave out; all models have one number called ``scale``.
    """
    units = int(4 * width)
    hidden = nn.Sequential(nn.Linear(3, units), nn.BatchNorm1d(units))
    names = {"0": "hidden", "1": "norm"}
    arrays = {names[n[0]] + n[1:]: x for n, x in hidden.state_dict().items()}
    arrays |= {f"out.{n}": x for n, x in nn.Linear(units, 2).state_dict().items()}
    arrays |= {f"linear.{n}": x for n, x in nn.Linear(3, 2).state_dict().items()}
    line = {"weight": torch.ones(1, 2), "bias": torch.ones(1)}
    return {**arrays, **line, "scale": torch.ones(()), "counter": torch.ones(())}


class Everything(nn.Module):
    """The arrays of all models here, of a width."""

    def __init__(self, width):
        super().__init__()
        for name, x in of_width(width).items():
            module, _, last = name.rpartition(".")
            if module and not hasattr(self, module):
                self.add_module(module, nn.Module())
            owner = getattr(self, module) if module else self
            if x.is_floating_point() and "running" not in name:
                owner.register_parameter(last, nn.Parameter(x.detach().clone()))
            else:
                owner.register_buffer(last, x)


def squares(model, batch):
    """Return a loss that knows all parameters of any model."""
    return batch["x"] * sum((p - 0.3).square().sum() for p in model.parameters())


def everything(config):
    return Everything(config["width"])


class Sizes(PublicStatistics):
    """Moving means of the squares of a model, which is released, of any names."""

    def second_moments(self, sent, before):
        now = {n: np.square(x.astype(float)) for n, x in sent.items()}
        now = {n: x for n, x in now.items() if is_parameter(n, sent[n])}
        return {n: 0.5 * (before.get(n, x) + x) for n, x in now.items()}


EVERYTHING = Task(everything, everything, squares)


def mostly_wide(client):
    """Return the width of a client, for rows of two widths."""
    return 0.5 if client == 1 else 1.0


METHODS = {
    "FedAvg": Method(make=AdditiveStrategy, fedavg={}),
    "FedAdam": Method(
        make=lambda **options: AdditiveStrategy(
            **{"server_optimizer": Adam(0.01), **options}
        ),
        fedavg={},
    ),
    "FedAvg-encoded": Method(
        make=lambda **options: AdditiveStrategy(**options),
        options={
            "download": BFloat16(),
            "upload": ErrorFeedback(Chain(TopK(0.25), NF4())),
        },
        others=({"download": TopK(0.5, "tensor"), "upload": NF4()},),
        fedavg={"download": Exact(), "upload": TopK(1.0)},
    ),
    "FedFish": Method(
        make=FedFish,
        half=FedFishClient,
        others=(
            {"estimator": "all-epochs", "damping": 0.0, "barrier": True},
            {"estimator": "per-example", "damping": math.inf},
            {"estimator": "sampled"},
        ),
        fedavg={"damping": math.inf},
        private=({}, {"normalization": "client"}),
    ),
    "FedCurv": Method(
        make=FedCurv,
        half=FedCurvClient,
        others=({"estimator": "per-example"},),
        fedavg={"strength": 0.0},
    ),
    "FLASC": Method(
        make=FLASC,
        half=FLASCClient,
        options={"download_density": 0.5, "upload_density": 0.25},
        others=(
            {"download_density": 1, "upload_density": 1},
            {"client_freeze": True, "fixed_mask_after": 1, "aggregation": "senders"},
            {"tiers": (Tier(0.5), Tier(1.0, 0.5)), "scope": "tensor"},
            {"dense": ("weight",), "upload_dense": ()},
            {"precision": "bfloat16"},
            {
                "tiers": (Tier(upload_density=1.0), Tier()),
                "precision": "bfloat16",
                "error_feedback": True,
            },
        ),
        has_codecs=True,
        fedavg={"download_density": 1, "upload_density": 1},
        refuses=(({"aggregation": "senders"}, "'cohort' with a mechanism"),),
    ),
    "MaxFL": Method(
        make=MaxFL,
        half=MaxFLClient,
        options={"warmup_steps": 3},
        others=({"requirement": 0.5, "temperature": 2.0},),
        fedavg={"temperature": 1e-9, "epsilon": 0.0},
    ),
    "BoundedGroupLoss": Method(
        make=BoundedGroupLoss,
        half=BoundedGroupLossClient,
        options={"groups": ["a", "b"], "upper_bound": 0.3},
        others=(
            {
                "labels": ["0", "1"],
                "upper_bound": 0.5,
                "group_counts": [1, 2, 3, 4],
                "server_optimizer": SGD(0.5),
            },
        ),
        fedavg={"dual_bound": 0.0},
        refuses=(({"certificate_radius": 1.0}, "what is noised certifies nothing"),),
    ),
    "DPFTRL": Method(
        make=DPFTRL,
        options={
            **PLAN,
            "noise_multiplier": 0.0,
            "clipping": 1e9,
            "unprotected_metrics": True,
        },
        others=(
            PLAN,
            {**PLAN, "restart_every": 2},
            {**PLAN, "factorization": "identity", "clipping": AdaptiveClipping(0.5)},
        ),
        fedavg={},
        takes_plan=True,
        refuses=(({"mechanism": Mechanism(**PLAN)}, "mechanism"),),
    ),
    "DiLoCo": Method(
        make=DiLoCo,
        half=DiLoCoClient,
        others=({"server_optimizer": SGD(), "upload": ErrorFeedback(EDEN(2))},),
        fedavg={},
        refuses=(({"fragments": 2}, "fragments=2 must be 1 under a mechanism"),),
    ),
    "DiLoCo-fragments": Method(
        make=DiLoCo,
        half=DiLoCoClient,
        options={"fragments": 2},
        private=(),
        refuses=(({}, "fragments=2 must be 1 under a mechanism"),),
    ),
    "Ditto": Method(
        make=Ditto,
        half=DittoClient,
        options={"strength": 0.5},
        others=({"strength": 0.0, "personal_epochs": 2},),
        fedavg={},  # whatever its options are: what differs is personal
    ),
    "FineTuned": Method(
        make=FineTuned,
        half=FineTunedClient,
        others=({"tuning_epochs": 2}, {"tuning_steps": 1}),
        fedavg={},
    ),
    "HeteroFL": Method(
        make=HeteroFL,
        half=HeteroFLClient,
        options={"model": of_width, "widths": (1.0, 0.5), "width_of": mostly_wide},
        others=({"widths": (0.75, 0.25), "width_of": None},),
        fedavg={"widths": (1.0,), "width_of": None},
    ),
    "HypCluster": Method(
        make=HypCluster,
        half=HypClusterClient,
        options={"num_clusters": 2},
        fedavg={"num_clusters": 1},
        start=apart,
    ),
    "Ensemble": Method(
        make=Ensemble,
        half=EnsembleClient,
        options={"num_models": 2},
        fedavg={"num_models": 1},
        start=apart,
    ),
    "KNNPer": Method(
        make=KNNPer,
        half=KNNPerClient,
        options={"num_neighbours": 3},
        others=({"weight": 0.5, "scale": 0.1},),
        fedavg={},  # whatever its options are: what differs is the evaluation
    ),
    "LocalOnly": Method(
        make=LocalOnly,
        half=LocalOnlyClient,
        private=(),
        refuses=(({}, "nothing is sent"),),
        moves=False,
    ),
    "StackedLoRA": Method(
        make=adapted.StackedLoRA,
        half=adapted.StackedLoRAClient,
        options={"lora_alpha": adapted.ALPHA},
        others=({"ranks": (1, 2), "seed": 1, "upload": NF4()},),
        start=adapted.start,
        private=(),
        refuses=(({}, "mechanism=.* must be left out: the exact sum"),),
    ),
    "FlexLoRA": Method(
        make=adapted.FlexLoRA,
        half=adapted.FlexLoRAClient,
        options={"lora_alpha": adapted.ALPHA},
        others=({"ranks": (1, 2), "download": BFloat16()},),
        start=adapted.start,
        private=(),
        refuses=(({}, "mechanism=.* must be left out: the exact sum"),),
    ),
    "FedExLoRA": Method(
        make=adapted.FedExLoRA,
        half=adapted.FedExLoRAClient,
        options={"lora_alpha": adapted.ALPHA},
        others=({"upload": ErrorFeedback(Chain(TopK(0.5), NF4()))},),
        start=adapted.start,
        private=(),
        refuses=(({}, "mechanism=.* must be left out: the residual"),),
    ),
    "FedPer": Method(make=FedPer, half=FedPerClient, options={"personal": "*bias"}),
    "MRMTL": Method(
        make=MRMTL,
        half=MRMTLClient,
        options={"strength": 2.0},
        others=({"strength": 0.0, "weights": "equal"}, {"strength": math.inf}),
        fedavg={"strength": math.inf},
        private=({}, {"weights": "equal"}),
        sends_kept=True,
    ),
    "FedRep": Method(
        make=FedRep,
        half=FedRepClient,
        options={"personal": "*bias", "head_epochs": 2},
        others=({"head_epochs": 0},),
    ),
    "FedBN": Method(make=FedBN, half=FedBNClient, options={"model": OffsetNorm()}),
    "FedBABU": Method(
        make=FedBABU,
        half=FedBABUClient,
        options={"personal": "*bias", "tuning_epochs": 1},
        others=({"tunes": "head"}, {"tuning_epochs": 0}),
    ),
    "FedConv": Method(
        make=FedConv,
        half=FedConvClient,
        options={
            "task": EVERYTHING,
            "public": {"x": torch.ones(12)},
            "widths": (1.0, 0.5),
            "width_of": mostly_wide,
            "server_steps": 2,
        },
        others=({"widths": (0.75, 0.25), "width_of": None},),
        fedavg={"widths": (1.0,), "width_of": None},
    ),
    "AdaDPS": Method(
        make=AdaDPS,
        options={"public_statistics": Sizes(), "tau": 0.5},
        others=({"public_statistics": PublicMoments({}), "tau": 1.0},),
        fedavg={"public_statistics": PublicMoments({})},
    ),
    "DP2": Method(
        make=DP2,
        options={"plain_rounds": 1, "adaptive_rounds": 2, "adaptive_rate": 0.1},
        others=({"moments": "adagrad", "plain_rounds": 2, "tau": 1.0},),
        fedavg={"plain_rounds": 3},
    ),
    "FedDyn": Method(make=FedDyn, half=FedDynClient),
    "FederatedRankLearning": Method(
        make=FederatedRankLearning,
        half=FederatedRankLearningClient,
        others=({"density": 0.2, "seed": 1, "download": Permutation()},),
        has_codecs=True,
        private=(),
        refuses=(({}, "mechanism=.* must be left out: noise that hides one"),),
    ),
    "FedNova": Method(
        make=FedNova,
        half=FedNovaClient,
        fedavg={},
        others=({"effective_work": 2.0},),
        private=({"effective_work": 2.0},),
        refuses=(({}, "effective_work=None must be given with a mechanism"),),
    ),
    "FedProx": Method(make=FedProx, half=FedProxClient, fedavg={"proximal_mu": 0.0}),
    "PublicRepresentations": Method(
        make=OnAnyEncoder,
        half=PublicRepresentationsClient,
        options={"head": "*weight"},
        fedavg={"head": "*"},
    ),
    "Scaffold": Method(make=Scaffold, half=ScaffoldClient, others=({"option": "I"},)),
    "AgnosticFL": Method(
        make=AgnosticFL,
        half=AgnosticFLClient,
        options={"weight_learning_rate": 0.5},
        others=({"average_iterates": False},),
        fedavg={"weight_learning_rate": 0.0},
        private=(),
        refuses=(({}, "left out: a weight for each client is about that client"),),
    ),
    "FedMGDA": Method(
        make=FedMGDA,
        others=({"max_deviation": 0.1, "normalize": True},),
        fedavg={"max_deviation": 0.0},
        private=(),
        refuses=(({}, "mechanism"),),
    ),
    "MosT": Method(
        make=MosT,
        half=MosTClient,
        options={"num_models": 2, "warmup_rounds": 1},
        others=(
            {"marginals": "scheduled", "warmup_rounds": 0},
            {"num_models": 1, "max_deviation": 0.5},
        ),
        fedavg={"num_models": 1, "max_deviation": 0.0},
        private=(),
        refuses=(({}, "mechanism"),),
        start=apart,
    ),
    "TERM": Method(
        make=TERM,
        half=TERMClient,
        options={"client_tilt": 2.0},
        others=(
            {"example_tilt": -1.0},
            {"client_tilt": 0.0, "example_tilt": 3.0},
            {"client_tilt": -900.0},
        ),
        fedavg={"client_tilt": 0.0},
        private=({"loss_cap": 0.5}, {"client_tilt": 0.0, "example_tilt": 1.0}),
        refuses=(({}, "loss_cap=None must be given with a mechanism"),),
    ),
}
# The columns' parameters: rows, rows with each of their options, private variants.
ROWS = pytest.mark.parametrize("row", METHODS.values(), ids=METHODS)
LIMITS = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name)
        for name, row in METHODS.items()
        if row.fedavg is not None
    ],
)
SETTINGS = pytest.mark.parametrize(
    ("row", "options"),
    [
        pytest.param(row, options, id=f"{name}-{i}")
        for name, row in METHODS.items()
        for i, options in enumerate(({}, *row.others))
    ],
)
PRIVATE = pytest.mark.parametrize(
    ("row", "options"),
    [
        pytest.param(row, options, id=f"{name}-{i}")
        for name, row in METHODS.items()
        for i, options in enumerate(row.private)
    ],
)
HALVES = {row.half for row in METHODS.values()} - {None}


# The contract -----------------------------------------------------------------------


@SETTINGS
def test_conformance(row, options):
    strategy = row.plain(**options)
    report = check_strategy(
        lambda: row.plain(**options), initial=lambda model: row.start(model, strategy)
    )
    assert report.limitations == {}


@PRIVATE
def test_conformance_under_a_mechanism(row, options):
    strategy = row.under({}, **options)
    report = check_strategy(
        lambda: row.under({}, **options),
        initial=lambda model: row.start(model, strategy),
    )
    assert report.limitations == {}


@ROWS
def test_what_cannot_be_private_is_refused(row):
    assert row.private or row.refuses, "a method without a mechanism says so"
    for options, words in row.refuses:
        with pytest.raises((ValueError, TypeError), match=words):
            row.under({}, **options)


# Whole runs, on any grid ------------------------------------------------------------

ROUNDS = 3  # of half of the clients: some are asked again
CLIENTS = 6
CONFIG = {"batch-size": 8, "lr": 0.1}


@pytest.fixture(scope="module")
def app(task):
    """Six clients that train the small net, of 12 examples and more, in two groups."""
    return client_app(with_groups(task, task.data), *HALVES)


@pytest.fixture(scope="module")
def asked_before(app):
    """The same clients, for columns about the server: what is known is not trained."""
    return Remembering(app)


@pytest.fixture(scope="module")
def equal_app(task):
    """The same clients with 16 examples each."""

    def data(context):
        train, test = task.data(context)
        first = {
            name: column.repeat((2,) + (1,) * (column.ndim - 1))[:16]
            for name, column in train.items()
        }
        return first, test

    return client_app(with_groups(task, data), *HALVES)


def with_groups(task: Task, data) -> Task:
    """Put a column of groups beside the others, unlike the labels."""

    def grouped(context):
        return [{**c, "group": (c["x"][:, 2] > 0).long()} for c in data(context)]

    return dataclasses.replace(task, data=grouped)


def run_of(row, private, **options):
    """Return what makes the strategy for a run of half of the six clients."""
    if not private:
        if row.takes_plan:
            return lambda: row.plain(population_size=CLIENTS, **options)
        return lambda: row.plain(fraction_train=0.5, **options)
    plan = {"population_size": CLIENTS, "unprotected_metrics": True, "clipping": 0.02}
    sampler = {} if row.takes_plan else {"sampler": MinSeparationSampler(2)}
    if row.takes_plan:
        return lambda: row.under({**plan, "min_separation": 2}, **options)
    return lambda: row.under(plan, **row.private[0], **sampler, **options)


PLAIN_AND_PRIVATE = pytest.mark.parametrize(
    ("row", "private"),
    [
        pytest.param(row, private, id=name + "-private" * private)
        for name, row in METHODS.items()
        for private in [False, True][: 1 + bool(row.private)]
    ],
)


def require_same(row, found, expected, initial, **tolerance):
    """Require two results to be equal, and to be of rounds that moved the models."""
    assert list(found.arrays) == list(expected.arrays)
    for key, array in expected.arrays.items():
        if tolerance:
            np.testing.assert_allclose(
                found.arrays[key].numpy(), array.numpy(), **tolerance
            )
        else:
            assert found.arrays[key].data == array.data
    for field_name in ("train_metrics_clientapp", "evaluate_metrics_clientapp"):
        ours, theirs = getattr(found, field_name), getattr(expected, field_name)
        assert list(ours) == list(theirs) == list(range(1, ROUNDS + 1))
        for number, metrics in theirs.items():
            if tolerance:
                close = pytest.approx(dict(metrics), rel=tolerance["rtol"])
                assert dict(ours[number]) == close
            else:
                assert ours[number] == metrics
    moved = any(
        x.data != expected.arrays[k].data
        for k, x in row.initial(initial, row.plain()).items()
    )
    assert moved == row.moves
    if not moved:
        measured = expected.evaluate_metrics_clientapp.values()
        assert len({metrics["loss"] for metrics in measured}) == ROUNDS


@pytest.fixture(scope="module")
def plain_run(asked_before, initial, tmp_path_factory):
    """Run a method in process, once for all columns; return its result and traffic."""
    known = {}

    def run(make, row, private):
        key = id(row), private
        if key not in known:
            folder = tmp_path_factory.mktemp("plain")
            strategy = make()
            result = strategy.start(
                LocalGrid(asked_before, CLIENTS, CONFIG),
                row.initial(initial, strategy),
                num_rounds=ROUNDS,
                tracker=Tracker(folder, tensorboard=False),
            )
            known[key] = result, traffic(folder)
        return known[key]

    return run


def traffic(folder):
    """Return bytes and parameters of every round."""
    rows = [
        {k: x for k, x in row.items() if "bytes" in k or "parameters" in k}
        for row in read_metrics(folder)
    ]
    assert all(rows)
    return rows


@PLAIN_AND_PRIVATE
def test_packed_clients_give_the_same_bit_for_bit(
    row, private, app, asked_before, initial, plain_run
):
    make = run_of(row, private)
    expected, _ = plain_run(make, row, private)
    # A mechanism is the server's: its clients train in packs in the plain row.
    clients = asked_before if private else app
    inner = LocalGrid(ClientApp(), 1)
    options = {"num_clients": CLIENTS, "client_app": clients, "run_config": CONFIG}
    with PackedGrid(inner, **options) as grid:
        strategy = make()
        found = strategy.start(grid, row.initial(initial, strategy), num_rounds=ROUNDS)
    require_same(row, found, expected, initial)


@PLAIN_AND_PRIVATE
def test_partial_sums_give_the_same(
    row, private, app, asked_before, initial, plain_run, tmp_path
):
    make = run_of(row, private)
    expected, its_traffic = plain_run(make, row, private)
    strategy = make()
    found = strategy.start(
        AddingGrid(asked_before, CLIENTS, CONFIG),
        row.initial(initial, strategy),
        num_rounds=ROUNDS,
        tracker=Tracker(tmp_path, tensorboard=False),
    )
    require_same(row, found, expected, initial, rtol=1e-6, atol=1e-8)
    assert traffic(tmp_path) == its_traffic
    if private:
        return
    # Clients that train anew hold their arrays, of which no bytes are made.
    strategy = make()
    grid = AddingGrid(app, CLIENTS, CONFIG)
    start = row.initial(initial, strategy)
    held = strategy.start(grid, start, num_rounds=ROUNDS)
    require_same(row, held, found, initial)


@pytest.fixture(scope="module")
def stacked_app(task):
    """The clients of `app`, trained together."""
    data = with_groups(task, task.data)
    return client_app(data, *HALVES, trainer=Stacked(at_once=3))


@ROWS
def test_stacked_clients_give_the_same(
    row, stacked_app, initial, plain_run, monkeypatch
):
    make = run_of(row, False)
    expected, _ = plain_run(make, row, False)
    steps = Counter()

    def counted(owner, name):
        take = getattr(owner, name)

        def step(self, **options):
            take(self, **options)  # not counted where it fails
            steps[name] += len(getattr(self, "members", [self]))

        monkeypatch.setattr(owner, name, step)

    counted(stacked._Stack, "step")
    counted(stacked._Member, "step_alone")
    strategy = make()
    grid = LocalGrid(stacked_app, CLIENTS, CONFIG)
    start = row.initial(initial, strategy)
    found = strategy.start(grid, start, num_rounds=ROUNDS)
    require_same(row, found, expected, initial, rtol=1e-4, atol=1e-6)
    assert steps["step"] > steps["step_alone"]


@PLAIN_AND_PRIVATE
def test_codecs_that_lose_nothing_change_nothing(row, private, app, initial, plain_run):
    if row.has_codecs:
        with pytest.raises(ValueError, match="left out"):
            row.plain(upload=Exact())
        return
    if "upload" in row.options:  # a row that is about what is lost
        return
    expected, _ = plain_run(run_of(row, private), row, private)
    upload = Chain(TopK(1.0), Exact())
    if row.plain().server_optimizer.keeps_coordinates:  # of which something is left
        upload = ErrorFeedback(upload)
    codecs = (
        {"upload": Exact(), "download": TopK(1.0)}
        if private
        else {"upload": upload, "download": Exact()}
    )
    strategy = run_of(row, private, **codecs)()
    grid = LocalGrid(app, CLIENTS, CONFIG)
    found = strategy.start(grid, row.initial(initial, strategy), num_rounds=ROUNDS)
    require_same(row, found, expected, initial)


@PLAIN_AND_PRIVATE
def test_a_run_resumed_after_every_round_is_the_same_bit_for_bit(
    row, private, asked_before, initial, plain_run, tmp_path
):
    make = run_of(row, private)
    expected, _ = plain_run(make, row, private)
    for rounds in range(1, ROUNDS + 1):
        # All is new, the clients too: what they keep is in the checkpoint.
        grid = LocalGrid(asked_before, CLIENTS, CONFIG)
        strategy = make()
        start = row.initial(initial, strategy)
        found = strategy.start(grid, start, num_rounds=rounds, checkpoint=tmp_path)
    require_same(row, found, expected, initial)


# Asynchronous runs ------------------------------------------------------------------

# Why a method has none.
IN_ROUNDS = {
    "FedMGDA": "no sum",
    "MosT": "no sum",
    "AgnosticFL": "about the one model of a round",
    "BoundedGroupLoss": "about the one model of a round",
    "DPFTRL": "a mechanism accounts for cohorts",
    "DiLoCo-fragments": "each round exchanges one fragment",
    "Ensemble": "each round trains one of the models",
    "FedConv": "made by maps that change every round",
    "FedCurv": "the last sum, that of one round",
    "FedDyn": "the sum of all moves",
    "FedExLoRA": "it is no sum over clients",
    "FederatedRankLearning": "a vote is on the ranking of its round",
    "FlexLoRA": "it is no sum over clients",
    "MRMTL": "the mean of clients' own models, as they all are now",
    "Scaffold": "the mean of the clients' only while all their changes count alike",
    "StackedLoRA": "it is no sum over clients",
}
AT_ANY_TIME = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name)
        for name, row in METHODS.items()
        if name not in IN_ROUNDS
    ],
)


@pytest.mark.parametrize("name", IN_ROUNDS)
def test_what_needs_rounds_is_refused(name, asked_before, initial):
    row = METHODS[name]
    strategy, grid = row.plain(), LocalGrid(asked_before, CLIENTS, CONFIG)
    start = row.initial(initial, strategy)
    kind = type(strategy).__name__
    with pytest.raises(ValueError, match=f"left out with {kind}: .*{IN_ROUNDS[name]}"):
        strategy.start(grid, start, asynchronous=Asynchronous(2, 3))


@AT_ANY_TIME
def test_equal_times_are_the_synchronous_run_bit_for_bit(
    row, asked_before, initial, plain_run
):
    expected, _ = plain_run(run_of(row, False), row, False)
    strategy, grid = row.plain(), LocalGrid(asked_before, CLIENTS, CONFIG)
    start = row.initial(initial, strategy)
    how = Asynchronous(CLIENTS // 2, CLIENTS // 2, clock=VirtualClock())
    found = strategy.start(grid, start, ROUNDS, asynchronous=how)
    own = {"staleness-mean", "staleness-max", "virtual-seconds"}
    for number, metrics in found.train_metrics_clientapp.items():
        assert metrics["virtual-seconds"] == number and not metrics["staleness-max"]
        kept = {key: x for key, x in metrics.items() if key not in own}
        found.train_metrics_clientapp[number] = MetricRecord(kept)
    require_same(row, found, expected, initial)


@AT_ANY_TIME
def test_an_asynchronous_run_resumed_is_the_same_bit_for_bit(
    row, app, initial, tmp_path
):
    # Four clients are at work, the last of them over two updates.
    how = Asynchronous(
        2, 4, clock=VirtualClock(lambda client, task: [1.0, 1.5, 2.0, 3.5][client])
    )

    def run(rounds, **options):
        strategy, grid = row.plain(), LocalGrid(app, 4, CONFIG)
        start = row.initial(initial, strategy)
        return strategy.start(grid, start, rounds, asynchronous=how, **options)

    expected = run(ROUNDS)
    run(2, checkpoint=tmp_path)
    require_same(row, run(ROUNDS, checkpoint=tmp_path), expected, initial)
    stale = expected.train_metrics_clientapp[ROUNDS]["staleness-max"]
    assert stale == 1


@pytest.fixture(scope="module")
def trained(equal_app, initial):
    """Train with a strategy in three rounds, of three clients of one size."""

    def run(make, start=lambda model, _: model, **options):
        optimizer = SGD(0.5, momentum=0.9)
        strategy = make(server_optimizer=optimizer, fraction_evaluate=0.0, **options)
        begin = to_record(start(from_record(initial), strategy))
        grid = LocalGrid(equal_app, 3, CONFIG)
        result = strategy.start(grid, begin, num_rounds=3)
        assert result.train_metrics_clientapp[3]["num-errors"] == 0
        return from_record(result.arrays)

    return run


@pytest.fixture(scope="module")
def average(trained):
    """Return FedAvg's model."""
    return trained(AdditiveStrategy)


@LIMITS
def test_a_limit_is_fedavg(row, trained, average):
    limit = trained(row.plain, row.start, **row.fedavg)
    average = row.start(average, row.plain(**row.fedavg))
    # Under a mechanism, also one without noise, counters stay as they are.
    floats = {name: x for name, x in average.items() if x.dtype.kind == "f"}
    for name, x in floats.items():
        np.testing.assert_allclose(limit[name], x, rtol=1e-5, atol=1e-7)
    if row.fedavg:
        usual = trained(row.plain, row.start)
        assert max(np.abs(usual[name] - x).max() for name, x in floats.items()) > 1e-6


# Personal state ---------------------------------------------------------------------

PERSONAL_ROWS = pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=name)
        for name, row in METHODS.items()
        if isinstance(row.plain(), PersonalStrategy)
    ],
)


class TappedGrid(LocalGrid):
    """Keeps the contents of all messages, both ways."""

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        replies = list(super().send_and_receive(messages, timeout=timeout))
        self.seen = [*getattr(self, "seen", []), *messages, *replies]
        return replies


def large(state):
    """Return the personal arrays of real numbers, and the bytes of their values."""
    found = {}
    for key, record in state.array_records.items():
        if key.startswith(PERSONAL):
            for name, x in from_record(record).items():
                if x.dtype.kind == "f" and x.size > 1:
                    found[key, name] = x.tobytes()
    return found


@PERSONAL_ROWS
def test_personal_state_never_travels(row, app, initial):
    """Neither what clients have kept nor what they keep next is in any message."""
    grid = TappedGrid(app, 3, CONFIG)
    row.plain().start(grid, row.initial(initial, row.plain()), num_rounds=1)
    rng = np.random.default_rng(0)
    secrets = {}
    for client in range(3):
        state = grid.states.read(client)
        if not row.half.keeps:
            assert not large(state)
        # What they have kept is replaced by what nobody else can have.
        for key, name in large(state):
            x = from_record(state[key])[name]
            noise = rng.normal(x, 0.01).astype(x.dtype)
            secrets[client, key, name] = noise.tobytes()
            state[key][name] = type(state[key][name])(noise)
        grid.states.write(client, state)
    grid.seen = []
    row.plain().start(grid, row.initial(initial, row.plain()), num_rounds=1)
    after = {
        (c, *k): x for c in range(3) for k, x in large(grid.states.read(c)).items()
    }
    assert bool(secrets) == bool(after) == row.half.keeps
    sent = [
        array.data
        for message in grid.seen
        for record in message.content.array_records.values()
        for array in record.values()
    ]
    assert len(grid.seen) == 12 and sent
    for key, secret in (*secrets.items(), *([] if row.sends_kept else after.items())):
        assert not any(secret in data for data in sent), key


@PERSONAL_ROWS
def test_who_never_trained_is_evaluated(row, app, initial):
    grid = TappedGrid(app, 3, CONFIG)
    start = row.initial(initial, row.plain())
    result = row.plain(fraction_train=0.0).start(grid, start, num_rounds=1)
    replies = grid.seen[-3:]
    assert all(reply.has_content() for reply in replies)
    metrics = result.evaluate_metrics_clientapp[1]
    assert math.isfinite(metrics["loss-unseen"]) and metrics["accuracy-unseen"] >= 0
    assert "loss-seen" not in metrics
    # An evaluation changes nothing.
    assert not any(large(grid.states.read(client)) for client in range(3))


# Under a mechanism ------------------------------------------------------------------

LINE = {"weight": np.zeros((1, 2), np.float32), "bias": np.zeros(1, np.float32)}


@pytest.fixture
def line(linear_task):
    """Make three clients of a line with ten examples each, and a column of groups."""
    rng = np.random.default_rng(0)
    data = [
        {
            "x": rng.standard_normal((10, 2)) + i,
            "y": rng.standard_normal(10) + i,
            "group": rng.integers(0, 2, 10),
        }
        for i in range(3)
    ]
    app = client_app(linear_task(data, 2, bias=True), *HALVES)
    return partial(LocalGrid, app, 3, {"lr": 0.05, "batch-size": 5})


@PRIVATE
def test_no_noise_and_no_clip_is_the_method_for_clients_of_one_size(row, options, line):
    models = []
    for make in (
        partial(row.under, {"noise_multiplier": 0, "clipping": math.inf}),
        row.plain,
    ):
        strategy = make(
            server_optimizer=SGD(0.8, momentum=0.9), fraction_evaluate=0.0, **options
        )
        start = row.initial(to_record(LINE), strategy)
        result = strategy.start(line(), start, num_rounds=3)
        models.append(from_record(result.arrays))
    private, plain = models
    for name, x in plain.items():
        np.testing.assert_allclose(private[name], x, rtol=1e-6)
    assert any(np.any(x != row.start(LINE, strategy)[n]) for n, x in plain.items())


def total_of(row, strategy, grid, change=list):
    """Run a round; return what the strategy was given to make a direction of."""
    kept = []
    update = strategy.update

    def spy(total, *more):
        arrays = {
            part: {name: x.copy() for name, x in arrays.items()}
            for part, arrays in total.arrays.items()
        }
        weight = {"weight": total.weight} if strategy.declares_weight else {}
        weight |= {WEIGHT_OF + part: x for part, x in total.weights.items()}
        kept.append(Contribution(arrays, scalars={**total.scalars, **weight}))
        return update(total, *more)

    strategy.update = spy
    start = row.initial(to_record(LINE), strategy)
    messages = strategy.configure_train(1, start, ConfigRecord(), grid)
    replies = sorted(
        grid.send_and_receive(messages), key=lambda m: m.metadata.src_node_id
    )
    strategy.aggregate_train(1, change(replies))
    return kept[0]


def distance(left, right, scales):
    """Return the norm of the difference, as it is scaled for clipping."""
    squares = 0.0
    for part, arrays in left.arrays.items():
        for name, x in arrays.items():
            assert not isinstance(x, Lazy)
            gap = np.linalg.norm(x - right.arrays[part][name])
            squares += (scales.get(part, 1.0) * gap) ** 2
    for name, x in left.scalars.items():
        gap = np.linalg.norm(x - right.scalars[name])
        squares += (scales.get(name, 1.0) * gap) ** 2
    return math.sqrt(squares)


@PRIVATE
@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_adjacent_inputs_are_within_the_norm(row, options, line, factor):
    """One client there or not, honest or with everything times a million."""

    def without(replies):
        return replies[1:]

    def enlarged(replies):
        for record in replies[0].content.array_records.values():
            for name, array in record.items():
                if array.dtype.startswith("float"):  # not FLASC's payload of bytes
                    record[name] = type(array)(array.numpy() * np.float32(factor))
        for record in replies[0].content.metric_records.values():
            for name in ("group-loss-sums", "num-examples"):
                if name in record:
                    value = record[name]
                    record[name] = (
                        [v * factor for v in value]
                        if isinstance(value, list)
                        else float(value * factor)
                    )
        return replies

    bound = 0.01
    # Without noise, below which no weight of several is taken to be.
    plan = {"clipping": bound, "noise_multiplier": 0.0}
    totals = [
        total_of(row, row.under(plan, **options), line(), change)
        for change in (without, enlarged)
    ]
    found = distance(*totals, dict(row.under(plan, **options).scales))
    assert 0 < found <= bound * (1 + 1e-6)
    # Clients that train really move by more than this norm.
    assert found == pytest.approx(bound, rel=1e-3)


@PRIVATE
def test_noise_reaches_every_coordinate(row, options, line):
    quiet, loud = (
        total_of(
            row,
            row.under({"noise_multiplier": z, "clipping": 0.05}, **options),
            line(),
        )
        for z in (0.0, 0.5)
    )
    for part, arrays in quiet.arrays.items():
        for name, x in arrays.items():
            assert np.all(loud.arrays[part][name] != x), (part, name)
    for name, x in quiet.scalars.items():
        assert np.all(loud.scalars[name] != x), name


@PRIVATE
def test_a_noisy_run_stays_finite(row, options, line):
    strategy = row.under({"noise_multiplier": 20.0}, fraction_evaluate=0.0, **options)
    start = row.initial(to_record(LINE), strategy)
    result = strategy.start(line(), start, num_rounds=4)
    assert all(np.isfinite(x).all() for x in from_record(result.arrays).values())
    assert len(result.train_metrics_clientapp) == 4


# Replies tampered with --------------------------------------------------------------


@ROWS
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_no_reply_ends_a_run_or_spoils_the_model(row, asked_before, initial):
    # Every row draws tampered replies of its own.
    name = next(name for name, other in METHODS.items() if other is row)
    evaluated = {}

    def honest(message, context):
        # What an evaluation finds is nothing to a server: it is asked for once.
        client = context.node_config["partition-id"]
        if message.metadata.message_type == "train":
            return asked_before(message, context)
        if client not in evaluated:
            evaluated[client] = asked_before(message, context).content
        return Message(evaluated[client], reply_to=message)

    @seed(zlib.crc32(name.encode()))
    @settings(max_examples=12, deadline=None, database=None)
    @given(data=st.data())
    def stays_whole(data):
        run_tampered_with(row, honest, initial, data.draw)

    stays_whole()


def run_tampered_with(row, honest, initial, draw):
    """Run two rounds in which two of three clients do not say what they found."""

    def answer(message, context):
        reply = honest(message, context)
        if context.node_config["partition-id"] > 0:
            return Message(tamper(reply.content, draw), reply_to=message)
        return reply

    app = ClientApp()
    app.train()(answer)
    app.evaluate()(answer)
    grid = LocalGrid(app, 3, {"batch-size": 20, "lr": 0.1})
    strategy = row.under({}) if row.takes_plan else row.plain()
    start = row.initial(initial, strategy)
    result = strategy.start(grid, start, num_rounds=2)
    first, last = from_record(start), from_record(result.arrays)
    assert {k: (x.shape, x.dtype) for k, x in last.items()} == {
        k: (x.shape, x.dtype) for k, x in first.items()
    }
    assert all(np.isfinite(x).all() for x in last.values())
    moved = any(not np.array_equal(x, last[k]) for k, x in first.items())
    assert moved == row.moves
