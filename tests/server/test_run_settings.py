"""Settings that a continued run must share with the saved one: none is left out."""

import inspect

import pytest
from flwr.app import MetricRecord

from flower_ext.core.sampling import UniformSampler
from flower_ext.server.additive import AdditiveStrategy
from flower_ext.server.optimizers import SGD
from flower_ext.server.options import AdditiveOptions
from flower_ext.server.run_settings import settings_of
from flower_ext.strategies import FLASC, BoundedGroupLoss, FedFish, MaxFL
from flower_ext.wire import NF4


def other_aggregate(contents, weighted_by_key):
    return MetricRecord()


REQUIRED = {BoundedGroupLoss: {"groups": ["a", "b"], "upper_bound": 0.5}}
SHARED = {
    "fraction_train": 0.5,
    "fraction_evaluate": 0.5,
    "min_train_nodes": 3,
    "min_evaluate_nodes": 3,
    "min_available_nodes": 3,
    "weighted_by_key": "n",
    "arrayrecord_key": "model",
    "configrecord_key": "cfg",
    "train_metrics_aggr_fn": other_aggregate,
    "evaluate_metrics_aggr_fn": other_aggregate,
    "server_optimizer": SGD(0.3),
    "sampler": UniformSampler(7),
    "min_replies": 2,
    "download": NF4(),
    "upload": NF4(),
}
OWN = {
    FedFish: {
        "damping": 0.7,
        "estimator": "all-epochs",
        "normalization": "client",
        "barrier": True,
    },
    MaxFL: {
        "temperature": 0.3,
        "epsilon": 0.1,
        "warmup_steps": 7,
        "requirement": 0.4,
        "warmup_rounds": 3,
        "opt_out_from": 2,
    },
    BoundedGroupLoss: {
        "groups": ["a", "c"],
        "upper_bound": 0.4,
        "overlapping": True,
        "labels": ["0", "1"],
        "dual_bound": 2.0,
        "dual_learning_rate": 0.1,
        "group_counts": [3, 4],
        "average_iterates": False,
        "multiplier_bound": 2.0,
        "loss_bound": 7.0,
        "certificate_radius": 3.0,
    },
    FLASC: {
        "download_density": 0.5,
        "upload_density": 0.5,
        "scope": "tensor",
        "client_freeze": True,
        "fixed_mask_after": 1,
        "aggregation": "senders",
        "precision": "bfloat16",
        "error_feedback": True,
        "eval_masked": False,
        "dense": ("bias",),
        "upload_dense": (),
        "ranks": "pair",
        "describe_arrays": True,
    },
}
CASES = [
    (cls, name, value)
    for cls in (AdditiveStrategy, *OWN)
    for name, value in {**SHARED, **OWN.get(cls, {})}.items()
    if cls is not FLASC or name not in {"download", "upload"}  # it has its own
]


@pytest.mark.parametrize(("cls", "name", "value"), CASES)
def test_every_option_of_every_strategy_is_among_the_settings(cls, name, value):
    given = REQUIRED.get(cls, {})
    plain = settings_of(cls(**given), {})
    assert plain == settings_of(cls(**given), {})
    assert settings_of(cls(**{**given, name: value}), {}) != plain


def test_the_table_above_has_every_plain_option():
    named = set(AdditiveOptions.__annotations__) - {"mechanism"}
    assert set(SHARED) == named
    for cls, options in OWN.items():
        own = set(inspect.signature(cls).parameters) - {"flowers", "options"}
        assert own - {"tiers", "tier_of"} <= set(options), cls
