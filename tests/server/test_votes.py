"""Votes on codecs: each client's is the best for it, their sum chooses, and is kept."""

from functools import partial

import numpy as np
import pytest
import torch
from flwr.app import Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import nn

from flower_ext import DPSGD, AdditiveStrategy, CodecVote, LocalGrid, client_app
from flower_ext.client.encoding import encoded
from flower_ext.client.task import Task
from flower_ext.core.arrays import from_record, to_record
from flower_ext.privacy import Mechanism, SiloPrivacy
from flower_ext.server.finished import FinishedRound, RunInfo
from flower_ext.simulation import Asynchronous, LogNormal, VirtualClock
from flower_ext.wire import (
    NF4,
    Chain,
    Described,
    ErrorFeedback,
    Exact,
    Sending,
    TopK,
    UniversalCode,
    Voted,
)
from flower_ext.wire.codec import PAYLOAD
from flower_ext.wire.messages import UPLOAD_KEY
from flower_ext.wire.registry import describe
from flower_ext.wire.vote import VOTE, best_option

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
CONFIG = {"batch-size": 4, "lr": 0.1}
STEPS = (0.25, 0.5, 1.0, 2.0, 5.0)
OPTIONS = tuple(UniversalCode(step) for step in STEPS)


def laplace(size=200_000, seed=0):
    return {"w": np.random.default_rng(seed).laplace(size=size).astype(np.float32)}


class Listening(LocalGrid):
    """Notes which codec the clients are told in each round."""

    def __init__(self, *args):
        super().__init__(*args)
        self.told = []

    def send_and_receive(self, messages, **kwargs):
        messages = list(messages)
        found = {message.content["config"].get(UPLOAD_KEY) for message in messages}
        self.told += [text for text in found if text]
        return super().send_and_receive(messages, **kwargs)


# One client's vote --------------------------------------------------------------------


@pytest.mark.parametrize("tradeoff", [0, 0.005, 0.02, 0.04, 0.08, 0.15, 0.3, 0.6, 3])
def test_the_best_step_is_that_of_the_measured_rates(tradeoff):
    """Of values with a Laplace distribution, as another coder has measured them."""
    bits = np.array([4.69, 3.43, 2.37, 1.41, 0.315])
    errors = np.array([0.0052, 0.0205, 0.0788, 0.269, 0.789])
    expected = int(np.argmin(errors + tradeoff * bits))
    for scale in (1e-6, 1, 1e6):  # the error is relative
        x = {name: np.float32(scale) * x for name, x in laplace().items()}
        assert best_option(OPTIONS, tradeoff, x) == expected


def test_published_tradeoffs_choose_their_steps():
    """The released table of the paper's code."""
    published = {0.25: 8.09e-3, 0.5: 0.0343, 1.0: 0.124, 2.0: 0.396, 5.0: 2.61}
    for step, tradeoff in published.items():
        assert STEPS[best_option(OPTIONS, tradeoff, laplace())] == step


def test_options_may_be_any_codecs():
    x = laplace(1000) | {"steps": np.array(7)}
    options = [TopK(1 / 64), NF4(), Exact(), Chain(TopK(0.25), NF4())]
    errors, bits = [], []
    for option in options:
        record = option.encode(x)
        left = (option.decode(record, x)["w"] - x["w"]).astype(np.float64)
        errors.append((left**2).sum() / (x["w"].astype(np.float64) ** 2).sum())
        bits.append(8 * len(record[PAYLOAD].data) / 1001)
    for tradeoff in (0, 1e-4, 0.01, 0.05, 1):
        expected = np.argmin(np.array(errors) + tradeoff * np.array(bits))
        assert best_option(options, tradeoff, x) == expected


@pytest.mark.parametrize(
    "x",
    [
        {},
        {"w": np.zeros(9, np.float32)},
        {"w": np.float32([1, np.nan])},
        {"w": np.float32([1, np.inf])},
        {"n": np.array([3, 4])},
    ],
)
def test_who_has_nothing_to_measure_abstains(x):
    assert best_option(OPTIONS, 0.1, x) is None
    votes = Voted(*OPTIONS, tradeoff=0.1).votes(x, Sending())
    assert votes == {VOTE + str(i): 0.0 for i in range(5)}


@pytest.mark.parametrize("around", [lambda x: x, ErrorFeedback, Described])
def test_what_travels_is_the_option_whatever_is_voted(around):
    options = [UniversalCode(step, rounding="stochastic") for step in STEPS]
    codec = around(Voted(*options, tradeoff=0.124, chosen=3))
    sending = Sending(np.random.default_rng(4))
    best = best_option(options, 0.124, laplace(500), sending)
    votes = codec.votes(laplace(500), sending)
    assert votes == {VOTE + str(i): float(i == best) for i in range(5)}
    found = codec.encode(laplace(500), sending)[PAYLOAD].data
    alone = options[3].encode(laplace(500), Sending(np.random.default_rng(4)))
    assert found == alone[PAYLOAD].data


# The count ----------------------------------------------------------------------------


def counted(vote, *shares, **metrics):
    metrics |= {VOTE + str(i): x for i, x in enumerate(shares)}
    vote.round(FinishedRound(1, train=MetricRecord(metrics)))
    return vote.option


def test_the_option_of_most_votes_is_the_next():
    vote = CodecVote(*OPTIONS[:3], tradeoff=0.1, first=1)
    assert vote(1) == 1
    assert counted(vote, 0.2, 0.3, 0.5) == vote(2) == 2
    assert counted(vote, 0.4, 0.2, 0.4) == 0  # the first of equally many
    assert counted(vote, 0.0, 0.0, 0.1) == 2
    assert counted(vote, 0.0, 0.0, 0.0) == 2  # all abstain
    assert counted(vote, 0.9, float("nan"), 0.1) == 2
    assert counted(vote, **{"num-replies": 0}) == 2  # nobody replied
    assert vote.codec.at(7) == Voted(*OPTIONS[:3], tradeoff=0.1, chosen=2)


def test_a_saved_vote_goes_on_and_a_new_run_starts_anew():
    vote, other = (CodecVote(*OPTIONS, tradeoff=0.1, first=1) for _ in range(2))
    counted(vote, 0, 0, 0, 1, 0)
    other.load_state_dict(vote.state_dict())
    other.begin(RunInfo(5, done=1, restored=True))
    assert other(2) == 3
    other.begin(RunInfo(5))
    assert other(1) == 1


def test_replies_without_votes_leave_the_codec_and_are_told_once(caplog):
    vote = CodecVote(*OPTIONS, tradeoff=0.1, first=2)
    for _ in range(3):
        counted(vote, **{"num-replies": 3, "train-loss": 0.5})
    assert vote(1) == 2
    assert caplog.text.count("upload=vote.codec") == 1


# In a run -----------------------------------------------------------------------------


def play(task, initial, vote, rounds=3, *, wrap=lambda codec: codec, folder=None):
    grid = Listening(client_app(task), 4, CONFIG)
    strategy = AdditiveStrategy(upload=wrap(vote.codec), fraction_evaluate=0.0, **ANY)
    result = strategy.start(grid, initial, rounds, callbacks=[vote], checkpoint=folder)
    return grid.told, result


def test_one_reply_without_votes_does_not_end_a_run(task, initial):
    def silent(message, context, call_next):
        reply = call_next(message, context)
        if context.node_config["partition-id"] == 0:
            metrics = reply.content["metrics"]
            for key in [key for key in metrics if key.startswith("codec-vote")]:
                del metrics[key]
        return reply

    vote = CodecVote(UniversalCode(1), UniversalCode(0.01), tradeoff=0)
    grid = LocalGrid(client_app(task, mods=[silent]), 4, CONFIG)
    strategy = AdditiveStrategy(upload=vote.codec, fraction_evaluate=0.0, **ANY)
    result = strategy.start(grid, initial, 2, callbacks=[vote])
    assert result.train_metrics_clientapp[2]["num-replies"] == 4
    assert vote.option == 0  # with the fourth vote it would be the finer one


@pytest.mark.parametrize("wrap", [lambda codec: codec, ErrorFeedback])
def test_clients_are_told_the_option_of_their_votes(task, initial, wrap):
    for tradeoff, best in ((0, 1), (10, 2)):
        options = [UniversalCode(step) for step in (1, 0.01, 20)]
        vote = CodecVote(*options, tradeoff=tradeoff)
        told, result = play(task, initial, vote, wrap=wrap)
        expected = [0, best, best]
        assert told == [
            describe(wrap(Voted(*options, tradeoff=tradeoff, chosen=i)))
            for i in expected
        ]
        for metrics in result.train_metrics_clientapp.values():
            assert metrics[f"{VOTE}{best}"] == 1 and metrics["num-dropped"] == 0


def test_votes_weigh_by_examples():
    """A client of three examples outvotes two of one each."""
    app = ClientApp(mods=[encoded()])
    # Many alike values are best in one step, few that differ as they are.
    changes = np.ones((2, 1000), np.float32)
    changes[1, 1:10], changes[1, 10:] = 0.4, 0

    @app.train()
    def train(message, context):
        client = context.node_config["partition-id"]
        x = changes[min(client, 1)]
        start = message.content["arrays"]["w"].numpy()
        metrics = MetricRecord({"num-examples": 1 if client else 3})
        content = {"arrays": to_record({"w": start + x}), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    options = (TopK(0.01), UniversalCode(1.0, "max"))
    vote = CodecVote(*options, tradeoff=0.3)
    strategy = AdditiveStrategy(upload=vote.codec, fraction_evaluate=0.0, **ANY)
    grid = LocalGrid(app, 3)
    start = to_record({"w": np.zeros(1000, np.float32)})
    result = strategy.start(grid, start, 1, callbacks=[vote])
    metrics = result.train_metrics_clientapp[1]
    assert metrics[f"{VOTE}1"] == pytest.approx(0.6)
    assert metrics[f"{VOTE}0"] == pytest.approx(0.4)
    assert vote.option == 1


def test_a_resumed_run_goes_on_with_the_option_of_its_votes(task, initial, tmp_path):
    def vote():
        return CodecVote(TopK(0.5), NF4(), UniversalCode(0.01), tradeoff=0)

    whole, expected = play(task, initial, vote())
    assert whole[0] != whole[1]
    play(task, initial, vote(), 1, folder=tmp_path)
    told, result = play(task, initial, vote(), 3, folder=tmp_path)
    assert told == whole[1:]
    for name, x in from_record(expected.arrays).items():
        assert x.tobytes() == from_record(result.arrays)[name].tobytes()


def test_clients_that_train_at_any_time_vote_and_are_read_as_they_were_told(
    task, initial
):
    """Options of other stages: a late reply is of the option before."""
    vote = CodecVote(TopK(0.5), UniversalCode(0.01), NF4(), tradeoff=0)
    grid = Listening(client_app(task), 4, CONFIG)
    strategy = AdditiveStrategy(upload=vote.codec, fraction_evaluate=0.0, **ANY)
    how = Asynchronous(2, 4, clock=VirtualClock(LogNormal()))
    result = strategy.start(grid, initial, 4, callbacks=[vote], asynchronous=how)
    assert vote.option == 1 and len(set(grid.told)) == 2
    for metrics in result.train_metrics_clientapp.values():
        assert (metrics["num-replies"], metrics["num-dropped"]) == (2, 0)


def test_under_a_mechanism_that_withholds_metrics_there_is_no_vote(task, initial):
    plan = {
        "clipping": 1.0,
        "num_rounds": 2,
        "num_sampled_clients": 2,
        "population_size": 4,
        "noise_multiplier": 1.0,
        "target_delta": 0.01,
    }
    for own, refused in (({}, True), ({"unprotected_metrics": True}, False)):
        vote = CodecVote(UniversalCode(1), UniversalCode(0.01), tradeoff=0)
        strategy = AdditiveStrategy(
            upload=vote.codec,
            mechanism=Mechanism(**plan, **own),
            fraction_evaluate=0.0,
            min_available_nodes=0,
        )
        grid = LocalGrid(client_app(task), 4, CONFIG)
        begin = partial(strategy.start, grid, initial, 1, callbacks=[vote])
        if refused:
            with pytest.raises(ValueError, match="withholds metrics"):
                begin()
        else:
            begin()
            assert vote.option == 1


def test_silos_of_dp_sgd_vote_on_what_is_private(task):
    made = Task(lambda config: nn.Linear(3, 2), task.data, task.loss)
    torch.manual_seed(0)
    start = to_record({n: x.numpy() for n, x in nn.Linear(3, 2).state_dict().items()})
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-2, clipping_norm=1.0, seed=1)
    app = client_app(made, trainer=DPSGD(privacy))
    vote = CodecVote(UniversalCode(3), UniversalCode(0.01), tradeoff=0)
    strategy = AdditiveStrategy(upload=vote.codec, fraction_evaluate=0.0, **ANY)
    strategy.start(LocalGrid(app, 2, CONFIG), start, 1, callbacks=[vote])
    assert vote.option == 1


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (partial(CodecVote, tradeoff=0.1), "options="),
        (partial(CodecVote, 0.5, tradeoff=0.1), "options="),
        (partial(CodecVote, UniversalCode, tradeoff=0.1), "options="),
        (partial(CodecVote, ErrorFeedback(NF4()), tradeoff=0.1), "around the vote"),
        (partial(CodecVote, NF4(), tradeoff=-1), "tradeoff=-1"),
        (partial(CodecVote, NF4(), tradeoff=np.nan), "tradeoff=nan"),
        (partial(CodecVote, NF4(), tradeoff=0.1, first=1), "chosen=1"),
        (partial(CodecVote, NF4(), tradeoff=0.1, first=-1), "first=-1"),
        (partial(best_option, [], 0.1, {}), "options="),
    ],
)
def test_votes_that_cannot_be_held(make, match):
    with pytest.raises(ValueError, match=match):
        make()
