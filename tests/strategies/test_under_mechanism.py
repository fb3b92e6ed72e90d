"""Every strategy under a mechanism: the same guarantee, and its own limits kept."""

import math

import numpy as np
import pytest
from flwr.app import ConfigRecord

from flower_ext import AdditiveStrategy, client_app
from flower_ext.core.arrays import Lazy, from_record, to_record
from flower_ext.core.contribution import Contribution
from flower_ext.privacy import Mechanism
from flower_ext.server.optimizers import SGD
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import (
    FLASC,
    BoundedGroupLoss,
    BoundedGroupLossClient,
    FedFish,
    FedFishClient,
    FLASCClient,
    MaxFL,
    MaxFLClient,
)
from flower_ext.testing import check_strategy

GROUPS = {"groups": ["a", "b"], "upper_bound": 0.3}
KINDS = {
    "fedavg": (AdditiveStrategy, {}),
    "fedfish": (FedFish, {}),
    "normalized fedfish": (FedFish, {"normalization": "client"}),
    "flasc": (FLASC, {"upload_density": 0.5, "download_density": 0.5}),
    "maxfl": (MaxFL, {}),
    "bounded group loss": (BoundedGroupLoss, GROUPS),
}
every = pytest.mark.parametrize(("kind", "options"), KINDS.values(), ids=KINDS)


def plan(**changes):
    usual = {
        "num_rounds": 4,
        "num_sampled_clients": 3,
        "population_size": 3,
        "noise_multiplier": 0.5,
        "target_delta": 1e-2,
        "factorization": "tree",
        "seed": 3,
    }
    return Mechanism(**{**usual, **changes})


@every
def test_conformance(kind, options):
    check_strategy(lambda: kind(mechanism=plan(), **options))


@pytest.fixture
def grid(linear_task):
    """Three clients of a line, with a column of groups."""
    rng = np.random.default_rng(0)
    data = [
        {
            "x": rng.standard_normal((10, 2)) + i,
            "y": rng.standard_normal(10) + i,
            "group": rng.integers(0, 2, 10),
        }
        for i in range(3)
    ]
    app = client_app(
        linear_task(data, 2),
        FedFishClient,
        FLASCClient,
        MaxFLClient,
        BoundedGroupLossClient,
    )
    return LocalGrid(app, 3, {"lr": 0.05, "batch-size": 5, "maxfl-warmup-steps": 3})


INITIAL = {"weight": np.zeros((1, 2), np.float32)}


@every
def test_no_noise_and_no_clip_is_the_strategy_with_equal_clients(kind, options, grid):
    """All clients have ten examples: FedAvg's weights are equal, too."""

    def models(**mechanism):
        strategy = kind(
            server_optimizer=SGD(0.8, momentum=0.9),
            fraction_evaluate=0.0,
            **mechanism,
            **options,
        )
        result = strategy.start(grid, to_record(INITIAL), num_rounds=3)
        return from_record(result.arrays)["weight"], result

    private, _ = models(mechanism=plan(noise_multiplier=0, clipping=math.inf))
    plain, _ = models()
    np.testing.assert_allclose(private, plain, rtol=1e-6)
    assert np.any(plain != 0)


class Recorder:
    """Keeps what a strategy was given to make a direction of."""

    def __init__(self, kind, options, **mechanism):
        self.total = None
        recorder = self

        class Spy(kind):
            def update(self, total):
                recorder.total = Contribution(
                    {
                        part: {name: x.copy() for name, x in arrays.items()}
                        for part, arrays in total.arrays.items()
                    },
                    scalars=dict(total.scalars),
                )
                return super().update(total)

        self.strategy = Spy(mechanism=plan(**mechanism), **options)

    def round_of(self, grid, change):
        messages = self.strategy.configure_train(
            1, to_record(INITIAL), ConfigRecord(), grid
        )
        replies = sorted(
            grid.send_and_receive(messages), key=lambda m: m.metadata.src_node_id
        )
        self.strategy.aggregate_train(1, change(replies))
        return self.total


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


@every
@pytest.mark.parametrize("factor", [1.0, 1e6])
def test_adjacent_inputs_are_within_the_norm(kind, options, grid, factor):
    """One client there or not, honest or with everything times a million."""

    def without(replies):
        return replies[1:]

    def tampered(replies):
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
    totals = [
        Recorder(kind, options, clipping=bound).round_of(grid, change)
        for change in (without, tampered)
    ]
    found = distance(*totals, dict(kind.scales))
    assert 0 < found <= bound * (1 + 1e-6)
    # Clients that train really move by more than this norm.
    assert found == pytest.approx(bound, rel=1e-3)


@every
def test_noise_reaches_every_coordinate(kind, options, grid):
    quiet, loud = (
        Recorder(kind, options, noise_multiplier=z, clipping=0.05).round_of(
            grid, lambda replies: replies
        )
        for z in (0.0, 0.5)
    )
    for part, arrays in quiet.arrays.items():
        for name, x in arrays.items():
            assert np.all(loud.arrays[part][name] != x), (part, name)
    for name, x in quiet.scalars.items():
        assert np.all(loud.scalars[name] != x), name


@every
def test_a_noisy_run_stays_finite(kind, options, grid):
    strategy = kind(
        mechanism=plan(noise_multiplier=20.0), fraction_evaluate=0.0, **options
    )
    result = strategy.start(grid, to_record(INITIAL), num_rounds=4)
    assert np.all(np.isfinite(from_record(result.arrays)["weight"]))
    assert len(result.train_metrics_clientapp) == 4
