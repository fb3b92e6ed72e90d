"""Amplification counts on secret cohorts: nothing that leaves a run depends on them."""

import copy
import json
import logging
import pickle
import re
import secrets
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from flower_ext import AdditiveStrategy
from flower_ext._flower import log
from flower_ext.core.arrays import from_record, to_record
from flower_ext.core.sampling import (
    BallsInBinsSampler,
    CyclicPoissonSampler,
    MinSeparationSampler,
    PoissonSampler,
    UniformSampler,
)
from flower_ext.privacy import BandedToeplitz, Mechanism, PrivateSum
from flower_ext.runs.report import main as report
from flower_ext.server.tracking import Tracker
from flower_ext.simulation.local import LocalGrid
from flower_ext.strategies import (
    FLASC,
    MRMTL,
    DiLoCo,
    FedCurv,
    FedDyn,
    FedPer,
    MaxFL,
    Scaffold,
)
from flower_ext.wire import ErrorFeedback, TopK, ValueCode

ROUNDS, CLIENTS = 6, 12
MODEL = {"w": np.zeros(3, np.float32)}
BANDS = BandedToeplitz(ROUNDS, [1.0, 0.5])
SECRET = 2**127 + 987654321
SAMPLERS = {
    "poisson": (lambda *seed: PoissonSampler(*seed, probability=0.5), {}),
    "uniform": (UniformSampler, {}),
    "cyclic": (
        lambda *seed: CyclicPoissonSampler(1.0, 2, *seed),
        {"factorization": BANDS},
    ),
    "bins": (lambda *seed: BallsInBinsSampler(2, *seed), {}),
}
amplified = pytest.mark.parametrize("kind", SAMPLERS)


def plan(**changes):
    usual = {
        "num_rounds": ROUNDS,
        "num_sampled_clients": 6,
        "population_size": CLIENTS,
        "noise_multiplier": 2.0,
        "target_delta": 1e-3,
        "factorization": "identity",
        "amplified": True,
    }
    return Mechanism(**{**usual, **changes})


def strategy_with(kind, *seed, same=False, **changes):
    make, needs = SAMPLERS[kind]
    sampler = make(*seed)
    sampler.same_for_evaluation = same
    return AdditiveStrategy(mechanism=plan(**needs, **changes), sampler=sampler)


class Noting(LocalGrid):
    """Notes who is asked, and logs it, as a grid does of clients that fail."""

    def __init__(self, app):
        super().__init__(app, CLIENTS)
        self.asked = []

    def send_and_receive(self, messages, *, timeout=None):
        messages = list(messages)
        self.asked.append(tuple(m.metadata.dst_node_id for m in messages))
        log(logging.WARNING, "clients %s are slow", self.asked[-1])
        return super().send_and_receive(messages, timeout=timeout)


@pytest.fixture
def grid():
    """Twelve clients that send nothing new, or fail, or cannot be read."""
    app = ClientApp()

    @app.train()
    def train(message, context):
        number = context.node_config["partition-id"]
        if number % 3 == 0:
            raise RuntimeError("left")
        metrics = MetricRecord({"num-examples": float(number), "loss": 0.25 * number})
        arrays = from_record(message.content["arrays"])
        if number % 3 == 1:
            arrays = {"other": np.zeros(1)}
        content = RecordDict({"arrays": to_record(arrays), "metrics": metrics})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate(message, context):
        raise RuntimeError("asked in vain")

    return Noting(app)


def start(strategy, grid, rounds=ROUNDS, **options):
    return strategy.start(grid, to_record(MODEL), num_rounds=rounds, **options)


# What leaves the run --------------------------------------------------------------


def everything(kind, grid, folder, cohorts, caplog, monkeypatch):
    """Run with these cohorts; return all that leaves it, without clock and versions."""
    strategy = strategy_with(kind, SECRET, seed=7)
    drawn = iter(cohorts)
    monkeypatch.setattr(
        type(strategy.sampler), "sample", lambda self, clients, *_: next(drawn)
    )
    monkeypatch.setattr(PrivateSum, "require_cohort", lambda self, drawn: None)
    caplog.clear()
    result = start(strategy, grid, tracker=Tracker(folder, tensorboard=False))
    report([str(folder)])
    about = json.loads((folder / "run.json").read_text())
    page = (folder / "report.html").read_text()
    return {
        "metrics": dict(result.train_metrics_clientapp),
        "evaluation": dict(result.evaluate_metrics_clientapp),
        "model": from_record(result.arrays)["w"].tolist(),
        "rows": (folder / "metrics.jsonl").read_text(),
        "settings": about["settings"],
        "page": re.sub(r"\d+ \w+ \d{4}|\d\d:\d\d(:\d\d)?", "", page),
        "log": [record.getMessage() for record in caplog.records],
    }


@amplified
def test_all_that_leaves_is_the_same_whoever_is_in_the_cohorts(
    kind, grid, tmp_path, caplog, monkeypatch
):
    """Clients move nothing here, so that what differs would be of the cohorts."""
    caplog.set_level(logging.DEBUG, "flwr")
    nodes = [1000 + i for i in range(CLIENTS)]
    cohorts = {
        "some": [nodes[2 : 2 + r] for r in range(ROUNDS)],
        "all": [nodes[: CLIENTS - r] for r in range(ROUNDS)],
    }
    left = {}
    for name, drawn in cohorts.items():
        folder = tmp_path / name / "run"
        grid.asked.clear()
        left[name] = everything(kind, grid, folder, drawn, caplog, monkeypatch)
        assert [list(asked) for asked in grid.asked if asked] == [c for c in drawn if c]
    for what, found in left["some"].items():
        assert found == left["all"][what], what
    assert left["some"]["rows"] and left["some"]["log"]


@dataclass(frozen=True)
class Dithered(ValueCode):
    """Draws in encoding: rounds up or down."""

    tag = b"dd"

    @classmethod
    def length(cls, count, dtype):
        return 4 * count

    def encode_values(self, values, generator):
        return np.floor(values + generator.random(values.shape)).astype("f4").tobytes()

    @classmethod
    def decode_values(cls, data, count, dtype):
        return np.frombuffer(data, np.float32).astype(dtype)


class Telling(AdditiveStrategy):
    """Every hook tells what it is told; each client has a kind of its own."""

    def variant(self, client, round):
        return client

    def download_codec(self, variant, round):
        return Dithered()

    def tell(self, round):
        return {"cohort": len(round.cohort)}

    def report(self, total, round):
        return {"cohort": len(round.cohort)}


def told(sampler, nodes, grid):
    """Return what the fifth client is sent, what is reported, what a worker has."""
    strategy = Telling(mechanism=plan(), sampler=sampler)
    sampler = strategy.private_sum.sampler
    sampler.sample = lambda clients, *_: nodes
    model = to_record({"w": np.linspace(-1, 1, 100, dtype=np.float32)})
    messages = list(strategy.configure_train(1, model, ConfigRecord(), grid))
    [mine] = [m.content for m in messages if m.metadata.dst_node_id == nodes[-1]]
    _, metrics = strategy.aggregate_train(1, [])
    sent = mine["arrays"]["<binary>"].data
    return sent, mine["config"]["cohort"], metrics["cohort"], strategy.summand()


def test_no_hook_client_or_worker_is_told_of_the_cohort(grid):
    ids = list(grid.get_node_ids())
    alone, others = (
        told(PoissonSampler(probability=0.5), nodes, grid)
        for nodes in ([ids[5]], [*ids[:4], ids[5]])
    )
    assert alone[:3] == others[:3]
    assert alone[1:3] == (0, 0)
    assert (
        dict(alone[3].places)
        == dict(others[3].places)
        == {node: place for place, node in enumerate(ids)}
    )


@amplified
def test_no_weight_in_a_reply_ends_a_run(kind, grid):
    """Elsewhere it does, since the strategy has not said that it weighs."""

    class Weighs(AdditiveStrategy):
        def contribution(self, reply, round):
            return replace(super().contribution(reply, round), weight=2.0)

    make, needs = SAMPLERS[kind]
    result = start(Weighs(mechanism=plan(**needs), sampler=make()), grid, 3)
    assert sorted(result.train_metrics_clientapp) == [1, 2, 3]


@amplified
@pytest.mark.parametrize("strategy", [AdditiveStrategy, FLASC])
def test_error_feedback_needs_others_that_do_not_know_of_a_client(kind, strategy, grid):
    """Who is in a cohort of fixed size because another is not tells of it for long."""
    make, needs = SAMPLERS[kind]
    feedback = (
        {"error_feedback": True}
        if strategy is FLASC
        else {"upload": ErrorFeedback(TopK(0.5))}
    )
    made = strategy(mechanism=plan(**needs), sampler=make(), **feedback)
    if kind == "uniform":
        with pytest.raises(ValueError, match="error feedback=.* must be left out"):
            start(made, grid, 1)
        assert not grid.asked
    else:
        start(made, grid, 1)


@amplified
@pytest.mark.parametrize(
    "make_strategy",
    [
        DiLoCo,
        FedCurv,
        FedDyn,
        partial(FedPer, personal=("w",)),
        MaxFL,
        MRMTL,
        Scaffold,
    ],
)
def test_neither_may_what_clients_keep_tell_who_was_not_there(kind, make_strategy):
    make, needs = SAMPLERS[kind]
    options = {"mechanism": plan(**needs), "sampler": make()}
    if kind == "uniform":
        with pytest.raises(
            ValueError, match="a client half that keeps=.* must be left"
        ):
            make_strategy(**options)
    else:
        make_strategy(**options)


def test_without_amplification_it_is_counted_and_said(grid, tmp_path, caplog):
    caplog.set_level(logging.INFO, "flwr")
    strategy = AdditiveStrategy(
        mechanism=plan(amplified=False), sampler=PoissonSampler(3, probability=0.5)
    )
    result = start(strategy, grid, 1, tracker=Tracker(tmp_path, tensorboard=False))
    assert result.train_metrics_clientapp[1]["num-errors"] > 0
    assert "messages/down" in (tmp_path / "metrics.jsonl").read_text()
    assert "reply(s) dropped" in caplog.text and "are slow" in caplog.text


def test_a_simulated_cohort_is_no_secret(grid):
    """Epsilon is the planned cohort's; of those that are drawn nothing is claimed."""
    strategy = AdditiveStrategy(
        mechanism=plan(
            simulated_cohort=3, population_size=1200, num_sampled_clients=600
        ),
        sampler=PoissonSampler(5, probability=0.5),
    )
    result = start(strategy, grid, 1)
    assert result.train_metrics_clientapp[1]["num-replies"] <= 3


def test_averages_over_secret_cohorts_are_refused():
    with pytest.raises(ValueError, match="unprotected_metrics=True must be False with"):
        plan(unprotected_metrics=True)


# Seeds ----------------------------------------------------------------------------


@amplified
@pytest.mark.parametrize("noise_seed", [None, 5, SECRET])
@pytest.mark.parametrize("seed", [0, 918273, 2**64, 2**96 - 1])
def test_a_seed_that_can_be_found_is_refused(kind, noise_seed, seed):
    with pytest.raises(ValueError, match="left out with amplified=True"):
        strategy_with(kind, seed, seed=noise_seed)


@amplified
def test_the_seed_comes_from_the_operating_system(kind, grid, monkeypatch):
    asked = []
    monkeypatch.setattr(
        secrets, "randbits", lambda bits: asked.append(bits) or SECRET + len(asked)
    )
    one, other = strategy_with(kind), strategy_with(kind)
    start(one, grid, 2)
    start(other, grid, 2)
    assert asked == [128, 128]
    assert (one.sampler.seed, other.sampler.seed) == (SECRET + 1, SECRET + 2)


@pytest.mark.parametrize("kind", ["poisson", "uniform", "bins"])
def test_two_runs_draw_other_cohorts(kind, grid):
    make, needs = SAMPLERS[kind]
    shared = make()
    drawn = []
    for _ in range(2):
        strategy = AdditiveStrategy(mechanism=plan(**needs), sampler=shared)
        grid.asked.clear()
        start(strategy, grid)
        drawn.append([asked for asked in grid.asked if asked])
        assert strategy.sampler is not shared and shared.seed == 0
        assert strategy.sampler.seed.bit_length() > 96
    assert drawn[0] != drawn[1]


@amplified
def test_a_seed_that_is_given_is_for_one_run(kind):
    make, needs = SAMPLERS[kind]
    sampler = make(SECRET)
    first = AdditiveStrategy(mechanism=plan(**needs), sampler=sampler)
    with pytest.raises(ValueError, match="another one, or left out, for a second"):
        AdditiveStrategy(mechanism=plan(**needs), sampler=sampler)
    for copied in (copy.deepcopy, pickle.dumps):
        for one in (first, strategy_with(kind, seed=SECRET)):
            with pytest.raises(ValueError, match="secret seed cannot be copied"):
                copied(one)


def test_copies_that_have_not_begun_draw_other_cohorts(grid):
    first = strategy_with("poisson")
    drawn = []
    for one in (first, copy.deepcopy(first), pickle.loads(pickle.dumps(first))):
        grid.asked.clear()
        start(one, grid)
        drawn.append(tuple(grid.asked))
    assert len(set(drawn)) == 3


@amplified
def test_a_resumed_run_goes_on_with_the_secret_seed(kind, grid, tmp_path):
    first = strategy_with(kind)
    start(first, grid, 3, checkpoint=tmp_path)
    second = strategy_with(kind)
    start(second, grid, 4, checkpoint=tmp_path)
    assert second.sampler.seed == first.sampler.seed
    with pytest.raises(Exception, match="another secret seed"):
        start(strategy_with(kind, SECRET), grid, 5, checkpoint=tmp_path)


@amplified
@pytest.mark.parametrize("given", [(), (SECRET,)])
def test_the_seed_is_nowhere_but_in_the_checkpoint(kind, given, grid, tmp_path, caplog):
    caplog.set_level(logging.DEBUG)
    strategy = strategy_with(kind, *given)
    tracker = Tracker(tmp_path / "run", tensorboard=False)
    start(strategy, grid, 2, tracker=tracker, checkpoint=tmp_path / "saved")
    report([str(tmp_path / "run")])
    seed = str(strategy.sampler.seed)
    texts = [path.read_text() for path in (tmp_path / "run").iterdir()]
    strategy.summary()
    for text in (*texts, caplog.text, str(strategy.settings())):
        assert seed not in text
    assert seed in (tmp_path / "saved" / "round-00002" / "state.json").read_text()
    with pytest.raises(ValueError, match="needs the same sampler") as caught:
        strategy.sampler.load_state_dict(MinSeparationSampler(2).state_dict())
    assert seed not in str(caught.value)


def test_a_sampler_of_ones_own_is_not_taken_for_the_one_it_extends():
    class Half(PoissonSampler):
        def sample(self, clients, size, server_round, purpose):
            return list(clients)[::2]

    with pytest.raises(ValueError, match="says how it draws, not Half"):
        AdditiveStrategy(mechanism=plan(), sampler=Half(probability=0.5))


def test_noise_of_a_seed_that_can_be_found_is_said_to_protect_nothing():
    weak, strong, none = (
        str(AdditiveStrategy(mechanism=plan(amplified=False, seed=seed)).settings())
        for seed in (7, SECRET, None)
    )
    assert "none against whoever tries seeds" in weak
    assert "tries seeds" not in strong + none


# Evaluation -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["poisson", "uniform"])
def test_evaluation_of_the_same_clients_finds_those_that_trained(kind, grid, caplog):
    """Where a strategy of one's own reads evaluations, cohorts follow the release."""

    class Own(AdditiveStrategy):
        def aggregate_evaluate(self, server_round, replies):
            return None

    make, needs = SAMPLERS[kind]
    sampler = make()
    sampler.same_for_evaluation = True
    strategy = Own(mechanism=plan(**needs), sampler=sampler, fraction_evaluate=0.5)
    for _ in range(3):
        start(strategy, grid, 2)
    pairs = list(zip(grid.asked[::2], grid.asked[1::2], strict=True))
    assert len(pairs) == 6
    assert all(trained == evaluated for trained, evaluated in pairs)
    assert "are slow" not in caplog.text
