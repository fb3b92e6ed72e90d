"""Codecs of any strategy: what is lost, what is kept, and what is refused."""

import dataclasses
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from rounded import Rounded
from torch import nn

from flower_ext import (
    DPSGD,
    AdditiveStrategy,
    ClientHalf,
    Contribution,
    Payload,
    RoundStrategy,
    Tracker,
    client_app,
)
from flower_ext.client.encoding import encoded, upload
from flower_ext.client.task import Task
from flower_ext.core.arrays import from_record, norm, to_record
from flower_ext.core.protocol import Reply, Round
from flower_ext.core.replies import MalformedReply
from flower_ext.core.schedules import Decay
from flower_ext.privacy import Mechanism, SiloPrivacy
from flower_ext.server.rounds import EveryClientFailed
from flower_ext.server.tracking import read_metrics
from flower_ext.simulation import LocalGrid, PackedGrid, packed
from flower_ext.strategies import FLASC, FLASCClient
from flower_ext.wire import (
    NF4,
    AnyOf,
    BFloat16,
    Chain,
    Described,
    ErrorFeedback,
    Exact,
    FixedMask,
    TopK,
)
from flower_ext.wire.codec import PAYLOAD, is_encoded, num_values
from flower_ext.wire.messages import UPLOAD_KEY, Uploads, change_like
from flower_ext.wire.registry import decode, describe

ANY = {"min_train_nodes": 0, "min_evaluate_nodes": 0, "min_available_nodes": 0}
CONFIG = {"batch-size": 4, "lr": 0.1}


def run(task, initial, grid=None, rounds=3, codecs=(), folder=None, **options):
    """Return the final arrays, and the rows of the tracker if there is a folder."""
    app = client_app(task, codecs=codecs)
    tracker = Tracker(folder, tensorboard=False) if folder else None
    result = AdditiveStrategy(**ANY, **options).start(
        grid or LocalGrid(app, 4, CONFIG), initial, num_rounds=rounds, tracker=tracker
    )
    arrays = from_record(result.arrays)
    return (arrays, list(read_metrics(folder))) if folder else arrays


def same(left, right):
    return all(x.tobytes() == right[name].tobytes() for name, x in left.items())


# What is lost -----------------------------------------------------------------------


def test_what_travels_is_counted_as_it_is_encoded(task, initial, tmp_path):
    weights = from_record(initial)
    size = sum(x.size for x in weights.values())
    codec = Chain(TopK(0.25, dense=()), NF4())
    _, rows = run(task, initial, download=BFloat16(), upload=codec, folder=tmp_path)
    down = BFloat16().encode(weights)
    row = rows[-1]
    # Four clients train, and four evaluate.
    assert row["parameters/down"] == 8 * size
    assert row["encoded-bytes/down"] == 8 * down[PAYLOAD].shape[0]
    integers = sum(x.size for x in weights.values() if x.dtype.kind == "i")
    kept = int(0.25 * (size - integers)) + integers
    assert row["parameters/up"] == 4 * kept
    assert row["bytes/up"] > row["encoded-bytes/up"] > 4 * kept / 2


def test_a_client_counts_its_change_from_what_it_received(task, initial):
    """However coarse the download: sent is the model, received what was decoded."""
    grid = LocalGrid(client_app(task), 2, CONFIG)
    strategy = AdditiveStrategy(download=NF4(), upload=Exact(), **ANY)
    messages = list(strategy.configure_train(1, initial, ConfigRecord(), grid))
    sent = messages[0].content["arrays"]
    received = NF4().decode(sent, from_record(initial))
    plain = AdditiveStrategy(**ANY)
    same_start = list(
        plain.configure_train(1, to_record(received), ConfigRecord(), grid)
    )
    for coarse, exact in zip(
        grid.send_and_receive(messages), grid.send_and_receive(same_start), strict=True
    ):
        trained = from_record(exact.content["arrays"])
        change = Exact().decode(coarse.content["arrays"], change_like(received))
        for name, x in change.items():
            wide = trained[name].astype(x.dtype) - received[name].astype(x.dtype)
            assert np.array_equal(x, wide), name


@pytest.mark.parametrize(
    "codecs",
    [
        {"download": BFloat16(), "upload": ErrorFeedback(Chain(TopK(0.3), NF4()))},
        {"download": TopK(0.5, "tensor"), "upload": NF4()},
        {"upload": Chain(TopK(Decay(0.5, 0.5)), Rounded())},
        {"download": Rounded(), "upload": ErrorFeedback(Rounded(0.1))},
    ],
)
def test_packs_and_partial_sums_change_nothing(task, initial, codecs):
    runs = []
    app = client_app(task, codecs=[Rounded])
    with PackedGrid(
        LocalGrid(ClientApp(), 1), num_clients=4, client_app=app, run_config=CONFIG
    ) as packed:
        for grid in (LocalGrid(app, 4, CONFIG), packed):
            runs.append(run(task, initial, grid, **codecs))
    assert same(*runs)
    assert not same(runs[0], from_record(initial))
    assert not same(runs[0], run(task, initial))


def test_draws_of_the_server_are_of_seed_and_round(task, initial, grid):
    def payload(seed, server_round):
        strategy = AdditiveStrategy(download=Rounded(0.1), **ANY)
        config = ConfigRecord({"seed": seed})
        asked = strategy.configure_train(server_round, initial, config, grid)
        return next(iter(asked)).content["arrays"][PAYLOAD].data

    assert payload(1, 1) == payload(1, 1)
    assert payload(1, 1) != payload(2, 1) != payload(2, 2)


def test_draws_of_clients_are_of_seed_round_and_client(task, initial):
    """Clients that change the same by the same data draw their own."""

    class Line(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(50))

    data = {"c": torch.linspace(0, 1, 50)[None]}
    made = Task(
        lambda config: Line(),
        lambda context: (data, data),
        lambda model, batch: -(model.w * batch["c"]).sum(1),
    )
    start = to_record({"w": np.zeros(50, np.float32)})

    def payloads(seed, server_round):
        app = client_app(made, codecs=[Rounded])
        strategy = AdditiveStrategy(upload=Rounded(0.5), **ANY)
        grid = LocalGrid(app, 2, {"seed": seed})
        asked = strategy.configure_train(server_round, start, ConfigRecord(), grid)
        replies = grid.send_and_receive(asked)
        return [reply.content["arrays"][PAYLOAD].data for reply in replies]

    found = payloads(1, 1)
    assert found == payloads(1, 1)
    assert len({*found, *payloads(2, 1), *payloads(1, 2)}) == 6


def test_error_feedback_is_kept_over_a_resumed_run(task, initial, tmp_path):
    upload = ErrorFeedback(Chain(TopK(0.1), NF4()))
    whole = run(task, initial, upload=upload)
    app = client_app(task)
    for rounds in (1, 3):  # the second is another process as far as states go
        strategy = AdditiveStrategy(upload=upload, **ANY)
        grid = LocalGrid(app, 4, CONFIG)
        result = strategy.start(grid, initial, rounds, checkpoint=tmp_path)
    assert same(from_record(result.arrays), whole)
    assert not same(whole, run(task, initial, upload=upload.codec))


def test_with_feedback_all_that_clients_change_arrives_in_the_end(task, initial):
    """Changes that stop are sent in full, however little travels at a time."""
    sent = {"w": np.zeros(16, np.float32)}
    total = np.float32([3, -1, 4, 1, -5, 9, 2, -6, 5, 3, 5, -8, 9, 7, 9, 3])

    class Once(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(16))

    data = {"c": torch.from_numpy(total)[None]}
    made = Task(
        lambda config: Once(),
        lambda context: (data, data),
        # Its gradient does not depend on the model: it wants the same in every round.
        lambda model, batch: -(model.w * batch["c"]).sum(1),
    )
    moved = {}
    for feedback in (True, False):
        codec = TopK(1 / 8)
        strategy = AdditiveStrategy(
            upload=ErrorFeedback(codec) if feedback else codec, **ANY
        )
        grid = LocalGrid(client_app(made), 1, {"lr": 1.0})
        result = strategy.start(grid, to_record(sent), num_rounds=40)
        moved[feedback] = from_record(result.arrays)["w"]
    left = 40 * total - moved[True]
    assert np.abs(left).max() < 8 * np.abs(total).max()
    assert np.count_nonzero(moved[False]) == 2 and moved[True].all()


# With everything else ----------------------------------------------------------------


def test_a_decoded_change_is_clipped(task, initial):
    """A codec may make a change larger; the mechanism sees what it makes of it."""

    @dataclass(frozen=True)
    class Louder(Rounded):
        tag = b"lo"

        @classmethod
        def decode_values(cls, data, count, dtype):
            return 100 * super().decode_values(data, count, dtype)

    mechanism = Mechanism(
        num_rounds=1,
        num_sampled_clients=4,
        population_size=4,
        clipping=0.25,
        noise_multiplier=0.0,
        factorization="identity",
    )
    app = client_app(task, codecs=[Louder])
    strategy = AdditiveStrategy(
        mechanism=mechanism, upload=Louder(), fraction_evaluate=0.0
    )
    result = strategy.start(LocalGrid(app, 4, CONFIG), initial, num_rounds=1)
    first, last = from_record(initial), from_record(result.arrays)
    moved = [last[n].astype(np.float64) - x for n, x in first.items()]
    assert 0 < norm(moved) <= 0.25 + 1e-6


def test_kinds_of_clients_have_codecs_of_their_own(task, initial):
    class Halves(AdditiveStrategy):
        def variant(self, client, round):
            return client % 2

        def download_codec(self, variant, round):
            return BFloat16() if variant else None

        def upload_codec(self, variant, round):
            return Chain(TopK(0.5 if variant else 0.1), Exact() if variant else NF4())

    strategy = Halves(**ANY)
    grid = LocalGrid(client_app(task), 4, CONFIG)
    messages = list(strategy.configure_train(1, initial, ConfigRecord(), grid))
    assert [is_encoded(m.content["arrays"]) for m in messages] == 2 * [False, True]
    assert len({id(m.content) for m in messages}) == 2  # made once a kind
    replies = list(grid.send_and_receive(messages))
    counts = [num_values(r.content["arrays"]) for r in replies]
    assert counts[0] == counts[2] < counts[1] == counts[3]
    record, metrics = strategy.aggregate_train(1, replies)
    assert metrics["num-replies"] == 4


def test_codecs_for_some_kinds_only_are_refused(task, initial, grid):
    class Some(AdditiveStrategy):
        def variant(self, client, round):
            return client % 2

        def upload_codec(self, variant, round):
            return NF4() if variant else None

    with pytest.raises(ValueError, match="for all kinds, or none"):
        Some(**ANY).configure_train(1, initial, ConfigRecord(), grid)


def test_a_strategy_that_is_no_sum_reads_encoded_changes(task, initial):
    class Median(RoundStrategy):
        def aggregate(self, round, replies):
            deltas = [reply.delta(round) for reply in replies]
            return {
                name: np.median([d[name].numpy() for d in deltas], axis=0)
                for name in round.sent
            }

    results = []
    for codecs in ({}, {"download": TopK(1.0), "upload": Exact()}, {"upload": NF4()}):
        grid = LocalGrid(client_app(task), 3, CONFIG)
        strategy = Median(**ANY, **codecs)
        results.append(from_record(strategy.start(grid, initial, num_rounds=2).arrays))
    assert not same(results[0], results[2])


class FirstClient(ClientHalf):
    """Takes the first of two models."""

    name = "first"

    def receive(self, local, arrays):
        return of_first(arrays)


def of_first(arrays):
    return {n[2:]: x for n, x in arrays.items() if n.startswith("0/")}


class Two(AdditiveStrategy):
    client_half = FirstClient

    def contribution(self, reply, round):
        change = reply.change(round, start=of_first(round.sent)).arrays
        return Contribution({"delta": {f"0/{n}": x for n, x in change.items()}})


class TwoWithoutASum(RoundStrategy):
    client_half = FirstClient

    def aggregate(self, round, replies):
        start = of_first(round.sent)
        changes = [reply.change(round, start).arrays for reply in replies]
        direction = {name: np.zeros(x.shape) for name, x in round.sent.items()}
        for name in start:
            of_all = [change[name].numpy() for change in changes]
            direction[f"0/{name}"] = np.mean(of_all, axis=0)
        return direction


@pytest.mark.parametrize("make", [Two, TwoWithoutASum])
@pytest.mark.parametrize(
    "codecs",
    [
        {"upload": Exact()},
        {"download": Exact()},
        {"download": TopK(1), "upload": NF4()},
    ],
)
def test_one_of_several_models_is_encoded_both_ways(task, initial, make, codecs):
    """What came is not the client's own model, and what it sends not the server's."""
    first = from_record(initial)
    two = to_record({f"{i}/{n}": x for i in range(2) for n, x in first.items()})
    grid = LocalGrid(client_app(task, FirstClient), 3, CONFIG)
    found, plain = (
        from_record(make(**ANY, **x).start(grid, two, num_rounds=2).arrays)
        for x in (codecs, {})
    )
    for name, x in first.items():
        assert np.array_equal(found[f"1/{name}"], x)
        coarse = 0.1 if codecs.get("upload") == NF4() else 0
        np.testing.assert_allclose(
            found[f"0/{name}"], plain[f"0/{name}"], rtol=0, atol=coarse
        )
    assert not np.array_equal(found["0/out.weight"], first["out.weight"])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_reply_of_one_of_several_models_that_is_not_finite_is_left_out(
    aggregate, reply, bad
):
    sent = {"0/w": np.zeros(3, np.float32), "1/w": np.zeros(3, np.float32)}
    contents = [reply(), reply()]
    for content, x in zip(contents, (1, bad), strict=True):
        content["arrays"] = Exact().encode({"w": np.float32([1, 5, x])})
    for make in (Two, TwoWithoutASum):
        new, metrics = aggregate(make(upload=Exact(), **ANY), sent, contents)
        assert new["0/w"].tolist() == [1, 5, 1]
        assert metrics["num-dropped"] == 1


def test_masks_of_several_models_are_not_those_of_one(task, initial):
    first = from_record(initial)
    two = to_record({f"{i}/{n}": x for i in range(2) for n, x in first.items()})
    strategy = Two(
        download=TopK(0.5), upload=Chain(TopK(0.5, within_received=True), NF4()), **ANY
    )
    grid = LocalGrid(client_app(task, FirstClient), 2, CONFIG)
    result = strategy.start(grid, two, num_rounds=1)
    assert result.train_metrics_clientapp[1]["num-replies"] == 2


class WideClient(ClientHalf):
    """Has as many outputs as the server says."""

    name = "wide"

    def make_model(self, task, run_config, config):
        return nn.Linear(3, config["outputs"])


class Wide(AdditiveStrategy):
    """Sends fewer and fewer outputs."""

    client_half = WideClient

    def of(self, round):
        return {name: x[: 5 - round.number] for name, x in round.sent.items()}

    def payload(self, variant, round):
        return Payload(self.of(round), {"outputs": 5 - round.number})

    def contribution(self, reply, round):
        change = reply.change(round, start=self.of(round)).arrays
        padded = {
            n: np.concatenate(
                [c.numpy(), np.zeros_like(round.sent[n][5 - round.number :])]
            )
            for n, c in change.items()
        }
        return Contribution({"delta": padded})


def test_what_was_left_out_of_another_slice_is_forgotten(task):
    start = {
        name: x.detach().numpy() for name, x in nn.Linear(3, 4).state_dict().items()
    }
    strategy = Wide(
        upload=ErrorFeedback(TopK(0.5)), download=NF4(), fraction_evaluate=0.0, **ANY
    )
    grid = LocalGrid(client_app(task, WideClient), 2, CONFIG)
    result = strategy.start(grid, to_record(start), num_rounds=3)
    for number in (1, 2, 3):
        assert result.train_metrics_clientapp[number]["num-replies"] == 2


@pytest.mark.parametrize("codecs", [{}, {"download": NF4(), "upload": Exact()}])
def test_a_client_makes_the_slice_that_it_is_told_and_no_other_model(task, codecs):
    def full(run_config):
        raise AssertionError("a small client made the full model")

    start = {
        name: x.detach().numpy() for name, x in nn.Linear(3, 4).state_dict().items()
    }
    sliced = dataclasses.replace(task, model=full)
    grid = LocalGrid(client_app(sliced, WideClient), 2, CONFIG)
    result = Wide(**codecs, **ANY).start(grid, to_record(start), num_rounds=2)
    for number in (1, 2):
        assert result.train_metrics_clientapp[number]["num-replies"] == 2
        assert np.isfinite(result.evaluate_metrics_clientapp[number]["loss"])
    silo = DPSGD(SiloPrivacy(epsilon=1.0, delta=1e-5, num_rounds=2, clipping_norm=1.0))
    assert client_app(sliced, WideClient, trainer=silo)


def test_the_model_of_a_client_that_sends_its_change_is_not_read():
    record = Exact().encode({"w": np.float32([1, -1])})
    reply = Reply(RecordDict({"arrays": record}), 0)
    round = Round(1, {"w": np.float32([1, 2])}, upload=Uploads.of([Exact()]))
    with pytest.raises(MalformedReply, match=r"delta\(\) and change\(\) read it"):
        reply.model(round)


def test_what_travels_beside_the_model_travels_plainly(task, initial):
    class Beside(AdditiveStrategy):
        def payload(self, variant, round):
            return Payload(round.sent, beside={"more": {"x": np.ones(3)}})

    grid = LocalGrid(client_app(task), 2, CONFIG)
    strategy = Beside(download=NF4(), **ANY)
    message = next(iter(strategy.configure_train(1, initial, ConfigRecord(), grid)))
    assert is_encoded(message.content["arrays"])
    assert from_record(message.content["more"])["x"].tolist() == [1, 1, 1]


def test_evaluation_is_decoded_and_tells_no_upload(task, initial, grid):
    strategy = AdditiveStrategy(download=NF4(), upload=NF4(), **ANY)
    message = next(iter(strategy.configure_evaluate(1, initial, ConfigRecord(), grid)))
    assert is_encoded(message.content["arrays"])
    assert UPLOAD_KEY not in message.content["config"]
    [reply] = list(grid.send_and_receive([message]))
    assert np.isfinite(reply.content["metrics"]["loss"])


def test_schedules_are_told_by_round(task, initial, grid):
    strategy = AdditiveStrategy(upload=TopK(Decay(0.5, 0.5)), **ANY)
    for number, density in ((1, 0.5), (2, 0.25)):
        asked = strategy.configure_train(number, initial, ConfigRecord(), grid)
        told = next(iter(asked)).content["config"][UPLOAD_KEY]
        assert told == describe(TopK(density))


def test_a_client_that_started_elsewhere_is_read_from_there():
    sent = {"w": np.float32([1, 2, 3])}
    start = {"w": np.float32([5, 5])}
    record = Exact().encode({"w": np.float32([1, -1])})
    reply = Reply(RecordDict({"arrays": record}), 0)
    round = Round(1, sent, upload=Uploads.of([Exact()]))
    assert reply.change(round, start).arrays["w"].numpy().tolist() == [1, -1]
    plain = Reply(RecordDict({"arrays": to_record({"w": np.float32([6, 4])})}), 0)
    change = plain.change(Round(1, sent), start)
    assert change.arrays["w"].numpy().tolist() == [1, -1] and change.masks is None


class Tied(nn.Module):
    """One tensor under two names."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(2, 2, bias=False)
        self.b = nn.Linear(2, 2, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def two_names(scale):
    data = {"x": torch.ones(1, 2)}
    made = Task(
        lambda config: Tied(),
        lambda context: (data, data),
        lambda model, batch: model(batch["x"]).sum(1) * scale,
    )
    w = np.float32([[0.3, 0.7], [-0.2, 0.4]])
    sent = to_record({"a.weight": w, "b.weight": w})
    return LocalGrid(client_app(made, codecs=[Rounded]), 1, CONFIG), sent


def test_a_tensor_of_two_names_begins_as_it_is_loaded():
    """Draws cut copies apart on the way; the change is counted from the last one."""
    grid, sent = two_names(0.0)  # trains nothing
    strategy = AdditiveStrategy(download=Rounded(1.0), upload=Exact(), **ANY)
    messages = list(strategy.configure_train(1, sent, ConfigRecord(), grid))
    like = from_record(sent)
    down = decode(messages[0].content["arrays"], like, [Rounded]).arrays
    assert not np.array_equal(down["a.weight"], down["b.weight"])
    [reply] = list(grid.send_and_receive(messages))
    change = Exact().decode(reply.content["arrays"], change_like(like))
    assert not change["a.weight"].any()


def test_the_change_of_a_tensor_of_two_names_is_sent_once():
    grid, sent = two_names(1.0)
    strategy = AdditiveStrategy(upload=Exact(), **ANY)
    asked = strategy.configure_train(1, sent, ConfigRecord(), grid)
    [reply] = list(grid.send_and_receive(asked))
    like = change_like(from_record(sent))
    change = Exact().decode(reply.content["arrays"], like)
    assert change["a.weight"].all() and not change["b.weight"].any()


def test_what_is_sent_of_a_tensor_of_two_names_is_chosen_once():
    grid, sent = two_names(1.0)
    strategy = AdditiveStrategy(download=TopK(0.4), **ANY)
    strategy.start(grid, sent, num_rounds=1)  # the clients tell of their ties
    asked = strategy.configure_train(2, sent, ConfigRecord(), grid)
    record = next(iter(asked)).content["arrays"]
    masks = decode(record, from_record(sent)).masks
    assert masks["a.weight"].sum() == 1
    assert np.array_equal(masks["a.weight"], masks["b.weight"])


def test_an_upload_of_another_codec_is_refused():
    start = {"w": np.zeros(3, np.float32)}
    uploads = Uploads.of([TopK(0.5), Chain(TopK(0.5), NF4())])
    for codec in (Exact(), NF4(), Chain(TopK(0.5), TopK(0.5), NF4())):
        with pytest.raises(MalformedReply, match="was asked for"):
            uploads.decode(codec.encode(start), start)


def test_silos_of_dp_sgd_send_encoded(task):
    """Error feedback keeps what was trained privately: it is post-processing."""
    alone = {**ANY, "fraction_evaluate": 0.0}
    made = Task(lambda config: nn.Linear(3, 2), task.data, task.loss)
    start = to_record(
        {"weight": np.ones((2, 3), np.float32), "bias": np.zeros(2, "f4")}
    )
    privacy = SiloPrivacy(noise_multiplier=1.0, delta=1e-2, clipping_norm=1.0, seed=1)
    for strategy in (
        AdditiveStrategy(upload=ErrorFeedback(TopK(0.5)), download=NF4(), **ANY),
        AdditiveStrategy(upload=ErrorFeedback(TopK(0.5)), **alone),
        FLASC(client_freeze=True, error_feedback=True, download_density=0.5, **ANY),
    ):
        app = client_app(made, FLASCClient, trainer=DPSGD(privacy))
        result = strategy.start(LocalGrid(app, 2, CONFIG), start, num_rounds=3)
        for metrics in result.train_metrics_clientapp.values():
            assert (metrics["num-replies"], metrics["num-errors"]) == (2, 0)
            assert metrics["example-epsilon"] > 0
        assert not same(from_record(result.arrays), from_record(start))


# Apps with a loop of their own --------------------------------------------------------


def loop(*mods):
    """Return an app that adds 1 to all that it is sent."""
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message, context):
        arrays = {
            k: x.numpy() + 1
            for k, x in message.content["arrays"].to_torch_state_dict().items()
        }
        metrics = MetricRecord({"num-examples": 1})
        content = {"arrays": to_record(arrays), "metrics": metrics}
        return Message(RecordDict(content), reply_to=message)

    return app


def test_a_loop_with_the_mod_serves_any_strategy():
    start = {"w": np.float32([1, 2, 3, 4]), "v": np.float32([0.5])}
    strategy = AdditiveStrategy(
        download=Described(TopK(0.4)),
        upload=Chain(TopK(0.5), BFloat16()),
        fraction_evaluate=0.0,
        **ANY,
    )
    result = strategy.start(LocalGrid(loop(encoded()), 3), to_record(start), 1)
    found = from_record(result.arrays)
    # Ties of ones: the first two of five coordinates, in the order of the names sent.
    assert found["w"].tolist() == [2, 3, 3, 4] and found["v"].tolist() == [0.5]


def over_the_wire(message, context, call_next):
    """Make every content of the bytes that Flower sends."""
    message.content = recorddict_from_proto(recorddict_to_proto(message.content))
    reply = call_next(message, context)
    reply.content = recorddict_from_proto(recorddict_to_proto(reply.content))
    return reply


@pytest.mark.parametrize("mod", [encoded(), upload(Chain(TopK(0.5), Exact()))])
@pytest.mark.parametrize("packs", [False, True])
def test_an_app_of_flowers_own_sends_less_by_one_mod_and_one_argument(mod, packs):
    """Its functions know nothing of it; over messages it is the same to the bit."""
    start = {"w": np.float32([1, 2, 3, 4]), "v": np.float32([0.5, 0.0])}
    mods = [over_the_wire, packed, mod] if packs else [over_the_wire, mod]
    grid = LocalGrid(loop(*mods), 2 if packs else 3)
    if packs:
        grid = PackedGrid(grid, num_clients=3, transport="messages")
    strategy = AdditiveStrategy(upload=TopK(0.5), fraction_evaluate=0.0, **ANY)
    result = strategy.start(grid, to_record(start), num_rounds=2)
    assert result.train_metrics_clientapp[2]["num-replies"] == 3
    found = from_record(result.arrays)
    # Of equal changes the first three of the six travel.
    assert found["w"].tolist() == [3, 4, 5, 4] and found["v"].tolist() == [0.5, 0]


def test_each_client_sends_as_it_chose():
    start = {"w": np.float32([0, 0, 0, 0])}
    choices = (Exact(), TopK(0.5), Chain(TopK(0.25), NF4()), None)

    def choose(message, context, call_next):
        own = choices[context.node_config["partition-id"]]
        return (upload(own) if own else encoded())(message, context, call_next)

    strategy = AdditiveStrategy(
        upload=AnyOf(*filter(None, choices)), fraction_evaluate=0.0, **ANY
    )
    grid = LocalGrid(loop(choose), 4)
    messages = list(strategy.configure_train(1, to_record(start), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    assert [num_values(r.content["arrays"]) for r in replies] == [4, 2, 1, 4]
    found, metrics = strategy.aggregate_train(1, replies)
    assert metrics["num-replies"] == 4
    assert from_record(found)["w"].tolist() == [1, 0.75, 0.5, 0.5]


def test_what_the_server_did_not_name_is_not_decoded(reply, aggregate, caplog):
    """Though it is a codec that it knows."""
    caplog.set_level("WARNING", logger="flwr")
    sent = {"w": np.zeros(2, np.float32)}
    contents = [reply(), reply()]
    for content, codec in zip(contents, (NF4(), BFloat16()), strict=True):
        content["arrays"] = codec.encode({"w": np.float32([1, -1])})
    strategy = AdditiveStrategy(upload=AnyOf(Exact(), BFloat16()), **ANY)
    new, metrics = aggregate(strategy, sent, contents)
    assert (metrics["num-replies"], metrics["num-dropped"]) == (1, 1)
    assert new["w"].tolist() == [1, -1] and "was asked for" in caplog.text


@pytest.mark.parametrize("options", [(), (NF4,), (ErrorFeedback(NF4()),), (AnyOf,)])
def test_a_choice_is_among_codecs(options):
    with pytest.raises(ValueError, match="each bare or a Chain"):
        AnyOf(*options)


@pytest.mark.parametrize(
    ("codecs", "mods", "reason"),
    [
        ({"upload": NF4()}, [], r"not encoded.*ClientApp\(mods=\[encoded\(\)\]\)"),
        ({"download": NF4()}, [], r"ClientApp\(mods=\[encoded\(\)\]\)"),
        ({"download": NF4()}, [encoded()], r"download=Described\(codec\)"),
        ({"upload": Rounded()}, [encoded()], r"codecs=\[Rounded\]"),
        (
            {"upload": TopK(0.5, within_received=True)},
            [encoded()],
            "needs the client half",
        ),
    ],
)
def test_a_loop_that_cannot_is_told_so(codecs, mods, reason):
    strategy = AdditiveStrategy(fraction_evaluate=0.0, **codecs, **ANY)
    start = to_record({"w": np.float32([1, 2])})
    with pytest.raises(Exception, match=re.compile(reason, re.DOTALL)):
        strategy.start(LocalGrid(loop(*mods), 2), start, num_rounds=1)


def test_an_app_that_does_not_know_a_codec_says_how_to_name_it(task, initial):
    grid = LocalGrid(client_app(task), 2, CONFIG)
    for codecs in ({"upload": Rounded()}, {"download": Rounded()}):
        strategy = AdditiveStrategy(**codecs, **ANY)
        with pytest.raises(EveryClientFailed, match=r"client_app\(task, ..., codecs="):
            strategy.start(grid, initial, num_rounds=1)
    with pytest.raises(ValueError, match="codecs="):
        client_app(task, codecs=[Rounded()])


# Options ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"upload": NF4}, "upload="),
        ({"download": "nf4"}, "download="),
        ({"upload": FixedMask({})}, "a message must be able to name it"),
    ],
)
def test_options_that_are_no_codecs(options, match):
    with pytest.raises(ValueError, match=match):
        AdditiveStrategy(**options)


@pytest.mark.parametrize("name", ["download", "upload"])
def test_flasc_has_its_own(name):
    with pytest.raises(ValueError, match="left out: FLASC has its own"):
        FLASC(**{name: NF4()})


def test_settings_are_shown(caplog):
    caplog.set_level("INFO", logger="flwr")
    AdditiveStrategy(upload=Chain(TopK(0.5), NF4())).summary()
    assert "Upload: Chain(links=(TopK(density=0.5" in caplog.text
    assert "Download" not in caplog.text


@pytest.mark.parametrize(
    "spoil",
    [
        lambda record: to_record({"w": np.zeros(3, np.float32)}),
        lambda record: NF4().encode({"w": np.zeros(3, np.float32)}),
        lambda record: TopK(0.5).encode({"v": np.zeros(3, np.float32)}),
        lambda record: ArrayRecord({PAYLOAD: record[PAYLOAD], "w": record[PAYLOAD]}),
        lambda record: TopK(1.0).encode({"w": np.float32([np.nan, 1, 2])}),
        lambda record: ArrayRecord(),
    ],
)
@pytest.mark.parametrize("kind", ["sum", "no sum"])
def test_a_reply_that_is_wrong_is_left_out(aggregate, reply, spoil, kind):
    class Mean(RoundStrategy):
        def aggregate(self, round, replies):
            deltas = [reply.delta(round)["w"].numpy() for reply in replies]
            return {"w": np.mean(deltas, axis=0, dtype=np.float64)}

    make = AdditiveStrategy if kind == "sum" else Mean
    sent = {"w": np.zeros(3, np.float32)}
    good, bad = reply(), reply()
    good["arrays"] = TopK(0.5).encode({"w": np.float32([1, 5, 2])})
    bad["arrays"] = spoil(good["arrays"])
    strategy = make(upload=TopK(0.9), **ANY)
    new, metrics = aggregate(strategy, sent, [good, bad, good])
    assert new["w"].tolist() == [0, 5, 0]
    assert metrics["num-dropped"] == 1
